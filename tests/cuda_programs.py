"""Attentions traced for CUDA as AOTInductor traces them, and what was traced run in Triton's interpreter.

Two processes, as kernels are either interpreted or looked into: `trace` needs no GPU and takes sm_90 for granted, `run`
computes the traced programs on CPU tensors and compares them with the launcher, called as the operator calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from export_cases import CASES, SLA2, SLA2_BY_BLOCK, Attention, Case, config
from sampling import ALL_CASES
from torch.export import Dim

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Program:
    """A case to be traced with a length as the example, and the lengths to run it at.

    longest, most_batches: bounds of a dynamic length and batch; 0 where it is static, None where nothing bounds it.
    """

    case: Case
    lengths: tuple[int, ...] = ()
    example: int = 200
    longest: int | None = 4096
    most_batches: int | None = 0

    @property
    def dynamic_shapes(self) -> Any:
        if self.longest == 0:
            return None
        length = Dim("length", max=self.longest)
        batch = {} if self.most_batches == 0 else {0: Dim("batch", max=self.most_batches)}
        mask = None if self.case.mask is None else {**batch, 3: length}
        return (*[{**batch, 2: length}] * 3, None, None, mask, *[None] * 4)


def of(case: Case, dtype: torch.dtype, *lengths: int, **options: Any) -> Program:
    return Program(replace(case, dtype=dtype), lengths, **options)


LOW_BIT = {name: Case(name, config(low_bit=name), "bool") for name in ("int8", "fp8")}
PROGRAMS = {
    "plain": of(CASES[0], torch.bfloat16, 1, 64, 65, 257),
    "plain, from 4096": of(CASES[0], torch.bfloat16, example=4096),
    "bool mask": of(CASES[1], torch.float16, 130),
    "SLA2, mask, pinned": of(SLA2[1], torch.float16, 1, 130),
    "int8": of(LOW_BIT["int8"], torch.bfloat16, 70),
    "static, SLA2 by block": of(SLA2_BY_BLOCK, torch.bfloat16, 200, longest=0),
    "static, fp8": of(LOW_BIT["fp8"], torch.float16, 200, longest=0),
    "no longest": of(CASES[0], torch.bfloat16, 70, longest=None),
    "dynamic batch": of(CASES[0], torch.float16, 70, most_batches=8),
    "dynamic batch, no largest": of(CASES[0], torch.float16, most_batches=None),
}
if ALL_CASES:
    PROGRAMS |= {
        "plain, from 65": of(CASES[0], torch.bfloat16, example=65),
        "all keys, pinned": of(CASES[2], torch.bfloat16, 70),
        "sparse alone, pinned": of(CASES[3], torch.float16, 130),
        "SLA2, mask, pinned, from 4000": of(SLA2[1], torch.float16, example=4000),
        "static": of(CASES[4], torch.float32, 200, longest=0),
    }


def trace(program: Program) -> dict[str, Any]:
    """The program's code, what the code refers to by number, and the launches in it: kernel and what it writes."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    kernel_side_table.reset_table()
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        inputs = tuple(
            None if like is None else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")
            for like in program.case.inputs(program.example)
        )
        exported = torch.export.export(Attention(program.case), inputs, dynamic_shapes=program.dynamic_shapes)
    with V.set_aot_compilation(True):
        graph = exported.run_decompositions({}).graph
    kernels = {}
    for index, kernel in kernel_side_table.id_to_kernel.items():
        while hasattr(kernel, "fn"):  # the function in the kernel, in an autotuner where there are launch options
            kernel = kernel.fn
        kernels[index] = (kernel.__module__, kernel.__name__)
    launches = graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional)
    return {
        "code": graph.python_code("self").src,
        "kernels": kernels,
        "constants": kernel_side_table.constant_args,
        "launches": [
            (kernels[node.kwargs["kernel_idx"]][1], list(node.kwargs["tensors_to_clone"])) for node in launches
        ],
    }


def stand_in_for_a_gpu() -> None:
    """What tracing asks of a device and its driver, answered in their place."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        library, installed = Path(folder) / "cuda_guard.so", Path(torch.__file__).parent
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{installed}/include", f"-L{installed}/lib", "-lc10"]
        subprocess.run(["g++", HERE / "cuda_guard.cpp", "-o", library, *flags], check=True)
        ctypes.CDLL(str(library))


def trace_all(path: str) -> None:
    """Saves what each program was traced to, or the message of its error."""
    from sla_compile.kernels import gpu
    from sla_compile.kernels.tuning import Target

    if not torch.cuda.is_available():
        stand_in_for_a_gpu()
    gpu.target_of = lambda device: Target.of_arch(90)  # what the interpreter takes
    traced: dict[str, Any] = {}
    for name, program in PROGRAMS.items():
        try:
            traced[name] = trace(program)
        except Exception as error:  # reported as the program's failure
            traced[name] = f"{type(error).__name__}: {error}"
    torch.save(traced, path)


def run_all(path: str) -> None:
    """Writes, beside what was traced, the lengths at which a program's result is not the launcher's, bit for bit."""
    import interpreter_bf16
    import interpreter_fp8
    import interpreter_speed

    interpreter_speed.install()
    interpreter_bf16.install()
    interpreter_fp8.install()
    traced = torch.load(path)
    found = {name: differing(program, traced[name]) for name, program in PROGRAMS.items() if program.lengths}
    Path(path).with_suffix(".json").write_text(json.dumps(found))


def differing(program: Program, traced: dict[str, Any]) -> list[int]:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from sla_compile import ops
    from sla_compile.kernels import gpu

    kernel_side_table.reset_table()
    kernel_side_table.constant_args = traced["constants"]
    for index, (module, name) in traced["kernels"].items():
        kernel_side_table.id_to_kernel[index] = getattr(importlib.import_module(module), name)
    scope = {"torch": torch, "device": lambda **_: torch.device("cpu"), "inf": math.inf}
    exec(traced["code"], scope)
    ops._kernels = lambda query, low_bit: gpu
    found = []
    for length in program.lengths:
        inputs = program.case.inputs(length)
        (result,), expected = scope["forward"](None, *inputs), Attention(program.case)(*inputs)
        if result.stride() != expected.stride() or not torch.equal(result, expected):
            found.append(length)
    return found


if __name__ == "__main__":
    {"trace": trace_all, "run": run_all}[sys.argv[1]](sys.argv[2])
