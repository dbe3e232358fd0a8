"""What a kernel needs to know of a call besides its tensors, and the arithmetic of blocks."""

from __future__ import annotations

from dataclasses import dataclass

# Added to the denominator of the linear branch when it sums over all keys, as the authors' code does.
ALL_KEYS_EPSILON = 1e-5
# Below this denominator the linear branch of a row is defined as zero: with relu or elu every weight may vanish.
MIN_DENOMINATOR = 2.0**-64
# SLA2's backward divides by alpha, at least by this: with less the sparse branch is below a rounding of the output.
MIN_ALPHA = 2.0**-24


@dataclass(frozen=True)
class Spec:
    """Scalars of one call; lengths are in tokens."""

    scale: float
    feature_map: str = "softmax"
    linear: str = "marginal"
    block_q: int = 64
    block_k: int = 64
    # Of the sparse branch's forward: "none", "int8" or "fp8" (quantize.py).
    low_bit: str = "none"

    @property
    def epsilon(self) -> float:
        """What is added to the linear branch's denominator."""
        return ALL_KEYS_EPSILON if self.linear == "all" else 0.0


def num_blocks(length: int, block: int) -> int:
    """Number of blocks that cover `length` tokens."""
    return -(-length // block)


def critical_count(blocks: int, sparsity: float, critical_blocks: int | None) -> int:
    """Critical blocks of a row of `blocks` key blocks: the share, rounded down, but at least one."""
    if critical_blocks is not None:
        return min(critical_blocks, blocks)
    # 1e-6: (1 - 0.8) * 10 is 1.9999999999999996 in floating point and means 2. int: Dynamo has no floor of a symbol.
    return min(blocks, max(1, int((1.0 - sparsity) * blocks + 1e-6)))


def negligible_count(blocks: int, critical: int, negligible: float) -> int:
    """Negligible blocks of a row; critical ones win where both do not fit."""
    return min(int(negligible * blocks), blocks - critical)
