"""The sparse branch's backward: one kernel walks the rows of the block map for dQ, one its columns for dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.forward import ragged_steps
from sla_compile.kernels.tiles import LOG2_E, aligned, load_mean, load_tile, store_tile


@triton.jit
def query_step(
    accumulator,
    row_sums,
    query,
    grad_output,
    logsumexp_log2,
    delta,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    stride_key_token,
    stride_key_dim,
    stride_value_token,
    stride_value_dim,
    stride_bias_token,
    start,
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_K: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Adds dS_ij K_j of the TILE_K keys from `start` and, for SMOOTHED, the row sums of dS_ij."""
    key = load_tile(
        key_ptr, start, length, stride_key_token, 0, stride_key_dim, TILE_K, DIMS, HEAD_DIM, MASK_KEYS, WIDE
    )  # (TILE_K, DIMS)
    value = load_tile(
        value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, MASK_KEYS, WIDE
    )  # (TILE_K, DIMS)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2  # (TILE_Q, TILE_K)
    tokens = start + tl.arange(0, TILE_K)
    if key_bias_ptr is not None:
        bias = tl.load(key_bias_ptr + tokens.to(tl.int64) * stride_bias_token, mask=tokens < length, other=0.0)
        scores += (bias * LOG2_E)[None, :]
    if MASK_KEYS:
        scores = tl.where((tokens < length)[None, :], scores, float("-inf"))
    probabilities = tl.exp2(scores - logsumexp_log2[:, None])
    grad_probabilities = tl.dot(grad_output, tl.trans(value), input_precision=PRECISION)
    grad_scores = (probabilities * (grad_probabilities - delta[:, None])).to(key.dtype)
    if SMOOTHED:
        row_sums += tl.sum(grad_scores.to(tl.float32), 1)
    return tl.dot(grad_scores, key, accumulator, input_precision=PRECISION), row_sums


