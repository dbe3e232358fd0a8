"""How the tensors of a written-out attention lie in memory, and how to view them as the op wants them.

A frame is the list of dimensions of the scores at one step of their computation: which are batch, which the query's and
which the key's tokens. Query, key and value are brought into the batch dimensions of one frame by views, and taken from
where they came from if those views only undo what the graph did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sla_compile.passes.nodes import CASTS, PERMUTES, RESHAPES, Call, Reader, mutates, permutation, same, same_shape
from sla_compile.passes.products import Product

QUERY, KEY = "query", "key"


class NoMatch(Exception):
    """Why a softmax is not attention that can be rewritten."""


@dataclass
class Operand:
    """A tensor of the match: a node and the views that bring it into the layout the op wants.

    A view is ``("permute", order)``, ``("regroup", number of leading dimensions, how to write the sizes they become,
    those sizes)`` or ``("replay", node)``, which does what another node does; `skipped` are the nodes between `node`
    and the product that it makes unnecessary.
    """

    node: fx.Node
    views: list[tuple] = field(default_factory=list)
    shape: tuple = ()
    skipped: set[fx.Node] = field(default_factory=set)


@dataclass
class Mask:
    """A tensor of the scores' frame; `hides` means that True takes a key out, `written_out` that it has a row for each
    query."""

    node: fx.Node
    hides: bool
    shape: tuple
    written_out: bool = False


@dataclass
class Scale:
    """The factor of the scores: a number, and nodes that it is multiplied with or divided by."""

    number: float
    nodes: list[tuple[str, fx.Node]] = field(default_factory=list)

    def take(self, call: Call, tensor: fx.Node, reader: Reader, *, symbolic: bool = False) -> float | None:
        """Takes over the factor of a ``mul`` or ``div`` of `tensor`, and returns it; raises NoMatch where it is no
        number. One that is `symbolic` (a size, or a float of the model under ``dynamic=True``) returns None."""
        other = call["other"] if call["input"] is tensor else call["input"]
        if call["rounding_mode"] is not None:
            raise NoMatch("its scores are divided with rounding")
        value = reader.value(other) if isinstance(other, fx.Node) else other
        known = isinstance(value, (int, float)) and math.isfinite(value) and (value != 0 or call.name == "mul")
        if isinstance(other, fx.Node) and (known or (symbolic and isinstance(value, (torch.SymInt, torch.SymFloat)))):
            self.nodes.append((call.name, other))
        elif known:
            self.number = self.number * other if call.name == "mul" else self.number / other
        else:
            raise NoMatch("its scores are scaled by a tensor")
        return (value if call.name == "mul" else 1 / value) if known else None


@dataclass(eq=False)  # compared by identity: comparing symbolic sizes would install guards
class Axis:
    label: str
    size: Any
    argument: Any  # what to write for the size in a reshape: an int, a node, or -1


class Frame:
    """The dimensions of the scores at one step."""

    def __init__(self, axes: list[Axis]) -> None:
        self.axes = axes

    @classmethod
    def of_product(cls, product: Product, shape: tuple) -> Frame:
        """The frame of a product's result: its batch dimensions, and its two own ones by their labels."""
        shared = set(product.left_labels) & set(product.right_labels)
        labels = (f"batch:{label}" if label in shared else label for label in product.labels)
        return cls(
            [
                Axis(label, size, size if isinstance(size, int) else -1)
                for label, size in zip(labels, shape, strict=True)
            ]
        )

    @property
    def batch(self) -> list[Axis]:
        return [axis for axis in self.axes if axis.label.startswith("batch")]

    @property
    def canonical(self) -> bool:
        """Whether the last two dimensions are the query's and the key's tokens."""
        return [axis.label for axis in self.axes[-2:]] == [QUERY, KEY]


def next_frame(frame: Frame, previous: fx.Node, node: fx.Node, call: Call, reader: Reader) -> Frame:
    """The frame after one step of the chain."""
    before, after = reader.shape(previous), reader.shape(node)
    if before is None or after is None:
        raise NoMatch(f"the shape after {call.name} is unknown")
    if call.name in PERMUTES:
        order = permutation(call, len(before))
        if order is None:
            raise NoMatch(f"the order of {call.name} is not constant")
        axes = [frame.axes[i] for i in order]
        batch = [axis for axis in axes if axis in frame.batch and not same(axis.size, 1)]
        if batch != [axis for axis in frame.batch if not same(axis.size, 1)]:
            raise NoMatch("the batch dimensions of its scores change places")
        return Frame([Axis(a.label, a.size, a.argument) for a in axes])
    if same_shape(before, after):
        return Frame([Axis(a.label, a.size, a.argument) for a in frame.axes])
    if call.name not in RESHAPES:
        raise NoMatch(f"{call.name} broadcasts its scores")
    return Frame(_regrouped(frame.axes, after, call))


