"""Stage 1 of SLA2 for one attention: what alpha is, that the router learns what means do not show, the samples."""

import pytest
import torch
from torch.nn import functional as F

from sla_compile import SLAConfig, route
from sla_compile.router_training import (
    ALPHA_RANGE,
    Router,
    SiteSamples,
    TrainingOptions,
    errors,
    fit_alpha,
    full_attention,
    mass_start,
    row_mass,
    train,
)
from sla_compile.samples import Sample, SampleStore

CPU = torch.device("cpu")


def draw(seed=0, length=64 * 6 + 20, dim=8, heads=2, kv_heads=2, mask=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, length, dim, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    return Sample(query.to(dtype), 2 * key.to(dtype), value.to(dtype), mask)


def uneven(seed, blocks=12, dim=16, heads=2):
    """Some key blocks spread widely, so that full attention prefers their extremes, while their means tell nothing:
    only feature 8 does, which scores do not see, as queries are 0 there. A router can map the constant feature 0 to it.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, heads, blocks, 64, dim, generator=generator)
    spread = 4.0 * (torch.rand(1, heads, blocks, 1, generator=generator) < 0.25)
    query[..., 0], key[..., 0] = 3, 0
    key[..., 1:8] *= 1 + spread[..., None]
    query[..., 8], key[..., 8] = 0, spread
    value = value.mean(3, keepdim=True) * 8 + 0.3 * value
    return Sample(query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3))


def samples_of(drawn, config, sparsities=None):
    return SiteSamples(drawn.__getitem__, len(drawn), config, sparsities or (config.sparsity,), CPU)


def identity(dim, heads=2, blocks=1, alpha=0.5, sparsities=1):
    return Router(torch.eye(dim), torch.eye(dim), (torch.full((heads, blocks), alpha),) * sparsities)


def config_of(sparsity=0.7, **changes):
    return SLAConfig(method="sla2", sparsity=sparsity, min_seq_len=64, **changes)


@pytest.mark.parametrize("masked", [False, True])
def test_row_mass_is_the_probability_on_critical_blocks(monkeypatch, masked):
    mask = None
    if masked:
        mask = torch.zeros(1, 1, 1, 404)
        mask[..., 100:260] = -torch.inf
    sample, config = draw(heads=4, mask=mask), config_of()
    block_map = route(sample.query, sample.key, config=config, key_padding_mask=mask, enable_gqa=True)
    key = sample.key.repeat_interleave(2, 1).double()
    scores = sample.query.double() @ key.transpose(-1, -2) / 8**0.5
    critical = block_map.repeat_interleave(64, 2)[:, :, :404].repeat_interleave(64, 3)[..., :404] == 1
    expected = ((scores + (0 if mask is None else mask)).softmax(-1) * critical).sum(-1)
    torch.testing.assert_close(row_mass(sample, block_map, config).double(), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("sla_compile.router_training.CHUNK_BYTES", 1)
    torch.testing.assert_close(row_mass(sample, block_map, config).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 7])
def test_mass_start_is_the_mean_mass(blocks):
    config = config_of(alpha_per="head" if blocks == 1 else "block")
    drawn = [draw(seed) for seed in range(3)]
    found = mass_start(samples_of(drawn, config), identity(8, blocks=blocks)).alphas[0]
    maps = [route(sample.query, sample.key, config=config) for sample in drawn[:2]]  # the third is held out
    masses = torch.cat([row_mass(s, m, config) for s, m in zip(drawn[:2], maps, strict=True)])
    if blocks == 1:
        expected = masses.mean((0, 2))[:, None]
    else:
        expected = torch.stack([part.mean((0, 2)) for part in masses.split(64, 2)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 7])
def test_fitted_alpha_has_the_least_error(blocks):
    config = config_of(alpha_per="head" if blocks == 1 else "block")
    samples = samples_of([draw(seed) for seed in range(3)], config)
    fitted = fit_alpha(samples, identity(8, blocks=blocks))
    (alpha,), (least,) = fitted.alphas, errors(samples, fitted, samples.training)
    assert alpha.shape == (2, blocks) and (alpha > ALPHA_RANGE[0]).all() and (alpha < ALPHA_RANGE[1]).all()
    for head in range(2):
        for change in (-0.02, 0.02):
            other = alpha.clone()
            other[head, -1] += change
            assert errors(samples, Router(*(torch.eye(8),) * 2, (other,)), samples.training)[0] > least


def test_errors_are_relative_to_full_attention():
    config, sample = config_of(), draw()
    samples = samples_of([sample], config)
    assert samples.held_out == samples.training == range(1)
    target = F.scaled_dot_product_attention(sample.query, sample.key, sample.value)
    torch.testing.assert_close(full_attention(sample), target)
    everything = Router(torch.eye(8), torch.eye(8), (torch.full((2, 1), 0.3),))
    (error,) = errors(samples_of([sample], config.replace(critical_blocks=7)), everything, range(1))
    assert 0 <= error < 1e-10  # all blocks are critical: alpha does not matter
    assert 0.01 < errors(samples, everything, range(1))[0] < 2


@pytest.mark.parametrize("sparsities", [(0.75,), (0.75, 0.6)])
def test_the_router_learns_what_means_do_not_show(sparsities):
    config, drawn = config_of(0.75), [uneven(seed) for seed in range(6)]
    samples = samples_of(drawn, config, sparsities)
    start = mass_start(samples, identity(16, sparsities=len(sparsities)))
    steps = []
    options = TrainingOptions(steps=100, learning_rate=1e-2, tau=0.5, query_blocks=6)
    trained = train(samples, start, options, lambda: steps.append(1))
    assert len(steps) == 100
    fitted = fit_alpha(samples, start)
    before, after = (errors(samples, router, samples.held_out) for router in (fitted, trained))
    assert all(two < 0.5 * one for one, two in zip(before, after, strict=True)), (before, after)
    assert [alpha.shape for alpha in trained.alphas] == [(2, 1)] * len(sparsities)
    assert torch.equal(start.router_q, torch.eye(16))  # what was given is as it was
    again = train(samples, start, options)
    assert torch.equal(again.router_q, trained.router_q) and torch.equal(again.alphas[0], trained.alphas[0])


def test_training_never_ends_worse_than_it_began():
    config = config_of()
    samples = samples_of([draw(seed) for seed in range(2)], config)
    start = mass_start(samples, identity(8))
    wild = train(samples, start, TrainingOptions(steps=4, learning_rate=30.0))
    fitted = fit_alpha(samples, start)
    assert errors(samples, wild, samples.training)[0] <= errors(samples, fitted, samples.training)[0]


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(pinned=(70, 10)),
        dict(alpha_per="block"),
        dict(linear="all"),
        dict(block_q=128),
        dict(critical_blocks=2),
    ],
    ids=str,
)
def test_all_configurations_train(changes):
    config = config_of(**changes)
    mask = torch.zeros(1, 1, 1, 404)
    mask[..., 150:210] = -torch.inf
    drawn = [draw(0, heads=4), draw(1, heads=4, mask=mask)]
    blocks = -(-404 // config.block_q) if config.alpha_per == "block" else 1
    samples = samples_of(drawn, config)
    start = mass_start(samples, identity(8, heads=4, blocks=blocks))
    trained = train(samples, start, TrainingOptions(steps=6, learning_rate=1e-2, query_blocks=3))
    assert trained.alphas[0].shape == (4, blocks)
    assert all(tensor.isfinite().all() for tensor in (trained.router_q, trained.router_k, *trained.alphas))


def test_where_every_block_is_critical_there_is_nothing_to_learn():
    samples = samples_of([draw()], config_of(critical_blocks=7))
    start = identity(8)
    trained = train(samples, start, TrainingOptions(steps=2))
    assert torch.equal(trained.router_q, start.router_q) and torch.equal(trained.alphas[0], start.alphas[0])


def test_a_store_keeps_an_even_share_of_what_it_is_offered(tmp_path):
    def filled(folder, calls=40):
        store = SampleStore(["a"], 4, 3, folder)
        for call in range(calls):
            tokens = torch.full((2, 1, 5, 3), float(call), dtype=torch.bfloat16)
            tokens[1] += 0.5
            store.offer("a", tokens, tokens + 100, tokens - 100, None, 0.25)
        return store

    store, on_disk = filled(None), filled(tmp_path)
    assert store.count("a") == 4 and store.seen["a"] == 80
    kept = [store.get("a", slot) for slot in range(4)]
    assert {sample.query.shape for sample in kept} == {(1, 1, 5, 3)}
    assert len({sample.query.mean().item() for sample in kept}) == 4
    assert any(sample.query.mean() > 2 for sample in kept)  # not just the first ones
    for slot, sample in enumerate(kept):
        again = on_disk.get("a", slot)
        assert again.scale == 0.25 and again.mask is None and again.query.dtype == torch.bfloat16
        assert all(torch.equal(getattr(again, n), getattr(sample, n)) for n in ("query", "key", "value"))
    chances = [0] * 8
    for seed in range(400):
        store = SampleStore(["a"], 2, seed, None)
        for number in range(8):
            store.offer("a", *(torch.full((1, 1, 1, 1), float(number)),) * 3, None, None)
        for slot in range(2):
            chances[int(store.get("a", slot).query)] += 1
    assert all(60 <= chance <= 140 for chance in chances)  # 100 expected, standard deviation 9


def test_a_store_takes_masks_and_single_heads():
    store = SampleStore(["a"], 9, 0, None)
    mask = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    mask[0, ..., 4:] = False
    mask[2] = False  # nothing takes part: no sample
    store.offer("a", *torch.randn(3, 3, 2, 6, 4).unbind(), mask, None)
    assert store.count("a") == 2
    assert store.get("a", 0).mask.tolist() == [[[[0, 0, 0, 0, -torch.inf, -torch.inf]]]]
    assert store.get("a", 1).mask.tolist() == [[[[0] * 6]]]
    store.offer("a", *torch.randn(3, 2, 6, 4).unbind(), torch.zeros(2, 1, 6), None)
    assert store.count("a") == 4 and store.get("a", 3).query.shape == (1, 1, 6, 4)
    assert store.get("a", 3).mask.shape == (1, 1, 1, 6)
