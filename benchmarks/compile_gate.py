"""Compiles every kernel for GPUs that need not be there, and compares what came out with committed limits.

The launcher runs on meta tensors for each architecture; its launches are compiled ahead of time exactly as they would
be launched, and registers, spills, shared memory and matrix instructions are read from the result.

    python benchmarks/compile_gate.py                      # all architectures and shapes, a table
    python benchmarks/compile_gate.py --check              # and fail where compile_limits.json is exceeded
    python benchmarks/compile_gate.py --update             # write what was found as the new limits
    python benchmarks/compile_gate.py --arch 90 --cases '*-bf16-D128-q64' --kernels 'key_*'
    python benchmarks/compile_gate.py --candidates --check # the other rows that tuning on request may choose

The limits are exact for the Triton that wrote them; with another one only the hardware's bounds are checked.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an uninstalled checkout works

LIMITS = Path(__file__).with_name("compile_limits.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES: tuple[int | str, ...] = (80, 89, 90, 100, 120, "gfx942")
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
# What the committed limits say of each kernel; registers are there to be read, they are no limit.
COLUMNS = ["registers", "spilled_bytes", "shared_bytes", "matrix_instructions"]
# What a candidate of tuning may spill, a quarter of a thread's registers: it is timed, not taken on trust.
CANDIDATE_SPILL = 256
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
    alpha: bool = False
    low_bit: str = "none"

    def __str__(self) -> str:
        parts = [f"{self.arch}-{self.dtype}-D{self.dim}-q{self.block_q}"]
        parts += [self.linear] if self.linear != "marginal" else []
        parts += [self.feature_map] if self.feature_map != "softmax" else []
        parts += ["sla2"] if self.alpha else []
        parts += [self.low_bit] if self.low_bit != "none" else []
        return "-".join([*parts, "masked"] if self.key_bias else parts)


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


def shipped_cases(architectures: list[int | str]) -> list[Case]:
    """What the gate covers: the head dimensions and dtypes with the paper's settings, and each variant once."""
    from sla_compile.kernels.tuning import Target

    found = []
    for arch in architectures:
        found += [Case(arch, "bf16", dim) for dim in (64, 72, 128, 256)]
        found += [Case(arch, "bf16", dim, block_q=128) for dim in (64, 128, 256)]
        found += [Case(arch, "fp16", 128), Case(arch, "fp32", 32), Case(arch, "fp32", 64), Case(arch, "fp32", 128)]
        found += [
            Case(arch, "bf16", 128, linear="all", feature_map="elu"),
            Case(arch, "bf16", 128, linear="none"),
            Case(arch, "bf16", 128, feature_map="relu", key_bias=True),
        ]
        found += [Case(arch, "bf16", dim, alpha=True) for dim in (64, 72, 128, 256)]
        found += [Case(arch, "bf16", dim, block_q=128, alpha=True) for dim in (64, 128)]
        low_bits = [name for name in ("int8", "fp8") if getattr(Target.of_arch(arch), name)]
        for low_bit in low_bits:
            found += [Case(arch, "bf16", dim, low_bit=low_bit) for dim in (64, 72, 128, 256)]
            found += [Case(arch, "bf16", dim, block_q=128, low_bit=low_bit) for dim in (64, 128, 256)]
            found += [Case(arch, "fp32", 64, low_bit=low_bit)]
            found += [Case(arch, "bf16", 128, linear="all", key_bias=True, alpha=True, low_bit=low_bit)]
        found += [Case(arch, "fp32", 64, alpha=True), Case(arch, "bf16", 128, linear="all", key_bias=True, alpha=True)]
    return found