def _regrouped(axes: list[Axis], shape: tuple, call: Call) -> list[Axis]:
    """Axes after a row-major reshape in which the token dimensions survive."""
    tokens = [axis for axis in axes if not axis.label.startswith("batch")]
    result: list[Axis] = []
    arguments = _size_arguments(call, shape)
    position, taken = 0, 0
    source = [axis for axis in axes if not same(axis.size, 1)]
    if any(same(axis.size, 1) for axis in tokens):
        raise NoMatch("its scores have a single token")
    while position < len(shape):
        size = shape[position]
        if taken < len(source) and same(source[taken].size, size):
            axis = source[taken]
            label = axis.label if axis in tokens else f"batch:{position}"
            result.append(Axis(label, size, axis.argument if axis in tokens else arguments[position]))
            position, taken = position + 1, taken + 1
            continue
        if same(size, 1):
            result.append(Axis(f"batch:{position}", size, 1))
            position += 1
            continue
        old, new, first = 1, 1, position  # a group of batch dimensions becomes another group
        while taken < len(source) and source[taken] not in tokens:
            old, taken = old * source[taken].size, taken + 1
        while position < len(shape) and not same(old, new):
            new, position = new * shape[position], position + 1
        if not same(old, new) or first == position:
            raise NoMatch("its scores are reshaped across tokens")
        result += [Axis(f"batch:{i}", shape[i], arguments[i]) for i in range(first, position)]
    if taken != len(source):
        raise NoMatch("its scores are reshaped across tokens")
    return result


def _size_arguments(call: Call, shape: tuple) -> list[Any]:
    """What to write for each size: a node the graph computes it with, so that lengths and batches stay free."""
    known = list(shape)
    sizes = next((call[name] for name in ("size", "shape", "sizes") if isinstance(call[name], (list, tuple))), ())
    if call.name == "unflatten" and isinstance(call["dim"], int):
        dim = call["dim"] % (len(shape) - len(sizes) + 1)
        known[dim : dim + len(sizes)] = sizes
    elif len(sizes) == len(shape):
        known = list(sizes)
    return [size if isinstance(size, (int, fx.Node)) else -1 for size in known]


def op_frame(frames: Iterable[Frame]) -> Frame:
    """The frame in which the op is called: (batch, heads) if the scores ever have two batch dimensions."""
    frames = list(frames)
    return next((frame for frame in frames if len(frame.batch) == 2), frames[0])


def operand_of(
    node: fx.Node, labels: tuple[str, ...], product: Product, source: Frame, target: Frame, reader: Reader
) -> Operand:
    """Query or key: (batch..., tokens, depth), with the batch dimensions of the target frame."""
    shape = reader.shape(node)
    assert shape is not None
    batch = [label for label in product.labels if label in product.left_labels and label in product.right_labels]
    free = next(label for label in labels if label not in batch and label != product.contracted)
    return laid_out(node, shape, labels, [*batch, free, product.contracted], source, target)


def laid_out(
    node: fx.Node, shape: tuple, labels: Sequence[str], wanted: Sequence[str], source: Frame, target: Frame
) -> Operand:
    number = len(wanted) - 2
    views: list[tuple] = []
    order = [list(labels).index(label) for label in wanted]
    regrouped = regroup(source, target)
    if order[:number] == list(range(number)):
        views += regrouped
        shift = len(target.batch) - number
        order = [*range(len(target.batch)), *(i + shift for i in order[number:])]
        views += [("permute", tuple(order))]
    else:
        views += [("permute", tuple(order)), *regrouped]
    sizes = (*(axis.size for axis in target.batch), *(shape[list(labels).index(label)] for label in wanted[-2:]))
    return Operand(node, without_identities(views), sizes)


def regroup(source: Frame, target: Frame) -> list[tuple]:
    """Views between the batch dimensions of two frames."""
    old, new = [axis.size for axis in source.batch], [axis.size for axis in target.batch]
    if same_shape(old, new):
        return []
    sizes = tuple(axis.argument for axis in target.batch)
    if -1 not in sizes and isinstance(sizes[0], int):
        sizes = (-1, *sizes[1:])  # a traced batch size may be that of the example alone
    if sum(size == -1 for size in sizes if isinstance(size, int)) > 1:
        raise NoMatch("several of its batch dimensions are symbolic")
    return [("regroup", len(old), sizes, tuple(new))]


def without_identities(views: list[tuple]) -> list[tuple]:
    """The views without permutations that change nothing."""
    return [view for view in views if view[0] != "permute" or view[1] != tuple(range(len(view[1])))]


