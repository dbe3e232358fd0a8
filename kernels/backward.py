"""The backward kernels: one walks the rows of the block map for dQ, one its columns for dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.forward import ragged_steps
from sla_compile.kernels.tiles import (
    LOG2_E,
    feature,
    feature_gradient,
    feature_statistics,
    key_weights,
    load_tile,
    store_tile,
)


@triton.jit
def query_step(
    accumulator,
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
):
    """Adds dS_ij K_j of the TILE_K keys from `start`."""
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
    grad_scores = probabilities * (grad_probabilities - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, accumulator, input_precision=PRECISION)


@triton.jit(do_not_specialize=["head_start", "heads", "group", "length", "query_blocks", "key_blocks"])
def query_gradient_kernel(
    grad_output_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    proj_bias_ptr,
    output_ptr,
    logsumexp_ptr,
    sums_ptr,
    entries_ptr,
    counts_ptr,
    grad_query_ptr,
    grad_states_ptr,
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
    stride_output_batch,
    stride_output_head,
    stride_output_token,
    stride_output_dim,
    stride_gq_batch,
    stride_gq_head,
    stride_gq_token,
    stride_gq_dim,
    stride_bias_batch,
    stride_bias_token,
    stride_proj_bias,
    scale,
    epsilon,
    head_start,
    heads,
    group,
    length,
    query_blocks,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SLICE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    LINEAR: tl.constexpr,
    MIN_DENOMINATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dQ of TILE_Q tokens of one query head, their delta_s, and the gradient of the state they read.

    With phi = phi(Q), r = 1 / (phi Z) and the projection folded into H (NOTE [State]), per token:
        G = dO H^T        delta_l = r <G, phi>        dphi = r (G - delta_l Z)
        dH = (r phi)^T dO        dZ = -(r phi)^T delta_l        delta_s = <dO, O - b> - delta_l
    which is SLA's algorithm 2 without O_l: <dO W, O_l> = <dO, O_l W^T> = r <dO H^T, phi>.
    """
    tiles = query_blocks * (BLOCK_Q // TILE_Q)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    head = head_start + local
    block = tile // (BLOCK_Q // TILE_Q)
    first = tile * TILE_Q
    batch = (head // heads).to(tl.int64)
    query_head = (head % heads).to(tl.int64)
    grad_output_ptr += batch * stride_grad_batch + query_head * stride_grad_head
    query_ptr += batch * stride_query_batch + query_head * stride_query_head
    key_ptr += batch * stride_key_batch + (query_head // group) * stride_key_head
    value_ptr += batch * stride_value_batch + (query_head // group) * stride_value_head
    output_ptr += batch * stride_output_batch + query_head * stride_output_head
    grad_query_ptr += batch * stride_gq_batch + query_head * stride_gq_head
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    line = local.to(tl.int64) * query_blocks + block
    entries_ptr += line * key_blocks
    count = tl.load(counts_ptr + line)
    rows = first + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIMS)
    scale = tl.cast(scale, tl.float32)

    query = load_tile(
        query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    grad_output = load_tile(
        grad_output_ptr, first, length, stride_grad_token, 0, stride_grad_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    output = load_tile(
        output_ptr, first, length, stride_output_token, 0, stride_output_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    ).to(tl.float32)  # (TILE_Q, DIMS)
    if proj_bias_ptr is not None:
        proj_bias = tl.load(proj_bias_ptr + dims * stride_proj_bias, mask=dims < HEAD_DIM, other=0.0)
        output -= proj_bias.to(tl.float32)[None, :]
    delta = tl.sum(grad_output.to(tl.float32) * output, 1)
    accumulator = tl.zeros([TILE_Q, DIMS], tl.float32)

    if LINEAR != "none":
        if LINEAR == "marginal":
            sums_ptr += line * STATE
        else:
            sums_ptr += (local // group).to(tl.int64) * STATE
        grad_states_ptr += (local.to(tl.int64) * tiles + tile) * STATE
        for col in range(0, HEAD_DIM, SLICE):
            h = load_tile(
                sums_ptr, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, HEAD_DIM < DIMS, False
            )  # (DIMS, SLICE)
            grads = load_tile(
                grad_output_ptr, first, length, stride_grad_token, col, stride_grad_dim,
                TILE_Q, SLICE, HEAD_DIM, True, WIDE,
            ).to(tl.float32)  # (TILE_Q, SLICE)  # fmt: skip
            accumulator = tl.dot(grads, tl.trans(h), accumulator, input_precision=PRECISION)
        tokens = query.to(tl.float32)
        maximum, normaliser = feature_statistics(tokens, HEAD_DIM, DIMS, FEATURE_MAP)
        phi = feature(tokens, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
        z = tl.load(sums_ptr + HEAD_DIM * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        denominator = tl.sum(phi * z[None, :], 1) + tl.cast(epsilon, tl.float32)
        defined = denominator > MIN_DENOMINATOR
        inverse = tl.where(defined, 1.0 / tl.where(defined, denominator, 1.0), 0.0)
        delta_linear = tl.sum(accumulator * phi, 1) * inverse
        delta -= delta_linear
        grad_phi = (accumulator - delta_linear[:, None] * z[None, :]) * inverse[:, None]
        # The loop below accumulates dQ / scale.
        accumulator = feature_gradient(tokens, phi, grad_phi, FEATURE_MAP) * (1.0 / scale)
        for col in range(0, HEAD_DIM, SLICE):
            part = load_tile(
                query_ptr, first, length, stride_query_token, col, stride_query_dim, TILE_Q, SLICE, HEAD_DIM, True, WIDE
            ).to(tl.float32)  # (TILE_Q, SLICE)
            weights = feature(part, maximum, normaliser, col, SLICE, HEAD_DIM, FEATURE_MAP) * inverse[:, None]
            grad_h = tl.dot(tl.trans(weights), grad_output.to(tl.float32), input_precision=PRECISION)  # (SLICE, DIMS)
            store_tile(
                grad_states_ptr, grad_h, col, HEAD_DIM, HEAD_DIM, 0, 1, SLICE, DIMS, HEAD_DIM, False
            )
            grad_z = -tl.sum(weights * delta_linear[:, None], 0)
            cols = col + tl.arange(0, SLICE)
            tl.store(grad_states_ptr + HEAD_DIM * HEAD_DIM + cols, grad_z, mask=cols < HEAD_DIM)

    tl.store(delta_ptr + local.to(tl.int64) * length + rows, delta, mask=rows < length)
    logsumexp = tl.load(logsumexp_ptr + head.to(tl.int64) * length + rows, mask=rows < length, other=float("inf"))
    # A row that no key takes part in has no gradient: with +inf every probability is 0.
    logsumexp_log2 = tl.where(logsumexp == float("-inf"), float("inf"), logsumexp) * LOG2_E
    scale_log2 = scale * LOG2_E
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    whole = count * STEPS - ragged_steps(entries_ptr, count, key_blocks, length, BLOCK_K, STEPS)
    for step in range(0, whole):
        start = tl.load(entries_ptr + step // STEPS) * BLOCK_K + step % STEPS * TILE_K
        accumulator = query_step(
            accumulator, query, grad_output, logsumexp_log2, delta, key_ptr, value_ptr, key_bias_ptr, stride_key_token,
            stride_key_dim, stride_value_token, stride_value_dim, stride_bias_token, start, length, scale_log2,
            HEAD_DIM, DIMS, TILE_K, False, PRECISION, WIDE,
        )  # fmt: skip
    for step in tl.range(whole, count * STEPS, num_stages=1):
        start = tl.load(entries_ptr + step // STEPS) * BLOCK_K + step % STEPS * TILE_K
        accumulator = query_step(
            accumulator, query, grad_output, logsumexp_log2, delta, key_ptr, value_ptr, key_bias_ptr, stride_key_token,
            stride_key_dim, stride_value_token, stride_value_dim, stride_bias_token, start, length, scale_log2,
            HEAD_DIM, DIMS, TILE_K, True, PRECISION, WIDE,
        )  # fmt: skip
    store_tile(
        grad_query_ptr, accumulator * scale, first, length, stride_gq_token, 0, stride_gq_dim,
        TILE_Q, DIMS, HEAD_DIM, WIDE,
    )  # fmt: skip


@triton.jit
def key_step(
    grad_key,
    grad_value,
    key,
    value,
    bias_log2,
    grad_output_ptr,
    query_ptr,
    logsumexp_ptr,
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
    MASK_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds dS_ij^T Q_i and P_ij^T dO_i of the TILE_Q queries from `first`."""
    rows = first + tl.arange(0, TILE_Q)
    query = load_tile(
        query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, MASK_QUERIES, WIDE
    )  # (TILE_Q, DIMS)
    grad_output = load_tile(
        grad_output_ptr, first, length, stride_grad_token, 0, stride_grad_dim, TILE_Q, DIMS, HEAD_DIM, MASK_QUERIES, WIDE
    )  # (TILE_Q, DIMS)
    if MASK_QUERIES:
        logsumexp = tl.load(logsumexp_ptr + rows, mask=rows < length, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
    else:
        logsumexp = tl.load(logsumexp_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    logsumexp_log2 = tl.where(logsumexp == float("-inf"), float("inf"), logsumexp) * LOG2_E
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2 + bias_log2[:, None]
    probabilities = tl.exp2(scores - logsumexp_log2[None, :])  # (TILE_K, TILE_Q)
    grad_value = tl.dot(probabilities.to(query.dtype), grad_output, grad_value, input_precision=PRECISION)
    grad_probabilities = tl.dot(value, tl.trans(grad_output), input_precision=PRECISION)
    grad_scores = probabilities * (grad_probabilities - delta[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["head_start", "heads", "group", "length", "query_blocks", "key_blocks"])
def key_gradient_kernel(
    grad_output_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    weight_ptr,
    logsumexp_ptr,
    delta_ptr,
    grad_sums_ptr,
    entries_ptr,
    counts_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_weights_ptr,
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
    stride_weight_out,
    stride_weight_in,
    scale,
    head_start,
    heads,
    group,
    length,
    query_blocks,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SLICE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dK and dV of TILE_K keys of one key-value head, over all its query heads, and their part of dW.

    With phi = diag(w) phi(K) and V' = V W^T, and dH, dZ summed over the query blocks that read these keys:
        dphi = diag(w) (V' dH^T + 1 dZ^T)        dV' = phi dH        dV = dV' W        dW = dV'^T V
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
    key_ptr += batch * stride_key_batch + key_head * stride_key_head
    value_ptr += batch * stride_value_batch + key_head * stride_value_head
    grad_key_ptr += batch * stride_gk_batch + key_head * stride_gk_head
    grad_value_ptr += batch * stride_gv_batch + key_head * stride_gv_head
    grad_output_ptr += batch * stride_grad_batch + query_head * stride_grad_head
    query_ptr += batch * stride_query_batch + query_head * stride_query_head
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

    if LINEAR != "none":
        if LINEAR == "marginal":
            grad_sums_ptr += (local.to(tl.int64) * key_blocks + block) * STATE
        else:
            grad_sums_ptr += local.to(tl.int64) * STATE
        grad_weights_ptr += (local.to(tl.int64) * tiles + tile) * HEAD_DIM * HEAD_DIM
        tokens = key.to(tl.float32)
        values = value.to(tl.float32)
        maximum, normaliser = feature_statistics(tokens, HEAD_DIM, DIMS, FEATURE_MAP)
        phi = feature(tokens, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
        weights = key_weights(key_bias_ptr, stride_bias_token, start, length, TILE_K)
        for col in range(0, HEAD_DIM, SLICE):
            weight = load_tile(
                weight_ptr, col, HEAD_DIM, stride_weight_out, 0, stride_weight_in,
                SLICE, DIMS, HEAD_DIM, HEAD_DIM % SLICE != 0, False,
            ).to(tl.float32)  # (SLICE, DIMS)  # fmt: skip
            grad_h = load_tile(
                grad_sums_ptr, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, HEAD_DIM < DIMS, False
            )  # (DIMS, SLICE)
            projected = tl.dot(values, tl.trans(weight), input_precision=PRECISION)  # V', (TILE_K, SLICE)
            grad_key = tl.dot(projected, tl.trans(grad_h), grad_key, input_precision=PRECISION)
            grad_projected = tl.dot(phi * weights[:, None], grad_h, input_precision=PRECISION)  # dV', (TILE_K, SLICE)
            grad_value = tl.dot(grad_projected, weight, grad_value, input_precision=PRECISION)
            grad_weight = tl.dot(tl.trans(grad_projected), values, input_precision=PRECISION)  # (SLICE, DIMS)
            store_tile(
                grad_weights_ptr, grad_weight, col, HEAD_DIM, HEAD_DIM, 0, 1, SLICE, DIMS, HEAD_DIM, False
            )
        dims = tl.arange(0, DIMS)
        grad_z = tl.load(grad_sums_ptr + HEAD_DIM * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        grad_phi = weights[:, None] * (grad_key + grad_z[None, :])
        # The loop below accumulates dK / scale.
        grad_key = feature_gradient(tokens, phi, grad_phi, FEATURE_MAP) * (1.0 / scale)

    if key_bias_ptr is None:
        bias_log2 = tl.zeros([TILE_K], tl.float32)
    else:
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
        head_logsumexp_ptr = logsumexp_ptr + (first_head + member).to(tl.int64) * length
        head_delta_ptr = delta_ptr + (local * group + member).to(tl.int64) * length
        whole = count * STEPS - ragged_steps(list_ptr, count, query_blocks, length, BLOCK_Q, STEPS)
        for step in range(0, whole):
            first = tl.load(list_ptr + step // STEPS) * BLOCK_Q + step % STEPS * TILE_Q
            grad_key, grad_value = key_step(
                grad_key, grad_value, key, value, bias_log2, head_grad_ptr, head_query_ptr, head_logsumexp_ptr,
                head_delta_ptr, stride_grad_token, stride_grad_dim, stride_query_token, stride_query_dim,
                first, length, scale_log2, HEAD_DIM, DIMS, TILE_Q, False, PRECISION, WIDE,
            )  # fmt: skip
        for step in tl.range(whole, count * STEPS, num_stages=1):
            first = tl.load(list_ptr + step // STEPS) * BLOCK_Q + step % STEPS * TILE_Q
            grad_key, grad_value = key_step(
                grad_key, grad_value, key, value, bias_log2, head_grad_ptr, head_query_ptr, head_logsumexp_ptr,
                head_delta_ptr, stride_grad_token, stride_grad_dim, stride_query_token, stride_query_dim,
                first, length, scale_log2, HEAD_DIM, DIMS, TILE_Q, True, PRECISION, WIDE,
            )  # fmt: skip
    store_tile(
        grad_key_ptr, grad_key * scale, start, length, stride_gk_token, 0, stride_gk_dim, TILE_K, DIMS, HEAD_DIM, WIDE
    )
    store_tile(
        grad_value_ptr, grad_value, start, length, stride_gv_token, 0, stride_gv_dim, TILE_K, DIMS, HEAD_DIM, WIDE
    )
