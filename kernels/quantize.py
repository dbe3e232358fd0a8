"""Low-bit operands of the sparse branch's forward, defined in PyTorch: what the Triton kernels compute, bit for bit.

SLA2 (arXiv 2602.12675) with the scales of SageAttention: keys are smoothed, K' = K - mean of the tokens, which changes
no softmax but takes the channels' common offset out of their scale. Then, with s the softmax scale,

    int8: S' = s a_q a_k Q_8 K'_8^T, one scale a = max|x| / 127 for each block of tokens; P and V in 16 bit
    fp8:  and P V = (a_v / 448) P_8 V_8 in E4M3, P_8 from 448 P, V_8 from V / a_v, a_v = max|v| / 448 for each channel

V stays in 16 bit with int8: P in int8 would want a scale of its own for every row of a block. P_8 is rounded relative
to a power of two, NOTE [Reference], so that it is the same whatever the order of the keys and the size of the tiles.

NOTE [Reference]: P_8 is E4M3 of 448 P, P being 2^(x - ceil(m)) of a score x in units of ln 2 in a row whose largest is
m. An online softmax moves its reference, here by whole powers of two, and those change no rounding of a floating-point
number. (Below 448 P = 2^-6 E4M3 is denormal: there the reference of the moment decides, by at most 2^-10 / 448 of P.)

NOTE [Frame]: the kernels give the log-sum-exp of S, not of S' = S - s q mean: they add s q mean, in float32 from the
original q. So a log-sum-exp means the same whatever the number of bits, and the backward recomputes P from the original
q and k as it always does. P has no need of smoothing: products of 16-bit numbers are exact, sums float32, and the error
of S about 2^-24 of sum |q k|, a share of P that is far below its own rounding to 16 bit. dQ = s dS K' has: with the
quantised forward's O_s and log-sum-exp the rows of dS do not sum to zero, so that dS K = dS K' + rowsum(dS) mean is off
by as much as the keys are away from zero. The backward takes the last term away.

The backward's P is exp(S - logsumexp) with the quantised forward's log-sum-exp: it is off by exp(S - S'), and above 1
where a large score was rounded down. Where scores are so large that int8 misses them by 11, P passes what float16
holds: no model whose 8-bit forward means anything has such scores, and bfloat16 stays finite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOW_BIT = ("none", "int8", "fp8")
INT8_MAX = 127.0
# Largest E4M3 number.
FP8_MAX = 448.0
# A block or channel whose largest magnitude is less is scaled as if it were this: no scale is zero or denormal.
MIN_PEAK = 2.0**-100


def without_masked(tokens: Tensor, key_bias: Tensor | None) -> Tensor:
    """The tokens (B, H, L, D), zero where they do not take part: nothing that is masked out moves a scale."""
    return tokens if key_bias is None else tokens.masked_fill((key_bias == -torch.inf)[:, None, :, None], 0)


def quantize_blocks(
    tokens: Tensor, block: int, *, mean: Tensor | None = None, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int8 with one scale for each block of tokens.

    Args:
        tokens: (B, H, L, D), floating.
        block: tokens of a block; the last may be ragged.
        mean: (B, H, D), subtracted first.
        key_bias: (B, L); a token at minus infinity counts as zero.

    Returns:
        int8 (B, H, L, D), and the scales (B, H, T): float32, or float64 of float64. A NaN makes its block's scale NaN.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if mean is not None:
        tokens = tokens - mean[:, :, None]
    tokens = without_masked(tokens, key_bias)
    length = tokens.shape[2]
    blocks = F.pad(tokens, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax((3, 4)).clamp(min=MIN_PEAK) / INT8_MAX
    # Half to even, and no NaN becomes an integer: that is undefined.
    integers = (blocks / scales[..., None, None]).nan_to_num(0).round()
    return integers.flatten(2, 3)[:, :, :length].to(torch.int8), scales


def channel_scales(value: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """Scale (B, H, D) of each channel of V (B, H, L, D) in E4M3: float32, or float64 of float64."""
    value = without_masked(value, key_bias)
    peak = torch.linalg.vector_norm(value, torch.inf, dim=2)
    peak = peak.to(torch.promote_types(value.dtype, torch.float32)).clamp(min=MIN_PEAK)
    # By a tensor: by a number a GPU multiplies with its inverse, and what is halfway between two E4M3 numbers, as one
    # 16-bit value in some thousands is, would be rounded to the other one.
    return peak / peak.new_full((), FP8_MAX)


def quantize_channels(value: Tensor, *, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """V (B, H, L, D) as E4M3, and one scale for each channel (B, H, D)."""
    scales = channel_scales(value, key_bias)
    return (without_masked(value, key_bias) / scales[:, :, None]).to(torch.float8_e4m3fn), scales


def quantize_probabilities(exponents: Tensor) -> Tensor:
    """448 P in E4M3, NOTE [Reference].

    exponents: scores in units of ln 2 minus the row's ceil(max), so at most 0.
    """
    return (FP8_MAX * exponents.exp2()).to(torch.float8_e4m3fn)
