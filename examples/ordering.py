"""Which attention costs how much: dense, block-sparse alone, SLA and SLA2, before and after a short fine-tuning.

    python examples/ordering.py            # trains the small video transformer of moving_shapes.py first
    python examples/ordering.py --load weights.pt --tune-steps 100

For each attention and sparsity: the relative squared error of its outputs against full attention on the same queries,
keys and values, the mean of all layers, and the model's validation loss. All fine-tunings see the same data in the same
order. The tables of benchmarks/results/2026-11-21-sla2.md come from here.
"""

import argparse
import copy
import math
import time
from collections.abc import Iterator

import moving_shapes
import torch
from moving_shapes import VideoTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig, SparseLinearAttention

ATTENTIONS = {
    "sparse only": (SLAConfig(linear="none", min_seq_len=64), False),
    "SLA": (SLAConfig(min_seq_len=64), False),
    "SLA2, no stage 1": (SLAConfig(method="sla2", min_seq_len=64), False),
    "SLA2": (SLAConfig(method="sla2", min_seq_len=64), True),
    "SLA2, int8": (SLAConfig(method="sla2", low_bit="int8", min_seq_len=64), True),
    "SLA2, fp8": (SLAConfig(method="sla2", low_bit="fp8", min_seq_len=64), True),
}


@torch.no_grad()
def attention_error(model: nn.Module, samples: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """``|O - O_full|^2 / |O_full|^2`` over the samples, the mean of the accelerated attentions, 0 without any."""
    sums: dict[nn.Module, list[float]] = {}

    def compare(module: nn.Module, args: tuple, output: Tensor) -> None:
        exact = F.scaled_dot_product_attention(*args[:3])
        total = sums.setdefault(module, [0.0, 0.0])
        total[0] += (output - exact).square().sum().item()
        total[1] += exact.square().sum().item()

    hooks = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, SparseLinearAttention)]
    model.eval()
    for given, sigma, _ in samples:
        model(given, sigma)
    for hook in hooks:
        hook.remove()
    return sum(wrong / size for wrong, size in sums.values()) / max(1, len(sums))


def calibration_batches(count: int, **sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips that neither training nor validation sees, with noise at levels spread over (0, 1)."""
    for given, sigma, _ in moving_shapes.validation(count, seed=500, **sizes):
        yield given, sigma


def main(arguments: list[str] | None = None) -> list[dict]:
    """Returns a row for each attention and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="256 tokens, one sparsity, hardly any training")
    parser.add_argument("--load", help="weights from moving_shapes.py --save, instead of training")
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--router-steps", type=int, default=100, help="of stage 1, for each attention")
    parser.add_argument("--only", nargs="+", choices=["dense", *ATTENTIONS], default=["dense", *ATTENTIONS])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.97])
    given = parser.parse_args(arguments)
    sizes, clips = {}, 12
    if given.small:
        sizes, clips = dict(frames=4, size=16), 2
        given.train_steps, given.tune_steps, given.router_steps, given.sparsities = 10, 3, 3, [0.5]

    torch.manual_seed(0)
    trained = VideoTransformer(**sizes)
    samples = moving_shapes.validation(clips, **sizes)
    if given.load:
        trained.load_state_dict(torch.load(given.load))
    else:
        print(f"training {given.train_steps} steps", flush=True)
        moving_shapes.train(trained, given.train_steps, rates={2e-3: list(trained.parameters())}, **sizes)

    rows = []
    print(f"{math.prod(trained.grid)} tokens; columns: attention error and validation loss before and after tuning")
    wanted = [("dense", 0.0), *((name, sparsity) for sparsity in given.sparsities for name in ATTENTIONS)]
    for name, sparsity in [pair for pair in wanted if pair[0] in given.only]:
        start, model = time.perf_counter(), copy.deepcopy(trained)
        own = list(model.parameters())
        rates = {3e-4: own}
        if name != "dense":
            config, stage_one = ATTENTIONS[name]
            sla_compile.accelerate(model, sparsity, config=config)
            if stage_one:
                batches = calibration_batches(clips, **sizes)
                sla_compile.calibrate(
                    model, batches, samples=8, steps=given.router_steps, query_blocks=8, progress=False
                )
            added = [p for p in sla_compile.parameters(model, stage=2) if all(p is not other for other in own)]
            rates |= {1e-2 if config.method == "sla2" else 1e-3: added} if added else {}
        found = [attention_error(model, samples), moving_shapes.validation_loss(model, samples)]
        moving_shapes.train(model, given.tune_steps, rates=rates, seed=2, **sizes)
        found += [attention_error(model, samples), moving_shapes.validation_loss(model, samples)]
        rows.append(dict(name=name, sparsity=sparsity, before=found[:2], after=found[2:]))
        numbers = " | ".join(f"{value:.4f}" for value in found)
        print(f"| {name} | {sparsity:.0%} | {numbers} | {time.perf_counter() - start:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
