"""Attention written out: ``softmax(q kᵀ · s + mask) v``, found by following the data from the softmax.

Backwards from the softmax over scalings, masks, casts and reshapes to the product that makes the scores, forwards to
the product that uses the probabilities. Every dimension of the scores is followed by its role (query token, key token,
batch), so that matmul, bmm, baddbmm, einsum, and what torch.export makes of them, are one case and not a list of patterns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sla_compile.passes.nodes import CASTS, PERMUTES, RESHAPES, Call, Reader, is_idle, mutates, permutation, same, same_shape

QUERY, KEY, DEPTH = "query", "key", "depth"


class NoMatch(Exception):
    """Why a softmax is not attention that can be rewritten."""


@dataclass
class Operand:
    """A tensor of the match: a node and the views that bring it into the layout the op wants.

    A view is ``("permute", order)``, ``("regroup", number of leading dimensions, how to write the sizes they become,
    those sizes)`` or ``("replay", node)``, which does what another node does; `skipped` are nodes between `node` and the product that are no longer needed.
    """

    node: fx.Node
    views: list[tuple] = field(default_factory=list)
    shape: tuple = ()
    skipped: set[fx.Node] = field(default_factory=set)


@dataclass
class Mask:
    """A tensor of the scores' frame; `hides` means that True takes a key out."""

    node: fx.Node
    hides: bool
    shape: tuple


@dataclass
class Written:
    """A found ``softmax(q kᵀ · s + mask) v``.

    `output` is the node it ends in and `views` what turns the op's output into that node's layout; `inner` are the nodes
    that disappear.
    """

    query: Operand
    key: Operand
    value: Operand
    mask: Mask | None
    scale: float
    scale_nodes: list[tuple[str, fx.Node]]
    dropout_p: float
    output: fx.Node
    views: list[tuple]
    inner: set[fx.Node]
    refusal: str = ""


@dataclass(frozen=True)
class _Product:
    """A batched matrix product: the role or batch number of every dimension."""

    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    labels: tuple[str, ...]
    factor: float = 1.0
    added: fx.Node | None = None

    @property
    def contracted(self) -> str:
        return next(iter(set(self.left_labels) - set(self.labels)))

    def free(self, side: Sequence[str], other: Sequence[str]) -> list[str]:
        return [label for label in side if label not in other]


def match_softmax(softmax: fx.Node, reader: Reader) -> Written | None:
    """The attention around a softmax node, or None where there is none.

    A match that cannot be rewritten carries its `refusal`.
    """
    call = reader.call(softmax)
    if call is None or not isinstance(call["input"], fx.Node) or reader.shape(softmax) is None:
        return None
    back: _Scores | None = None
    reason = ""
    try:
        back = _trace_back(call["input"], reader)
    except NoMatch as failure:
        reason = str(failure)
    try:
        front = _trace_front(softmax, reader)
    except NoMatch as failure:
        front, reason = None, reason or str(failure)
    if front is None and back is None:
        return None
    if back is None or front is None:
        return _refused(softmax, back, front, reason)
    try:
        return _assemble(softmax, call, back, front, reader)
    except NoMatch as failure:
        return _refused(softmax, back, front, str(failure))


def _refused(softmax: fx.Node, back: _Scores | None, front: _Use | None, reason: str) -> Written:
    query = back.product.left if back else softmax
    key = back.product.right if back else softmax
    value = front.value if front else softmax
    operands = (Operand(query), Operand(key), Operand(value))
    return Written(*operands, None, 1.0, [], 0.0, front.node if front else softmax, [], set(), reason)


# ---- backwards: the scores -------------------------------------------------------------------------------------------


@dataclass
class _Scores:
    product: _Product
    node: fx.Node
    steps: list[tuple[fx.Node, Call]]


def _trace_back(node: fx.Node, reader: Reader) -> _Scores:
    steps: list[tuple[fx.Node, Call]] = []
    while True:
        call = reader.call(node)
        if call is None:
            raise NoMatch(f"its scores come from {node.target}, which is not understood")
        product = read_product(node, call, reader)
        if product is not None:
            return _Scores(product, node, steps[::-1])
        steps.append((node, call))
        node = _previous(node, call, reader)


