"""Counts the instructions of one step of the sparse loops, by kind, in machine code for GPUs that need not be there.

    python benchmarks/loop_instructions.py                                   # the table of docs/kernels.md
    python benchmarks/loop_instructions.py --check --arch 90 --cases '*-D64-*'

With --check the exit status is 1 where a loop waits for the copies that it has just issued, reads tokens in pieces of
less than 16 bytes, uses local memory, waits for the parts of a product, or multiplies values late without taking
exponentials meanwhile.

A step is one tile of keys (or, for key_gradient, of queries) of one thread block. A multiprocessor issues four
instructions a cycle, one from each quarter: `issue cycles` is what that takes, `matrix cycles` what the products take
at the tensor cores' peak; the longer bounds the step from below. `in flight` is how many groups of copies a step leaves
under way where it waits for its own, `behind` how many of its exponentials are taken while a product is under way, as
those of sm_90 can be. `shared cycles` is what sm_90's shared memory takes for the operands that its products read there
and for the copies, at 128 bytes a cycle.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from compile_gate import Case, compile_launch, launches, shipped_cases

KERNELS = ("forward", "query_gradient", "key_gradient")
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}
# Operations a cycle and multiprocessor (NVIDIA's papers on its architectures); of 8 bit there are twice as many.
OPERATIONS_A_CYCLE = {80: 2048, 90: 4096}
TIME_OF_LOW_BIT = {"none": 1.0, "int8": 0.75, "fp8": 0.5}
KINDS = {
    "matrix": "HGMMA QGMMA IGMMA HMMA QMMA IMMA",
    "exp": "MUFU",
    "float": "FADD FMUL FFMA FMNMX FSEL FSETP F2F F2FP I2FP FRND FCHK HADD2 HMUL2 HFMA2",
    "copy": "LDGSTS",
    "memory": "LDG STG LDS STS LDSM STSM LDL STL LDC ULDC",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPGROUP WARPSYNC MEMBAR FENCE SYNCS ERRBAR",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop's body, in order and without their predicates."""

    body: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.body)

    def names(self, name: str) -> list[str]:
        """Full names, such as LDGSTS.E.BYPASS.128, of the instructions of one name."""
        found = (instruction.split()[0] for instruction in self.body)
        return [full for full in found if full.split(".")[0] == name]

    @property
    def kinds(self) -> Counter[str]:
        names = (instruction.split()[0].split(".")[0] for instruction in self.body)
        return Counter(KIND_OF.get(name, "integer") for name in names)

    @property
    def in_flight(self) -> int:
        """How many groups of copies are still under way where the loop waits for them."""
        waits = (re.match(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", instruction) for instruction in self.body)
        return min((int(wait[1], 16) for wait in waits if wait), default=0)

    @property
    def behind(self) -> int:
        """How many exponentials are taken while a product is under way: issued, and not yet waited for."""
        counts = []
        under_way = False
        for _ in range(2):  # the second time with what the step before leaves under way
            counts.append(0)
            for instruction in self.body:
                if instruction.startswith(("HGMMA", "WARPGROUP.DEPBAR")):
                    under_way = instruction.startswith("HGMMA")
                counts[-1] += under_way and instruction.startswith("MUFU")
        return counts[-1]

    @property
    def operand_bytes(self) -> int:
        """What the products of one warpgroup of sm_90 read from shared memory: 32 bytes of each row of an operand."""
        rows = 0
        for instruction in self.body:
            shape = re.match(r"[HQI]GMMA\.64x(\d+)x\d+\S* R\d+, (R\d+|gdesc)", instruction)
            if shape:
                rows += int(shape[1]) + (64 if shape[2] == "gdesc" else 0)
        return 32 * rows

    def complaints(self, token_bytes: int, products: int, late_values: bool) -> list[str]:
        """What is wrong with the loop, of whose tokens a thread has to load so many bytes in a step."""
        found = []
        if sum(instruction.startswith("WARPGROUP.DEPBAR") for instruction in self.body) > products:
            found.append("waits for the parts of a product one by one")
        if not self.in_flight:
            found.append("waits for the copies that it has just issued")
        loads = [*self.names("LDG"), *self.names("LDGSTS")]
        if 16 * sum(name.endswith(".128") for name in loads) < token_bytes:
            found.append("loads tokens in pieces of less than 16 bytes")
        if self.names("LDL") or self.names("STL"):
            found.append("uses local memory")
        if late_values and 2 * self.behind < self.kinds["exp"]:
            found.append("takes its exponentials while nothing is multiplied")
        return found


def machine_code(compiled: Any) -> str:
    """What nvdisasm, which comes with Triton, makes of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[Loop]:
    """The innermost loops: from a label to the branch back to it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.match(r"\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+ )?\s*([A-Z][^;]*);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(" ".join(instruction[1].split()))
            back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if back and back[1] in labels:
                found.append((labels[back[1]], len(instructions)))
    inner = [(a, b) for a, b in found if not any(a <= c and d < b for c, d in found)]
    return [Loop(tuple(instructions[a:b])) for a, b in inner]


def sparse_loop(code: str) -> Loop:
    """The loop over whole tiles: it has products and exponentials, and copies ahead, as the ragged one does not."""
    found = [loop for loop in loops(code) if {"matrix", "exp", "copy"} <= set(loop.kinds)]
    # The linear branch's loop, where it has all three, comes after.
    return found[0]


def token_bytes(kernel: str, arguments: dict[str, Any], low_bit: str) -> int:
    """Of the two tiles that a thread loads its part of in a step: keys and values, or queries and gradients."""
    tokens = arguments["TILE_Q"] if kernel == "key_gradient" else arguments["TILE_K"]
    of_two = {"none": 4, "int8": 3, "fp8": 2}[low_bit if kernel == "forward" else "none"]
    return tokens * arguments["DIMS"] * of_two // (32 * arguments["num_warps"])


def rows(case: Case) -> list[tuple[str, str, dict[str, Any], Loop]]:
    """Kernel, its tiles, its launch's arguments and the loop of each sparse kernel of a case."""
    found = []
    for kernel, arguments in launches(case):
        name = kernel.fn.__name__.removesuffix("_kernel")
        if name in KERNELS:
            compiled = compile_launch(kernel, arguments, case.arch)
            tiles = f"{arguments['TILE_Q']} x {arguments['TILE_K']}"
            found.append((name, tiles, arguments, sparse_loop(machine_code(compiled))))
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=OPERATIONS_A_CYCLE)
    shown = ["*-bf16-D128-q64", "*-bf16-D128-q128"]
    parser.add_argument("--cases", nargs="+", default=shown, help="patterns of case names, as compile_gate's")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a loop is not as it should be")
    options = parser.parse_args(given)
    cases = [case for case in shipped_cases(options.arch) if any(fnmatch.fnmatch(str(case), p) for p in options.cases)]
    if not cases:
        parser.error(f"no case matches {options.cases}")

    kinds = [*KINDS, "integer"]  # with addresses, moves and branches
    columns = ["kernel", "case", "tile", "warps", "instructions", *kinds, "in flight", "behind"]
    columns += ["issue cycles", "matrix cycles", "shared cycles"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    failed = False
    for case in cases:
        for name, tiles, arguments, loop in rows(case):
            issue = len(loop) * arguments["num_warps"] // 4
            operations = 2 * PRODUCTS[name] * arguments["TILE_Q"] * arguments["TILE_K"] * arguments["DIMS"]
            matrix = round(operations / OPERATIONS_A_CYCLE[case.arch] * TIME_OF_LOW_BIT[case.low_bit])
            counts = [loop.kinds[kind] for kind in kinds]
            warps, copied = arguments["num_warps"], token_bytes(name, arguments, case.low_bit)
            shared = (loop.operand_bytes * warps // 4 + copied * 32 * warps) // 128 if case.arch == 90 else "–"
            values = [name, case, tiles, warps, len(loop), *counts, loop.in_flight, loop.behind, issue, matrix, shared]
            print(f"| {' | '.join(str(value) for value in values)} |", flush=True)
            late = arguments.get("LATE_VALUES", False)
            for complaint in loop.complaints(copied, PRODUCTS[name], late):
                failed = True
                print(f"    {name} {complaint}", flush=True)
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
