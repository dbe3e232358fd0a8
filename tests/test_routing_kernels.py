"""The kernels of routing, on a GPU or in Triton's interpreter: means of blocks, and the ranking by score and place.

As a script it makes the comparisons in a process of its own, which Triton's interpreter needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

KINDS = ("random", "ties", "equal", "infinite", "tiny", "nan")
# (rows, columns, critical, skipped, leading, trailing)
SIZES = [
    (1, 1, 1, 0, 0, 1),
    (5, 7, 2, 1, 0, 7),
    (3, 20, 1, 0, 0, 20),
    (9, 129, 6, 12, 0, 129),
    (6, 40, 3, 4, 2, 39),  # pinned at both ends
    (2, 8, 0, 0, 3, 3),  # nothing but pinned columns
    (4, 64, 64, 0, 0, 64),
    (4, 64, 10, 54, 0, 64),  # nothing marginal
    (2, 1500, 75, 150, 5, 1500),
    (2, 3000, 150, 300, 0, 2990),  # 4 warps
    (1, 9000, 450, 900, 0, 9000),  # 16 warps
]


def scores(rows: int, columns: int, kind: str) -> Tensor:
    drawn = torch.randn(1, 2, rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    if kind == "ties":
        return drawn.round()
    if kind == "equal":
        return torch.zeros_like(drawn)
    if kind == "infinite":
        return drawn.masked_fill(drawn > 1, torch.inf).masked_fill(drawn < 0, -torch.inf)
    if kind == "tiny":  # subnormal numbers
        return drawn * 1e-39
    if kind == "nan":
        return drawn.masked_fill(drawn > 1, torch.nan).masked_fill(drawn < -1, -torch.nan)
    return drawn


def expected(scores: Tensor, critical: int, skipped: int, leading: int, trailing: int) -> Tensor:
    """By a stable sort: of equal scores the first is the highest, and NaN is higher than all."""
    block_map = torch.ones(scores.shape, dtype=torch.int8)
    ranked = scores[..., leading:trailing]
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    classes = torch.zeros(ranked.shape, dtype=torch.int8)
    classes.scatter_(-1, order[..., :critical], 1)
    classes.scatter_(-1, order[..., ranked.shape[-1] - skipped :], -1)
    block_map[..., leading:trailing] = classes
    return block_map


def compare_selection(device: str) -> None:
    from sla_compile.kernels.gpu import select_blocks

    for rows, columns, *choice in SIZES:
        for kind in KINDS if (rows, columns) == (6, 40) else KINDS[:2]:
            drawn = scores(rows, columns, kind)
            found = select_blocks(drawn.to(device), *choice).cpu()
            assert torch.equal(found, expected(drawn, *choice)), (rows, columns, choice, kind)
    strided = scores(5, 9, "random").transpose(2, 3)
    assert torch.equal(select_blocks(strided.to(device), 1, 1, 0, 5).cpu(), expected(strided, 1, 1, 0, 5))


def compare_pooling(device: str) -> None:
    """Means and counts against float64: a sum of n float32 errs by n eps of the sum of absolute values at most."""
    from sla_compile.kernels.gpu import pool_blocks

    generator = torch.Generator().manual_seed(0)
    for length, dim, block in [(1, 8, 64), (64, 64, 64), (130, 72, 64), (300, 16, 128)]:
        for layout in ("bhld", "blhd", "packed"):
            drawn = 3 + torch.randn(2, length, 3, 2, dim, generator=generator, dtype=torch.float16)
            tokens = drawn[:, :, 1].transpose(1, 2)
            if layout != "packed":
                tokens = tokens.contiguous() if layout == "bhld" else drawn[:, :, 1].contiguous().transpose(1, 2)
            for masked in (False, True):
                bias = torch.zeros(2, length)
                if masked:  # also a whole block, and tokens that no mean may see
                    bias[0, length // 3 :] = -torch.inf
                    bias[1, ::2] = -3.5
                    tokens = tokens.masked_fill((bias == -torch.inf)[:, None, :, None], torch.nan)
                means, counts = pool_blocks(tokens.to(device), block, bias.to(device) if masked else None)
                blocks = -(-length // block)
                valid = torch.nn.functional.pad(bias > -torch.inf, (0, blocks * block - length))
                number = valid.view(2, 1, blocks, block).sum(-1)[..., None]
                padded = torch.nn.functional.pad(tokens.double().nan_to_num(), (0, 0, 0, blocks * block - length))
                whole = padded.view(2, 2, blocks, block, dim)
                error = (means.cpu() - whole.sum(3) / number.clamp(min=1)).abs()
                bound = 2 * block * torch.finfo(torch.float32).eps * whole.abs().sum(3) / number.clamp(min=1)
                assert (error <= bound).all(), (length, dim, block, layout, masked)
                assert (counts is not None) == masked
                assert counts is None or torch.equal(counts.cpu(), number.expand(2, 2, blocks, 1).float())


@pytest.mark.parametrize("name", ["selection", "pooling"])
def test_kernel(name: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        COMPARISONS[name]("cuda")
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


COMPARISONS = {"selection": compare_selection, "pooling": compare_pooling}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import interpreter_speed

    interpreter_speed.install()
    COMPARISONS[sys.argv[1]]("cpu")
