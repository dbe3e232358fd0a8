"""The oracle of a low-bit forward: quantize.py's operands, then the dense formula, and straight-through gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

PRODUCT_TERMS = 32  # of one instruction on E4M3
SUM_BITS = 14


def rows(per_block: Tensor, block: int, length: int) -> Tensor:
    """(B, H, T) for each block to (B, H, L, 1) for each token."""
    return per_block.repeat_interleave(block, 2)[:, :, :length, None]


def e4m3_product(left: Tensor, right: Tensor, terms_per_sum: int) -> Tensor:
    """(..., M, K) @ (..., K, N) of E4M3 numbers, added up as sm_90's tensor cores do.

    An instruction shifts its terms, the sum so far among them, to the largest one's exponent and drops all but 14 bits;
    after `terms_per_sum` terms a sum is added in float32.
    """
    total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float32)
    for start in range(0, left.shape[-1], terms_per_sum):
        part = torch.zeros_like(total)
        for first in range(start, min(start + terms_per_sum, left.shape[-1]), PRODUCT_TERMS):
            some = slice(first, first + PRODUCT_TERMS)
            products = left[..., :, None, some] * right[..., some, :].transpose(-1, -2)[..., None, :, :]
            terms = torch.cat([products.float(), part[..., None]], -1)
            exponent = terms.abs().amax(-1, keepdim=True).frexp().exponent
            unit = torch.ones(()).ldexp(exponent - SUM_BITS)
            part = ((terms / unit).trunc() * unit).sum(-1)
        total += part
    return total


def sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    classes: Tensor,
    spec: Any,
    bias: Tensor | None,
    mean: Tensor,
    dtype: Any,
    *,
    tensor_cores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """O_s and log-sum-exp of quantised operands, and by how much roundings of P that are all but ties may move O_s.

    query, key and value as given, H heads each; mean (B, H, D). dtype: float64 for the oracle; float16, bfloat16 or
    float32 for what a kernel does, which keeps P, where it is not E4M3, and the output in that. tensor_cores: E4M3
    products are added up as they do it.
    """
    from sla_compile.kernels import quantize

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    length = query.shape[2]
    low_query, query_scales = quantize.quantize_blocks(query, spec.block_q)
    low_key, key_scales = quantize.quantize_blocks(key, spec.block_k, mean=mean, key_bias=bias)
    scores = low_query.to(wide) @ low_key.to(wide).transpose(-1, -2)
    scores = scores * rows(query_scales.to(wide) * spec.scale, spec.block_q, length)
    scores = scores * rows(key_scales.to(wide), spec.block_k, length).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(wide)[:, None, None]
    tokens = classes.repeat_interleave(spec.block_q, 2)[:, :, :length]
    tokens = tokens.repeat_interleave(spec.block_k, 3)[..., :length]
    scores = scores.masked_fill(tokens != 1, -torch.inf) / math.log(2)
    maximum = scores.amax(-1, keepdim=True)
    reference = (maximum.ceil() if spec.low_bit == "fp8" else maximum).masked_fill(maximum == -torch.inf, 0)
    exponents = scores - reference
    total = exponents.exp2().sum(-1, keepdim=True)
    inverse = 1 / total.where(total > 0, 1)
    slack = torch.zeros((), dtype=wide)
    if spec.low_bit == "int8":
        output = exponents.exp2().to(dtype).to(wide) @ value.to(wide) * inverse
    else:
        low_value, value_scales = quantize.quantize_channels(value, key_bias=bias)
        dequantised = low_value.to(wide) * value_scales[:, :, None].to(wide)
        low_probabilities = quantize.quantize_probabilities(exponents)
        if not tensor_cores:
            output = low_probabilities.to(wide) @ dequantised * (inverse / quantize.FP8_MAX)
        else:
            product = e4m3_product(low_probabilities.float(), low_value.float(), spec.block_k)
            output = product * value_scales[:, :, None].float() * (inverse / quantize.FP8_MAX)
        # A float32 score is off by some units in the last place, and P by that share.
        share = (
            8 * 2.0**-24 * max(1.0, scores[scores.isfinite()].abs().max().item() if scores.isfinite().any() else 1.0)
        )
        near = [quantize.quantize_probabilities((exponents + sign * share).clamp(max=0)).to(wide) for sign in (-1, 1)]
        moved = near[1] - near[0]
        denormal = (exponents < math.log2(2.0**-6 / quantize.FP8_MAX)) & (exponents > -torch.inf)
        moved = moved + denormal * 2.0**-9
        slack = moved @ dequantised.abs() * (inverse / quantize.FP8_MAX)
    logsumexp = (reference + total.log2()).squeeze(-1) * math.log(2)
    logsumexp = logsumexp + spec.scale * (query.to(wide) * mean[:, :, None].to(wide)).sum(-1)
    return output, logsumexp, slack


def low_bit_evaluate(
    inputs: list[Tensor | None],
    grad: Tensor,
    classes: Tensor,
    spec: Any,
    bias: Tensor | None,
    mean: Tensor | None,
    smoothing: Tensor,
    dtype: torch.dtype,
    *,
    tensor_cores: bool = False,
) -> tuple[list[Any], Tensor]:
    """As kernel_cases.evaluate, with a low-bit forward and its backward in `dtype`; and sparse_forward's slack.

    The sparse branch's gradients are the 16-bit formula's on the original operands, with the quantised forward's O_s
    and log-sum-exp: dS = P (dP - rowsum(dO O_s)), P = exp(S - logsumexp); dQ is by the smoothed keys.
    """
    from sla_compile.kernels.reference import reference_attention

    query, key, value, weight, proj_bias, alpha = inputs
    kv_heads, length = key.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    repeated = [tensor.repeat_interleave(group, 1) for tensor in (key, value, smoothing)]
    sparse, logsumexp, slack = sparse_forward(
        query, *repeated[:2], classes, spec, bias, repeated[2], dtype, tensor_cores=tensor_cores
    )

    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in (query, key, value, weight, proj_bias)
    ]
    shares = torch.ones((), dtype=dtype) if alpha is None else rows(alpha, spec.block_q, length).to(sparse.dtype)
    linear, grads = None, [torch.zeros_like(leaf) if index < 3 else None for index, leaf in enumerate(leaves)]
    if spec.linear != "none":
        shifted = leaves[1] if mean is None else leaves[1] - mean.to(dtype)[:, :, None]
        projection = leaves[3] if alpha is None else torch.eye(query.shape[3], dtype=dtype)
        linear, _ = reference_attention(
            leaves[0], shifted, leaves[2], classes.where(classes != 1, -1), replace(spec, low_bit="none"),
            proj_weight=projection, proj_bias=leaves[4], key_bias=bias,
        )  # fmt: skip
        used = [leaf for leaf in leaves if leaf is not None]
        of_linear = grad if alpha is None else (1 - shares) * grad
        found = iter(torch.autograd.grad(linear, used, of_linear.to(dtype)))
        grads = [None if leaf is None else next(found) for leaf in leaves]
        linear = linear.detach()
    output = shares * sparse
    if linear is not None:
        output = output + (linear if alpha is None else (1 - shares) * linear)

    low_query, low_key, low_value = (t.to(dtype) for t in (query, *repeated[:2]))
    grad_sparse = (shares * grad).to(dtype)
    scores = spec.scale * low_query @ low_key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, None]
    tokens = classes.repeat_interleave(spec.block_q, 2)[:, :, :length]
    tokens = tokens.repeat_interleave(spec.block_k, 3)[..., :length]
    empty = logsumexp == -torch.inf
    probabilities = (scores - logsumexp.masked_fill(empty, 0)[..., None].to(scores.dtype)).exp()
    probabilities = probabilities.masked_fill((tokens != 1) | empty[..., None], 0).to(dtype)
    delta = (grad_sparse * sparse.to(dtype)).sum(-1, keepdim=True)
    grad_scores = spec.scale * probabilities * (grad_sparse @ low_value.transpose(-1, -2) - delta)
    folded = lambda tensor: tensor.unflatten(1, (kv_heads, group)).sum(2)  # noqa: E731
    # The keys' gradient is the same with the mean, whose coefficients are dS's row sums, off by what the forward was.
    grads[0] = grads[0] + grad_scores @ low_key - grad_scores.sum(-1, keepdim=True) * repeated[2][:, :, None].to(dtype)
    grads[1] = grads[1] + folded(grad_scores.transpose(-1, -2) @ low_query)
    grads[2] = grads[2] + folded(probabilities.transpose(-1, -2) @ grad_sparse)
    grad_alpha = None
    if alpha is not None:
        per_row = (grad.to(sparse.dtype) * (sparse - linear)).sum(-1)
        grad_alpha = torch.stack([part.sum(-1) for part in per_row.split(spec.block_q, -1)], -1)
    return [output.to(dtype), logsumexp, *grads, grad_alpha], (shares * slack).expand(output.shape)
