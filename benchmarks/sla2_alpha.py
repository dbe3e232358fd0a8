"""Where SLA2's alpha may come from without any training, and what error each leaves against full attention.

    python examples/moving_shapes.py --save weights.pt      # some minutes on one core
    python benchmarks/sla2_alpha.py --load weights.pt       # without --load on clustered keys alone

One for each head, from other samples: the mean mass that full attention puts on the chosen blocks, and the alpha of
least squared error (`fit_alpha`, what calibrate does). One for each query block, from the call itself: the mass that
the softmax of the pooled scores puts on the chosen blocks, weighted by their sizes, which costs next to nothing; and,
for what could be reached, the true mass and the best alpha of the block. Routers are the identity. Numbers are the
relative squared error ``sum |O - O_full|^2 / sum |O_full|^2`` on samples that were not fitted on.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from sla_compile import SLAConfig, accelerate, dense, route, sparse_linear_attention
from sla_compile.kernels.routing import pooled_tokens
from sla_compile.ops import default_scale
from sla_compile.router_training import Router, SiteSamples, fit_alpha, full_attention, mass_start, row_mass
from sla_compile.samples import Observer, Sample, SampleStore

COLUMNS = ("sparse alone", "head: mass", "head: fitted", "block: pooled mass", "block: true mass", "block: fitted")


def clustered(strength: float, count: int = 4, length: int = 4096, dim: int = 32, heads: int = 2) -> list[Sample]:
    """Tokens around one of 16 centres of this norm, 32 in a row around the same; values have centres, too."""
    found = []
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        centres, of_values = torch.randn(2, 1, heads, 16, dim, generator=random)
        centres = strength * centres / centres.norm(dim=-1, keepdim=True)
        label = torch.randint(16, (length // 32,), generator=random).repeat_interleave(32)
        query, key, value = torch.randn(3, 1, heads, length, dim, generator=random)
        near = centres[:, :, label]
        found.append(Sample(near + query / 2, near + key / 2, of_values[:, :, label] + 0.3 * value))
    return found


def of_model(weights: str, count: int = 8) -> dict[str, list[Sample]]:
    """Samples of the trained video transformer's attentions, of mixed noise levels."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import moving_shapes

    model = moving_shapes.VideoTransformer()
    model.load_state_dict(torch.load(weights))
    accelerate(model.eval(), config=SLAConfig(method="sla2", min_seq_len=64))
    names = [f"blocks.{i}.attn" for i in range(len(model.blocks))]
    store = SampleStore(names, count, 0, None)
    for name in names:
        model.get_submodule(name)._sla_redirection.observer = Observer(name, store, lambda _: None)
    clips = moving_shapes.validation(count, seed=77)
    with torch.no_grad(), dense(model):
        for number in (0, 2, 4, 6, 7, 5, 1, 3):  # the last quarter is held out, and not the noisiest
            model(*clips[number][:2])
    return {name: [store.get(name, slot) for slot in range(count)] for name in names}


def pooled_mass(sample: Sample, block_map: Tensor, config: SLAConfig) -> Tensor:
    """(H, T_m): share of the pooled scores' softmax, weighted by block sizes, on the chosen blocks."""
    query, key, _ = pooled_tokens(sample.query, sample.key, config.block_q, config.block_k, None)
    starts = torch.arange(key.shape[2]) * config.block_k
    sizes = (sample.key.shape[2] - starts).clamp(max=config.block_k)
    scores = default_scale(None, query.shape[-1]) * query @ key.transpose(-1, -2) + sizes.log()
    return (scores.softmax(-1) * (block_map == 1)).sum(-1)[0]


@torch.no_grad()
def measure(samples: list[Sample], sparsity: float) -> tuple[list[float], float]:
    """The errors in the order of COLUMNS, and the correlation of the pooled with the true mass."""
    heads, length, dim = samples[0].query.shape[1:]
    config = SLAConfig(method="sla2", sparsity=sparsity, min_seq_len=64)
    given = SiteSamples(samples.__getitem__, len(samples), config, (sparsity,), torch.device("cpu"))
    start = Router(torch.eye(dim), torch.eye(dim), (torch.ones(heads, 1),))
    by_mass, fitted = mass_start(given, start).alphas[0], fit_alpha(given, start).alphas[0]
    wrong, size, masses = torch.zeros(len(COLUMNS), dtype=torch.float64), 0.0, []
    for number in given.held_out:
        sample = given[number]
        target = full_attention(sample).double()
        block_map = route(sample.query, sample.key, config=config)

        def branch(alpha: Tensor, sample: Sample = sample) -> Tensor:
            return sparse_linear_attention(sample.query, sample.key, sample.value, config=config, alpha=alpha).double()

        true = row_mass(sample, block_map, config)[0].unflatten(1, (-1, 64)).mean(-1)
        pooled = pooled_mass(sample, block_map, config).clamp(0, 1)
        linear, sparse = (branch(torch.full((heads, 1), alpha)) for alpha in (0.0, 1.0))
        off, apart = ((t - linear).unflatten(2, (length // 64, 64)) for t in (target, sparse))
        best = ((off * apart).sum((0, 3, 4)) / apart.square().sum((0, 3, 4))).clamp(0, 1).float()
        alphas = (torch.ones(heads, 1), by_mass, fitted, pooled, true, best)
        wrong += torch.stack([(branch(alpha) - target).square().sum() for alpha in alphas])
        size += target.square().sum().item()
        masses.append(torch.stack([pooled.flatten(), true.flatten()]))
    return (wrong / size).tolist(), torch.corrcoef(torch.cat(masses, 1))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", help="weights of examples/moving_shapes.py")
    given = parser.parse_args()
    data = {f"clusters of norm {strength:g}": clustered(strength) for strength in (1.5, 3.0)}
    if given.load:
        data |= of_model(given.load)
    print("| data | sparsity | " + " | ".join(COLUMNS) + " | correlation of masses |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, samples in data.items():
        for sparsity in (0.9, 0.95, 0.97):
            errors, correlation = measure(samples, sparsity)
            numbers = " | ".join(f"{error:.3f}" for error in errors)
            print(f"| {name} | {sparsity:.0%} | {numbers} | {correlation:.2f} |", flush=True)


if __name__ == "__main__":
    main()
