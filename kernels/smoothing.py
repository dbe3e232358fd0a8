"""What SLA2 derives from the keys and the block map before the kernels: the keys' mean, and where alpha applies.

NOTE [Keys without their mean]
SLA2 (arXiv 2602.12675) takes the keys less their mean over the tokens that take part. Softmax over keys and the ranks
of the pooled scores do not see the mean, the feature map does, so only the linear branch subtracts it. Its gradient
is that of the smoothed keys less their own mean: ``dK - mean_tokens(dK)``. The sparse branch's share of dK sums to
zero over the tokens, so subtracting the mean of the whole is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla_compile.kernels.spec import num_blocks


def token_mean(tokens: Tensor, key_bias: Tensor | None) -> Tensor:
    """Mean over the tokens that take part, (B, H, D) in float32 (float64 for float64 tokens); 0 where none does.

    Args:
        tokens: (B, H, L, D), any strides.
        key_bias: (B, L), -inf where a token takes no part, or None where all do.
    """
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if key_bias is None:
        return tokens.sum(2, dtype=dtype) / tokens.shape[2]
    valid = key_bias > -torch.inf
    count = valid.sum(-1).clamp(min=1)[:, None, None]
    return tokens.masked_fill(~valid[:, None, :, None], 0).sum(2, dtype=dtype) / count


def without_mean(grad_key: Tensor, key_bias: Tensor | None) -> Tensor:
    """The key's gradient from that of the smoothed key, see NOTE [Keys without their mean]; (B, H, L, D), same strides.

    A key that takes no part has no share in the mean.
    """
    mean = token_mean(grad_key, key_bias)[:, :, None]
    if key_bias is not None:
        mean = mean * (key_bias > -torch.inf)[:, None, :, None]
    return grad_key.sub_(mean)


def has_complement(block_map: Tensor, key_bias: Tensor | None, block_k: int) -> Tensor:
    """Boolean (B, H, T_m): the row has a marginal block with a key that takes part.

    Where it has none the sparse branch is exact attention over all there is, and alpha counts as 1.
    """
    marginal = block_map == 0
    if key_bias is not None:
        batch, length = key_bias.shape
        blocks = num_blocks(length, block_k)
        valid = torch.zeros(batch, blocks * block_k, dtype=torch.bool, device=key_bias.device)
        valid[:, :length] = key_bias > -torch.inf
        marginal = marginal & valid.view(batch, 1, 1, blocks, block_k).any(-1)
    return marginal.any(-1)