# ---- where the operands come from ------------------------------------------------------------------------------------


def peel_scale(operand: Operand, scale: Scale, reader: Reader) -> None:
    """Moves scalar factors of query or key into the scale, wherever they stand among its views."""
    while True:
        peel(operand, reader)
        node, chain = operand.node, []
        call = reader.call(node)
        while call is not None and call.name in (*RESHAPES, *PERMUTES, *CASTS) and isinstance(call["input"], fx.Node):
            chain.append(node)
            node = call["input"]
            call = reader.call(node)
        if call is None or call.name not in ("mul", "div") or not isinstance(call["input"], fx.Node):
            return
        if not _like(call["input"], node, reader):
            return
        try:
            scale.take(call, call["input"], reader)
        except NoMatch:
            return
        operand.skipped |= {node, *chain}
        operand.node = call["input"]
        operand.views = [*(("replay", each) for each in reversed(chain)), *operand.views]


def peel(operand: Operand, reader: Reader) -> None:
    """Takes the tensor from before what its views undo, and from before what does nothing."""
    moved = True
    while moved:
        moved = False
        call = reader.call(operand.node)
        if call is None or not isinstance(call["input"], fx.Node):
            return
        source, view = call["input"], operand.views[0] if operand.views else ("",)
        if call.name in (*RESHAPES, *CASTS) and _like(source, operand.node, reader):
            moved = _move(operand, source)
        elif view[0] == "permute" and call.name in PERMUTES:
            shape = reader.shape(source)
            order = permutation(call, len(shape)) if shape is not None else None
            if order is not None:
                composed = tuple(order[i] for i in view[1])
                operand.views = without_identities([("permute", composed), *operand.views[1:]])
                moved = _move(operand, source)
        elif view[0] == "regroup" and call.name in RESHAPES:
            ancestor = _ancestor_of_shape(operand, reader)
            if ancestor is not None:
                operand.views = operand.views[1:]
                moved = _move(operand, ancestor)


def _move(operand: Operand, source: fx.Node) -> bool:
    """Takes the tensor from `source`, an ancestor along first inputs."""
    while operand.node is not source:
        operand.skipped.add(operand.node)
        operand.node = operand.node.all_input_nodes[0]
    return True


def _like(left: fx.Node, right: fx.Node, reader: Reader) -> bool:
    """Whether two nodes agree in shape and dtype."""
    a, b = reader.value(left), reader.value(right)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _ancestor_of_shape(operand: Operand, reader: Reader) -> fx.Node | None:
    """The tensor whose reshape the operand is and which has the regrouped shape already."""
    _, number, _, sizes = operand.views[0]
    shape = reader.shape(operand.node)
    assert shape is not None
    return _reshaped_from(operand.node, (*sizes, *shape[number:]), reader)


def _reshaped_from(node: fx.Node, shape: tuple, reader: Reader) -> fx.Node | None:
    """The ancestor of a certain shape that the node is a row-major reshape of."""
    while True:
        call = reader.call(node)
        if call is None or not isinstance(call["input"], fx.Node) or call.name not in RESHAPES:
            return None
        before, after = reader.value(call["input"]), reader.value(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
            return None
        node = call["input"]
        if same_shape(before.shape, shape):
            return node


def shared_mask(node: fx.Node, hides: bool, reader: Reader) -> Mask:
    """The mask, as little expanded as the graph has it."""
    node = _unexpanded(node, reader)
    return Mask(node, hides, reader.shape(node) or ())


def _unexpanded(mask: fx.Node, reader: Reader) -> fx.Node:
    """What a mask is expanded from: nn.MultiheadAttention writes one that is the same for all heads out for each."""
    while True:
        call, shape = reader.call(mask), reader.shape(mask)
        if call is None or shape is None or not isinstance(call["input"], fx.Node):
            return mask
        source = call["input"] if call.name == "expand" else _reshaped_from(mask, shape, reader)
        if source is None or reader.shape(source) is None:
            return mask
        passed = mask
        while passed is not source:
            passed = passed.prev
            if mutates(passed):
                return mask
        mask = source


def peel_upcast(operand: Operand, dtype: torch.dtype, reader: Reader) -> bool:
    """``q.float() @ k.float().mT``: the kernel accumulates in float32 anyway, so it takes what was cast."""
    call = reader.call(operand.node)
    if reader.value(operand.node).dtype == dtype or call is None or call.name not in CASTS:
        return False
    before, after = reader.value(call["input"]), reader.value(operand.node)
    if not isinstance(before, Tensor) or before.dtype != dtype or not same_shape(before.shape, after.shape):
        return False
    return _move(operand, call["input"])
