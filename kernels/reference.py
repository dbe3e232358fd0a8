"""The oracle: the paper's equations in order, dense and differentiable, in whatever precision the inputs have.

Quadratic in memory. Tests run it in float64; nothing else calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec


def feature(tokens: Tensor, feature_map: str) -> Tensor:
    """The feature map phi, per token over the head dimension."""
    if feature_map == "softmax":
        return tokens.softmax(-1)
    return F.elu(tokens) + 1 if feature_map == "elu" else F.relu(tokens)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse-linear attention over a given block map: SLA's ``O_s + O_l W^T + b`` (arXiv 2509.24006, equations 4 to 6),
    or with `alpha` SLA2's ``alpha O_s + (1 - alpha) O_l`` (arXiv 2602.12675).

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, L, D), H a multiple of H_kv.
        block_map: (B, H, T_m, T_n) in {1, 0, -1}.
        proj_weight: (D, D), proj_bias: (D): the projection of SLA's linear branch.
        key_bias: (B, L), added to the scores of a key; its exponential weighs the key in the linear branch.
        alpha: (B, H, T_m), 1 where a row has no marginal block with a key that takes part.
        key_mean: (B, H_kv, D), subtracted from the keys before the feature map.

    Returns:
        output (B, H, L, D) and the log-sum-exp of the sparse branch's scaled scores (B, H, L); a row that no key
        takes part in is zero, with log-sum-exp -inf.
    """
    heads, length = query.shape[1], query.shape[2]
    smooth = key if key_mean is None else key - key_mean[:, :, None]
    smooth = smooth.repeat_interleave(heads // key.shape[1], 1)
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    tokens = block_map.repeat_interleave(spec.block_q, 2)[:, :, :length]
    tokens = tokens.repeat_interleave(spec.block_k, 3)[..., :length]
    bias = query.new_zeros(()) if key_bias is None else key_bias.to(query.dtype)[:, None, None, :]

    scores = spec.scale * query @ key.transpose(-1, -2) + bias
    scores = scores.masked_fill(tokens != 1, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    output = probabilities @ value
    if spec.linear == "none":
        return output, logsumexp

    selected = torch.ones_like(tokens) if spec.linear == "all" else tokens == 0
    weights = feature(query, spec.feature_map) @ feature(smooth, spec.feature_map).transpose(-1, -2)
    weights = weights * selected * bias.exp()
    denominator = weights.sum(-1, keepdim=True) + spec.epsilon
    defined = denominator > MIN_DENOMINATOR
    linear = (weights @ value) / denominator.where(defined, 1) * defined
    if alpha is not None:
        share = alpha.repeat_interleave(spec.block_q, 2)[:, :, :length, None]
        return share * output + (1 - share) * linear, logsumexp
    if proj_weight is None:
        raise ValueError(f'linear="{spec.linear}" needs proj_weight or alpha')
    return output + F.linear(linear, proj_weight, proj_bias), logsumexp