def _previous(node: fx.Node, call: Call, reader: Reader) -> fx.Node:
    """The scores that a step of the chain works on."""
    candidates: list[Any]
    if call.name in RESHAPES or call.name in CASTS or call.name in PERMUTES or call.name == "masked_fill":
        candidates = [call["input"]]
    elif call.name == "div":
        candidates = [call["input"]]
    elif call.name in ("mul", "add"):
        candidates = [call["input"], call["other"]]
    elif call.name == "where":
        candidates = [call["input"], call["other"]]
    else:
        raise NoMatch(f"its scores pass through {call.name}, which sparse-linear attention does not have")
    nodes = [c for c in candidates if isinstance(c, fx.Node) and isinstance(reader.value(c), Tensor)]
    if len(nodes) > 1:
        leading = []
        for candidate in nodes:
            try:
                _trace_back(candidate, reader)
                leading.append(candidate)
            except NoMatch:
                pass
        if len(leading) > 1:
            raise NoMatch("its scores are a sum or product of two matrix products")
        nodes = leading or nodes[:1]
    if not nodes:
        raise NoMatch(f"its scores pass through {call.name} of no tensor")
    return nodes[0]


def read_product(node: fx.Node, call: Call, reader: Reader) -> _Product | None:
    """The node as a product of two batched matrices; None where it is none."""
    if call.name == "einsum":
        return _read_einsum(call, reader)
    if call.name in ("matmul", "bmm"):
        left, right = call["input"], call["other"] if call.name == "matmul" else call["mat2"]
        factor, added = 1.0, None
    elif call.name == "baddbmm":
        left, right, factor = call["batch1"], call["batch2"], call["alpha"]
        added = None if call["beta"] == 0 else call["input"]
        if call["beta"] not in (0, 1) or not isinstance(factor, (int, float)):
            return None
    else:
        return None
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    left_shape, right_shape = reader.shape(left), reader.shape(right)
    if left_shape is None or right_shape is None or len(left_shape) != len(right_shape) or len(left_shape) < 2:
        return None
    if not same_shape(left_shape[:-2], right_shape[:-2]):
        return None
    batch = tuple(f"batch{i}" for i in range(len(left_shape) - 2))
    return _Product(left, right, (*batch, "row", "sum"), (*batch, "sum", "column"), (*batch, "row", "column"), factor, added)


def _read_einsum(call: Call, reader: Reader) -> _Product | None:
    operands = call["operands"]
    equation = str(call["equation"]).replace(" ", "")
    if len(operands) != 2 or "->" not in equation or not all(isinstance(o, fx.Node) for o in operands):
        return None
    inputs, _, output = equation.partition("->")
    sides = inputs.split(",")
    shapes = [reader.shape(operand) for operand in operands]
    if len(sides) != 2 or shapes[0] is None or shapes[1] is None:
        return None
    dots = [len(shape) - len(side.replace("...", "")) for side, shape in zip(sides, shapes, strict=True)]
    if "..." in equation and (dots[0] != dots[1] or not all("..." in text for text in (*sides, output))):
        return None
    labels = [_einsum_labels(text, dots[0]) for text in (*sides, output)]
    left, right, out = labels
    if any(len(set(text)) != len(text) for text in labels):
        return None
    shared, summed = set(left) & set(right) & set(out), (set(left) & set(right)) - set(out)
    if len(summed) != 1 or len(set(left) - shared - summed) != 1 or len(set(right) - shared - summed) != 1:
        return None
    if set(out) != shared | (set(left) ^ set(right)):
        return None
    sizes = dict(zip(left, shapes[0], strict=True))
    if not all(same(sizes[label], size) for label, size in zip(right, shapes[1], strict=True) if label in sizes):
        return None
    return _Product(operands[0], operands[1], left, right, out)


def _einsum_labels(text: str, dots: int) -> tuple[str, ...]:
    before, found, after = text.partition("...")
    return (*before, *(f"...{i}" for i in range(dots if found else 0)), *after)


# ---- forwards: what the probabilities are used for -------------------------------------------------------------------


@dataclass
class _Use:
    node: fx.Node
    product: _Product
    value: fx.Node
    steps: list[tuple[fx.Node, Call]]
    dropout_p: float
    helpers: set[fx.Node]


