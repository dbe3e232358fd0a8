"""Compiles every kernel for GPUs that need not be there, and compares what came out with committed limits.

The launcher runs on meta tensors for each architecture; its launches are compiled ahead of time exactly as they would be
launched, and registers, spills, shared memory and matrix instructions are read from the result.

    python benchmarks/compile_gate.py                      # all architectures and shapes, a table
    python benchmarks/compile_gate.py --check              # and fail where compile_limits.json is exceeded
    python benchmarks/compile_gate.py --update             # write what was found as the new limits
    python benchmarks/compile_gate.py --arch 90 --dims 128 --dtypes bf16 --kernels forward
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Path(__file__).with_name("compile_limits.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES: tuple[int | str, ...] = (80, 89, 90, 100, 120, "gfx942")
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
MATRIX_INSTRUCTIONS = r"wgmma\.mma_async|tcgen05\.mma|(?<![.\w])mma\.sync|v_mfma|v_smfmac"


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled."""

    arch: int | str
    dtype: str
    dim: int
    block_q: int = 64
    linear: str = "marginal"
    feature_map: str = "softmax"
    key_bias: bool = False


@dataclass(frozen=True)
class Row:
    """What one kernel became."""

    kernel: str
    case: str
    launch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    asynchronous_copies: int


def cases(architectures: list[int | str], dtypes: list[str], dims: list[int], block_qs: list[int]) -> Iterator[Case]:
    """The shipped shapes: every dtype and dimension with the paper's settings, and each variant once."""
    for arch in architectures:
        for dtype in dtypes:
            for dim in dims:
                for block_q in block_qs:
                    yield Case(arch, dtype, dim, block_q)
        if 128 in dims and "bf16" in dtypes and 64 in block_qs:
            yield Case(arch, "bf16", 128, linear="all", feature_map="elu")
            yield Case(arch, "bf16", 128, linear="none")
            yield Case(arch, "bf16", 128, feature_map="relu", key_bias=True)


def launches(case: Case) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels of a forward and a backward, with the arguments that the launcher gives them."""
    from sla_compile.kernels import gpu
    from sla_compile.kernels.spec import Spec, num_blocks
    from sla_compile.kernels.tuning import Target

    backend = "cuda" if isinstance(case.arch, int) else "hip"
    target = Target(backend, case.arch, SHARED_MEMORY[case.arch])
    batch, heads, length = 1, 2, 4090
    tokens = torch.empty(batch, length, heads, case.dim, dtype=DTYPES[case.dtype], device="meta").transpose(1, 2)
    block_map = torch.empty(
        batch, heads, num_blocks(length, case.block_q), num_blocks(length, 64), dtype=torch.int8, device="meta"
    )
    weight, bias = torch.empty(case.dim, case.dim, device="meta"), torch.empty(case.dim, device="meta")
    if case.linear == "none":
        weight = bias = None
    options = dict(
        proj_weight=weight,
        proj_bias=bias,
        key_bias=torch.empty(batch, length, device="meta") if case.key_bias else None,
    )
    spec = Spec(case.dim**-0.5, case.feature_map, case.linear, case.block_q, 64)
    found: list[tuple[Any, dict[str, Any]]] = []
    kept = gpu.launch, gpu.target_of
    gpu.launch, gpu.target_of = lambda kernel, programs, **arguments: found.append((kernel, arguments)), lambda _: target
    try:
        output, logsumexp = gpu.forward(tokens, tokens, tokens, block_map, spec, **options)
        gpu.backward(output, tokens, tokens, tokens, output, logsumexp, block_map, spec, **options)
    finally:
        gpu.launch, gpu.target_of = kept
    return found


def compile_launch(kernel: Any, arguments: dict[str, Any], arch: int | str) -> Any:
    """Compiles a launch as triton.jit would: ones, Nones and constexprs built in, divisibility by 16 announced."""
    from triton.compiler import ASTSource

    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
            signature[parameter.name] = "*" + names.get(value.dtype, "i8")
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def measure(compiled: Any, arch: int | str) -> dict[str, int]:
    """Registers of a thread, spilled bytes, shared memory, and counts of instructions."""
    shared = compiled.metadata.shared
    if not isinstance(arch, int):
        code = compiled.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))  # noqa: E731
        return dict(
            registers=field("vgpr_count"),
            spilled_bytes=4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
            shared_bytes=shared,
            matrix_instructions=len(re.findall(MATRIX_INSTRUCTIONS, code)),
            asynchronous_copies=len(re.findall("buffer_load_dword.* lds", code)),
        )
    code = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    field = lambda name: int(re.search(rf"\b{name}:(\d+)", usage.stdout).group(1))  # noqa: E731
    return dict(
        registers=field("REG"),
        spilled_bytes=field("STACK") + field("LOCAL"),
        shared_bytes=shared,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTIONS, code)),
        asynchronous_copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", code)),
    )


def rows_of(case: Case, wanted: Callable[[str], bool] = lambda _: True) -> list[Row]:
    """One row for each different kernel of a case."""
    rows = []
    for kernel, arguments in launches(case):
        name = kernel.fn.__name__.removesuffix("_kernel")
        if arguments.get("stride_list", arguments.get("stride_term")) == 1:
            name += "_columns" if "stride_list" in arguments else "_rows"
        if not wanted(name):
            continue
        tiles = [f"{key}={arguments[key]}" for key in arguments if key.startswith("TILE") or key in ("SLICE", "LISTS")]
        launch = " ".join([*tiles, f"warps={arguments.get('num_warps', 4)}", f"stages={arguments.get('num_stages', 3)}"])
        label = f"{case.arch}-{case.dtype}-D{case.dim}-q{case.block_q}-{case.linear}-{case.feature_map}"
        label += "-masked" if case.key_bias else ""
        rows.append(Row(name, label, launch, **measure(compile_launch(kernel, arguments, case.arch), case.arch)))
    unique = {(row.kernel, row.case, row.launch): row for row in rows}
    return list(unique.values())
