"""The forward kernel: exact attention over a query block's critical keys, and the linear branch as its epilogue.

NOTE [Prefetch]: the sparse loops load the entry of the next step themselves, a step ahead. Were it loaded in its own
step, the compiler's pipeline would spend half of its stages on it, and a loop would wait for the copies of keys and
values that it has just issued.

NOTE [Late values]: with LATE_VALUES a step multiplies the probabilities of the step before with that step's values. On
sm_90 products are asynchronous: this one runs while the exponentials of the step's own scores are taken, for which it
would otherwise have to wait, and the tensor cores with it. The compiler lets a product run on into the next step only
if nothing but that step's product touches its result; so scores, which every step needs at once, stay where they are.

NOTE [Operands]: of a product on sm_90 the compiler takes the left factor from shared memory if it was loaded, and from
registers if it was computed. A product with a tile of 64 keys then reads as much of the query as of the keys, each time
anew, and takes the shared memory's whole bandwidth; so the sparse loops compute what stays the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.low_bit import FP8_MAX, quantize_query
from sla_compile.kernels.tiles import (
    LN_2,
    LOG2_E,
    aligned,
    feature,
    feature_statistics,
    load_mean,
    load_tile,
    store_tile,
)


@triton.jit
def key_product(
    query,
    key_ptr,
    low_key_ptr,
    stride_key_token,
    stride_key_dim,
    start,
    length,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_K: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LOW_BIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scores (TILE_Q, TILE_K) of the TILE_K keys from `start`, without their scale; int32 of int8."""
    if LOW_BIT == "none":
        key = load_tile(
            key_ptr, start, length, stride_key_token, 0, stride_key_dim, TILE_K, DIMS, HEAD_DIM, MASK_KEYS, WIDE
        )  # (TILE_K, DIMS)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    else:
        key = load_tile(low_key_ptr, start, 0, DIMS, 0, 1, TILE_K, DIMS, DIMS, False, False)  # (TILE_K, DIMS)
        scores = tl.dot(query, tl.trans(key))
    return scores