def _trace_front(softmax: fx.Node, reader: Reader) -> _Use:
    steps: list[tuple[fx.Node, Call]] = []
    helpers: set[fx.Node] = set()
    dropout_p, node = 0.0, softmax
    while True:
        users = [user for user in node.users if not is_idle(user)]
        guarded = _guarded_zero(node, users, reader)
        if guarded is not None:
            node, extra = guarded
            helpers |= extra
            continue
        if len(users) != 1:
            raise NoMatch("its attention probabilities are used elsewhere" if users else "its result is not used")
        user = users[0]
        call = reader.call(user)
        if call is None:
            raise NoMatch(f"its attention probabilities go to {user.target}, which is not understood")
        product = read_product(user, call, reader)
        if product is not None:
            if product.added is not None or product.factor != 1.0 or product.left is product.right:
                raise NoMatch("its product with the values adds or scales")
            value = product.right if product.left is node else product.left
            return _Use(user, product, value, steps, dropout_p, helpers)
        if call.name == "dropout":
            training = call["training"] if call["training"] is not None else call["train"]
            p = call["p"] if training is not False else 0.0
            if not isinstance(p, (int, float)) or isinstance(reader.value(user), (tuple, list)):
                raise NoMatch("its dropout is not understood")
            dropout_p = max(dropout_p, float(p))
        elif call.name not in RESHAPES and call.name not in CASTS and call.name not in PERMUTES and call.name != "nan_to_num":
            raise NoMatch(f"its attention probabilities pass through {call.name}")
        steps.append((user, call))
        node = user


def _guarded_zero(node: fx.Node, users: list[fx.Node], reader: Reader) -> tuple[fx.Node, set[fx.Node]] | None:
    """``where(row has no key, 0, p)``, what torch.export makes of the safe softmax; the op gives zeros there itself."""
    for user in users:
        call = reader.call(user)
        if call is None or call.name != "where" or call["other"] is not node:
            continue
        zero = reader.call(call["input"])
        if zero is None or zero.name not in ("full_like", "zeros_like") or zero["fill_value"] not in (0, None):
            continue
        condition, helpers = call["condition"], {user, call["input"]}
        while isinstance(condition, fx.Node):
            inner = reader.call(condition)
            if inner is None or inner.name not in ("eq", "logical_not", "any"):
                break
            helpers.add(condition)
            condition = inner["input"]
        if set(users) <= helpers:
            return user, helpers
    return None




# ---- both ends together ----------------------------------------------------------------------------------------------


@dataclass(eq=False)  # compared by identity: comparing symbolic sizes would install guards
class _Axis:
    label: str
    size: Any
    argument: Any  # what to write for the size in a reshape: an int, a node, or -1


class _Frame:
    """The dimensions of the scores at one step."""

    def __init__(self, axes: list[_Axis]) -> None:
        self.axes = axes

    @property
    def batch(self) -> list[_Axis]:
        return [axis for axis in self.axes if axis.label.startswith("batch")]

    @property
    def canonical(self) -> bool:
        """Whether the last two dimensions are the query's and the key's tokens."""
        return [axis.label for axis in self.axes[-2:]] == [QUERY, KEY]


