"""Sparse-linear attention over dense attention on one CPU thread, in process time.

    python benchmarks/cpu.py --length 8192 --dim 128 --negligible 0 --backward

Both run in one process, alternately, after a check of the numbers against the float64 reference; what is compared is
the whole op (routing, sparse and linear branch, projection) as `sparse_linear_attention` calls it, by the medians of
process time. Wall time on shared cores says nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sla_compile import SLAConfig, route, sparse_linear_attention
from sla_compile.kernels.reference import reference_attention
from sla_compile.kernels.spec import Spec

CHECKED_LENGTH = 1000  # the reference is quadratic; ragged
NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--dim", type=int, default=128, help="head dimension")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--negligible", type=float, default=0.10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = SLAConfig(sparsity=arguments.sparsity, negligible=arguments.negligible)
    dtype = getattr(torch, arguments.dtype)
    check(config, arguments.dim, dtype)

    inputs = draw(arguments.heads, arguments.length, arguments.dim, dtype)
    grad = torch.randn_like(inputs[0])
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(*inputs[:3]),
        "sparse-linear": lambda: attention(inputs, config),
    }
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if arguments.backward:
        calls = {
            "dense": lambda: torch.autograd.grad(F.scaled_dot_product_attention(*leaves[:3]), leaves[:3], grad),
            "sparse-linear": lambda: torch.autograd.grad(attention(leaves, config), leaves, grad),
        }
    calls["routing alone"] = lambda: route(*inputs[:2], config=config)
    times = measure(calls, arguments.repeats)
    report(arguments, times)


def attention(inputs: list[Tensor], config: SLAConfig) -> Tensor:
    query, key, value, weight, bias = inputs
    return sparse_linear_attention(query, key, value, config=config, proj_weight=weight, proj_bias=bias)


def draw(heads: int, length: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value as transposed (B, L, H, D), and a projection that is not zero."""
    tokens = [torch.randn(1, length, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    return [*tokens, torch.randn(dim, dim) * dim**-0.5, torch.randn(dim)]


def check(config: SLAConfig, dim: int, dtype: torch.dtype) -> None:
    """Ends the program unless output and gradients are near the float64 reference: no speed of wrong numbers."""
    leaves = [tensor.requires_grad_() for tensor in draw(2, CHECKED_LENGTH, dim, dtype)]
    block_map = route(*(tensor.detach() for tensor in leaves[:2]), config=config)
    output = attention(leaves, config)
    grad = torch.randn_like(output)
    results = [output, *torch.autograd.grad(output, leaves, grad)]

    double = [tensor.detach().double().requires_grad_() for tensor in leaves]
    spec = Spec(dim**-0.5)
    exact, _ = reference_attention(*double[:3], block_map, spec, proj_weight=double[3], proj_bias=double[4])
    expected = [exact, *torch.autograd.grad(exact, double, grad.double())]
    # A few roundings of operands and results, which do not add up over a reduction.
    allowed = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, result, reference in zip(NAMES, results, expected, strict=True):
        error = ((result.double() - reference).norm() / reference.norm()).item()
        if not error <= allowed:
            sys.exit(f"{name} is off by {error:.1e} of its norm, allowed {allowed:.1e}: nothing measured")


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Process times in milliseconds of each call, in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_number:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def report(arguments: argparse.Namespace, times: dict[str, list[float]]) -> None:
    what = "forward + backward" if arguments.backward else "forward"
    shape = f"B1 H{arguments.heads} L{arguments.length} D{arguments.dim} {arguments.dtype}"
    table = Table(title=f"{what}, {shape}, sparsity {arguments.sparsity}, negligible {arguments.negligible}")
    for column in ("", "p20 ms", "p50 ms", "p80 ms", "times faster"):
        table.add_column(column, justify="right" if column else "left")
    dense = statistics.median(times["dense"])
    for name, values in times.items():
        low, _, _, high = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        middle = statistics.median(values)
        ratio = "" if name == "routing alone" else f"{dense / middle:.2f}"
        table.add_row(name, f"{low:.1f}", f"{middle:.1f}", f"{high:.1f}", ratio)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True)
    capability = torch.backends.cpu.get_cpu_capability()
    table.caption = (
        f"process time, {arguments.threads} thread, {len(times['dense'])} rounds; {platform.machine()} {capability}, "
        f"torch {torch.__version__}, commit {git.stdout.strip() or 'unknown'}"
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
