"""The kernels compile for GPUs that are not here: a sample of benchmarks/compile_gate.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("arch", "cases", "options"),
    [
        ("90", "90-bf16-D128-q64", []),
        ("80", "80-bf16-D64-q64-sla2", []),
        ("gfx942", "gfx942-bf16-D64-q64", []),
        ("89", "89-bf16-D64-q64-fp8", []),
        ("100", "100-bf16-D64-q64-int8", []),
        ("90", "90-bf16-D64-q128", ["--candidates", "--kernels", "query_gradient"]),
    ],
)
def test_kernels_compile_within_the_limits(arch: str, cases: str, options: list[str]) -> None:
    check("compile_gate.py", "--arch", arch, "--cases", cases, *options)


def test_sparse_loops_copy_ahead_in_wide_pieces_and_multiply_behind_exponentials() -> None:
    cases = "90-bf16-D64-q64", "90-bf16-D64-q64-fp8", "90-bf16-D64-q128"
    check("loop_instructions.py", "--arch", "90", "--cases", *cases)


def check(script: str, *options: str) -> None:
    # A process of its own: where TRITON_INTERPRET is set, nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--check", *options], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stdout + found.stderr