@triton.jit(do_not_specialize=["head_start", "heads", "group", "length", "query_blocks", "key_blocks"])
def query_gradient_kernel(
    grad_output_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    key_mean_ptr,
    logsumexp_log2_ptr,
    entries_ptr,
    counts_ptr,
    grad_query_ptr,
    delta_ptr,
    stride_grad_batch,
    stride_grad_head,
    stride_grad_token,
    stride_grad_dim,
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_query_dim,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_gq_batch,
    stride_gq_head,
    stride_gq_token,
    stride_gq_dim,
    stride_bias_batch,
    stride_bias_token,
    stride_mean_batch,
    stride_mean_head,
    stride_mean_dim,
    scale,
    head_start,
    heads,
    group,
    length,
    query_blocks,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dQ of TILE_Q tokens of one query head; with a linear branch, its part is in grad_query already.

    After a low-bit forward dS K is that of the keys without their mean, NOTE [Frame].
    """
    tiles = query_blocks * (BLOCK_Q // TILE_Q)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    head = head_start + local
    block = tile // (BLOCK_Q // TILE_Q)
    first = tile * TILE_Q
    batch = (head // heads).to(tl.int64)
    query_head = (head % heads).to(tl.int64)
    stride_grad_token = aligned(stride_grad_token, ALIGN)
    stride_query_token = aligned(stride_query_token, ALIGN)
    stride_key_token = aligned(stride_key_token, ALIGN)
    stride_value_token = aligned(stride_value_token, ALIGN)
    stride_gq_token = aligned(stride_gq_token, ALIGN)
    grad_output_ptr += aligned(batch * stride_grad_batch + query_head * stride_grad_head, ALIGN)
    query_ptr += aligned(batch * stride_query_batch + query_head * stride_query_head, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + (query_head // group) * stride_key_head, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + (query_head // group) * stride_value_head, ALIGN)
    grad_query_ptr += aligned(batch * stride_gq_batch + query_head * stride_gq_head, ALIGN)
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    line = local.to(tl.int64) * query_blocks + block
    entries_ptr += line * key_blocks
    count = tl.load(counts_ptr + line)
    scale = tl.cast(scale, tl.float32)

    query = load_tile(
        query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    grad_output = load_tile(
        grad_output_ptr, first, length, stride_grad_token, 0, stride_grad_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    # Zero already: but what is computed stays in registers, NOTE [Operands] in forward.py.
    exists = (first + tl.arange(0, TILE_Q) < length)[:, None]
    query, grad_output = tl.where(exists, query, 0.0), tl.where(exists, grad_output, 0.0)
    rows = local.to(tl.int64) * (query_blocks * BLOCK_Q) + first + tl.arange(0, TILE_Q)
    logsumexp_log2 = tl.load(logsumexp_log2_ptr + rows)
    delta = tl.load(delta_ptr + rows)
    scale_log2 = scale * LOG2_E
    accumulator = tl.zeros([TILE_Q, DIMS], tl.float32)
    row_sums = tl.zeros([TILE_Q], tl.float32)
    SMOOTHED: tl.constexpr = key_mean_ptr is not None
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    whole = count * STEPS - ragged_steps(entries_ptr, count, key_blocks, length, BLOCK_K, STEPS)
    key_block = tl.load(entries_ptr, mask=whole > 0, other=0)  # NOTE [Prefetch]
    for step in range(0, whole):
        start = key_block * BLOCK_K + step % STEPS * TILE_K
        key_block = tl.load(entries_ptr + tl.minimum(step + 1, whole - 1) // STEPS)
        accumulator, row_sums = query_step(
            accumulator, row_sums, query, grad_output, logsumexp_log2, delta, key_ptr, value_ptr, key_bias_ptr,
            stride_key_token, stride_key_dim, stride_value_token, stride_value_dim, stride_bias_token, start, length,
            scale_log2, HEAD_DIM, DIMS, TILE_K, False, PRECISION, WIDE, SMOOTHED,
        )  # fmt: skip
    for step in tl.range(whole, count * STEPS, num_stages=1):
        start = tl.load(entries_ptr + step // STEPS) * BLOCK_K + step % STEPS * TILE_K
        accumulator, row_sums = query_step(
            accumulator, row_sums, query, grad_output, logsumexp_log2, delta, key_ptr, value_ptr, key_bias_ptr,
            stride_key_token, stride_key_dim, stride_value_token, stride_value_dim, stride_bias_token, start, length,
            scale_log2, HEAD_DIM, DIMS, TILE_K, True, PRECISION, WIDE, SMOOTHED,
        )  # fmt: skip
    if SMOOTHED:
        key_mean_ptr += batch * stride_mean_batch + (query_head // group) * stride_mean_head
        accumulator -= row_sums[:, None] * load_mean(key_mean_ptr, stride_mean_dim, DIMS, HEAD_DIM)[None, :]
    accumulator *= scale
    if LINEAR != "none":
        accumulator += load_tile(
            grad_query_ptr, first, length, stride_gq_token, 0, stride_gq_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (TILE_Q, DIMS)
    store_tile(
        grad_query_ptr, accumulator, first, length, stride_gq_token, 0, stride_gq_dim, TILE_Q, DIMS, HEAD_DIM, WIDE
    )


@triton.jit
def key_step(
    grad_key,
    grad_value,
    key,
    value,
    bias_log2,
    grad_output_ptr,
    query_ptr,
    logsumexp_log2_ptr,
    delta_ptr,
    stride_grad_token,
    stride_grad_dim,
    stride_query_token,
    stride_query_dim,
    first,
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds dS_ij^T Q_i and P_ij^T dO_i of the TILE_Q queries from `first`."""
    rows = first + tl.arange(0, TILE_Q)
    query = load_tile(
        query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    grad_output = load_tile(
        grad_output_ptr, first, length, stride_grad_token, 0, stride_grad_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    logsumexp_log2 = tl.load(logsumexp_log2_ptr + rows)  # not masked, as delta: there are whole blocks of both
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2  # (TILE_K, TILE_Q)
    if bias_log2 is not None:
        scores += bias_log2[:, None]
    grad_probabilities = tl.dot(value, tl.trans(grad_output), input_precision=PRECISION)
    probabilities = tl.exp2(scores - logsumexp_log2[None, :])
    grad_value = tl.dot(probabilities.to(query.dtype), grad_output, grad_value, input_precision=PRECISION)
    delta = tl.load(delta_ptr + rows)
    grad_scores = probabilities * (grad_probabilities - delta[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["head_start", "heads", "length", "query_blocks", "key_blocks"])
def key_gradient_kernel(
    grad_output_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    logsumexp_log2_ptr,
    delta_ptr,
    entries_ptr,
    counts_ptr,
    grad_key_ptr,
    grad_value_ptr,
    stride_grad_batch,
    stride_grad_head,
    stride_grad_token,
    stride_grad_dim,
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_query_dim,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_gk_batch,
    stride_gk_head,
    stride_gk_token,
    stride_gk_dim,
    stride_gv_batch,
    stride_gv_head,
    stride_gv_token,
    stride_gv_dim,
    stride_bias_batch,
    stride_bias_token,
    scale,
    head_start,
    heads,
    group,
    length,
    query_blocks,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dK and dV of TILE_K keys of one key-value head, over all its query heads.

    With a linear branch, its part is in grad_key and grad_value already.
    """
    tiles = key_blocks * (BLOCK_K // TILE_K)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    block = tile // (BLOCK_K // TILE_K)
    start = tile * TILE_K
    first_head = (head_start + local) * group
    batch = (first_head // heads).to(tl.int64)
    query_head = (first_head % heads).to(tl.int64)
    key_head = query_head // group
    stride_grad_token = aligned(stride_grad_token, ALIGN)
    stride_query_token = aligned(stride_query_token, ALIGN)
    stride_key_token = aligned(stride_key_token, ALIGN)
    stride_value_token = aligned(stride_value_token, ALIGN)
    stride_gk_token = aligned(stride_gk_token, ALIGN)
    stride_gv_token = aligned(stride_gv_token, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + key_head * stride_key_head, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + key_head * stride_value_head, ALIGN)
    grad_key_ptr += aligned(batch * stride_gk_batch + key_head * stride_gk_head, ALIGN)
    grad_value_ptr += aligned(batch * stride_gv_batch + key_head * stride_gv_head, ALIGN)
    grad_output_ptr += aligned(batch * stride_grad_batch + query_head * stride_grad_head, ALIGN)
    query_ptr += aligned(batch * stride_query_batch + query_head * stride_query_head, ALIGN)
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    scale = tl.cast(scale, tl.float32)
    scale_log2 = scale * LOG2_E

    # Keys past the end of the sequence are zero rows: what comes of them is not stored and reaches no other key.
    key = load_tile(
        key_ptr, start, length, stride_key_token, 0, stride_key_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_K, DIMS)
    value = load_tile(
        value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_K, DIMS)
    grad_key = tl.zeros([TILE_K, DIMS], tl.float32)
    grad_value = tl.zeros([TILE_K, DIMS], tl.float32)
    bias_log2 = None
    if key_bias_ptr is not None:
        keys = start + tl.arange(0, TILE_K)
        bias = tl.load(key_bias_ptr + keys.to(tl.int64) * stride_bias_token, mask=keys < length, other=0.0)
        bias_log2 = bias * LOG2_E
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    for member in range(0, group):
        line = (local * group + member).to(tl.int64) * key_blocks + block
        list_ptr = entries_ptr + line * query_blocks
        count = tl.load(counts_ptr + line)
        head_query_ptr = query_ptr + tl.cast(member, tl.int64) * stride_query_head
        head_grad_ptr = grad_output_ptr + tl.cast(member, tl.int64) * stride_grad_head
        head_rows = (local * group + member).to(tl.int64) * (query_blocks * BLOCK_Q)
        query_block = tl.load(list_ptr, mask=count > 0, other=0)  # NOTE [Prefetch]
        for step in range(0, count * STEPS):
            first = query_block * BLOCK_Q + step % STEPS * TILE_Q
            query_block = tl.load(list_ptr + tl.minimum(step + 1, count * STEPS - 1) // STEPS)
            grad_key, grad_value = key_step(
                grad_key, grad_value, key, value, bias_log2, head_grad_ptr, head_query_ptr,
                logsumexp_log2_ptr + head_rows, delta_ptr + head_rows, stride_grad_token, stride_grad_dim,
                stride_query_token, stride_query_dim, first, length, scale_log2,
                HEAD_DIM, DIMS, TILE_Q, PRECISION, WIDE,
            )  # fmt: skip
    grad_key *= scale
    if LINEAR != "none":
        grad_key += load_tile(
            grad_key_ptr, start, length, stride_gk_token, 0, stride_gk_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (TILE_K, DIMS)
        grad_value += load_tile(
            grad_value_ptr, start, length, stride_gv_token, 0, stride_gv_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (TILE_K, DIMS)
    store_tile(grad_key_ptr, grad_key, start, length, stride_gk_token, 0, stride_gk_dim, TILE_K, DIMS, HEAD_DIM, WIDE)
    store_tile(
        grad_value_ptr, grad_value, start, length, stride_gv_token, 0, stride_gv_dim, TILE_K, DIMS, HEAD_DIM, WIDE
    )
