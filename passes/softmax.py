"""Attention written out: ``softmax(q kᵀ · s + mask) v``, found by following the data from the softmax.

Backwards from the softmax over scalings, masks, casts and reshapes to the product that makes the scores, forwards to
the product that uses the probabilities. Every dimension of the scores is followed by its role (query token, key token,
batch), so that matmul, bmm, baddbmm, einsum, and what torch.export makes of them, are one case, not a list of patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sla_compile.passes.layout import (
    KEY,
    QUERY,
    Frame,
    Mask,
    NoMatch,
    Operand,
    Scale,
    laid_out,
    next_frame,
    op_frame,
    operand_of,
    peel,
    peel_scale,
    peel_upcast,
    regroup,
    shared_mask,
    without_identities,
)
from sla_compile.passes.nodes import CASTS, PERMUTES, RESHAPES, Call, Reader, is_idle, mutates
from sla_compile.passes.products import Product, read_product

_KEPT = RESHAPES | CASTS | PERMUTES
"""What scores and probabilities may pass through as they are."""

_HIDDEN = -1e4
"""From here on a score takes its key out."""


@dataclass
class Written:
    """A found ``softmax(q kᵀ · s + mask) v``.

    `output` is the node it ends in, `views` what turns the op's output into that node's layout, `inner` are the nodes
    that disappear.
    """

    query: Operand
    key: Operand
    value: Operand
    mask: Mask | None
    scale: Scale
    dropout_p: float
    output: fx.Node
    views: list[tuple]
    inner: set[fx.Node]
    refusal: str = ""


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
    return Written(*operands, None, Scale(1.0), 0.0, front.node if front else softmax, [], set(), reason)


# ---- backwards: the scores -------------------------------------------------------------------------------------------


@dataclass
class _Scores:
    product: Product
    node: fx.Node
    steps: list[tuple[fx.Node, Call]]


def _trace_back(node: fx.Node, reader: Reader) -> _Scores:
    """The product that makes the scores, and the steps from there to `node`; raises NoMatch."""
    result = _traced(node, reader, {}, 64)
    if isinstance(result, str):
        raise NoMatch(result)
    return result


def _traced(node: fx.Node, reader: Reader, seen: dict[fx.Node, _Scores | str], steps_left: int) -> _Scores | str:
    """:func:`_trace_back`, each node once: sums of sums have more paths than can be walked."""
    if node in seen:
        return seen[node]
    call = reader.call(node)
    if call is None or not steps_left:
        result: _Scores | str = f"its scores come from {node.target}, which is not understood"
    elif (product := read_product(node, call, reader)) is not None:
        result = _Scores(product, node, [])
    elif call.name in _KEPT or call.name in ("masked_fill", "div", "mul", "add", "where"):
        names = ("input", "other") if call.name in ("mul", "add", "where") else ("input",)
        inputs = {call[name] for name in names if isinstance(call[name], fx.Node)}
        traced = [_traced(each, reader, seen, steps_left - 1) for each in inputs if reader.shape(each) is not None]
        found = [each for each in traced if isinstance(each, _Scores)]
        if len(found) == 1:
            result = _Scores(found[0].product, found[0].node, [*found[0].steps, (node, call)])
        elif found:
            result = "its scores are a sum or product of two matrix products"
        else:
            result = next((each for each in traced if isinstance(each, str)), f"{call.name} of no tensor")
    else:
        result = f"its scores pass through {call.name}, which sparse-linear attention does not have"
    seen[node] = result
    return result


# ---- forwards: what the probabilities are used for -------------------------------------------------------------------


@dataclass
class _Use:
    node: fx.Node
    product: Product
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
        elif call.name not in _KEPT and call.name != "nan_to_num":
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


def _assemble(softmax: fx.Node, call: Call, back: _Scores, front: _Use, reader: Reader) -> Written:
    product = back.product
    if product.broadcast or front.product.broadcast:
        raise NoMatch(
            "its heads share keys and values by broadcasting: expand them, or call scaled_dot_product_attention with "
            "enable_gqa=True"
        )
    shape = reader.shape(back.node)
    assert shape is not None
    frames = [Frame.of_product(product, shape)]
    factor = product.factor
    scale = Scale(1.0, [("mul", factor)]) if isinstance(factor, fx.Node) else Scale(factor)
    mask: Mask | None = None
    mask_frame = 0
    fill: float | None = None
    if product.added is not None:
        mask = shared_mask(product.added, False, reader)
    previous = back.node
    for node, each in back.steps:
        frames.append(next_frame(frames[-1], previous, node, each, reader))
        if each.name in ("mul", "div"):
            by = scale.take(each, previous, reader, symbolic=True)
            fill = None if fill is None or by is None else fill * by
            if mask is not None and (fill is None or fill > _HIDDEN):  # what is filled in may hide keys all the same
                raise NoMatch("its mask is scaled together with its scores")
        elif each.name in ("add", "masked_fill", "where"):
            found = _read_mask(each, previous, reader)
            if found is not None and mask is not None:
                raise NoMatch("its scores have more than one mask")
            if found is not None:
                (mask, fill), mask_frame = found, len(frames) - 1
        previous = node
    roles = _roles(frames[-1], call, product)
    for frame in frames:
        for axis in frame.axes:
            axis.label = roles.get(axis.label, axis.label)
    if mask is not None and not frames[mask_frame].canonical:
        raise NoMatch("its mask is added to transposed scores")
    end = frames[-1]
    previous = softmax
    for node, each in front.steps:
        end = next_frame(end, previous, node, each, reader)
        frames.append(end)
        previous = node

    target = frames[mask_frame] if mask is not None else op_frame(frames)
    query_side = (
        product.left_labels if roles.get(product.free(product.left_labels, product.right_labels)[0]) == QUERY else None
    )
    left = operand_of(product.left, product.left_labels, product, frames[0], target, reader)
    right = operand_of(product.right, product.right_labels, product, frames[0], target, reader)
    query, key = (left, right) if query_side is not None else (right, left)
    value, views = _value(front, previous, end, target, query, reader)

    inner = {back.node, softmax, front.node, *front.helpers}
    inner |= {node for node, _ in back.steps} | {node for node, _ in front.steps}
    _check_private(inner, front.node, softmax, {node for node, _ in back.steps} | {back.node})
    written = Written(query, key, value, mask, scale, front.dropout_p, front.node, views, inner)
    _simplify(written, reader)
    _check_mutation(written)
    return written


def _roles(frame: Frame, call: Call, product: Product) -> dict[str, str]:
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


def _value(
    front: _Use, probabilities: fx.Node, end: Frame, target: Frame, query: Operand, reader: Reader
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
    value = laid_out(front.value, shape, value_labels, [*batch, product.contracted, depth], end, target)
    wanted = [*batch, rows, depth]
    order = tuple(wanted.index(label) for label in product.labels)
    return value, without_identities([*regroup(target, end), ("permute", order)])


def _read_mask(call: Call, scores: fx.Node, reader: Reader) -> tuple[Mask, float | None] | None:
    """The mask of an add, masked_fill or where, and what it fills in, None where it is added; None for both where a
    constant is added, which softmax does not see."""
    if call.name == "add":
        other = call["other"] if call["input"] is scores else call["input"]
        if call["alpha"] not in (None, 1):
            raise NoMatch("its mask is scaled while it is added")
        if not isinstance(other, fx.Node) or reader.shape(other) is None:  # a number
            return None
        if getattr(reader.value(other), "dtype", None) == torch.bool:
            raise NoMatch("its mask is boolean and added, which adds ones")
        return shared_mask(other, False, reader), None
    if call.name == "masked_fill":
        fill, condition, hides = call["value"], call["mask"], True
    elif call["input"] is scores:
        fill, condition, hides = call["other"], call["condition"], False
    else:
        fill, condition, hides = call["input"], call["condition"], True
    if isinstance(fill, fx.Node):
        fill = _constant(fill, reader)
    if not isinstance(fill, (int, float)) or fill > _HIDDEN:
        raise NoMatch("its mask fills in something else than a very negative number")
    return shared_mask(condition, hides, reader), float(fill)


def _constant(node: fx.Node, reader: Reader) -> Any:
    call = reader.call(node)
    if call is not None and call.name in ("scalar_tensor", "full", "full_like", "tensor"):
        return next(
            (v for k, v in call.arguments.items() if k in ("s", "fill_value", "input") and not isinstance(v, fx.Node)),
            None,
        )
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
    """Moves the operands to where they come from: over what the views only undo, and over scalar factors, which belong
    to the scale, for the feature map of the linear branch sees query and key unscaled."""
    peel(written.value, reader)
    dtype = reader.value(written.value.node).dtype
    for operand in (written.query, written.key):
        peel_scale(operand, written.scale, reader)
        if peel_upcast(operand, dtype, reader):
            peel_scale(operand, written.scale, reader)
    if len({reader.value(o.node).dtype for o in (written.query, written.key, written.value)}) > 1:
        raise NoMatch("its query, key and value have different dtypes")
