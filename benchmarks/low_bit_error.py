"""Forward error of the sparse branch in 16 and in 8 bit against float64, with and without smoothed keys.

Synthetic tokens whose outliers are of the kinds that attention has: a common offset of some channels of the keys, which
smoothing takes out, a few large tokens, which it does not, and large channels of the values. The operands and roundings
are those of kernels/quantize.py, so of the Triton kernels. No speed is measured here.

    python benchmarks/low_bit_error.py
    python benchmarks/low_bit_error.py --length 512 --dim 64      # smaller
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # an uninstalled checkout works; low_bit_reference is the tests' oracle

OUTLIERS = ("none", "key channels", "key tokens", "value channels", "key and value channels")


def draw(outliers: str, length: int, dim: int, heads: int, generator: torch.Generator) -> list[Tensor]:
    """query, key and value, bfloat16 (1, H, L, D); one channel in 32 is an outlier, ten times the others."""
    query, key, value = (torch.randn(1, heads, length, dim, generator=generator) for _ in range(3))
    channels = torch.randperm(dim, generator=generator)[: max(1, dim // 32)]
    if "key" in outliers and "channels" in outliers:
        key[..., channels] += 10 * torch.randn(heads, 1, len(channels), generator=generator).sign()
    if outliers == "key tokens":
        key[:, :, torch.randperm(length, generator=generator)[: length // 64]] *= 4
    if "value" in outliers:
        value[..., channels] *= 10
    return [tensor.bfloat16() for tensor in (query, key, value)]


def in_16_bit(query: Tensor, key: Tensor, value: Tensor, classes: Tensor, scale: float, block: int) -> Tensor:
    """What the 16-bit kernels compute: float32 scores and sums, bfloat16 P and output."""
    tokens = classes.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, : query.shape[2], : key.shape[2]]
    scores = (scale * query.float() @ key.float().transpose(-1, -2)).masked_fill(tokens != 1, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.bfloat16().float() @ value.float() / weights.sum(-1, keepdim=True)).bfloat16()


def table(length: int, dim: int, heads: int, share: float) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """For each kind of outliers and each scheme: relative error of O_s (rms) and largest error of the log-sum-exp."""
    from low_bit_reference import sparse_forward

    from sla_compile.kernels.reference import reference_attention
    from sla_compile.kernels.smoothing import token_mean
    from sla_compile.kernels.spec import Spec

    generator = torch.Generator().manual_seed(0)
    spec = Spec(dim**-0.5, linear="none")
    found = []
    for outliers in OUTLIERS:
        query, key, value = draw(outliers, length, dim, heads, generator)
        blocks = -(-length // spec.block_q)
        count = max(1, round(share * blocks))
        chosen = torch.rand(1, heads, blocks, blocks, generator=generator).topk(count, -1).indices
        classes = torch.full((1, heads, blocks, blocks), -1, dtype=torch.int8).scatter_(-1, chosen, 1)
        exact, exact_sum = reference_attention(query.double(), key.double(), value.double(), classes, spec)

        mean = token_mean(key, None)
        results = {"bf16": (in_16_bit(query, key, value, classes, spec.scale, spec.block_q), exact_sum)}
        for low_bit in ("int8", "fp8"):
            for name, shift in ((low_bit, mean), (f"{low_bit}, not smoothed", torch.zeros_like(mean))):
                output, logsumexp, _ = sparse_forward(
                    query, key, value, classes, replace(spec, low_bit=low_bit), None, shift, torch.bfloat16
                )
                results[name] = output.bfloat16(), logsumexp
        errors = {
            name: (
                ((output.double() - exact).norm() / exact.norm()).item(),
                (logsumexp.double() - exact_sum).abs().max().item(),
            )
            for name, (output, logsumexp) in results.items()
        }
        found.append((outliers, errors))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.1, help="of the key blocks that are critical")
    options = parser.parse_args(arguments)
    rows = table(options.length, options.dim, options.heads, options.share)
    print("Relative error of O_s (rms), and in brackets the largest error of the log-sum-exp, against float64\n")
    names = list(rows[0][1])
    print("| outliers | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for outliers, errors in rows:
        cells = [f"{100 * errors[name][0]:.2f} % ({errors[name][1]:.1g})" for name in names]
        print(f"| {outliers} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
