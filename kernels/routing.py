"""Routing: which blocks are critical (+1), marginal (0) and negligible (-1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels.spec import critical_count, negligible_count, num_blocks

SCORES_BYTES = 1 << 26  # of the scores that are there at a time, which grow with the square of the length


def select_blocks(scores: Tensor, critical: int, skipped: int, leading: int, trailing: int) -> Tensor:
    """The block map of scores (B, H, T_m, T_n) float32: 1 for the `critical` highest of a row, -1 for the `skipped`
    lowest, 0 for the others.

    Columns before `leading` and from `trailing` on are 1 and not ranked. The order among equal scores is undefined.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    pinned_columns = (column < leading) | (column >= trailing)
    has_pinned = leading > 0 or trailing < scores.shape[-1]
    highest = scores.masked_fill(pinned_columns, -torch.inf) if has_pinned else scores
    block_map = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    # Negligible first: where scores tie, a block can be in both lists, and critical wins.
    if skipped:
        lowest = scores.masked_fill(pinned_columns, torch.inf) if has_pinned else scores
        block_map.scatter_(-1, lowest.topk(skipped, largest=False, sorted=False).indices, -1)
    if critical:
        block_map.scatter_(-1, highest.topk(critical, sorted=False).indices, 1)
    return block_map.masked_fill_(pinned_columns, 1) if has_pinned else block_map