def _assemble(softmax: fx.Node, call: Call, back: _Scores, front: _Use, reader: Reader) -> Written:
    product = back.product
    shape = reader.shape(back.node)
    assert shape is not None
    frame = _Frame([_Axis(f"batch:{a}" if a in product.left_labels and a in product.right_labels else a, size, _argument(size))
                    for a, size in zip(product.labels, shape, strict=True)])
    frames = [frame]
    scale, scale_nodes = product.factor, []
    mask: Mask | None = None
    mask_frame = 0
    if product.added is not None:
        mask = _mask(product.added, False, reader)
    previous = back.node
    for node, step in back.steps:
        frames.append(_step(frames[-1], previous, node, step, reader))
        if step.name in ("mul", "div"):
            scale = _scaled(step, previous, scale, scale_nodes, reader)
        elif step.name in ("add", "masked_fill", "where"):
            found = _read_mask(step, previous, reader)
            if found is not None and mask is not None:
                raise NoMatch("its scores have more than one mask")
            if found is not None:
                mask, mask_frame = found, len(frames) - 1
        previous = node
    roles = _roles(frames[-1], call, product)
    for each in frames:
        for axis in each.axes:
            axis.label = roles.get(axis.label, axis.label)
    if mask is not None and not frames[mask_frame].canonical:
        raise NoMatch("its mask is added to transposed scores")
    end = frames[-1]
    previous = softmax
    for node, step in front.steps:
        end = _step(end, previous, node, step, reader)
        frames.append(end)
        previous = node

    target = frames[mask_frame] if mask is not None else _op_frame(frames)
    query_side = product.left_labels if roles.get(product.free(product.left_labels, product.right_labels)[0]) == QUERY else None
    left = _operand(product.left, product.left_labels, product, frames[0], target, reader)
    right = _operand(product.right, product.right_labels, product, frames[0], target, reader)
    query, key = (left, right) if query_side is not None else (right, left)
    value, views = _value(front, previous, end, target, query, reader)

    inner = {back.node, softmax, front.node, *front.helpers}
    inner |= {node for node, _ in back.steps} | {node for node, _ in front.steps}
    _check_private(inner, front.node, softmax, {node for node, _ in back.steps} | {back.node})
    written = Written(query, key, value, mask, scale, scale_nodes, front.dropout_p, front.node, views, inner)
    _simplify(written, reader)
    _check_mutation(written)
    return written


def _argument(size: Any) -> Any:
    return size if isinstance(size, int) else -1


def _step(frame: _Frame, previous: fx.Node, node: fx.Node, call: Call, reader: Reader) -> _Frame:
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
        return _Frame([_Axis(a.label, a.size, a.argument) for a in axes])
    if same_shape(before, after):
        return _Frame([_Axis(a.label, a.size, a.argument) for a in frame.axes])
    if call.name not in RESHAPES:
        raise NoMatch(f"{call.name} broadcasts its scores")
    return _Frame(_regrouped(frame.axes, after, call))


def _regrouped(axes: list[_Axis], shape: tuple, call: Call) -> list[_Axis]:
    """Axes after a row-major reshape in which the token dimensions survive."""
    tokens = [axis for axis in axes if not axis.label.startswith("batch")]
    result: list[_Axis] = []
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
            result.append(_Axis(label, size, axis.argument if axis in tokens else arguments[position]))
            position, taken = position + 1, taken + 1
            continue
        if same(size, 1):
            result.append(_Axis(f"batch:{position}", size, 1))
            position += 1
            continue
        old, new, first = 1, 1, position  # a group of batch dimensions becomes another group
        while taken < len(source) and source[taken] not in tokens:
            old, taken = old * source[taken].size, taken + 1
        while position < len(shape) and not same(old, new):
            new, position = new * shape[position], position + 1
        if not same(old, new) or first == position:
            raise NoMatch("its scores are reshaped across tokens")
        result += [_Axis(f"batch:{i}", shape[i], arguments[i]) for i in range(first, position)]
    if taken != len(source):
        raise NoMatch("its scores are reshaped across tokens")
    return result


def _size_arguments(call: Call, shape: tuple) -> list[Any]:
    """What to write for each size: a node the graph computes it with, so that lengths and batches stay free."""
    sizes = call["size"] if call["size"] is not None else call["shape"]
    known = list(sizes) if isinstance(sizes, (list, tuple)) and len(sizes) == len(shape) else list(shape)
    return [size if isinstance(size, (int, fx.Node)) else -1 for size in known]


def _roles(frame: _Frame, call: Call, product: _Product) -> dict[str, str]:
    """Which of the product's two free dimensions the softmax normalises: that is the keys'."""
    dim = call["dim"]
    if not isinstance(dim, int):
        raise NoMatch("the dimension of its softmax is not constant")
    normalised = frame.axes[dim].label
    left = product.free(product.left_labels, product.right_labels)
    right = product.free(product.right_labels, product.left_labels)
    if normalised not in (left[0], right[0]):
        raise NoMatch("its softmax does not run over a token dimension")
    other = left[0] if normalised == right[0] else right[0]
    return {normalised: KEY, other: QUERY}


def _op_frame(frames: Iterable[_Frame]) -> _Frame:
    """The frame in which the op is called: (batch, heads) if the scores ever have two batch dimensions."""
    frames = list(frames)
    return next((frame for frame in frames if len(frame.batch) == 2), frames[0])


