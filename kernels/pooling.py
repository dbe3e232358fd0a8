"""Mean tokens of blocks, which routing scores."""

from __future__ import annotations

import triton
import triton.language as tl

from sla_compile.kernels.tiles import aligned, load_tile


@triton.jit(do_not_specialize=["heads", "length", "blocks", "stride_bias_batch"])
def pool_kernel(
    tokens_ptr,
    key_bias_ptr,
    means_ptr,
    counts_ptr,
    stride_tokens_batch,
    stride_tokens_head,
    stride_tokens_token,
    stride_tokens_dim,
    stride_bias_batch,
    stride_bias_token,
    heads,
    length,
    blocks,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The float32 mean over a block's tokens that take part, 0 where none does, and with a key bias how many do."""
    start = tl.program_id(0) % blocks * BLOCK
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    stride_tokens_token = aligned(stride_tokens_token, ALIGN)
    tokens_ptr += aligned(batch * stride_tokens_batch + head * stride_tokens_head, ALIGN)
    tokens = load_tile(
        tokens_ptr, start, length, stride_tokens_token, 0, stride_tokens_dim, BLOCK, DIMS, HEAD_DIM, True, WIDE
    ).to(tl.float32)  # (BLOCK, DIMS)
    count = tl.minimum(length - start, BLOCK)
    if key_bias_ptr is not None:
        token = start + tl.arange(0, BLOCK)
        key_bias_ptr += batch * stride_bias_batch
        bias = tl.load(key_bias_ptr + token.to(tl.int64) * stride_bias_token, mask=token < length, other=float("-inf"))
        valid = bias > float("-inf")
        tokens = tl.where(valid[:, None], tokens, 0.0)
        count = tl.sum(valid.to(tl.int32), 0)
        tl.store(counts_ptr + tl.program_id(0), count.to(tl.float32))
    dims = tl.arange(0, DIMS)
    mean = tl.sum(tokens, 0) / tl.maximum(count, 1).to(tl.float32)
    tl.store(means_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)
