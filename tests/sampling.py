"""Where a sweep has many cases that are nearly equal: those that run by default, and all of them on request."""

import os
from collections.abc import Iterable, Sequence
from itertools import cycle, product
from typing import Any

ALL_CASES = os.environ.get("SLA_ALL_CASES") == "1"


def every_other(cases: Sequence[Any], first: int = 0) -> Sequence[Any]:
    """Every second of `cases`; with SLA_ALL_CASES=1 all."""
    return cases if ALL_CASES else cases[first::2]


def pairs(one: Iterable[Any], other: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Each of the longer `one` with one of `other`, in turn; with SLA_ALL_CASES=1 each with each."""
    return list(product(one, other) if ALL_CASES else zip(one, cycle(other), strict=False))