def _operand(
    node: fx.Node, labels: tuple[str, ...], product: _Product, source: _Frame, target: _Frame, reader: Reader
) -> Operand:
    """Query or key: (batch..., tokens, depth), with the batch dimensions of the target frame."""
    shape = reader.shape(node)
    assert shape is not None
    batch = [label for label in product.labels if label in product.left_labels and label in product.right_labels]
    free = next(label for label in labels if label not in batch and label != product.contracted)
    return _laid_out(node, shape, labels, [*batch, free, product.contracted], source, target)


def _laid_out(
    node: fx.Node, shape: tuple, labels: Sequence[str], wanted: Sequence[str], source: _Frame, target: _Frame
) -> Operand:
    number = len(wanted) - 2
    views: list[tuple] = []
    order = [list(labels).index(label) for label in wanted]
    regroup = _regroup(source, target)
    if order[:number] == list(range(number)):
        views += regroup
        shift = len(target.batch) - number
        order = [*range(len(target.batch)), *(i + shift for i in order[number:])]
        views += [("permute", tuple(order))]
    else:
        views += [("permute", tuple(order)), *regroup]
    sizes = (*(axis.size for axis in target.batch), *(shape[list(labels).index(label)] for label in wanted[-2:]))
    return Operand(node, _without_identities(views), sizes)


def _regroup(source: _Frame, target: _Frame) -> list[tuple]:
    """Views between the batch dimensions of two frames."""
    old, new = [axis.size for axis in source.batch], [axis.size for axis in target.batch]
    if same_shape(old, new):
        return []
    sizes = tuple(axis.argument for axis in target.batch)
    if sum(size == -1 for size in sizes if isinstance(size, int)) > 1:
        raise NoMatch("several of its batch dimensions are symbolic")
    return [("regroup", len(old), sizes, tuple(new))]


def _without_identities(views: list[tuple]) -> list[tuple]:
    return [view for view in views if view[0] != "permute" or view[1] != tuple(range(len(view[1])))]


def _value(
    front: _Use, probabilities: fx.Node, end: _Frame, target: _Frame, query: Operand, reader: Reader
) -> tuple[Operand, list[tuple]]:
    """The value operand, and the views from the op's output to the last product's layout."""
    product = front.product
    on_left = product.left is probabilities
    labels, value_labels = (
        (product.left_labels, product.right_labels) if on_left else (product.right_labels, product.left_labels)
    )
    roles = {label: axis.label for label, axis in zip(labels, end.axes, strict=True)}
    if roles[product.contracted] != KEY:
        raise NoMatch("its last product does not sum over the keys")
    batch = [label for label in labels if roles[label].startswith("batch")]
    if not all(label in value_labels and label in product.labels for label in batch):
        raise NoMatch("its values are broadcast")
    rows = next(label for label in labels if roles[label] == QUERY)
    depth = next(label for label in value_labels if label not in labels)
    shape = reader.shape(front.value)
    assert shape is not None
    value = _laid_out(front.value, shape, value_labels, [*batch, product.contracted, depth], end, target)
    wanted = [*batch, rows, depth]
    order = tuple(wanted.index(label) for label in product.labels)
    return value, _without_identities([*_regroup(target, end), ("permute", order)])


def _scaled(call: Call, scores: fx.Node, scale: float, nodes: list, reader: Reader) -> float:
    other = call["other"] if call["input"] is scores else call["input"]
    if call["rounding_mode"] is not None:
        raise NoMatch("its scores are divided with rounding")
    number = _number(other, reader)
    if number is not None:
        return scale * number if call.name == "mul" else scale / number
    if isinstance(other, fx.Node) and type(reader.value(other)) in (int, float):
        nodes.append((call.name, other))
        return scale
    raise NoMatch("its scores are scaled by a tensor")


def _number(value: Any, reader: Reader) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _mask(node: fx.Node, hides: bool, reader: Reader) -> Mask:
    shape = reader.shape(node)
    if shape is None:
        raise NoMatch("the shape of its mask is unknown")
    return Mask(node, hides, shape)


