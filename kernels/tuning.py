"""Tile sizes and launch options of each kernel: static, a function of head dimension, dtype and architecture.

Every row of the tables is the largest that compiles without spilled registers and within shared memory, found with
benchmarks/compile_gate.py; none was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

# No tile has more tokens.
MAX_TILE = 128


@dataclass(frozen=True)
class Target:
    """What the choice of tiles depends on: vendor, architecture (90 for sm_90, "gfx942"), shared memory of a block."""

    backend: str
    arch: int | str
    shared_memory: int


@dataclass(frozen=True)
class Launch:
    """Tile sizes in tokens, `slice` in columns of the head dimension, and Triton's launch options; 0: not used.

    block_sums tiles a matrix product: rows are `tile_q`, terms `tile_k` and columns `slice`.
    """

    tile_q: int
    tile_k: int
    slice: int
    num_warps: int
    num_stages: int

    @property
    def tiles(self) -> dict[str, int]:
        """Keyword arguments of a kernel that walks the block lists."""
        return {"TILE_Q": self.tile_q, "TILE_K": self.tile_k, **self.options}

    @property
    def options(self) -> dict[str, int]:
        """Those that every kernel takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Plan:
    """How to launch every kernel of a call."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch
    query_linear: Launch
    key_linear: Launch
    summaries: Launch
    block_sums: Launch
    # Of the matrix products of float32 inputs, and of the linear branch for 16-bit ones.
    precision: str


# Bytes of shared memory that one block of threads may have, by compute capability.
_SHARED_MEMORY = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
_SMALL_SHARED_MEMORY = 101376

_Row = tuple[int, int, int, int, int]

# By kind of architecture (much or little shared memory, or AMD's) and bytes of a token's row; 16-bit inputs. Where a
# tile_q exceeds the query block, it is cut to the block, and the warps with it.
_PLANS: dict[tuple[str, int], dict[str, _Row]] = {
    ("large", 128): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 64, 0, 8, 3),
        "key_gradient": (64, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 4, 2),
        "key_linear": (0, 64, 32, 4, 2),
        "summaries": (0, 64, 64, 4, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("large", 256): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 64, 0, 8, 3),
        "key_gradient": (32, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 8, 2),
        "key_linear": (0, 64, 32, 8, 2),
        "summaries": (0, 64, 64, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("large", 512): {
        "forward": (64, 16, 32, 8, 3),
        "query_gradient": (32, 64, 0, 8, 3),
        "key_gradient": (16, 64, 0, 8, 3),
        "query_linear": (32, 0, 32, 8, 2),
        "key_linear": (0, 32, 32, 8, 2),
        "summaries": (0, 32, 64, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("small", 128): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 32, 0, 8, 3),
        "key_gradient": (64, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 4, 2),
        "key_linear": (0, 64, 32, 4, 2),
        "summaries": (0, 64, 64, 4, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("small", 256): {
        "forward": (128, 16, 32, 8, 3),
        "query_gradient": (128, 16, 0, 8, 3),
        "key_gradient": (16, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 8, 2),
        "key_linear": (0, 64, 16, 8, 2),
        "summaries": (0, 32, 32, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("small", 512): {
        "forward": (64, 32, 32, 8, 3),
        "query_gradient": (64, 16, 0, 4, 3),
        "key_gradient": (16, 64, 0, 8, 3),
        "query_linear": (32, 0, 32, 8, 2),
        "key_linear": (0, 16, 16, 4, 2),
        "summaries": (0, 16, 32, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("hip", 128): {
        "forward": (128, 64, 32, 8, 2),
        "query_gradient": (128, 64, 0, 8, 1),
        "key_gradient": (64, 64, 0, 4, 1),
        "query_linear": (64, 0, 32, 4, 1),
        "key_linear": (0, 64, 32, 4, 1),
        "summaries": (0, 64, 32, 4, 1),
        "block_sums": (64, 32, 128, 4, 1),
    },
    ("hip", 256): {
        "forward": (128, 32, 32, 8, 2),
        "query_gradient": (128, 32, 0, 8, 1),
        "key_gradient": (32, 64, 0, 4, 1),
        "query_linear": (64, 0, 32, 4, 1),
        "key_linear": (0, 64, 16, 4, 1),
        "summaries": (0, 64, 32, 4, 1),
        "block_sums": (64, 32, 128, 4, 1),
    },
    ("hip", 512): {
        "forward": (64, 32, 32, 4, 1),
        "query_gradient": (64, 32, 0, 4, 1),
        "key_gradient": (32, 32, 0, 4, 1),
        "query_linear": (32, 0, 16, 4, 1),
        "key_linear": (0, 32, 16, 4, 1),
        "summaries": (0, 32, 32, 4, 1),
        "block_sums": (64, 32, 128, 4, 1),
    },
}
# float32 inputs are multiplied without tensor cores: one row for all architectures.
_FLOAT32_PLANS: dict[int, dict[str, _Row]] = {
    128: {
        "forward": (32, 32, 16, 4, 1),
        "query_gradient": (32, 32, 0, 4, 1),
        "key_gradient": (32, 32, 0, 4, 1),
        "query_linear": (32, 0, 16, 4, 1),
        "key_linear": (0, 32, 16, 4, 1),
        "summaries": (0, 32, 16, 4, 1),
        "block_sums": (64, 32, 64, 4, 1),
    },
    256: {
        "forward": (32, 32, 16, 8, 1),
        "query_gradient": (32, 32, 0, 8, 1),
        "key_gradient": (32, 32, 0, 8, 1),
        "query_linear": (32, 0, 16, 4, 1),
        "key_linear": (0, 32, 16, 8, 1),
        "summaries": (0, 32, 16, 8, 1),
        "block_sums": (64, 32, 64, 4, 1),
    },
    512: {
        "forward": (16, 16, 16, 8, 1),
        "query_gradient": (16, 16, 0, 8, 1),
        "key_gradient": (16, 16, 0, 8, 1),
        "query_linear": (16, 0, 16, 8, 1),
        "key_linear": (0, 16, 16, 8, 1),
        "summaries": (0, 16, 16, 8, 1),
        "block_sums": (64, 32, 64, 4, 1),
    },
    1024: {
        "forward": (16, 16, 16, 8, 1),
        "query_gradient": (16, 16, 0, 8, 1),
        "key_gradient": (16, 16, 0, 8, 1),
        "query_linear": (16, 0, 16, 8, 1),
        "key_linear": (0, 16, 16, 8, 1),
        "summaries": (0, 16, 16, 8, 1),
        "block_sums": (64, 32, 64, 4, 1),
    },
}


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device; a CPU, where the kernels are interpreted, counts as sm_90."""
    if device.type != "cuda":
        return Target("cuda", 90, _SHARED_MEMORY[90])
    if torch.version.hip is not None:
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0], 65536)
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    return Target("cuda", arch, _SHARED_MEMORY.get(arch, _SMALL_SHARED_MEMORY))


@lru_cache
def plan(dims: int, itemsize: int, block_q: int, block_k: int, target: Target) -> Plan:
    """Launches for heads of `dims` padded columns and elements of `itemsize` bytes."""
    row_bytes = max(128, dims * itemsize)
    if itemsize == 4:
        rows = _FLOAT32_PLANS[row_bytes]
    elif target.backend == "hip":
        rows = _PLANS["hip", row_bytes]
    else:
        rows = _PLANS["large" if target.shared_memory > 1.5 * _SMALL_SHARED_MEMORY else "small", row_bytes]
    launches = {}
    for kernel, (tile_q, tile_k, slice_, warps, stages) in rows.items():
        if kernel != "block_sums":
            if tile_q > block_q:
                tile_q, warps = block_q, warps * block_q // tile_q
            tile_k, slice_ = min(tile_k, block_k), min(slice_, dims)
        launches[kernel] = Launch(tile_q, tile_k, slice_, warps, stages)
    tf32 = itemsize == 2 and (target.backend == "cuda" or target.arch == "gfx942")
    return Plan(**launches, precision="tf32" if tf32 else "ieee")
