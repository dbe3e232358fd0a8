"""Sparse-linear attention as a graph of core ATen operators, for compilers and runtimes that cannot call the kernels.

The same numbers as the kernels: routing, both branches and the projection in float32 (float64 for float64 inputs).

NOTE [A loop over slots]
The n-th critical block of every row is slot n. One iteration of a `while_loop` gathers slot n of all rows and adds it
by an online softmax, so that the number of critical blocks is a trip count and no dimension of any tensor: dimensions
that are a share of the length cannot be exported, and `topk` with such a count has been frozen silently to the
example's.
It also bounds memory: nothing is larger than a few times the query, or (D + 1) / block_k times the value for the
linear branch, at any length and sparsity.

NOTE [One block more]
Under a symbolic length there is at least one block more than the tokens need. Whether a dimension is 1 and whether
padding changes a size then has the same answer at every length, so tracing, which settles such questions with the
example's length, adds no condition that another length breaks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.reference import feature
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec, num_blocks


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    router_q: Tensor | None,
    router_k: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    block_map: Tensor | None,
    scale: float,
    sparsity: float,
    negligible: float,
    critical_blocks: int,
    pinned_first: int,
    pinned_last: int,
    feature_map: str,
    linear: str,
    block_q: int,
    block_k: int,
    low_bit: str,
    impl_version: int,
    *,
    eager: bool = False,
) -> tuple[Tensor, Tensor]:
    """``O_s + O_l W^T + b`` (SLA, arXiv 2509.24006, equations 2 to 6) or ``alpha O_s + (1 - alpha) O_l`` (SLA2, arXiv
    2602.12675): arguments and results as of the op ``sla_compile::sparse_linear_attention``, for inference; the length
    may be symbolic.

    Args:
        eager: run the loop now, and differentiably, instead of recording it.
    """
    if low_bit != "none":
        raise NotImplementedError(f'low_bit="{low_bit}" has kernels only; accelerate with low_bit=None for this export')
    batch, heads, length, dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    spec = Spec(scale, feature_map, linear, block_q, block_k)
    rows, columns = padded_blocks(length, block_q), padded_blocks(length, block_k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = key_bias(key_padding_mask, batch, length)

    queries = blocks(query.to(dtype), block_q, rows)
    keys, values = (blocks(tokens.to(dtype), block_k, columns) for tokens in (key, value))
    pinned = (pinned_first, pinned_last) if block_map is None or eager else (0, 0)
    if block_map is None:
        block_map = route(
            queries, keys, length, bias, spec, sparsity=sparsity, negligible=negligible,
            critical_blocks=critical_blocks, pinned=pinned, router_q=router_q, router_k=router_k,
        )  # fmt: skip
    else:
        block_map = F.pad(block_map, (0, columns - block_map.shape[3], 0, rows - block_map.shape[2]))

    bias = _padded_bias(bias, length, columns * block_k, query.device).to(dtype)
    bias = bias.view(-1, 1, columns, block_k).expand(batch, kv_heads, columns, block_k)
    critical = block_map == 1
    if any(pinned):  # these rows have many more slots than the others, and get a loop of their own
        held = _pinned_blocks(length, block_q, rows, pinned, query.device)
        output, logsumexp = _sparse(queries, keys, values, bias, critical & ~held[:, None], spec, eager)
        index = _pinned_rows(length, block_q, rows, pinned, query.device)
        exact = _sparse(
            queries.index_select(2, index), keys, values, bias, critical.index_select(2, index), spec, eager
        )
        output, logsumexp = (all.index_copy(2, index, own) for all, own in zip((output, logsumexp), exact, strict=True))
    else:
        output, logsumexp = _sparse(queries, keys, values, bias, critical, spec, eager)
    if linear != "none":
        valid = bias > -torch.inf
        if alpha is not None:  # see smoothing.py
            keys = keys - _mean(keys, valid)
        # The ones give the denominator as one more column of the product.
        weighted = torch.cat([values, torch.ones_like(values[..., :1])], -1) * bias.exp()[..., None]
        sums = feature(keys, feature_map).transpose(-1, -2) @ weighted  # (B, H_kv, T_n, D, D + 1)
        selected = _selected_sums(sums, block_map, linear, group)
        product = feature(queries, feature_map) @ selected
        denominator = product[..., dim:] + spec.epsilon
        defined = denominator > MIN_DENOMINATOR
        mean = torch.where(defined, product[..., :dim] / torch.where(defined, denominator, 1), 0)
        if alpha is not None:
            marginal = ((block_map == 0) & valid[:, :1].any(-1)[:, :, None]).any(-1)
            share = torch.where(marginal, _by_row(alpha.to(dtype), rows), 1)[..., None, None]
            output = share * output + (1 - share) * mean
        elif proj_weight is not None:
            offset = None if proj_bias is None else proj_bias.to(dtype)
            output = output + F.linear(mean, proj_weight.to(dtype), offset)
        else:
            raise ValueError(f'linear="{linear}" needs proj_weight or alpha')

    output = output.view(batch, heads, rows * block_q, dim)[:, :, :length].to(query.dtype)
    logsumexp = logsumexp.view(batch, heads, rows * block_q)[:, :, :length]
    # The layout of the op's output, which views of it may have been traced with.
    return output.transpose(1, 2).contiguous().transpose(1, 2), logsumexp.contiguous()


def route(
    queries: Tensor,
    keys: Tensor,
    length: int,
    bias: Tensor | None,
    spec: Spec,
    *,
    sparsity: float,
    negligible: float,
    critical_blocks: int,
    pinned: tuple[int, int],
    router_q: Tensor | None = None,
    router_k: Tensor | None = None,
) -> Tensor:
    """The block map of routing.py, by rank: int32 (B, H, T_m, T_n); TensorRT takes int8 for something quantised.

    Args:
        queries: (B, H, T_m, b_q, D), keys: (B, H_kv, T_n, b_k, D), zero past `length`.
        bias: (B, length), -inf where a key takes no part.
    """
    batch, heads, rows, _, dim = queries.shape
    kv_heads, columns, block = keys.shape[1:4]
    device = queries.device
    valid = _padded_bias(bias, length, columns * block, device) > -torch.inf
    valid = valid.view(-1, 1, columns, block, 1)
    count = valid.sum(3).float()  # (B or 1, 1, T_n, 1)
    pooled_key = torch.where(valid, keys, 0).float().sum(3) / count.clamp(min=1)
    pooled_key = pooled_key - (pooled_key * count).sum(2, keepdim=True) / count.sum(2, keepdim=True).clamp(min=1)
    tokens = torch.arange(rows * spec.block_q, device=device).view(rows, spec.block_q) < length
    pooled_query = queries.float().sum(3) / tokens.sum(1, keepdim=True).clamp(min=1)
    if router_q is not None:
        pooled_query = F.linear(pooled_query, router_q.float())
    if router_k is not None:
        pooled_key = F.linear(pooled_key, router_k.float())

    grouped = pooled_query.view(batch, kv_heads, heads // kv_heads * rows, dim)
    scores = (grouped @ pooled_key.transpose(-1, -2)).view(batch, heads, rows, columns) * spec.scale
    # Behind all others rank the pinned columns and those past the length, and before them those without a valid key.
    if bias is not None:
        scores = torch.where(count.transpose(-1, -2) == 0, torch.finfo(torch.float32).min, scores)
    pinned_columns = _pinned_blocks(length, spec.block_k, columns, pinned, device)
    past = torch.arange(columns, device=device) * block >= length
    scores = torch.where(pinned_columns | past, -torch.inf, scores)
    # Tensors, not symbolic numbers: see NOTE [A loop over slots].
    existing = (~past).sum().double()
    free = existing - pinned_columns.sum()
    critical = torch.floor(existing * (1.0 - sparsity) + 1e-6).clamp(min=1)
    if critical_blocks:
        critical = torch.full_like(existing, critical_blocks)
    critical = torch.minimum(critical, free)
    skipped = torch.minimum(torch.floor(free * negligible), free - critical)

    rank = torch.arange(columns, device=device)
    by_rank = torch.where((rank >= free - skipped) & (rank < free), -1, (rank < critical).long()).int()
    order = scores.sort(-1, descending=True).indices
    block_map = torch.zeros_like(scores, dtype=torch.int32).scatter(-1, order, by_rank.expand(scores.shape))
    pinned_rows = _pinned_blocks(length, spec.block_q, rows, pinned, device)
    return torch.where((pinned_columns | pinned_rows[:, None]) & ~past, 1, block_map)


def padded_blocks(length: int, block: int) -> int:
    """Number of blocks to pad the length to: see NOTE [One block more]."""
    return num_blocks(length, block) if isinstance(length, int) else length // block + 2


def blocks(tokens: Tensor, block: int, count: int) -> Tensor:
    """(B, H, L, D) padded with zeros to (B, H, count, block, D)."""
    batch, heads, length, dim = tokens.shape
    if not (isinstance(length, int) and length == count * block):
        tokens = F.pad(tokens, (0, 0, 0, count * block - length))
    return tokens.contiguous().view(batch, heads, count, block, dim)


def _mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the tokens (B, H, T, b, D) that take part, (B, H, T, b): (B, H, 1, 1, D), 0 where none does."""
    total = torch.where(valid[..., None], tokens, 0).sum((2, 3), keepdim=True)
    return total / valid.sum((2, 3), keepdim=True)[..., None].clamp(min=1)