def _read_mask(call: Call, scores: fx.Node, reader: Reader) -> Mask | None:
    """The mask of an add, masked_fill or where; None where a constant is added, which softmax does not see."""
    if call.name == "add":
        other = call["other"] if call["input"] is scores else call["input"]
        if call["alpha"] not in (None, 1):
            raise NoMatch("its mask is scaled while it is added")
        return _mask(other, False, reader) if isinstance(other, fx.Node) else None
    if call.name == "masked_fill":
        fill, condition, hides = call["value"], call["mask"], True
    elif call["input"] is scores:
        fill, condition, hides = call["other"], call["condition"], False
    else:
        fill, condition, hides = call["input"], call["condition"], True
    if isinstance(fill, fx.Node):
        fill = _constant(fill, reader)
    if not isinstance(fill, (int, float)) or fill > -1e4:
        raise NoMatch("its mask fills in something else than a very negative number")
    return _mask(condition, hides, reader)


def _constant(node: fx.Node, reader: Reader) -> Any:
    call = reader.call(node)
    if call is not None and call.name in ("scalar_tensor", "full", "full_like", "tensor"):
        return next((v for k, v in call.arguments.items() if k in ("s", "fill_value", "input") and not isinstance(v, fx.Node)), None)
    return None


# ---- checks and tidying ----------------------------------------------------------------------------------------------


def _check_private(inner: set[fx.Node], output: fx.Node, softmax: fx.Node, scores: set[fx.Node]) -> None:
    """Nothing outside of the match may see its scores or probabilities."""
    for node in inner - {output}:
        outside = [user for user in node.users if user not in inner and not is_idle(user)]
        if outside:
            what = "scores" if node in scores else "attention probabilities"
            raise NoMatch(f"its {what} are used elsewhere, by {outside[0].name}")


def _check_mutation(written: Written) -> None:
    """Its operands are read at the match's end from now on: nothing may write to a tensor before that."""
    node = min(written.inner.union(*(operand.skipped for operand in (written.query, written.key, written.value))))
    while node is not written.output:
        if node not in written.inner and mutates(node):
            raise NoMatch(f"an in-place operation, {node.name}, lies between its operands and its result")
        node = node.next


def _simplify(written: Written, reader: Reader) -> None:
    """Moves the operands to where they come from: over copies, reshapes and transposes that the views only undo, and over
    scalar factors, which belong to the scale: the feature map of the linear branch sees query and key unscaled."""
    _peel(written.value, reader)
    dtype = reader.value(written.value.node).dtype
    for operand in (written.query, written.key):
        _peel_scale(operand, written, reader)
        if _peel_upcast(operand, dtype, reader):
            _peel_scale(operand, written, reader)
    if len({reader.value(o.node).dtype for o in (written.query, written.key, written.value)}) > 1:
        raise NoMatch("its query, key and value have different dtypes")


def _peel_scale(operand: Operand, written: Written, reader: Reader) -> None:
    """Moves scalar factors of query or key into the scale, wherever they stand among its views."""
    while True:
        _peel(operand, reader)
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
            written.scale = _scaled(call, call["input"], written.scale, written.scale_nodes, reader)
        except NoMatch:
            return
        operand.skipped |= {node, *chain}
        operand.node = call["input"]
        operand.views = [*(("replay", each) for each in reversed(chain)), *operand.views]


def _peel(operand: Operand, reader: Reader) -> None:
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
                operand.views = _without_identities([("permute", composed), *operand.views[1:]])
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
    wanted = (*sizes, *shape[number:])
    node = operand.node
    while True:
        call = reader.call(node)
        if call is None or not isinstance(call["input"], fx.Node) or call.name not in RESHAPES:
            return None
        before, after = reader.value(call["input"]), reader.value(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
            return None
        node = call["input"]
        if same_shape(before.shape, wanted):
            return node


def _peel_upcast(operand: Operand, dtype: torch.dtype, reader: Reader) -> bool:
    """``q.float() @ k.float().mT``: the kernel accumulates in float32 anyway, so it takes the tensors before the cast."""
    call = reader.call(operand.node)
    if reader.value(operand.node).dtype == dtype or call is None or call.name not in CASTS:
        return False
    before, after = reader.value(call["input"]), reader.value(operand.node)
    if not isinstance(before, Tensor) or before.dtype != dtype or not same_shape(before.shape, after.shape):
        return False
    return _move(operand, call["input"])
