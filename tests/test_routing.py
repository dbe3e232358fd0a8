"""Routing: which blocks are critical, marginal and negligible, against a float64 brute force."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import every_other, pairs
from torch import Tensor

import sla_compile
from sla_compile import SLAConfig
from sla_compile.kernels.routing import pinned_blocks, pinned_first_last, route
from sla_compile.kernels.spec import critical_count, negligible_count, num_blocks
from sla_compile.ops import routing_kernels

SCALE = 0.125


def classify(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    arguments = dict(scale=SCALE, block_q=64, block_k=64, sparsity=0.8, negligible=0.0)
    return route(query, key, **{**arguments, **options})


def block_scores(
    query: Tensor, key: Tensor, block_q: int = 64, block_k: int = 64, valid: Tensor | None = None
) -> Tensor:
    """Pooled scores (B, H, T_m, T_n) in float64, block by block, -inf for a block without a valid key."""
    batch, heads, length, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[1], 1).double()
    query = query.double()
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    scores = torch.full((batch, heads, num_blocks(length, block_q), num_blocks(length, block_k)), -torch.inf).double()
    for entry in range(batch):
        kept = valid[entry]
        mean = key[entry][:, kept].mean(1, keepdim=True) if kept.any() else 0
        for row in range(scores.shape[2]):
            pooled_query = query[entry, :, row * block_q : (row + 1) * block_q].mean(1)
            for column in range(scores.shape[3]):
                part = slice(column * block_k, min((column + 1) * block_k, length))
                if kept[part].any():
                    pooled_key = (key[entry, :, part] - mean)[:, kept[part]].mean(1)
                    scores[entry, :, row, column] = SCALE * (pooled_query * pooled_key).sum(-1)
    return scores


def expected(scores: Tensor, critical: int, negligible: int) -> Tensor:
    order = scores.argsort(-1, descending=True)
    classes = torch.zeros(scores.shape, dtype=torch.int8)
    classes.scatter_(-1, order[..., scores.shape[-1] - negligible :], -1)
    return classes.scatter_(-1, order[..., :critical], 1)


@pytest.mark.parametrize(
    ("blocks", "sparsity", "explicit", "critical"),
    [(10, 0.8, None, 2), (10, 0.95, None, 1), (128, 0.95, None, 6), (20, 0.95, None, 1), (1, 0.5, None, 1),
     (7, 0.5, None, 3), (10, 0.8, 4, 4), (3, 0.8, 9, 3)],
)  # fmt: skip
def test_critical_count(blocks: int, sparsity: float, explicit: int | None, critical: int) -> None:
    assert critical_count(blocks, sparsity, explicit) == critical


def test_negligible_gives_way_to_critical() -> None:
    assert negligible_count(10, 2, 0.35) == 3
    assert negligible_count(10, 9, 0.35) == 1
    assert negligible_count(10, 10, 0.35) == 0


@pytest.mark.parametrize("length", [640, 641, 700, 64, 63, 1])
@pytest.mark.parametrize("negligible", [0.0, 0.3])
@pytest.mark.parametrize("block_q", [64, 128])
def test_ranks_pooled_scores(length: int, negligible: float, block_q: int) -> None:
    """Ragged last blocks are divided by their true number of tokens."""
    query, key = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16) + 3
    found = classify(query, key, negligible=negligible, block_q=block_q)
    columns = num_blocks(length, 64)
    critical = critical_count(columns, 0.8, None)
    skipped = negligible_count(columns, critical, negligible)
    assert found.dtype == torch.int8
    assert torch.equal(found, expected(block_scores(query, key, block_q), critical, skipped))


def test_ragged_block_is_a_mean_of_its_own_tokens() -> None:
    """Two strong tokens in the last block: divided by 64, they would lose against an ordinary block."""
    query, key = torch.ones(1, 1, 258, 4), torch.zeros(1, 1, 258, 4)
    key[:, :, 64:128] = 0.2
    key[:, :, 256:] = 1.0
    assert classify(query, key, critical_blocks=1)[0, 0, 0].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_offset_common_to_all_keys_changes_nothing(dtype: torch.dtype) -> None:
    """Pooling and scoring are float32: a mean far above the differences does not drown them."""
    raised = torch.arange(64) < torch.randperm(20)[:, None]  # in block j, so many tokens of 64 at 64.5
    key = torch.full((1, 2, 1280, 8), 64.0)
    key[..., 0] += 0.5 * raised.flatten()
    query = torch.zeros(1, 2, 1280, 8)
    query[..., 0] = torch.tensor([1.0, -1.0])[:, None]
    found = classify(query.to(dtype), key.to(dtype), negligible=0.1)
    assert torch.equal(found, expected(block_scores(query, key), 4, 2))


def test_shared_key_heads() -> None:
    query, key = torch.randn(2, 6, 640, 16), torch.randn(2, 2, 640, 16)
    assert torch.equal(classify(query, key), classify(query, key.repeat_interleave(3, 1)))


def test_any_strides() -> None:
    packed = torch.randn(2, 640, 3, 4, 16)
    query, key = packed[:, :, 0].transpose(1, 2), packed[:, :, 2].transpose(1, 2)
    assert torch.equal(classify(query, key), classify(query.contiguous(), key.contiguous()))
    spread = torch.randn(2, 4, 640, 16, 2)[..., 1]
    assert torch.equal(classify(spread, key), classify(spread.contiguous(), key.contiguous()))


def test_masked_keys_are_not_pooled_and_empty_blocks_come_last() -> None:
    query, key = torch.randn(2, 2, 640, 16), torch.randn(2, 2, 640, 16)
    valid = torch.rand(2, 640) < 0.5
    valid[0, 128:256] = False
    key[:, :, 128:256] = 100.0  # would win, in entry 0, if it were pooled
    bias = torch.zeros(2, 640).masked_fill(~valid, -torch.inf)
    found = classify(query, key, key_bias=bias)
    assert torch.equal(found, expected(block_scores(query, key, valid=valid), 2, 0))
    assert (found[0, :, :, 2:4] == 0).all()


def test_entry_without_valid_keys_still_has_critical_blocks() -> None:
    query, key = torch.randn(1, 1, 640, 16), torch.randn(1, 1, 640, 16)
    found = classify(query, key, key_bias=torch.full((1, 640), -torch.inf))
    assert ((found == 1).sum(-1) == 2).all()


def test_mask_of_all_true_changes_nothing() -> None:
    query, key = torch.randn(1, 2, 700, 16), torch.randn(1, 2, 700, 16)
    assert torch.equal(classify(query, key), classify(query, key, key_bias=torch.zeros(1, 700)))


@pytest.mark.parametrize("critical", [1, 3, 10])
@pytest.mark.parametrize("negligible", [0.0, 0.2])
def test_ties_keep_the_count(critical: int, negligible: float) -> None:
    found = classify(
        torch.ones(1, 2, 640, 8), torch.ones(1, 2, 640, 8), critical_blocks=critical, negligible=negligible
    )
    assert ((found == 1).sum(-1) == critical).all()
    # Where everything ties a block can be in both lists, and critical wins: never more than the share.
    assert ((found == -1).sum(-1) <= negligible_count(10, critical, negligible)).all()


def test_one_block_is_critical() -> None:
    assert classify(torch.randn(1, 1, 50, 8), torch.randn(1, 1, 50, 8), negligible=0.9).tolist() == [[[[1]]]]


@pytest.mark.parametrize(
    ("length", "pinned", "leading", "trailing", "count"),
    [(640, (0, 0), 0, 10, 0), (640, (1, 0), 1, 10, 1), (640, (64, 0), 1, 10, 1), (640, (65, 1), 2, 9, 3),
     (650, (0, 10), 0, 10, 1), (650, (0, 11), 0, 9, 2), (640, (600, 600), 10, 10, 10), (100, (999, 999), 2, 2, 2)],
)  # fmt: skip
def test_pinned_blocks(length: int, pinned: tuple[int, int], leading: int, trailing: int, count: int) -> None:
    assert pinned_first_last(length, 64, pinned) == (leading, trailing, count)
    blocks = pinned_blocks(length, 64, pinned, torch.device("cpu"))
    first, last = pinned
    pins = [start < first or min(start + 64, length) > length - last for start in range(0, length, 64)]
    assert blocks.tolist() == pins


@pytest.mark.parametrize("block_q", [64, 128])
def test_pinned_tokens_stay_exact(block_q: int) -> None:
    """Every query attends to pinned blocks, pinned queries to all, and the budget goes to the others."""
    query, key = torch.randn(1, 2, 1300, 16), torch.randn(1, 2, 1300, 16)
    found = classify(query, key, pinned=(70, 30), negligible=0.25, block_q=block_q)
    columns = pinned_blocks(1300, 64, (70, 30), query.device)
    rows = pinned_blocks(1300, block_q, (70, 30), query.device)
    assert (found[..., columns] == 1).all() and (found[:, :, rows] == 1).all()
    free = found[:, :, ~rows][..., ~columns]
    scores = block_scores(query, key, block_q)[:, :, ~rows][..., ~columns]
    share = negligible_count(int((~columns).sum()), 4, 0.25)
    assert torch.equal(free, expected(scores, 4, share))


def test_everything_pinned() -> None:
    query = torch.randn(1, 1, 300, 8)
    assert (classify(query, query, pinned=(300, 0), negligible=0.5) == 1).all()


@pytest.mark.parametrize(
    ("config", "masked"),
    every_other(pairs([SLAConfig(pinned=(70, 30)), SLAConfig(sparsity=0.75, negligible=0.1)], [True, False])),
)
def test_traces(config: SLAConfig, masked: bool) -> None:
    """Ragged lengths and others, in one program while the length is dynamic."""

    class Route(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            mask = query[:, :1, None, :, 0] > -1 if masked else None
            return sla_compile.route(query, query, config=config, key_padding_mask=mask)

    query = torch.randn(3, 2, 700, 16)
    program = torch.export.export(Route(), (query,), strict=True)
    assert torch.equal(program.module()(query), Route()(query))
    compiled = torch.compile(Route(), backend="aot_eager", fullgraph=True, dynamic=True)
    for number, length in enumerate((700, 704, 750)):
        query = torch.randn(3, 2, length, 16)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert torch.equal(compiled(query), Route()(query))


def test_a_trace_takes_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo follows neither their launcher nor its choice of a device: torch.compile would fail for CUDA tensors."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert routing_kernels(mock.Mock(is_cuda=True)) == {}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 900),
    st.floats(0.05, 0.99),
    st.floats(0.0, 0.9),
    st.sampled_from([64, 128]),
    st.tuples(st.integers(0, 300), st.integers(0, 300)),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_counts_of_every_row(
    length: int,
    sparsity: float,
    negligible: float,
    block_q: int,
    pinned: tuple[int, int],
    masked: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, length, 4, generator=generator) for heads in (2, 1))
    valid = torch.rand(length, generator=generator) < (0.02 if masked else 1)
    bias = torch.zeros(1, length).masked_fill(~valid, -torch.inf) if masked else None
    found = classify(
        query, key, sparsity=sparsity, negligible=negligible, block_q=block_q, pinned=pinned, key_bias=bias
    )
    columns = pinned_blocks(length, 64, pinned, query.device)
    rows = pinned_blocks(length, block_q, pinned, query.device)
    free = int((~columns).sum())
    critical = min(critical_count(columns.numel(), sparsity, None), free)
    assert found.shape == (1, 2, num_blocks(length, block_q), num_blocks(length, 64))
    assert (found[:, :, rows] == 1).all() and (found[..., columns] == 1).all()
    others = found[:, :, ~rows][..., ~columns]
    skipped = negligible_count(free, critical, negligible)
    if not masked:
        assert ((others == 1).sum(-1) == critical).all()
        assert ((others == -1).sum(-1) == skipped).all()
        return
    # Blocks without a valid key tie, with each other and with pinned ones: those with one go before them, and what is
    # critical without one attends to nothing.
    occupied = torch.stack([part.any() for part in valid.split(64)])[~columns]
    assert ((others == 1).sum(-1) <= critical).all()
    assert ((others[..., occupied] == 1).sum(-1) == min(critical, int(occupied.sum()))).all()
    assert ((others == -1).sum(-1) <= skipped).all()
    assert (found == 1).any(-1).all()
