"""What AOTInductor gets on CUDA: launches of the Triton kernels, traced without a GPU and run in the interpreter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_programs import PROGRAMS
from torch import nn
from torch.export import Dim, export

from sla_compile.kernels.layout import addressing
from sla_compile.kernels.symbolic import known, largest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("cuda_programs.py")
WRITTEN = {
    "block_lists_kernel": ["entries_ptr", "counts_ptr"],
    "quantize_kernel": ["low_key_ptr", "key_scales_ptr"],
    "summaries_kernel": ["states_ptr"],
    "block_sums_kernel": ["sums_ptr"],
    "forward_kernel": ["output_ptr", "logsumexp_ptr"],
}


def process(command, path, **environment):
    """A run of the script, with Triton's interpreter or for certain without."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, SCRIPT, command, path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for what stands in for a device")
def test_traced_programs(tmp_path, subtests):
    path = tmp_path / "traced.pt"
    process("trace", path)
    traced = torch.load(path)
    refused = traced.pop("dynamic batch, no largest")
    assert "NotImplementedError" in refused and "bound the dimensions of batch and length" in refused
    assert [name for name, program in traced.items() if isinstance(program, str)] == [], traced
    for name, program in traced.items():
        with subtests.test(name, of="what is recorded"):
            # No kernel writes to what it reads: nothing but results is copied or kept from being reused.
            for kernel, written in program["launches"]:
                expected = WRITTEN[kernel] + ["low_value_ptr"] * (kernel == "quantize_kernel" and "fp8" in name)
                assert written == expected
            heads = 4 if name == "no longest" else 1  # a piece of work for each key-value head
            assert [kernel for kernel, _ in program["launches"]].count("forward_kernel") == heads
        base, _, example = name.partition(", from ")
        if example:
            with subtests.test(name, of="nothing was settled by the example's length"):
                assert program == traced[base]

    process("run", path, TRITON_INTERPRET="1")
    found = json.loads(path.with_suffix(".json").read_text())
    assert found.keys() == {name for name, program in PROGRAMS.items() if program.lengths}
    for name, differing in found.items():
        with subtests.test(name, of="bit for bit the launcher's result"):
            assert differing == [], "at these lengths it is another"


class Ask(nn.Module):
    """Asks its questions while it is traced."""

    def __init__(self, *questions):
        super().__init__()
        self.questions = questions

    def forward(self, tensor):
        self.answers = [question(tensor) for question in self.questions]
        return tensor + 1


def asked(tensor, dynamic_shapes, *questions):
    """The answers, which are the same for every example and add no condition to the program."""
    ask = Ask(*questions)
    with torch.no_grad():
        program = export(ask, (tensor,), dynamic_shapes=(dynamic_shapes,))
    return ask.answers, program.range_constraints


@pytest.mark.parametrize("length", [8, 96])
def test_questions_about_symbolic_sizes(length):
    questions = (
        lambda x: largest(x.shape[2]),
        lambda x: largest(-(-x.shape[2] // 64)),
        lambda x: known(x.shape[2] < 4096),
        lambda x: known(x.shape[2] <= 100),
        lambda x: known(x.stride(0) % 4 == 0),
        lambda x: known(x.shape[2] % 8 == 0),
    )
    tensor = torch.zeros(2, 3, length, 12)
    answers, ranges = asked(tensor, {2: Dim("length", max=100)}, *questions)
    assert answers == [100, 2, True, True, True, False]
    assert [(int(found.lower), int(found.upper)) for found in ranges.values()] == [(0, 100)]
    answers, _ = asked(tensor, {2: Dim("length")}, *questions)
    assert answers == [sys.maxsize, sys.maxsize, False, False, True, False]
    assert [largest(7), known(True), known(False)] == [7, True, False]


@pytest.mark.parametrize("length", [8, 96])
def test_addressing_of_symbolic_sizes(length):
    transposed = torch.zeros(2, length, 3, 12, dtype=torch.bfloat16).transpose(1, 2)
    (answer,), _ = asked(transposed, {2: Dim("length")}, addressing)
    assert answer == {"WIDE": False, "ALIGN": 4} == addressing(transposed)
    # What is not certain for all lengths counts as not so: dimensions far apart, strides that are multiples of nothing.
    channels_first = torch.zeros(2, 3, 12, length, dtype=torch.bfloat16).transpose(2, 3)
    assert addressing(channels_first) == {"WIDE": False, "ALIGN": 1}
    (answer,), _ = asked(channels_first, {2: Dim("length", max=4096)}, addressing)
    assert answer == {"WIDE": False, "ALIGN": 1}
    (answer,), _ = asked(channels_first, {2: Dim("length")}, addressing)
    assert answer == {"WIDE": True, "ALIGN": 1}