def _by_row(alpha: Tensor, rows: int) -> Tensor:
    """alpha (H, 1) or (H, T_m), the latter padded to the number of rows."""
    return alpha if alpha.shape[1] == 1 else F.pad(alpha, (0, rows - alpha.shape[1]))


def _padded_bias(bias: Tensor | None, length: int, padded: int, device: torch.device) -> Tensor:
    """(B or 1, padded): the bias, and -inf past the length."""
    if bias is None:
        past = torch.arange(padded, device=device) >= length
        return torch.where(past, -torch.inf, 0.0)[None]
    return F.pad(bias, (0, padded - length), value=-torch.inf)


def _pinned_blocks(length: int, block: int, count: int, pinned: tuple[int, int], device: torch.device) -> Tensor:
    """Boolean (count,): the block holds a pinned token, see routing.pinned_blocks."""
    index = torch.arange(count, device=device)
    first, last = pinned
    held = index < num_blocks(first, block)
    if last:
        held = held | ((index + 1) * block > length - last)
    return held & (index * block < length)


def _pinned_rows(length: int, block: int, count: int, pinned: tuple[int, int], device: torch.device) -> Tensor:
    """Indices that hold all pinned blocks: as many at all lengths, so that others and repeated ones may be in."""
    first, last = pinned
    index = torch.arange(num_blocks(first, block) + (num_blocks(last, block) + 1 if last else 0), device=device)
    if last:
        start = torch.scalar_tensor(length - last, dtype=torch.int64, device=device)
        start = torch.div(start, block, rounding_mode="floor")
        leading = num_blocks(first, block)
        index = torch.where(index < leading, index, index - leading + start)
    return index.clamp(0, count - 1)


