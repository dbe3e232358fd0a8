"""Output and tangent by torch.func.jvp: sparse-linear attention, and dense attention, which has one backend for it.

    OMP_NUM_THREADS=1 python benchmarks/forward_mode.py --length 8192

First the tangent is checked: along any direction it has to agree with the gradients. Then each runs in a process of its
own, because of its peak memory, which is told above what was there before. On the CPU times are process time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an uninstalled checkout works

from sla_compile import SLAConfig, bench, sparse_linear_attention

CHECKED_LENGTH = 700


def attention(inputs: bench.Inputs, config: SLAConfig | None, *tokens: Tensor) -> Tensor:
    """Ours, or without a config the dense one that has a tangent."""
    if config is not None:
        return sparse_linear_attention(*tokens, config=config, **inputs.parameters)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tokens)


def jvp(inputs: bench.Inputs, config: SLAConfig | None, tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.func.jvp(lambda *tokens: attention(inputs, config, *tokens), inputs.tokens, tangents)[1]


def directions(inputs: bench.Inputs) -> tuple[Tensor, ...]:
    generator = torch.Generator(inputs.query.device).manual_seed(1)
    return tuple(torch.empty_like(token).normal_(generator=generator) for token in inputs.tokens)


def check(shape: bench.Shape, config: SLAConfig) -> None:
    """Exits where <J t, J t> is not <J^T (J t), t>, up to the roundings that bench allows a result."""
    inputs = bench.Inputs(shape, config)
    along = directions(inputs)
    tangent = jvp(inputs, config, along).detach()
    grads = torch.autograd.grad(attention(inputs, config, *inputs.tokens), inputs.tokens, tangent)
    pairs = [(tangent, tangent), *zip(grads, along, strict=True)]
    found, *parts = ((one.double() * other).sum().item() for one, other in pairs)
    size = sum((one.norm() * other.norm()).item() for one, other in pairs)
    eps = torch.finfo(shape.dtype).eps if shape.device.type == "cpu" else bench.TF32_EPS
    if not abs(found - sum(parts)) <= bench.ALLOWED_ROUNDINGS * eps * size:
        sys.exit(f"the tangent's square is {found}, by the gradients {sum(parts)}: nothing was measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("sparse-linear", "dense"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device(given.device)
    shape = bench.Shape(1, given.heads, given.length, given.dim, torch.float32, device)
    config = SLAConfig(sparsity=given.sparsity)
    if given.only is None:
        check(bench.Shape(1, given.heads, CHECKED_LENGTH, given.dim, torch.float32, device), config)
        print(", ".join(f"{name} {value}" for name, value in bench.environment(device).items() if value))
        print(f"{shape}, sparsity {given.sparsity:g}, output and tangent, median of {given.repeats}")
        for name in ("sparse-linear", "dense"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
        return
    inputs = bench.Inputs(shape, config)
    chosen, along = config if given.only == "sparse-linear" else None, directions(inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    with torch.no_grad():
        jvp(inputs, chosen, along)
        times = [bench.milliseconds(lambda: jvp(inputs, chosen, along), device) for _ in range(given.repeats)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        after = torch.cuda.max_memory_allocated(device) / 2**20
    print(f"{given.only}: {statistics.median(times):.0f} ms, {after - before:.0f} MiB")


if __name__ == "__main__":
    main()
