"""Batched matrix products, in every spelling, with the role of each dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from sla_compile.passes.nodes import Call, Reader, same


@dataclass(frozen=True)
class Product:
    """A batched matrix product: the role or batch number of every dimension.

    `broadcast` means that a side lacks batch dimensions of the other, as the keys of multi-query attention lack heads.
    """

    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    labels: tuple[str, ...]
    factor: float | fx.Node = 1.0
    added: fx.Node | None = None
    broadcast: bool = False

    @property
    def contracted(self) -> str:
        return next(iter(set(self.left_labels) - set(self.labels)))

    def free(self, side: Sequence[str], other: Sequence[str]) -> list[str]:
        return [label for label in side if label not in other]


def read_product(node: fx.Node, call: Call, reader: Reader) -> Product | None:
    """The node as a product of two batched matrices; None where it is none."""
    if call.name == "einsum":
        return _read_einsum(call, reader)
    if call.name in ("matmul", "bmm"):
        left, right = call["input"], call["other"] if call.name == "matmul" else call["mat2"]
        factor, added = 1.0, None
    elif call.name == "baddbmm":
        left, right, factor = call["batch1"], call["batch2"], call["alpha"]
        added = None if call["beta"] == 0 else call["input"]
        if call["beta"] not in (0, 1) or not isinstance(factor, (int, float, fx.Node)):
            return None
    else:
        return None
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    left_shape, right_shape = reader.shape(left), reader.shape(right)
    if left_shape is None or right_shape is None or len(left_shape) != len(right_shape) or len(left_shape) < 2:
        return None
    pairs = list(zip(left_shape[:-2], right_shape[:-2], strict=True))
    if not all(same(one, other) or same(one, 1) or same(other, 1) for one, other in pairs):
        return None
    batch = tuple(f"batch{i}" for i in range(len(pairs)))
    labels = (*batch, "row", "sum"), (*batch, "sum", "column"), (*batch, "row", "column")
    return Product(left, right, *labels, factor, added, broadcast=not all(same(*pair) for pair in pairs))


def _read_einsum(call: Call, reader: Reader) -> Product | None:
    operands = call["operands"]
    equation = str(call["equation"]).replace(" ", "")
    if len(operands) != 2 or "->" not in equation or not all(isinstance(o, fx.Node) for o in operands):
        return None
    inputs, _, output = equation.partition("->")
    sides = inputs.split(",")
    shapes = [reader.shape(operand) or () for operand in operands]
    if len(sides) != 2 or not all(shapes):
        return None
    dots = [len(shape) - len(side.replace("...", "")) for side, shape in zip(sides, shapes, strict=True)]
    if "..." in equation and (dots[0] != dots[1] or not all("..." in text for text in (*sides, output))):
        return None
    labels = [_einsum_labels(text, dots[0]) for text in (*sides, output)]
    left, right, out = labels
    if any(len(set(text)) != len(text) for text in labels):
        return None
    shared, summed = set(left) & set(right) & set(out), (set(left) & set(right)) - set(out)
    free = [len(set(side) - shared - summed) for side in (left, right)]
    if len(summed) != 1 or min(free) < 1 or (max(free) > 1 and not shared):
        return None
    if set(out) != shared | (set(left) ^ set(right)):
        return None
    sizes = dict(zip(left, shapes[0], strict=True))
    if not all(same(sizes[label], size) for label, size in zip(right, shapes[1], strict=True) if label in sizes):
        return None
    return Product(operands[0], operands[1], left, right, out, broadcast=max(free) > 1)


def _einsum_labels(text: str, dots: int) -> tuple[str, ...]:
    before, found, after = text.partition("...")
    return (*before, *(f"...{i}" for i in range(dots if found else 0)), *after)
