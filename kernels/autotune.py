"""Tuning on request: with SLA_COMPILE_AUTOTUNE=1 a kernel's first launch times neighbours of its row of tuning.py.

triton.autotune times them and keeps the times beside the compiled kernels, for later processes. A choice holds for one
situation: GPU model, kernel with its constants and dtypes, and the lengths from one power of two to the next. How many
blocks are critical is no part of it, as asking the GPU would make every launch wait: it is what the first call brings.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

# The tile that is a program's, and that of a step of its loop. The other kernels' tiles give their results their shape.
_TILES = {
    "forward_kernel": ("TILE_Q", "TILE_K"),
    "query_gradient_kernel": ("TILE_Q", "TILE_K"),
    "key_gradient_kernel": ("TILE_K", "TILE_Q"),
}
# What a kernel adds to: put back after each launch that is only timed.
_ADDED_TO = {"query_gradient_kernel": ["grad_query_ptr"], "key_gradient_kernel": ["grad_key_ptr", "grad_value_ptr"]}
_chosen: dict[str, dict[str, int]] = {}


@functools.cache
def asked() -> bool:
    """Whether launches are tuned: SLA_COMPILE_AUTOTUNE=1, and no interpreter, whose times say nothing."""
    return os.environ.get("SLA_COMPILE_AUTOTUNE") == "1" and not triton.knobs.runtime.interpret


def candidates(kernel: Any, arguments: dict[str, Any]) -> list[dict[str, int]]:
    """The tiles and options of a launch, then neighbours that compile (benchmarks/compile_gate.py --candidates)."""
    tiles = _TILES.get(kernel.__name__, ())
    names = (*tiles, "LATE_VALUES", "num_warps", "num_stages")
    row = {name: arguments[name] for name in names if name in arguments}
    found = [row]
    if "num_stages" not in row or arguments["PRECISION"] == "ieee":  # no options; no tensor cores
        return found
    roomy = arguments.get("HEAD_DIM", 0) <= 128  # shared memory has room for more
    if tiles:
        outer, inner = tiles
        if row[outer] == 128:
            found.append({**row, outer: 64, "num_warps": 4})
        least = 32 if arguments.get("LOW_BIT") == "fp8" else 16  # of a matrix product
        if row[inner] > least:
            found.append({**row, inner: row[inner] // 2})
        elif roomy:
            found.append({**row, inner: row[inner] * 2})
    stages = row["num_stages"]
    if stages > 1:
        found.append({**row, "num_stages": stages - 1})
    # Rows of one stage are AMD's: 8 warps have too few registers for them, as has key_gradient for two stages.
    if roomy and (stages > 1 or kernel.__name__ != "key_gradient_kernel"):
        found.append({**row, "num_stages": stages + 1})
    if row["num_warps"] == 4 and stages > 1:
        found.append({**row, "num_warps": 8})
    if "LATE_VALUES" in row and roomy and stages > 1 and arguments["LOW_BIT"] != "fp8":
        found.append({**row, "LATE_VALUES": not row["LATE_VALUES"]})
    return found


def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Launches with the fastest candidate, finding out which one that is where it can: not in a capture."""
    rows = candidates(kernel, arguments)
    if len(rows) == 1:
        kernel[(programs,)](**arguments)
        return
    situation = _situation(kernel, arguments)
    row = _chosen.get(situation)
    if row is None and torch.cuda.is_current_stream_capturing():
        row = rows[0]
    grid: Any = (programs,)
    if kernel.__name__ in _TILES:
        outer, _ = _TILES[kernel.__name__]
        grid = lambda meta: (programs * arguments[outer] // meta[outer],)  # noqa: E731
    if row is not None:
        kernel[grid](**{**arguments, **row})
        return
    tuned = triton.autotune(
        [_config(row) for row in rows],
        key=["situation"],
        restore_value=_ADDED_TO.get(kernel.__name__),
        cache_results=True,
    )(_Situated(kernel))
    fixed = {name: value for name, value in arguments.items() if name not in rows[0]}
    tuned[grid](**fixed, situation=situation)
    options = tuned.best_config.all_kwargs()
    _chosen[situation] = {name: options[name] for name in rows[0]}


def _situation(kernel: Any, arguments: dict[str, Any]) -> str:
    """What is compiled differently, the GPU model, and the length's power of two."""
    said = [torch.cuda.get_device_name(), kernel.__name__]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            said.append(f"{name}: {value.dtype}")
        elif value is None or name.isupper() or (name.startswith("stride") and value == 1):
            said.append(f"{name}: {value}")
    length = arguments["length" if "length" in arguments else "rows"]
    return ", ".join([*said, f"length: {length.bit_length()} bits"])


def _config(row: dict[str, int]) -> triton.Config:
    constants = {name: value for name, value in row.items() if name.isupper()}
    return triton.Config(constants, num_warps=row["num_warps"], num_stages=row["num_stages"])


class _Situated(triton.KernelInterface):
    """A kernel with one argument more, which the tuner keeps its choice by."""

    def __init__(self, kernel: Any) -> None:
        self.fn = kernel
        self.arg_names = [*kernel.arg_names, "situation"]

    def run(self, *args: Any, situation: str, **options: Any) -> Any:
        return self.fn.run(*args, **options)
