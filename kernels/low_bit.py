"""The quantisation before a low-bit forward, of keys and values, and inside it, of a query block; see quantize.py."""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.tiles import aligned, load_mean, load_tile, store_tile

# As in quantize.py.
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
MIN_PEAK = tl.constexpr(2.0**-100)
# Adding and subtracting this rounds a float32 below 2^22 to an integer, half to even.
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def block_scale(peak):
    """Scale of a block with these largest magnitudes; NaN stays NaN."""
    return tl.div_rn(tl.maximum(peak, MIN_PEAK, propagate_nan=tl.PropagateNan.ALL), INT8_MAX)


@triton.jit
def largest(tile):
    """Largest magnitude of a tile's elements, or NaN if there is one: a reduction passes over it."""
    return tl.where(tl.max((tile != tile).to(tl.int32)) > 0, float("nan"), tl.max(tl.abs(tile)))


@triton.jit
def to_int8(tile, scale):
    """The tile over the scale as int8, half to even; 0 where that is not a number."""
    quotient = tl.div_rn(tile, tl.broadcast_to(scale, tile.shape))
    rounded = (quotient + ROUNDER) - ROUNDER
    return tl.where(quotient == quotient, rounded, 0.0).to(tl.int8)


@triton.jit
def quantize_query(
    query_ptr,
    block_start,
    first,
    length,
    stride_token,
    stride_dim,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    WIDE: tl.constexpr,
):
    """int8 (TILE_Q, DIMS) of the tokens from `first`, and the scale of the whole block that they are part of."""
    peak = 0.0
    for start in tl.static_range(0, BLOCK_Q, TILE_Q):
        tile = load_tile(
            query_ptr, block_start + start, length, stride_token, 0, stride_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)
        peak = tl.maximum(peak, largest(tile), propagate_nan=tl.PropagateNan.ALL)
    tile = load_tile(query_ptr, first, length, stride_token, 0, stride_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE)
    scale = block_scale(peak)
    return to_int8(tile.to(tl.float32), scale), scale


@triton.jit(do_not_specialize=["head_start", "heads", "length", "key_blocks"])
def quantize_kernel(
    key_ptr,
    value_ptr,
    key_bias_ptr,
    key_mean_ptr,
    value_scales_ptr,
    low_key_ptr,
    key_scales_ptr,
    low_value_ptr,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_bias_batch,
    stride_bias_token,
    stride_mean_batch,
    stride_mean_head,
    stride_mean_dim,
    head_start,
    heads,
    length,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of keys and values of one key-value head in few bits.

    Keys become int8 (BLOCK_K, DIMS) with one scale; values, for low_value_ptr, E4M3 (DIMS, BLOCK_K): the product with P
    reads both operands along the tokens. Either is zero past the sequence's end and HEAD_DIM.
    """
    block = tl.program_id(0) % key_blocks
    local = tl.program_id(0) // key_blocks
    start = block * BLOCK_K
    batch = ((head_start + local) // heads).to(tl.int64)
    head = ((head_start + local) % heads).to(tl.int64)
    stride_key_token = aligned(stride_key_token, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + head * stride_key_head, ALIGN)
    line = local.to(tl.int64) * key_blocks + block

    tokens = start + tl.arange(0, BLOCK_K)
    takes_part = tokens < length
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
        bias = tl.load(key_bias_ptr + tokens.to(tl.int64) * stride_bias_token, mask=takes_part, other=0.0)
        takes_part &= bias != float("-inf")
    key = load_tile(
        key_ptr, start, length, stride_key_token, 0, stride_key_dim, BLOCK_K, DIMS, HEAD_DIM, True, WIDE
    ).to(tl.float32)  # (BLOCK_K, DIMS)
    key_mean_ptr += batch * stride_mean_batch + head * stride_mean_head
    key -= load_mean(key_mean_ptr, stride_mean_dim, DIMS, HEAD_DIM)[None, :]
    key = tl.where(takes_part[:, None], key, 0.0)
    scale = block_scale(largest(key))
    tl.store(key_scales_ptr + line, scale)
    low_key_ptr += line * BLOCK_K * DIMS
    store_tile(low_key_ptr, to_int8(key, scale), 0, BLOCK_K, DIMS, 0, 1, BLOCK_K, DIMS, DIMS, False)

    if low_value_ptr is not None:
        stride_value_token = aligned(stride_value_token, ALIGN)
        value_ptr += aligned(batch * stride_value_batch + head * stride_value_head, ALIGN)
        value = load_tile(
            value_ptr, start, length, stride_value_token, 0, stride_value_dim, BLOCK_K, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (BLOCK_K, DIMS)
        dims = tl.arange(0, DIMS)
        scales_ptr = value_scales_ptr + (head_start + local).to(tl.int64) * HEAD_DIM
        scales = tl.load(scales_ptr + dims, mask=dims < HEAD_DIM, other=1.0)
        value = tl.div_rn(tl.where(takes_part[:, None], value, 0.0), tl.broadcast_to(scales[None, :], value.shape))
        low_value = tl.trans(value.to(tl.float8e4nv))  # (DIMS, BLOCK_K)
        low_value_ptr += line * BLOCK_K * DIMS
        store_tile(low_value_ptr, low_value, 0, DIMS, BLOCK_K, 0, 1, DIMS, BLOCK_K, BLOCK_K, False)