def launches(case: Case) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels of a forward and a backward, with the arguments that the launcher gives them."""
    from sla_compile.kernels import gpu
    from sla_compile.kernels.backward import query_gradient_kernel
    from sla_compile.kernels.forward import forward_kernel
    from sla_compile.kernels.low_bit import quantize_kernel
    from sla_compile.kernels.spec import Spec, num_blocks
    from sla_compile.kernels.tuning import Target

    target = Target.of_arch(case.arch)
    batch, heads, length = 1, 2, 4090
    tokens = torch.empty(batch, length, heads, case.dim, dtype=DTYPES[case.dtype], device="meta").transpose(1, 2)
    block_map = torch.empty(
        batch, heads, num_blocks(length, case.block_q), num_blocks(length, 64), dtype=torch.int8, device="meta"
    )
    weight, bias = torch.empty(case.dim, case.dim, device="meta"), torch.empty(case.dim, device="meta")
    alpha = mean = None
    if case.linear == "none" or case.alpha:
        weight = bias = None
    if case.alpha:
        alpha = torch.empty(1, heads, 1, device="meta").expand(batch, heads, block_map.shape[2])
        mean = torch.empty(batch, heads, case.dim, device="meta")
    options = dict(
        proj_weight=weight,
        proj_bias=bias,
        key_bias=torch.empty(batch, length, device="meta") if case.key_bias else None,
        alpha=alpha,
        key_mean=mean,
    )
    spec = Spec(case.dim**-0.5, case.feature_map, case.linear, case.block_q, 64, case.low_bit)
    found: list[tuple[Any, dict[str, Any]]] = []
    kept = gpu.launch, gpu.target_of
    gpu.launch, gpu.target_of = (
        lambda kernel, programs, **arguments: found.append((kernel, arguments)),
        lambda _: target,
    )
    try:
        output, logsumexp = gpu.forward(tokens, tokens, tokens, block_map, spec, **options)
        gpu.backward(output, tokens, tokens, tokens, output, logsumexp, block_map, spec, **options)
        if case.low_bit != "none":  # the other kernels are the same as without
            own = forward_kernel, quantize_kernel, query_gradient_kernel
            return [(kernel, arguments) for kernel, arguments in found if kernel in own]
        gpu.pool_blocks(tokens, case.block_q, options["key_bias"])
        gpu.select_blocks(torch.empty(block_map.shape, device="meta"), 3, 6, 0, block_map.shape[3])
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
            names[torch.float8_e4m3fn] = "fp8e4nv"
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
            spilled_bytes=4 * field("vgpr_spill_count"),
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


def rows_of(case: Case, kernels: str, candidates: bool) -> list[Row]:
    """One row for each different kernel of a case, or for each of its candidates but the first, which is the kernel."""
    from sla_compile.kernels import autotune

    found = [
        (kernel, arguments)
        for kernel, arguments in launches(case)
        if fnmatch.fnmatch(kernel.fn.__name__.removesuffix("_kernel"), kernels)
    ]
    if candidates:
        found = [
            (kernel, {**arguments, **row})
            for kernel, arguments in found
            for row in autotune.candidates(kernel, arguments)[1:]
        ]
    rows = {}
    for kernel, arguments in found:
        name = kernel.fn.__name__.removesuffix("_kernel")
        # The kernels that take the map in either direction are compiled for contiguous rows and columns.
        direction = [key for key in ("stride_list", "stride_row") if key in arguments]
        if direction:
            name += "_columns" if arguments[direction[0]] == 1 else "_rows"
        tiles = [f"{key}={arguments[key]}" for key in arguments if key.startswith("TILE") or key == "SLICE"]
        tiles += ["late values"] if arguments.get("LATE_VALUES") else []
        launch = " ".join(
            [*tiles, f"warps={arguments.get('num_warps', 4)}", f"stages={arguments.get('num_stages', 3)}"]
        )
        if (name, launch) not in rows:
            compiled = compile_launch(kernel, arguments, case.arch)
            rows[name, launch] = Row(name, str(case), launch, **measure(compiled, case.arch))
    return list(rows.values())


def complaints(row: Row, arch: int | str, limits: dict[str, Any], candidate: bool) -> list[str]:
    """What is wrong with a row: more shared memory than there is, or worse than the limits of this Triton.

    A candidate has no limits of its own, but one spill for all.
    """
    found = []
    if row.shared_bytes > SHARED_MEMORY[arch]:
        found.append(f"needs {row.shared_bytes} bytes of shared memory, sm has {SHARED_MEMORY[arch]}")
    if candidate:
        spills = row.spilled_bytes > CANDIDATE_SPILL
        return [*found, f"spills {row.spilled_bytes} bytes, more than {CANDIDATE_SPILL}"] if spills else found
    values = limits["rows"].get(f"{row.case} {row.kernel}")
    if limits["triton"] != triton.__version__:
        return found
    if values is None:
        return [*found, "has no limit: run with --update"]
    limit = dict(zip(COLUMNS, values, strict=True))
    for name in ("spilled_bytes", "shared_bytes"):
        if getattr(row, name) > limit[name]:
            found.append(f"{name} {getattr(row, name)} exceeds {limit[name]}")
    if limit["matrix_instructions"] and not row.matrix_instructions:
        found.append("uses no matrix instructions any more")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=[str(arch) for arch in ARCHITECTURES])
    parser.add_argument("--cases", default="*", help="pattern of case names, such as '*-bf16-D128-*'")
    parser.add_argument("--kernels", default="*", help="pattern of kernel names, such as 'key_*'")
    parser.add_argument("--candidates", action="store_true", help="the candidates of SLA_COMPILE_AUTOTUNE=1")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a limit is exceeded")
    parser.add_argument("--update", action="store_true", help="write the limits of the cases that ran")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)

    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"triton": triton.__version__, "rows": {}}
    architectures = [int(arch) if arch.isdigit() else arch for arch in options.arch]
    chosen = [case for case in shipped_cases(architectures) if fnmatch.fnmatch(str(case), options.cases)]
    if not chosen:
        parser.error(f"no case matches {options.cases!r}")
    if options.update and options.candidates:
        parser.error("--update writes the limits of what is launched, not of --candidates")
    if options.update and limits["triton"] != triton.__version__:
        limits = {"triton": triton.__version__, "rows": {}}
    failed = False
    print(f"{'case':32} {'kernel':20} {'regs':>4} {'spilled':>7} {'shared':>7} {'mma':>4} {'async':>5}  launch")
    compiled = functools.partial(rows_of, kernels=options.kernels, candidates=options.candidates)
    with ProcessPoolExecutor(options.jobs) as pool:
        for case, rows in zip(chosen, pool.map(compiled, chosen), strict=True):
            for row in rows:
                print(
                    f"{row.case:32} {row.kernel:20} {row.registers:4} {row.spilled_bytes:7} {row.shared_bytes:7} "
                    f"{row.matrix_instructions:4} {row.asynchronous_copies:5}  {row.launch}",
                    flush=True,
                )
                if options.update:
                    limits["rows"][f"{row.case} {row.kernel}"] = [getattr(row, name) for name in COLUMNS]
                for complaint in complaints(row, case.arch, limits, options.candidates):
                    failed = True
                    print(f"    {row.kernel} {complaint}", flush=True)
    if options.update:
        body = ",\n".join(f"{json.dumps(key)}: {values}" for key, values in sorted(limits["rows"].items()))
        head = f'"triton": {json.dumps(limits["triton"])}, "columns": {json.dumps(COLUMNS)}'
        LIMITS.write_text(f'{{{head}, "rows": {{\n{body}\n}}}}\n')
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
