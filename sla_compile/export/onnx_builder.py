"""Building ONNX nodes in Python, with sizes that are numbers where they are known and values where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Size = int | ir.Value  # a value is int64 of shape (1,)


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape, which the exporter knows for all that comes from the program."""
    if value.shape is None:
        raise ValueError(f"the exporter has no shape for {value.name}")
    return value.shape


def known_size(value: ir.Value, axis: int) -> int:
    """The size of a dimension that must not be dynamic."""
    size = shape_of(value)[axis]
    if not isinstance(size, int):
        raise ValueError(f"dimension {axis} of {value.name} is dynamic: only batch and length may be")
    return size


class Builder:
    """A list of nodes that grows with every call, in the default domain.

    Args:
        nodes: where new nodes are appended.
        names: prefix of names, for subgraphs: what is in them must not be named as something outside.
        inside: whether this is a subgraph, whose nodes and values are named here; the exporter names the others.
    """

    def __init__(self, nodes: list[ir.Node], names: str, inside: bool = False) -> None:
        self.nodes = nodes
        self.names = names
        self.inside = inside

    def __call__(self, op_type: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Appends a node; numbers and arrays among the inputs become constants."""
        values = [value if value is None or isinstance(value, ir.Value) else self.constant(value) for value in inputs]
        converted = ir.convenience.convert_attributes(attributes)
        return self._append(ir.Node("", op_type, values, attributes=converted, num_outputs=outputs))

    def _append(self, node: ir.Node) -> Any:
        if self.inside:
            node.name = f"{self.names}_{len(self.nodes)}"
            for index, value in enumerate(node.outputs):
                value.name = f"{node.name}_{index}"
        self.nodes.append(node)
        return node.outputs[0] if len(node.outputs) == 1 else node.outputs

    def constant(self, value: Any) -> ir.Value:
        """A constant: integers become int64, other arrays keep their dtype."""
        array = np.asarray(value)
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        attribute = ir.AttrTensor("value", ir.tensor(array))
        return self._append(ir.Node("", "Constant", [], attributes=[attribute], num_outputs=1))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A scalar constant of a given type."""
        return self.constant(np.asarray(value, dtype=dtype.numpy()))

    def size(self, value: ir.Value, axis: int) -> Size:
        """The size of a dimension."""
        size = shape_of(value)[axis]
        return size if isinstance(size, int) else self("Shape", value, start=axis, end=axis + 1)

    def as_value(self, size: Size) -> ir.Value:
        """int64 of shape (1,)."""
        return self.constant([size]) if isinstance(size, int) else size

    def shape(self, *sizes: Size) -> ir.Value:
        """The sizes as one tensor, as Reshape and Expand take them."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        return self("Concat", *(self.as_value(size) for size in sizes), axis=0)

    def _sizes(self, op_type: str, function: Callable[[int, int], int], left: Size, right: Size) -> Size:
        if isinstance(left, int) and isinstance(right, int):
            return function(left, right)
        return self(op_type, self.as_value(left), self.as_value(right))

    def add(self, left: Size, right: Size) -> Size:
        return self._sizes("Add", lambda a, b: a + b, left, right)

    def subtract(self, left: Size, right: Size) -> Size:
        return self._sizes("Sub", lambda a, b: a - b, left, right)

    def multiply(self, left: Size, right: Size) -> Size:
        return self._sizes("Mul", lambda a, b: a * b, left, right)

    def minimum(self, left: Size, right: Size) -> Size:
        return self._sizes("Min", min, left, right)

    def ceil_divide(self, size: Size, by: int) -> Size:
        """Quotient rounded up, of a size that is not negative."""
        return self._sizes("Div", lambda a, b: a // b, self.add(size, by - 1), by)

    def arange(self, count: Size) -> ir.Value:
        """int64 (count,)."""
        if isinstance(count, int):
            return self.constant(np.arange(count))
        return self("Range", 0, self("Squeeze", count, [0]), 1)

    def reshape(self, value: ir.Value, *sizes: Size) -> ir.Value:
        return self("Reshape", value, self.shape(*sizes))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self("Cast", value, to=dtype.value)

    def pad(self, value: ir.Value, axis: int, by: Size) -> ir.Value:
        """Zeros (or False) behind the last entry along an axis."""
        if isinstance(by, int) and by == 0:
            return value
        return self("Pad", value, self.shape(0, by), None, [axis])

    def for_each(
        self,
        name: str,
        body: Callable[..., ir.Value],
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
    ) -> ir.Value:
        """Runs `body` over the first axis of all inputs, and stacks what it returns.

        A Loop, although a Scan says just this: TensorRT-RTX's parser refuses every Scan.

        Args:
            name: prefix of the names inside.
            body: from a builder and an entry of each input to a value of type `dtype`.
        """
        name = f"{self.names}_{name}"
        step = ir.Value(name=f"{name}_step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        go_on = ir.Value(name=f"{name}_go_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        inside = Builder([], name, inside=True)
        result = body(inside, *(inside("Gather", value, step) for value in inputs))
        result.type = ir.TensorType(dtype)
        again = inside("Identity", go_on)
        again.type = ir.TensorType(ir.DataType.BOOL)
        graph = ir.Graph([step, go_on], [again, result], nodes=inside.nodes, name=name)
        count = self("Squeeze", self("Shape", inputs[0], start=0, end=1), [0])
        return self("Loop", count, self.constant(np.asarray(True)), body=graph)
