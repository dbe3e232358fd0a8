"""The linear branch's states: what a block of keys contributes, and the sums of contributions over marginal blocks.

NOTE [State]: a state is a (D + 1, D) matrix, h above z, flat, so that summing h and z over blocks is one matrix
product. Its size is rounded up to 16 elements, which keeps every state aligned. The projection is folded in:

    h_j = phi(K_j)^T diag(w) V_j W^T        z_j = phi(K_j)^T w        w: weights of the keys, exp(key bias)

so O_l W^T = phi(Q) H / (phi(Q) Z) is one product less for each query block, in the forward and in the backward. SLA2
has no projection, W is the identity, and it subtracts the keys' mean before phi.

NOTE [Precision of states]: for bfloat16 inputs the states, their sums and their gradients are bfloat16, and so are the
operands of the products that make and use them. They are the largest tensors of a call: it moves half the bytes, and
multiplies at twice tf32's rate. Each is rounded as P is in the sparse branch; all sums are taken in float32. For
float16 they are float32, because sums over a sequence can pass 65504. The kernels take the type from the pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.tiles import (
    aligned,
    feature,
    feature_statistics,
    key_weights,
    load_mean,
    load_tile,
    store_tile,
)


def state_size(head_dim: int) -> int:
    """Elements of a state, see NOTE [State]."""
    return -(-(head_dim + 1) * head_dim // 16) * 16


@triton.jit(do_not_specialize=["head_start", "heads", "length", "slots", "slot_tokens"])
def summaries_kernel(
    key_ptr,
    value_ptr,
    weight_ptr,
    key_bias_ptr,
    key_mean_ptr,
    states_ptr,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_weight_out,
    stride_weight_in,
    stride_bias_batch,
    stride_bias_token,
    stride_mean_batch,
    stride_mean_head,
    stride_mean_dim,
    head_start,
    heads,
    length,
    slots,
    slot_tokens,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    DIMS: tl.constexpr,
    SLICE: tl.constexpr,
    TILE_K: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Columns of the state of `slot_tokens` consecutive keys of one key-value head."""
    slices: tl.constexpr = (HEAD_DIM + SLICE - 1) // SLICE
    col = (tl.program_id(0) % slices) * SLICE
    slot = (tl.program_id(0) // slices) % slots
    local = tl.program_id(0) // slices // slots
    batch = ((head_start + local) // heads).to(tl.int64)
    head = ((head_start + local) % heads).to(tl.int64)
    stride_key_token = aligned(stride_key_token, ALIGN)
    stride_value_token = aligned(stride_value_token, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + head * stride_key_head, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + head * stride_value_head, ALIGN)
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    states_ptr += (local.to(tl.int64) * slots + slot) * STATE
    dtype: tl.constexpr = states_ptr.dtype.element_ty  # NOTE [Precision of states]

    if weight_ptr is not None:
        weight = load_tile(
            weight_ptr, col, HEAD_DIM, stride_weight_out, 0, stride_weight_in,
            SLICE, DIMS, HEAD_DIM, HEAD_DIM % SLICE != 0, False,
        ).to(dtype)  # (SLICE, DIMS)  # fmt: skip
    if key_mean_ptr is not None:
        mean = load_mean(
            key_mean_ptr + batch * stride_mean_batch + head * stride_mean_head, stride_mean_dim, DIMS, HEAD_DIM
        )
    h = tl.zeros([DIMS, SLICE], tl.float32)
    z = tl.zeros([DIMS], tl.float32)
    end = tl.minimum((slot + 1) * slot_tokens, length)
    for start in range(slot * slot_tokens, end, TILE_K):
        key = load_tile(
            key_ptr, start, length, stride_key_token, 0, stride_key_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (TILE_K, DIMS)
        if key_mean_ptr is not None:
            key -= mean[None, :]
        if weight_ptr is None:
            projected = load_tile(
                value_ptr, start, length, stride_value_token, col, stride_value_dim, TILE_K, SLICE, HEAD_DIM, True, WIDE
            ).to(dtype)  # (TILE_K, SLICE)
        else:
            value = load_tile(
                value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
            ).to(dtype)  # (TILE_K, DIMS)
            projected = tl.dot(value, tl.trans(weight), input_precision=PRECISION).to(dtype)  # (TILE_K, SLICE)
        maximum, normaliser = feature_statistics(key, HEAD_DIM, DIMS, FEATURE_MAP)
        phi = feature(key, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
        # Past the end of the sequence phi of what was loaded is not zero: the weight is, applied after phi.
        phi *= key_weights(key_bias_ptr, stride_bias_token, start, length, TILE_K)[:, None]
        h = tl.dot(tl.trans(phi.to(dtype)), projected, h, input_precision=PRECISION)
        z += tl.sum(phi, 0)

    store_tile(states_ptr, h, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, False)
    dims = tl.arange(0, DIMS)
    if col == 0:
        tl.store(states_ptr + HEAD_DIM * HEAD_DIM + dims, z.to(dtype), mask=dims < HEAD_DIM)


@triton.jit(
    do_not_specialize=["head_start", "heads", "members", "shared", "rows", "terms", "stride_head", "stride_batch"]
)
def block_sums_kernel(
    map_ptr,
    states_ptr,
    sums_ptr,
    stride_batch,
    stride_head,
    stride_row,
    stride_term,
    head_start,
    heads,
    members,
    shared,
    rows,
    terms,
    STATE: tl.constexpr,
    TERMS_PER_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TERMS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[r] = sum over t of [map[r, t] == 0] states[t]: a matrix product with the marginal mask, in float32.

    Sum n adds up the query heads n * members .. + members - 1, whose states are those of head / shared. With the map's
    strides exchanged it sums over query blocks for each key block; TERMS_PER_BLOCK consecutive states then belong to
    one of them.
    """
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    col_tiles: tl.constexpr = (STATE + TILE_COLS - 1) // TILE_COLS
    # Row tiles run fastest: those that read the same columns of the states meet in the cache.
    row = (tl.program_id(0) % row_tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first_col = (tl.program_id(0) // row_tiles) % col_tiles * TILE_COLS
    local = tl.program_id(0) // row_tiles // col_tiles
    col = first_col + tl.arange(0, TILE_COLS)

    total = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    for member in range(0, members):
        local_head = local * members + member
        head = head_start + local_head
        head_map_ptr = map_ptr + (head // heads).to(tl.int64) * stride_batch + (head % heads).to(tl.int64) * stride_head
        head_states_ptr = states_ptr + (local_head // shared).to(tl.int64) * terms * STATE
        for start in range(0, terms, TILE_TERMS):
            term = start + tl.arange(0, TILE_TERMS)
            block = (term // TERMS_PER_BLOCK).to(tl.int64)
            classes = tl.load(
                head_map_ptr + row.to(tl.int64)[:, None] * stride_row + block[None, :] * stride_term,
                mask=(row < rows)[:, None] & (term < terms)[None, :],
                other=-1,
            )  # (TILE_ROWS, TILE_TERMS)
            states = load_tile(
                head_states_ptr, start, terms, STATE, first_col, 1, TILE_TERMS, TILE_COLS, STATE, True, False
            )  # (TILE_TERMS, TILE_COLS)
            total = tl.dot((classes == 0).to(tl.float32), states, total, input_precision=PRECISION)
    offsets = (local.to(tl.int64) * rows + row)[:, None] * STATE + col[None, :]
    tl.store(sums_ptr + offsets, total, mask=(row < rows)[:, None] & (col < STATE)[None, :])