@triton.jit
def softmax_step(
    scores,
    maximum,
    total,
    key_bias_ptr,
    key_scales_ptr,
    stride_bias_token,
    start,
    length,
    scale_log2,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LOW_BIT: tl.constexpr,
):
    """One step of the online softmax, in base 2, over key_product's scores.

    With LOW_BIT scale_log2, which is not negative, has the query's scale in it; for "fp8" `maximum` is a whole number.

    Returns:
        probabilities (TILE_Q, TILE_K), the new maximum and total, and what the accumulator is to be multiplied with.
    """
    factor = scale_log2
    if LOW_BIT != "none":
        scores = scores.to(tl.float32)
        factor = scale_log2 * tl.load(key_scales_ptr + start // BLOCK_K)
    PARTIAL: tl.constexpr = MASK_KEYS or key_bias_ptr is not None
    if PARTIAL:
        tokens = start + tl.arange(0, TILE_K)
        scores *= factor
        factor = 1.0
        if key_bias_ptr is not None:
            bias = tl.load(key_bias_ptr + tokens.to(tl.int64) * stride_bias_token, mask=tokens < length, other=0.0)
            scores += (bias * LOG2_E)[None, :]
        if MASK_KEYS:
            scores = tl.where((tokens < length)[None, :], scores, float("-inf"))
    new_maximum = tl.max(scores, 1) * factor
    if LOW_BIT == "fp8":
        new_maximum = tl.ceil(new_maximum)
    new_maximum = tl.maximum(maximum, new_maximum)
    reference = new_maximum
    if PARTIAL:
        # Until a row has met a key that takes part, its maximum is -inf, and -inf - -inf is not a number.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    # Scaled here and not before: one instruction with the subtraction.
    probabilities = tl.exp2(scores * factor - reference[:, None])
    rescale = tl.exp2(maximum - reference)
    return probabilities, new_maximum, total * rescale + tl.sum(probabilities, 1), rescale


@triton.jit
def value_product(
    accumulator,
    probabilities,
    value_ptr,
    low_value_ptr,
    stride_value_token,
    stride_value_dim,
    start,
    length,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LOW_BIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The accumulator and the probabilities' product with the TILE_K values from `start`; 448 times that for "fp8"."""
    if LOW_BIT == "fp8":
        # Not `start % BLOCK_K`: of a remainder the compiler does not know what divides it, and would load single bytes.
        block_start = start // BLOCK_K * BLOCK_K
        low_value_ptr += tl.cast(block_start, tl.int64) * DIMS + (start - block_start)
        value = load_tile(low_value_ptr, 0, 0, BLOCK_K, 0, 1, DIMS, TILE_K, TILE_K, False, False)  # (DIMS, TILE_K)
        # Not into the accumulator: sm_90 adds up E4M3 products with 14 bits, so only those of one step.
        accumulator += tl.dot((probabilities * FP8_MAX).to(tl.float8e4nv), tl.trans(value))
    else:
        value = load_tile(
            value_ptr, start, length, stride_value_token, 0, stride_value_dim, TILE_K, DIMS, HEAD_DIM, MASK_KEYS, WIDE
        )  # (TILE_K, DIMS)
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def ragged_steps(entries_ptr, count, key_blocks, length, BLOCK_K: tl.constexpr, STEPS: tl.constexpr):
    """How many steps at the end of an ascending list meet keys past the sequence's end: those of its last block."""
    last = tl.load(entries_ptr + count - 1, mask=count > 0, other=-1)
    return tl.where((last == key_blocks - 1) & (length % BLOCK_K != 0), STEPS, 0)


# Nor alpha's strides: they are numbers of query blocks, and a kernel would be compiled for each kind of length.
@triton.jit(
    do_not_specialize=[
        "head_start", "heads", "group", "length", "query_blocks", "key_blocks",
        "stride_alpha_batch", "stride_alpha_head", "stride_alpha_block",
    ]
)  # fmt: skip
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_bias_ptr,
    proj_bias_ptr,
    alpha_ptr,
    key_mean_ptr,
    value_scales_ptr,
    low_key_ptr,
    key_scales_ptr,
    low_value_ptr,
    sums_ptr,
    entries_ptr,
    counts_ptr,
    output_ptr,
    logsumexp_ptr,
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
    stride_bias_batch,
    stride_bias_token,
    stride_proj_bias,
    stride_alpha_batch,
    stride_alpha_head,
    stride_alpha_block,
    stride_mean_batch,
    stride_mean_head,
    stride_mean_dim,
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
    LOW_BIT: tl.constexpr,
    MIN_DENOMINATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    LATE_VALUES: tl.constexpr,
):
    """Output and log-sum-exp of TILE_Q tokens of one query head.

    SLA (arXiv 2509.24006, algorithm 1): O_s + O_l W^T + b. With alpha, one number for each query block, SLA2
    (arXiv 2602.12675): alpha O_s + (1 - alpha) O_l. With LOW_BIT the scores, and for "fp8" P V as well, come of 8-bit
    operands (quantize.py), whose keys are smoothed by key_mean; the log-sum-exp does not show it, NOTE [Frame].
    """
    tiles = query_blocks * (BLOCK_Q // TILE_Q)
    tile = tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles
    head = head_start + local
    block = tile // (BLOCK_Q // TILE_Q)
    first = tile * TILE_Q
    batch = (head // heads).to(tl.int64)
    query_head = (head % heads).to(tl.int64)
    stride_query_token = aligned(stride_query_token, ALIGN)
    stride_key_token = aligned(stride_key_token, ALIGN)
    stride_value_token = aligned(stride_value_token, ALIGN)
    stride_output_token = aligned(stride_output_token, ALIGN)
    query_ptr += aligned(batch * stride_query_batch + query_head * stride_query_head, ALIGN)
    key_ptr += aligned(batch * stride_key_batch + (query_head // group) * stride_key_head, ALIGN)
    value_ptr += aligned(batch * stride_value_batch + (query_head // group) * stride_value_head, ALIGN)
    output_ptr += aligned(batch * stride_output_batch + query_head * stride_output_head, ALIGN)
    if key_bias_ptr is not None:
        key_bias_ptr += batch * stride_bias_batch
    line = local.to(tl.int64) * query_blocks + block
    entries_ptr += line * key_blocks
    count = tl.load(counts_ptr + line)

    scale = tl.cast(scale, tl.float32)
    scale_log2 = tl.abs(scale) * LOG2_E
    if LOW_BIT == "none":
        query = load_tile(
            query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
        )  # (TILE_Q, DIMS)
    else:
        unit = (local // group).to(tl.int64)
        low_key_ptr += unit * key_blocks * BLOCK_K * DIMS
        key_scales_ptr += unit * key_blocks
        if LOW_BIT == "fp8":
            low_value_ptr += unit * key_blocks * BLOCK_K * DIMS
        query, query_scale = quantize_query(
            query_ptr, block * BLOCK_Q, first, length, stride_query_token, stride_query_dim,
            HEAD_DIM, DIMS, BLOCK_Q, TILE_Q, WIDE,
        )  # fmt: skip
        scale_log2 *= query_scale
    # softmax_step takes the maximum of scores before it scales them, which a negative scale would turn around. It makes
    # the query something computed, too, NOTE [Operands].
    query = tl.where(scale < 0, -query, query)
    accumulator = tl.zeros([TILE_Q, DIMS], tl.float32)
    maximum = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    whole = count * STEPS - ragged_steps(entries_ptr, count, key_blocks, length, BLOCK_K, STEPS)
    key_block = tl.load(entries_ptr, mask=whole > 0, other=0)  # NOTE [Prefetch]
    if LATE_VALUES:
        probabilities = tl.zeros([TILE_Q, TILE_K], tl.float32)
        rescale = tl.full([TILE_Q], 1.0, tl.float32)
        late_start = key_block * BLOCK_K  # with probabilities of zero any values that are attended to will do
        for step in range(0, whole):
            start = key_block * BLOCK_K + step % STEPS * TILE_K
            key_block = tl.load(entries_ptr + tl.minimum(step + 1, whole - 1) // STEPS)
            scores = key_product(
                query, key_ptr, low_key_ptr, stride_key_token, stride_key_dim, start, length,
                HEAD_DIM, DIMS, TILE_K, False, LOW_BIT, PRECISION, WIDE,
            )  # fmt: skip
            accumulator = value_product(
                accumulator * rescale[:, None], probabilities, value_ptr, low_value_ptr, stride_value_token,
                stride_value_dim, late_start, length, HEAD_DIM, DIMS, BLOCK_K, TILE_K, False, LOW_BIT, PRECISION, WIDE,
            )  # fmt: skip
            probabilities, maximum, total, rescale = softmax_step(
                scores, maximum, total, key_bias_ptr, key_scales_ptr, stride_bias_token, start, length, scale_log2,
                BLOCK_K, TILE_K, False, LOW_BIT,
            )  # fmt: skip
            late_start = start
        if whole > 0:
            accumulator = value_product(
                accumulator * rescale[:, None], probabilities, value_ptr, low_value_ptr, stride_value_token,
                stride_value_dim, late_start, length, HEAD_DIM, DIMS, BLOCK_K, TILE_K, False, LOW_BIT, PRECISION, WIDE,
            )  # fmt: skip
    else:
        for step in range(0, whole):
            start = key_block * BLOCK_K + step % STEPS * TILE_K
            key_block = tl.load(entries_ptr + tl.minimum(step + 1, whole - 1) // STEPS)
            scores = key_product(
                query, key_ptr, low_key_ptr, stride_key_token, stride_key_dim, start, length,
                HEAD_DIM, DIMS, TILE_K, False, LOW_BIT, PRECISION, WIDE,
            )  # fmt: skip
            probabilities, maximum, total, rescale = softmax_step(
                scores, maximum, total, key_bias_ptr, key_scales_ptr, stride_bias_token, start, length, scale_log2,
                BLOCK_K, TILE_K, False, LOW_BIT,
            )  # fmt: skip
            accumulator = value_product(
                accumulator * rescale[:, None], probabilities, value_ptr, low_value_ptr, stride_value_token,
                stride_value_dim, start, length, HEAD_DIM, DIMS, BLOCK_K, TILE_K, False, LOW_BIT, PRECISION, WIDE,
            )  # fmt: skip
    for step in tl.range(whole, count * STEPS, num_stages=1):
        start = tl.load(entries_ptr + step // STEPS) * BLOCK_K + step % STEPS * TILE_K
        scores = key_product(
            query, key_ptr, low_key_ptr, stride_key_token, stride_key_dim, start, length,
            HEAD_DIM, DIMS, TILE_K, True, LOW_BIT, PRECISION, WIDE,
        )  # fmt: skip
        probabilities, maximum, total, rescale = softmax_step(
            scores, maximum, total, key_bias_ptr, key_scales_ptr, stride_bias_token, start, length, scale_log2,
            BLOCK_K, TILE_K, True, LOW_BIT,
        )  # fmt: skip
        accumulator = value_product(
            accumulator * rescale[:, None], probabilities, value_ptr, low_value_ptr, stride_value_token,
            stride_value_dim, start, length, HEAD_DIM, DIMS, BLOCK_K, TILE_K, True, LOW_BIT, PRECISION, WIDE,
        )  # fmt: skip

    rows = first + tl.arange(0, TILE_Q)
    attended = total > 0
    logsumexp = tl.where(attended, (maximum + tl.log2(tl.where(attended, total, 1.0))) * LN_2, float("-inf"))
    # Read again: it went into the products with another sign, or as int8.
    query = load_tile(
        query_ptr, first, length, stride_query_token, 0, stride_query_dim, TILE_Q, DIMS, HEAD_DIM, True, WIDE
    )  # (TILE_Q, DIMS)
    if LOW_BIT != "none":
        key_mean_ptr += batch * stride_mean_batch + (query_head // group) * stride_mean_head
        mean = load_mean(key_mean_ptr, stride_mean_dim, DIMS, HEAD_DIM)
        logsumexp += scale * tl.sum(query.to(tl.float32) * mean[None, :], 1)  # NOTE [Frame]
    tl.store(logsumexp_ptr + head.to(tl.int64) * length + rows, logsumexp, mask=rows < length)
    dims = tl.arange(0, DIMS)
    if LOW_BIT == "fp8":
        scales_ptr = value_scales_ptr + (head_start // group + local // group).to(tl.int64) * HEAD_DIM
        value_scales = tl.load(scales_ptr + dims, mask=dims < HEAD_DIM, other=0.0) * (1.0 / FP8_MAX)
        accumulator *= value_scales[None, :]
    share = 1.0 / tl.where(attended, total, 1.0)
    if alpha_ptr is not None:
        alpha = tl.load(
            alpha_ptr + batch * stride_alpha_batch + query_head * stride_alpha_head + block * stride_alpha_block
        )
        share *= alpha
    accumulator *= share[:, None]

    if LINEAR != "none":
        if LINEAR == "marginal":
            sums_ptr += line * STATE
        else:
            sums_ptr += (local // group).to(tl.int64) * STATE
        tokens = query.to(tl.float32)
        feature_maximum, normaliser = feature_statistics(tokens, HEAD_DIM, DIMS, FEATURE_MAP)
        phi = feature(tokens, feature_maximum, normaliser, 0, DIMS, HEAD_DIM, FEATURE_MAP)
        z = tl.load(sums_ptr + HEAD_DIM * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        denominator = tl.sum(phi * z[None, :], 1) + tl.cast(epsilon, tl.float32)
        defined = denominator > MIN_DENOMINATOR
        inverse = tl.where(defined, 1.0 / tl.where(defined, denominator, 1.0), 0.0)
        if alpha_ptr is not None:
            inverse *= 1.0 - alpha
        for col in range(0, HEAD_DIM, SLICE):
            part = load_tile(
                query_ptr, first, length, stride_query_token, col, stride_query_dim, TILE_Q, SLICE, HEAD_DIM, True, WIDE
            ).to(tl.float32)  # (TILE_Q, SLICE)
            weights = feature(part, feature_maximum, normaliser, col, SLICE, HEAD_DIM, FEATURE_MAP) * inverse[:, None]
            h = load_tile(
                sums_ptr, col, HEAD_DIM, HEAD_DIM, 0, 1, SLICE, DIMS, HEAD_DIM, HEAD_DIM % SLICE != 0, False
            )  # (SLICE, DIMS), SLA's projection folded in
            accumulator = tl.dot(weights.to(h.dtype), h, accumulator, input_precision=PRECISION)
        if proj_bias_ptr is not None:
            proj_bias = tl.load(proj_bias_ptr + dims * stride_proj_bias, mask=dims < HEAD_DIM, other=0.0)
            accumulator += proj_bias.to(tl.float32)[None, :]

    store_tile(
        output_ptr, accumulator, first, length, stride_output_token, 0, stride_output_dim, TILE_Q, DIMS, HEAD_DIM, WIDE
    )
