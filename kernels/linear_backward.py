"""The linear branch's backward: query side (and what the sparse branch reads of each row) and key side, apart from it.

They are kernels of their own because their products want registers and shared memory that would halve the number of
programs a multiprocessor holds in the sparse loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.tiles import (
    LOG2_E,
    aligned,
    feature,
    feature_gradient,
    feature_statistics,
    key_weights,
    load_mean,
    load_tile,
    store_tile,
)


@triton.jit(
    do_not_specialize=[
        "head_start", "heads", "group", "length", "query_blocks",
        "stride_alpha_batch", "stride_alpha_head", "stride_alpha_block",
    ]
)  # fmt: skip
def query_linear_kernel(
    grad_output_ptr,
    query_ptr,
    proj_bias_ptr,
    alpha_ptr,
    output_ptr,
    logsumexp_ptr,
    sums_ptr,
    grad_query_ptr,
    grad_states_ptr,
    grad_alpha_ptr,
    delta_ptr,
    logsumexp_log2_ptr,
    stride_grad_batch,
    stride_grad_head,
    stride_grad_token,
    stride_grad_dim,
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_query_dim,
    stride_output_batch,
    stride_output_head,
    stride_output_token,
    stride_output_dim,
    stride_gq_batch,
    stride_gq_head,
    stride_gq_token,
    stride_gq_dim,
    stride_proj_bias,
    stride_alpha_batch,
    stride_alpha_head,
    stride_alpha_block,
    epsilon,
    head_start,
    heads,
    group,
    length,
    query_blocks,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    SLICE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    LINEAR: tl.constexpr,
    MIN_DENOMINATOR: tl.constexpr,
    MIN_ALPHA: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta_s and log-sum-exp of TILE_Q tokens of one query head, the linear branch's part of their dQ, and dH, dZ.

    With phi = phi(Q), r = 1 / (phi Z) and the projection folded into H (NOTE [State]), per token:
        G = dO H^T        delta_l = r <G, phi>        dphi = r (G - delta_l Z)
        dH = (r phi)^T dO        dZ = -(r phi)^T delta_l        delta_s = <dO, O - b> - delta_l
    which is SLA's algorithm 2 without O_l: <dO W, O_l> = <dO, O_l W^T> = r <dO H^T, phi>.

    With alpha (SLA2) the output is alpha O_s + (1 - alpha) O_l: dphi, dH and dZ take the factor 1 - alpha, and
        delta_s = (<dO, O> - (1 - alpha) delta_l) / alpha        dalpha = sum over a block's tokens of delta_s - delta_l
    """
    tiles = query_blocks * (BLOCK_Q // TILE_Q)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    first = tile * TILE_Q
    batch = ((head_start + local) // heads).to(tl.int64)
    head = ((head_start + local) % heads).to(tl.int64)
    stride_grad_token = aligned(stride_grad_token, ALIGN)
    stride_query_token = aligned(stride_query_token, ALIGN)
    stride_output_token = aligned(stride_output_token, ALIGN)
    stride_gq_token = aligned(stride_gq_token, ALIGN)
    grad_output_ptr += aligned(batch * stride_grad_batch + head * stride_grad_head, ALIGN)
    query_ptr += aligned(batch * stride_query_batch + head * stride_query_head, ALIGN)
    output_ptr += aligned(batch * stride_output_batch + head * stride_output_head, ALIGN)
    grad_query_ptr += aligned(batch * stride_gq_batch + head * stride_gq_head, ALIGN)
    dims = tl.arange(0, DIMS)
    place = local.to(tl.int64) * (query_blocks * BLOCK_Q) + first

    grad_output = load_tile(
        grad_output_ptr, first, length, stride_grad_token, 0, stride_grad_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    ).to(tl.float32)  # (TILE_Q, DIMS)
    output = load_tile(
        output_ptr, first, length, stride_output_token, 0, stride_output_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    ).to(tl.float32)  # (TILE_Q, DIMS)
    if proj_bias_ptr is not None:
        proj_bias = tl.load(proj_bias_ptr + dims * stride_proj_bias, mask=dims < HEAD_DIM, other=0.0)
        output -= proj_bias.to(tl.float32)[None, :]
    delta = tl.sum(grad_output * output, 1)

    if LINEAR != "none":
        if LINEAR == "marginal":
            sums_ptr += (local.to(tl.int64) * query_blocks + tile // (BLOCK_Q // TILE_Q)) * STATE
        else:
            sums_ptr += (local // group).to(tl.int64) * STATE
        grad_states_ptr += (local.to(tl.int64) * tiles + tile) * STATE
        dtype: tl.constexpr = sums_ptr.dtype.element_ty  # NOTE [Precision of states]
        products = tl.zeros([TILE_Q, DIMS], tl.float32)  # G
        for col in range(0, HEAD_DIM, SLICE):
            h = load_tile(
                sums_ptr, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, HEAD_DIM < DIMS, False
            )  # (DIMS, SLICE)
            grads = load_tile(
                grad_output_ptr, first, length, stride_grad_token, col, stride_grad_dim,
                TILE_Q, SLICE, HEAD_DIM, True, WIDE,
            ).to(dtype)  # (TILE_Q, SLICE)  # fmt: skip
            products = tl.dot(grads, tl.trans(h), products, input_precision=PRECISION)

        query = load_tile(
            query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
        ).to(tl.float32)  # (TILE_Q, DIMS)
        maximum, normaliser = feature_statistics(query, HEAD_DIM, DIMS, FEATURE_MAP)
        phi = feature(query, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
        z = tl.load(sums_ptr + HEAD_DIM * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        denominator = tl.sum(phi * z[None, :], 1) + tl.cast(epsilon, tl.float32)
        defined = denominator > MIN_DENOMINATOR
        inverse = tl.where(defined, 1.0 / tl.where(defined, denominator, 1.0), 0.0)
        delta_linear = tl.sum(products * phi, 1) * inverse
        if alpha_ptr is None:
            delta -= delta_linear
        else:
            block = tile // (BLOCK_Q // TILE_Q)
            alpha = tl.load(
                alpha_ptr + batch * stride_alpha_batch + head * stride_alpha_head + block * stride_alpha_block
            )
            delta = (delta - (1.0 - alpha) * delta_linear) / tl.maximum(alpha, MIN_ALPHA)
            inverse *= 1.0 - alpha
            # Not summed here: Triton 3.7.1 fails on a sum of what comes of tensor memory (sm_100).
            tl.store(grad_alpha_ptr + place + tl.arange(0, TILE_Q), delta - delta_linear)
        grad_phi = (products - delta_linear[:, None] * z[None, :]) * inverse[:, None]
        store_tile(
            grad_query_ptr, feature_gradient(query, phi, grad_phi, FEATURE_MAP), first, length, stride_gq_token, 0,
            stride_gq_dim, TILE_Q, DIMS, HEAD_DIM, WIDE,
        )  # fmt: skip

        for col in range(0, HEAD_DIM, SLICE):
            part = load_tile(
                query_ptr, first, length, stride_query_token, col, stride_query_dim, TILE_Q, SLICE, HEAD_DIM, True, WIDE
            ).to(tl.float32)  # (TILE_Q, SLICE)
            weights = feature(part, maximum, normaliser, col, SLICE, HEAD_DIM, FEATURE_MAP) * inverse[:, None]
            grad_h = tl.dot(
                tl.trans(weights.to(dtype)), grad_output.to(dtype), input_precision=PRECISION
            )  # (SLICE, DIMS)
            store_tile(grad_states_ptr, grad_h, col, HEAD_DIM, HEAD_DIM, 0, 1, SLICE, DIMS, HEAD_DIM, False)
            grad_z = -tl.sum(weights * delta_linear[:, None], 0)
            cols = col + tl.arange(0, SLICE)
            tl.store(grad_states_ptr + HEAD_DIM * HEAD_DIM + cols, grad_z.to(dtype), mask=cols < HEAD_DIM)

    rows = first + tl.arange(0, TILE_Q)
    logsumexp = tl.load(
        logsumexp_ptr + (head_start + local).to(tl.int64) * length + rows, mask=rows < length, other=float("-inf")
    )
    # Once for all blocks that read the row. Where no key takes part, and past the last row, probabilities are to be 0.
    logsumexp_log2 = tl.where(logsumexp == float("-inf"), float("inf"), logsumexp * LOG2_E)
    if alpha_ptr is not None:
        logsumexp_log2 -= tl.log2(tl.maximum(alpha, MIN_ALPHA))  # NOTE [Alpha]
    tl.store(delta_ptr + place + tl.arange(0, TILE_Q), delta)
    tl.store(logsumexp_log2_ptr + place + tl.arange(0, TILE_Q), logsumexp_log2)


@triton.jit(do_not_specialize=["head_start", "heads", "length", "key_blocks"])
def key_linear_kernel(
    key_ptr,
    value_ptr,
    weight_ptr,
    key_bias_ptr,
    key_mean_ptr,
    grad_sums_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_projected_ptr,
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
    key_blocks,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    SLICE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The linear branch's part of dK and dV of TILE_K keys of one key-value head, and what dW is made of.

    With phi = diag(w) phi(K) and V' = V W^T, and dH, dZ summed over the query blocks that read these keys:
        dphi = diag(w) (V' dH^T + 1 dZ^T)        dV' = phi dH        dV = dV' W
    Without a projection V' is V; with one dV' is kept for projection_gradient_kernel. A key mean,
    subtracted before phi, counts as a constant.
    """
    tiles = key_blocks * (BLOCK_K // TILE_K)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    start = tile * TILE_K
    batch = ((head_start + local) // heads).to(tl.int64)
    head = ((head_start + local) % heads).to(tl.int64)
    stride_key_token = aligned(stride_key_token, ALIGN)
    stride_value_token = aligned(stride_value_token, ALIGN)
    stride_gk_token = aligned(stride_gk_token, ALIGN)
    stride_gv_token = aligned(stride_gv_token, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + head * stride_key_head, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + head * stride_value_head, ALIGN)
    grad_key_ptr += aligned(batch * stride_gk_batch + head * stride_gk_head, ALIGN)
    grad_value_ptr += aligned(batch * stride_gv_batch + head * stride_gv_head, ALIGN)
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    if LINEAR == "marginal":
        grad_sums_ptr += (local.to(tl.int64) * key_blocks + tile // (BLOCK_K // TILE_K)) * STATE
    else:
        grad_sums_ptr += local.to(tl.int64) * STATE
    if weight_ptr is not None:
        grad_projected_ptr += local.to(tl.int64) * length * HEAD_DIM

    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty  # NOTE [Precision of states]
    key = load_tile(key_ptr, start, length, stride_key_token, 0, stride_key_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE).to(
        tl.float32
    )  # (TILE_K, DIMS)
    value = load_tile(
        value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
    ).to(dtype)  # (TILE_K, DIMS)
    if key_mean_ptr is not None:
        key_mean_ptr += batch * stride_mean_batch + head * stride_mean_head
        key -= load_mean(key_mean_ptr, stride_mean_dim, DIMS, HEAD_DIM)[None, :]
    weights = key_weights(key_bias_ptr, stride_bias_token, start, length, TILE_K)
    maximum, normaliser = feature_statistics(key, HEAD_DIM, DIMS, FEATURE_MAP)
    phi = (feature(key, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP) * weights[:, None]).to(dtype)
    grad_phi = tl.zeros([TILE_K, DIMS], tl.float32)
    grad_value = tl.zeros([TILE_K, DIMS], tl.float32)
    for col in range(0, HEAD_DIM, SLICE):
        if weight_ptr is None:
            grad_h = load_tile(
                grad_sums_ptr, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, HEAD_DIM < DIMS, False
            )  # (DIMS, SLICE)
            store_tile(
                grad_value_ptr, tl.dot(phi, grad_h, input_precision=PRECISION), start, length, stride_gv_token, col,
                stride_gv_dim, TILE_K, SLICE, HEAD_DIM, WIDE,
            )  # fmt: skip
            part = load_tile(
                value_ptr, start, length, stride_value_token, col, stride_value_dim, TILE_K, SLICE, HEAD_DIM, True, WIDE
            ).to(dtype)  # (TILE_K, SLICE)
            grad_phi = tl.dot(part, tl.trans(grad_h), grad_phi, input_precision=PRECISION)
        else:
            weight = load_tile(
                weight_ptr, col, HEAD_DIM, stride_weight_out, 0, stride_weight_in,
                SLICE, DIMS, HEAD_DIM, HEAD_DIM % SLICE != 0, False,
            ).to(dtype)  # (SLICE, DIMS)  # fmt: skip
            grad_h = load_tile(
                grad_sums_ptr, 0, HEAD_DIM, HEAD_DIM, col, 1, DIMS, SLICE, HEAD_DIM, HEAD_DIM < DIMS, False
            )  # (DIMS, SLICE)
            projected = tl.dot(value, tl.trans(weight), input_precision=PRECISION).to(dtype)  # V', (TILE_K, SLICE)
            grad_phi = tl.dot(projected, tl.trans(grad_h), grad_phi, input_precision=PRECISION)
            grad_projected = tl.dot(phi, grad_h, input_precision=PRECISION).to(dtype)  # dV', (TILE_K, SLICE)
            grad_value = tl.dot(grad_projected, weight, grad_value, input_precision=PRECISION)
            store_tile(
                grad_projected_ptr, grad_projected, start, length, HEAD_DIM, col, 1, TILE_K, SLICE, HEAD_DIM, False
            )
    if weight_ptr is not None:
        store_tile(
            grad_value_ptr, grad_value, start, length, stride_gv_token, 0, stride_gv_dim, TILE_K, DIMS, HEAD_DIM, WIDE
        )
    dims = tl.arange(0, DIMS)
    grad_z = tl.load(grad_sums_ptr + HEAD_DIM * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    grad_phi = weights[:, None] * (grad_phi + grad_z[None, :])
    phi = feature(key, maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
    store_tile(
        grad_key_ptr, feature_gradient(key, phi, grad_phi, FEATURE_MAP), start, length, stride_gk_token, 0,
        stride_gk_dim, TILE_K, DIMS, HEAD_DIM, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["head_start", "heads", "length", "parts", "part_tokens"])
def projection_gradient_kernel(
    value_ptr,
    grad_projected_ptr,
    grad_weights_ptr,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    head_start,
    heads,
    length,
    parts,
    part_tokens,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SLICE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """SLICE rows of dW = dV'^T V, summed over the `part_tokens` keys of a part of one key-value head."""
    slices: tl.constexpr = (HEAD_DIM + SLICE - 1) // SLICE
    row = (tl.program_id(0) % slices) * SLICE
    part = (tl.program_id(0) // slices) % parts
    local = tl.program_id(0) // slices // parts
    batch = ((head_start + local) // heads).to(tl.int64)
    head = ((head_start + local) % heads).to(tl.int64)
    stride_value_token = aligned(stride_value_token, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + head * stride_value_head, ALIGN)
    grad_projected_ptr += local.to(tl.int64) * length * HEAD_DIM
    grad_weights_ptr += (local.to(tl.int64) * parts + part) * HEAD_DIM * HEAD_DIM
    dtype: tl.constexpr = grad_projected_ptr.dtype.element_ty  # NOTE [Precision of states]

    grad_weight = tl.zeros([SLICE, DIMS], tl.float32)
    for start in range(part * part_tokens, tl.minimum((part + 1) * part_tokens, length), TILE_K):
        grad_projected = load_tile(
            grad_projected_ptr, start, length, HEAD_DIM, row, 1, TILE_K, SLICE, HEAD_DIM, True, False
        )  # (TILE_K, SLICE)
        value = load_tile(
            value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, True, WIDE
        ).to(dtype)  # (TILE_K, DIMS)
        grad_weight = tl.dot(tl.trans(grad_projected), value, grad_weight, input_precision=PRECISION)
    store_tile(grad_weights_ptr, grad_weight, row, HEAD_DIM, HEAD_DIM, 0, 1, SLICE, DIMS, HEAD_DIM, False)