def pool_blocks(tokens: Tensor, block: int, key_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Float32 means (B, H, T, D) of the blocks' tokens that take part, 0 where none does, and how many do.

    Args:
        tokens: (B, H, L, D), any strides.
        key_bias: (B, L), -inf where a token takes no part; None where all do, and then the counts are None.
    """
    batch, heads, length, dim = tokens.shape
    blocks, full, traced = num_blocks(length, block), length // block, torch.compiler.is_compiling()
    counts = None
    if key_bias is not None:
        valid = key_bias > -torch.inf
        tokens = tokens.masked_fill(~valid[:, None, :, None], 0)
        counts = F.pad(valid.float(), (0, blocks * block - length))
        counts = counts.view(batch, 1, blocks, block).sum(-1)[..., None]
    if traced:  # Dynamo refuses out= of a part; padded, ragged lengths and others are one program
        padded = F.pad(tokens, (0, 0, 0, blocks * block - length))
        sums = torch.unflatten(padded, 2, (blocks, block)).sum(3, dtype=torch.float32)
    else:
        sums = tokens.new_empty(batch, heads, blocks, dim, dtype=torch.float32)
        _sum_blocks(tokens, block, sums)
    sizes = counts
    if sizes is None:
        sizes = sums.new_full((blocks, 1), block)
        if traced or full < blocks:
            sizes[-1] = length - (blocks - 1) * block
    return sums / sizes.clamp(min=1), counts


def _sum_blocks(tokens: Tensor, block: int, sums: Tensor) -> None:
    """Sums of the tokens of each block, into float32 (B, H, T, D)."""
    length = tokens.shape[2]
    full = length // block
    if full:
        whole = torch.unflatten(tokens[:, :, : full * block], 2, (full, block))
        if tokens.device.type == "cpu" and tokens.dtype != torch.float32:
            # The CPU's sum would first convert all tokens: converted some at a time they stay in the cache.
            for entry in range(tokens.shape[0]):
                for head in range(tokens.shape[1]):
                    for part, out in zip(whole[entry, head].split(8), sums[entry, head, :full].split(8), strict=True):
                        torch.sum(part.float(), 1, out=out)
        else:
            torch.sum(whole, 3, dtype=torch.float32, out=sums[:, :, :full])
    if full * block < length:
        torch.sum(tokens[:, :, full * block :], 2, dtype=torch.float32, out=sums[:, :, full])


@torch.no_grad()
def route(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    sparsity: float,
    negligible: float,
    critical_blocks: int | None = None,
    pinned: tuple[int, int] = (0, 0),
    key_bias: Tensor | None = None,
    router_q: Tensor | None = None,
    router_k: Tensor | None = None,
    pool: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]] = pool_blocks,
    select: Callable[[Tensor, int, int, int, int], Tensor] = select_blocks,
) -> Tensor:
    """Classifies the blocks of an attention by the pooled scores of their tokens.

    ``rank_j(s * meanpool(Q)_i . meanpool(K - mean(K))_j)`` (SLA, arXiv 2509.24006, equation 2 and 3): ranks see neither
    the softmax, which is monotonic, nor a positive s. Pooling and scoring are float32 whatever the input is. Routers
    multiply the pooled tokens first: ``(R_q meanpool(Q)_i) . (R_k meanpool(K - mean(K))_j)`` (SLA2, arXiv 2602.12675).

    Args:
        query: (B, H, L, D); key: (B, H_kv, L, D), H a multiple of H_kv; any strides.
        key_bias: (B, L) float32, -inf where a key takes no part; those keys are not pooled.
        router_q, router_k: (D, D) as in nn.Linear, shared by the heads; None is the identity.
        pool, select: what a device has faster ones of than :func:`pool_blocks` and :func:`select_blocks`.

    Returns:
        int8 (B, H, T_m, T_n), with at least one +1 in each row.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    rows, columns = num_blocks(length, block_q), num_blocks(length, block_k)
    pooled_query, pooled_key, counts = pooled_tokens(query, key, block_q, block_k, key_bias, pool)
    if router_q is not None:
        pooled_query = F.linear(pooled_query, router_q.float())
    if router_k is not None:
        pooled_key = F.linear(pooled_key, router_k.float())

    leading, trailing, pinned_count = pinned_first_last(length, block_k, pinned)
    free = columns - int(pinned_count)
    critical = min(critical_count(columns, sparsity, critical_blocks), free) if free else 0
    skipped = negligible_count(free, critical, negligible)

    def classes(some: Tensor) -> Tensor:
        grouped = some.reshape(batch, kv_heads, heads // kv_heads * some.shape[2], some.shape[3])
        scores = torch.matmul(grouped, pooled_key.transpose(-1, -2)).view(batch, heads, some.shape[2], columns)
        if scale <= 0:
            scores = scores * scale
        if counts is not None:
            scores = scores.masked_fill((counts[:, :1] == 0).transpose(-1, -2), -torch.inf)
        return select(scores, critical, skipped, leading, trailing)

    if torch.compiler.is_compiling() or 4 * batch * heads * rows * columns <= SCORES_BYTES:
        block_map = classes(pooled_query)
    else:
        parts = pooled_query.split(max(1, SCORES_BYTES // (4 * batch * heads * columns)), 2)
        block_map = torch.cat([classes(part) for part in parts], 2)
    if pinned_count:
        block_map.masked_fill_(pinned_blocks(length, block_q, pinned, query.device)[:, None], 1)
    return block_map


def pooled_tokens(
    query: Tensor,
    key: Tensor,
    block_q: int,
    block_k: int,
    key_bias: Tensor | None,
    pool: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]] = pool_blocks,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float32 means of the query blocks (B, H, T_m, D) and, less their mean, of the key blocks (B, H_kv, T_n, D), and
    how many keys of each block take part, as of :func:`pool_blocks`. No gradient goes through them."""
    pooled_query, _ = pool(query, block_q, None)
    pooled_key, counts = pool(key, block_k, key_bias)
    if counts is None:  # a ragged last block may count as a whole one: ranks do not see what all keys have subtracted
        return pooled_query, pooled_key - pooled_key.mean(2, keepdim=True), None
    mean = (pooled_key * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)
    return pooled_query, pooled_key - mean, counts


def pinned_first_last(length: int, block: int, pinned: tuple[int, int]) -> tuple[int, int, int]:
    """(end of the leading pinned blocks, start of the trailing ones, number of pinned blocks)."""
    blocks = num_blocks(length, block)
    first, last = pinned
    leading = min(num_blocks(first, block), blocks)
    trailing = blocks if last == 0 else max((length - last) // block, leading)
    return leading, max(trailing, leading), leading + blocks - max(trailing, leading)


def pinned_blocks(length: int, block: int, pinned: tuple[int, int], device: torch.device) -> Tensor:
    """Boolean (blocks,): the block holds a pinned token."""
    leading, trailing, _ = pinned_first_last(length, block, pinned)
    index = torch.arange(num_blocks(length, block), device=device)
    return (index < leading) | (index >= trailing)
