"""Questions about sizes that have one answer for every length an exported program is for.

Under a symbolic length a plain `if` is settled with the example's length and then holds for all of them, without a
word in a program that is compiled ahead of time. The launcher asks these instead; of plain numbers they are trivial.
"""

from __future__ import annotations

import sys

import torch


def largest(size: int) -> int:
    """The largest value the size may take; sys.maxsize where nothing bounds it."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(min(sys.maxsize, size.node.shape_env.bound_sympy(size.node.expr).upper))


def known(condition: bool) -> bool:
    """Whether the condition holds for every value the sizes in it may take."""
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def padded_to(size: int, multiple: int) -> int:
    """The size, made a multiple: at least the next, for a symbolic size one that is larger than the size for certain.

    Whether there is padding then has one answer at every length.
    """
    return size // multiple * multiple + multiple if isinstance(size, torch.SymInt) else -(-size // multiple) * multiple
