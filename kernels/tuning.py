"""Tile sizes and launch options of each kernel: static, a function of head dimension, dtype and architecture.

The rows of the tables are the largest that compile within shared memory and with hardly a spilled register, found with
benchmarks/compile_gate.py; none was measured on a GPU. autotune.py times their neighbours for those who ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

# No tile has more tokens.
MAX_TILE = 128


@dataclass(frozen=True)
class Target:
    """What the choice of tiles depends on.

    kind: "wgmma" where a matrix product reads its operands from shared memory (sm_90, sm_100), "mma" where it takes
    registers for them (sm_80 to sm_89, sm_120), "hip" for AMD. tf32, int8, fp8 (E4M3): whether products of that
    precision exist.
    """

    kind: str
    tf32: bool
    int8: bool
    fp8: bool
    name: str

    @classmethod
    def of_arch(cls, arch: int | str) -> Target:
        """The target of a compute capability (90 for sm_90) or of an AMD architecture ("gfx942")."""
        if isinstance(arch, int):
            return cls("wgmma" if 90 <= arch < 120 else "mma", True, arch >= 80, arch >= 89, f"sm_{arch}")
        # gfx942 multiplies another E4M3, whose largest number is 240.
        return cls("hip", arch == "gfx942", arch == "gfx942", False, arch)


@dataclass(frozen=True)
class Launch:
    """Tile sizes in tokens, `slice` in columns of the head dimension, and Triton's launch options; 0: not used.

    late_values is of the forward only, NOTE [Late values] there.
    block_sums tiles a matrix product: rows are `tile_q`, terms `tile_k` and columns `slice`.
    """

    tile_q: int
    tile_k: int
    slice: int
    num_warps: int
    num_stages: int
    late_values: bool = False

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


_Row = tuple[int, int, int, int, int]

# For 16-bit inputs, by kind of architecture and bytes of a token's row: tile_q, tile_k, slice, warps, stages. A tile_q
# larger than the query block is cut to the block, and the warps with it.
_PLANS: dict[tuple[str, int], dict[str, _Row]] = {
    ("wgmma", 128): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 64, 0, 8, 3),
        "key_gradient": (64, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 4, 2),
        "key_linear": (0, 64, 32, 4, 2),
        "summaries": (0, 64, 64, 4, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("wgmma", 256): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 64, 0, 8, 3),
        "key_gradient": (32, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 8, 2),
        "key_linear": (0, 64, 32, 8, 2),
        "summaries": (0, 64, 64, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("wgmma", 512): {
        "forward": (64, 16, 32, 8, 3),
        "query_gradient": (32, 64, 0, 8, 3),
        "key_gradient": (16, 64, 0, 8, 3),
        "query_linear": (32, 0, 32, 8, 2),
        "key_linear": (0, 32, 32, 8, 2),
        "summaries": (0, 32, 64, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("mma", 128): {
        "forward": (128, 64, 32, 8, 3),
        "query_gradient": (128, 32, 0, 8, 3),
        "key_gradient": (64, 64, 0, 4, 3),
        "query_linear": (64, 0, 32, 4, 2),
        "key_linear": (0, 64, 32, 4, 2),
        "summaries": (0, 64, 64, 4, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("mma", 256): {
        "forward": (128, 16, 32, 8, 3),
        "query_gradient": (128, 16, 0, 8, 2),
        "key_gradient": (16, 64, 0, 4, 2),
        "query_linear": (64, 0, 32, 8, 2),
        "key_linear": (0, 64, 16, 8, 2),
        "summaries": (0, 32, 32, 8, 2),
        "block_sums": (128, 32, 128, 8, 3),
    },
    ("mma", 512): {
        "forward": (64, 32, 32, 8, 2),
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
# Query blocks of 64, where the row above, cut to them, leaves a multiprocessor room for one program of 4 warps.
_SMALL_BLOCKS: dict[tuple[str, int], dict[str, _Row]] = {("wgmma", 256): {"query_gradient": (64, 32, 0, 4, 3)}}
# The forward, where a low-bit one does not take the row above, by low_bit as well.
_LOW_BIT_FORWARD: dict[tuple[str, int, str], _Row] = {("wgmma", 256, "fp8"): (128, 64, 16, 8, 3)}
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
        return Target.of_arch(90)
    if torch.version.hip is not None:
        return Target.of_arch(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target.of_arch(10 * major + minor)


@lru_cache
def plan(dims: int, itemsize: int, block_q: int, block_k: int, target: Target, low_bit: str = "none") -> Plan:
    """Launches for heads of `dims` padded columns and elements of `itemsize` bytes."""
    row_bytes = max(128, dims * itemsize)
    rows = _FLOAT32_PLANS[row_bytes] if itemsize == 4 else _PLANS[target.kind, row_bytes]
    if itemsize == 2 and block_q == 64:
        rows = {**rows, **_SMALL_BLOCKS.get((target.kind, row_bytes), {})}
    launches = {}
    for kernel, (tile_q, tile_k, slice_, warps, stages) in rows.items():
        if kernel == "forward" and low_bit != "none" and itemsize == 2:
            row = _LOW_BIT_FORWARD.get((target.kind, row_bytes, low_bit))
            tile_q, tile_k, slice_, warps, stages = row or rows[kernel]
        if kernel == "forward" and low_bit == "fp8":
            tile_k = max(tile_k, 32)  # what a product of 8-bit numbers takes at least
        if kernel != "block_sums":
            if tile_q > block_q:
                tile_q, warps = block_q, warps * block_q // tile_q
            tile_k, slice_ = min(tile_k, block_k), min(slice_, dims)
        # Two programs of 4 warps on a multiprocessor work while the other waits; one of 8 has only itself. Wider heads
        # have no registers left, and sums of E4M3 products wait for each other anyway.
        late_values = kernel == "forward" and target.name == "sm_90" and warps == 8 and low_bit != "fp8"
        late_values &= itemsize == 2 and row_bytes <= 256
        launches[kernel] = Launch(tile_q, tile_k, slice_, warps, stages, late_values)
    return Plan(**launches, precision="tf32" if itemsize == 2 and target.tf32 else "ieee")
