"""Tile sizes and launch options of each kernel: static, a function of head dimension, dtype and architecture."""

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
    """Tile sizes in tokens, `slice` in columns of the head dimension, and Triton's launch options."""

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
    query_linear: Launch
    key_linear: Launch
    query_gradient: Launch
    key_gradient: Launch
    summaries: Launch
    block_sums: Launch
    # Input precision of the matrix products: of float32 inputs, and of the linear branch for 16-bit ones.
    precision: str


# Bytes of shared memory that one block of threads may have, by compute capability.
_CUDA_SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device; a CPU (Triton's interpreter) counts as the smallest NVIDIA one."""
    if device.type != "cuda":
        return Target("cuda", 89, 101376)
    if torch.version.hip is not None:
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0], 65536)
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    return Target("cuda", arch, _CUDA_SHARED_MEMORY.get(arch, 101376))


def plan(dims: int, itemsize: int, block_q: int, block_k: int, target: Target) -> Plan:
    """Launches for heads of `dims` padded columns and elements of `itemsize` bytes.

    Where tiles of whole blocks do not fit the registers or the shared memory, a program takes a part of a block.
    """
    row_bytes = dims * itemsize
    large = target.shared_memory > 110000
    tile_q, tile_k, stages = block_q, block_k, 3
    if row_bytes > 256:
        tile_q, tile_k, stages = 64, 32, 2
    if row_bytes > 512:
        tile_q, tile_k, stages = 32, 32, 1
    warps = 8 if tile_q * dims >= 128 * 128 else 4
    slice_ = min(dims, 32 if dims < 256 else 16)
    del large
    precision = "ieee" if itemsize == 4 or (target.backend == "hip" and target.arch != "gfx942") else "tf32"
    return Plan(
        forward=Launch(tile_q, tile_k, slice_, warps, stages),
        query_linear=Launch(min(tile_q, 64), 0, slice_, 4, 2),
        key_linear=Launch(0, min(tile_k, 32), slice_, 4, 2),
        query_gradient=Launch(min(tile_q, 64), tile_k, slice_, warps, min(stages, 2)),
        key_gradient=Launch(min(tile_q, 64), tile_k, slice_, warps, min(stages, 2)),
        summaries=Launch(0, min(tile_k, 32), slice_, 4, 2),
        block_sums=Launch(64, 32, 128, 4, 3),
        precision=precision,
    )
