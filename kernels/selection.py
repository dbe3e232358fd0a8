"""The choice of critical and negligible blocks from their scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest(keys, count):
    """Whether a key (COLS,), uint32, is among the `count` largest; of equal ones the first are."""
    threshold = tl.cast(0, tl.uint32)
    bit = tl.cast(1 << 31, tl.uint32)
    for _ in range(32):  # the largest number that `count` keys reach, bit by bit
        candidate = threshold | bit
        reached = tl.sum((keys >= candidate).to(tl.int32), 0) >= count
        threshold = tl.where(reached, candidate, threshold)
        bit = bit >> 1
    above = keys > threshold
    equal = (keys == threshold).to(tl.int32)
    return above | ((equal != 0) & (tl.cumsum(equal, 0) <= count - tl.sum(above.to(tl.int32), 0)))


@triton.jit(do_not_specialize=["columns", "critical", "kept", "leading", "trailing"])
def select_kernel(
    scores_ptr,
    map_ptr,
    columns,
    critical,
    kept,
    leading,
    trailing,
    COLS: tl.constexpr,
):
    """Classes of one row of a block map: 1 for the `critical` highest scores, -1 for those below the `kept` highest.

    Columns before `leading` and from `trailing` on are pinned: 1, and not ranked. A NaN ranks highest.
    """
    column = tl.arange(0, COLS)
    row = tl.program_id(0).to(tl.int64) * columns
    scores = tl.load(scores_ptr + row + column, mask=column < columns, other=0.0)
    scores = tl.where(scores == 0.0, 0.0, tl.where(scores == scores, scores, float("nan")))  # one zero, one NaN
    bits = scores.to(tl.uint32, bitcast=True)
    # Unsigned numbers in the order of the scores; 0 is below them all.
    sign = tl.full([COLS], 1 << 31, tl.uint32)
    keys = bits ^ tl.where(bits < sign, sign, tl.full([COLS], 0xFFFFFFFF, tl.uint32))
    ranked = (column >= leading) & (column < trailing)
    keys = tl.where(ranked, keys, 0)
    classes = tl.where(largest(keys, kept), 0, -1)
    classes = tl.where(largest(keys, critical) | (ranked == 0), 1, classes)
    tl.store(map_ptr + row + column, classes.to(tl.int8), mask=column < columns)