def _sparse(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, critical: Tensor, spec: Spec, eager: bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the critical blocks (B, H, T_m, T_n): output (B, H, T_m, b_q, D), log-sum-exp without
    D."""
    from torch._higher_order_ops.while_loop import while_loop_op  # torch.while_loop would call Dynamo

    batch, heads, rows = queries.shape[:3]
    kv_heads, columns = keys.shape[1:3]
    count = critical.sum(-1)
    # Critical blocks first; each as a row of the flattened keys.
    slots = critical.int().sort(-1, descending=True).indices
    owner = torch.arange(batch * kv_heads, device=queries.device).view(batch, kv_heads, 1, 1, 1)
    slots = slots.view(batch, kv_heads, heads // kv_heads, rows, columns) + owner * columns

    def go_on(slot, output, largest, total, most, *_):
        return slot < most

    def add_slot(slot, output, largest, total, most, slots, count, queries, keys, values, bias):
        block = slots.index_select(1, slot.view(1)).squeeze(1)
        scores = torch.bmm(queries, keys.index_select(0, block).transpose(1, 2)) * spec.scale
        scores = scores + bias.index_select(0, block)[:, None]
        scores = torch.where((slot < count)[:, None, None], scores, -torch.inf)
        above = torch.maximum(largest, scores.amax(-1, keepdim=True))
        shift = torch.where(above == -torch.inf, 0, above)
        weights, before = torch.exp(scores - shift), torch.exp(largest - shift)
        output = output * before + torch.bmm(weights, values.index_select(0, block))
        return slot + 1, output, above, total * before + weights.sum(-1, keepdim=True), most.clone()

    flat = (
        slots.flatten(0, 3), count.flatten(), queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2),
        bias.flatten(0, 2),
    )  # fmt: skip
    statistics = torch.full_like(flat[2][..., :1], -torch.inf)
    first = torch.zeros((), dtype=torch.int64, device=queries.device)
    carried = (first, torch.zeros_like(flat[2]), statistics, torch.zeros_like(statistics), count.flatten().amax(0))
    loop: Callable = _run_loop if eager else while_loop_op
    _, output, largest, total, _ = loop(go_on, add_slot, carried, flat)
    output = output / torch.where(total > 0, total, 1)
    logsumexp = largest + torch.where(total > 0, total, 1).log()
    return output.view(queries.shape), logsumexp.view(queries.shape[:-1])


def _run_loop(_: Callable, body: Callable, carried: tuple, flat: tuple) -> tuple:
    for _slot in range(int(carried[-1])):  # what go_on would compare, read once
        carried = body(*carried, *flat)
    return carried


def _selected_sums(sums: Tensor, block_map: Tensor, linear: str, group: int) -> Tensor:
    """Sums of the key blocks of each query block: (B, H, T_m or 1, D, D + 1)."""
    batch, kv_heads, columns, dim, width = sums.shape
    if linear == "all":
        total = sums.sum(2)[:, :, None].expand(batch, kv_heads, group, dim, width)
        return total.reshape(batch, kv_heads * group, 1, dim, width)
    rows = block_map.shape[2]
    marginal = (block_map == 0).to(sums.dtype).view(batch, kv_heads, group * rows, columns)
    selected = marginal @ sums.view(batch, kv_heads, columns, dim * width)
    return selected.view(batch, kv_heads * group, rows, dim, width)
