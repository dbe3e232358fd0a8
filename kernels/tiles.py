"""What the kernels share: tiles of tokens, and the feature map of the linear branch."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """The offset, which the launcher found to be a multiple of ALIGN: the compiler learns it from this and vectorises.

    It is told of multiples of 16 by itself, but a head dimension of 72 makes strides that are multiples of 8.
    """
    return offset // ALIGN * ALIGN


@triton.jit
def tile_offsets(stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets (ROWS, COLS) inside a tile; 32 bits wide unless the launcher found that they may not hold them."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    return rows[:, None] * stride_row + cols[None, :] * stride_col


@triton.jit
def tile_mask(
    row,
    end_row,
    col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    END_COL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Which elements of a tile exist, or None where all do; columns come in steps of COLS below END_COL."""
    if MASK_ROWS and END_COL % COLS != 0:
        mask = ((row + tl.arange(0, ROWS)) < end_row)[:, None] & ((col + tl.arange(0, COLS)) < END_COL)[None, :]
    elif MASK_ROWS:
        mask = ((row + tl.arange(0, ROWS)) < end_row)[:, None]
    elif END_COL % COLS != 0:
        mask = ((col + tl.arange(0, COLS)) < END_COL)[None, :]
    else:
        mask = None
    return mask


@triton.jit
def load_tile(
    ptr,
    row,
    end_row,
    stride_row,
    col,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    END_COL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows from `row` and columns from `col` of a matrix; zero past `end_row` (if MASK_ROWS) and END_COL."""
    ptr += tl.cast(row, tl.int64) * stride_row + tl.cast(col, tl.int64) * stride_col
    offsets = tile_offsets(stride_row, stride_col, ROWS, COLS, WIDE)
    mask = tile_mask(row, end_row, col, ROWS, COLS, END_COL, MASK_ROWS)
    return tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr,
    tile,
    row,
    end_row,
    stride_row,
    col,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    END_COL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The inverse of load_tile, in the destination's dtype; nothing is written past `end_row` and END_COL."""
    ptr += tl.cast(row, tl.int64) * stride_row + tl.cast(col, tl.int64) * stride_col
    offsets = tile_offsets(stride_row, stride_col, ROWS, COLS, WIDE)
    mask = tile_mask(row, end_row, col, ROWS, COLS, END_COL, True)
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_mean(ptr, stride, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head's mean key (DIMS,), zero past HEAD_DIM."""
    dims = tl.arange(0, DIMS)
    return tl.load(ptr + dims * stride, mask=dims < HEAD_DIM, other=0.0)


@triton.jit
def feature_statistics(tokens, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """Per token (maximum, 1 / sum of exponentials), so that softmax over HEAD_DIM can be taken slice by slice.

    tokens: (TOKENS, DIMS) float32, DIMS >= HEAD_DIM.
    """
    if FEATURE_MAP == "softmax":
        if HEAD_DIM < DIMS:
            tokens = tl.where((tl.arange(0, DIMS) < HEAD_DIM)[None, :], tokens, float("-inf"))
        maximum = tl.max(tokens, 1)
        normaliser = 1.0 / tl.sum(tl.exp2((tokens - maximum[:, None]) * LOG2_E), 1)
    else:
        maximum = tl.zeros([tokens.shape[0]], tl.float32)
        normaliser = maximum
    return maximum, normaliser


@triton.jit
def feature(tokens, maximum, normaliser, col, COLS: tl.constexpr, HEAD_DIM: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """phi of columns `col` .. `col + COLS` of the tokens, float32; zero past HEAD_DIM."""
    if FEATURE_MAP == "softmax":
        phi = tl.exp2((tokens - maximum[:, None]) * LOG2_E) * normaliser[:, None]
    elif FEATURE_MAP == "elu":
        phi = tl.where(tokens > 0, tokens + 1, tl.exp2(tokens * LOG2_E))
    else:
        phi = tl.maximum(tokens, 0.0)
    if HEAD_DIM % COLS != 0:
        phi = tl.where((col + tl.arange(0, COLS) < HEAD_DIM)[None, :], phi, 0.0)
    return phi


@triton.jit
def feature_gradient(tokens, phi, grad_phi, FEATURE_MAP: tl.constexpr):
    """Gradient to the tokens from that to phi(tokens), through phi's chain rule; all (TOKENS, DIMS) float32."""
    if FEATURE_MAP == "softmax":
        grad = phi * (grad_phi - tl.sum(grad_phi * phi, 1)[:, None])
    elif FEATURE_MAP == "elu":
        grad = grad_phi * tl.minimum(phi, 1.0)
    else:
        grad = tl.where(tokens > 0, grad_phi, 0.0)
    return grad


@triton.jit
def key_weights(key_bias_ptr, stride, start, length, TOKENS: tl.constexpr):
    """Weight (TOKENS,) float32 of the keys in the linear branch: exp(bias), and zero past the end of the sequence."""
    tokens = start + tl.arange(0, TOKENS)
    exists = tokens < length
    if key_bias_ptr is None:
        weights = tl.where(exists, 1.0, 0.0)
    else:
        bias = tl.load(key_bias_ptr + tokens.to(tl.int64) * stride, mask=exists, other=float("-inf"))
        weights = tl.exp2(bias * LOG2_E)
    return weights
