"""The kernels compile for GPUs that are not here: a sample of benchmarks/compile_gate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


CALLS = [
    ("compile_gate", ["--arch", arch, "--cases", cases, *options])
    for arch, cases, *options in (
        ("90", "90-bf16-D128-q64"),
        ("80", "80-bf16-D64-q64-sla2", "--kernels", "forward,summaries,projection_gradient"),
        ("gfx942", "gfx942-bf16-D64-q64", "--kernels", "forward,query_gradient"),
        ("89", "89-bf16-D64-q64-fp8", "--kernels", "quantize,forward"),
        ("100", "100-bf16-D64-q64-int8", "--kernels", "quantize,forward"),
        ("90", "90-bf16-D64-q128", "--candidates", "--kernels", "query_gradient"),
    )
]
CALLS.append(
    ("loop_instructions", ["--arch", "90", "--cases", "90-bf16-D64-q64", "90-bf16-D64-q64-fp8", "90-bf16-D64-q128"])
)
CHECK = """
import importlib, json, sys
folder, calls = sys.argv[1:]
sys.path.insert(0, folder)
failed = [call for call in json.loads(calls) if importlib.import_module(call[0]).main(["--check", *call[1]])]
sys.exit(f"failed: {failed}" if failed else 0)
"""


@pytest.mark.parametrize("calls", [CALLS[::2], CALLS[1::2]], ids=["even", "odd"])
def test_kernels_compile_within_the_limits(calls: list[tuple[str, list[str]]]) -> None:
    """And the sparse loops copy ahead, and multiply meanwhile. Several in a process, as each takes seconds to start."""
    # A process of its own: where TRITON_INTERPRET is set, nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", CHECK, BENCHMARKS, json.dumps(calls)], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stdout + found.stderr
