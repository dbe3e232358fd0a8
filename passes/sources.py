"""Where the tensors of a graph come from, which tells self-attention from cross-attention."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sla_compile.passes.nodes import VIEWS, mutates
from sla_compile.passes.scopes import Caller, Scope


class Sources:
    """The activations that each node's value is computed of, token by token.

    NOTE [Self-attention]
    Equal numbers of queries and keys do not make self-attention: Wan attends from 512 video tokens to 512 text tokens.
    Neither does a look at the model's inputs alone, for after the first block every stream depends on every input. So
    the walk back from query, key and value ends at the inputs *and at the results of attentions*: between two of those
    transformers work on each token by itself, hence streams that have not been joined keep different sources.
    Parameters, buffers and sizes are no sources. It is self-attention if

    * key has the sources of query and maybe more, a mask that zeroes padded keys, and value has none that query lacks:
      rotary tables reach query and key alone. A query with more sources than key is refused: conditioning by the prompt
      gives the query of a cross-attention all that its keys have. Or
    * query, key and value are computed of three unrelated inputs: a graph that begins behind the projections does not
      say, and equal lengths are all there is to go by. Cross-attention there has key and value of one input.

    Joint attention (Flux: text and image concatenated) has both streams as sources of all three; the attentions of
    Wan's blocks to the text have the text alone for key and value. Limit: streams that are slices of one tensor look
    alike.

    A graph that is called several times is walked once for each call, and all calls must agree.

    Args:
        found: the graphs.
        stops: the nodes where attentions end.
        constants: names of the root's placeholders that are parameters, buffers or constants.
    """

    def __init__(self, found: list[Scope], stops: set[fx.Node], constants: set[str]) -> None:
        self._stops, self._constants = stops, constants
        self._bodies: dict[fx.Node, list[tuple[Scope, Caller]]] = {}
        for scope in found:
            for caller in scope.callers:
                self._bodies.setdefault(caller.node, []).append((scope, caller))
        self._seen: dict[fx.Node, list[int]] = {}
        self._inputs = 0
        self._next = 0
        self._walk(found[0], None)

    def of(self, node: fx.Node) -> int:
        """The sources of a node as a set of bits, over all calls of its graph."""
        return functools.reduce(operator.or_, self._seen.get(node, ()), 0)

    def why_cross(self, query: fx.Node, key: fx.Node, value: fx.Node) -> str:
        """The reason why the three do not make self-attention, empty if they do. See NOTE [Self-attention]."""
        for q, k, v in zip(*(self._seen.get(node, ()) for node in (query, key, value)), strict=True):
            if not (q and k and v):
                return "its query, key or value does not depend on any input"
            unrelated = not (q & k or q & v or k & v) and not (q | k | v) & ~self._inputs
            if (q & ~k or v & ~q) and not unrelated:
                return "cross-attention: key and value are not computed from what the query is computed from"
        return ""

    def _new(self, *, is_input: bool = False) -> int:
        self._next += 1
        bit = 1 << self._next
        if is_input:
            self._inputs |= bit
        return bit

    def _walk(self, scope: Scope, operands: Sequence[int | None] | None) -> list[int] | int | None:
        """Follows one call of a graph; returns its outputs' sources, None where there is no telling them apart."""
        bits: dict[fx.Node, int] = {}
        outputs: dict[fx.Node, list[int]] = {}
        placeholders = 0
        result: list[int] | int | None = None
        for node in scope.module.graph.nodes:
            if node.op == "placeholder":
                known = None if operands is None else operands[placeholders]
                bits[node] = self._placeholder(scope, node) if known is None else known
                placeholders += 1
            elif node.op == "output":
                returned = node.args[0]
                if isinstance(returned, fx.Node):
                    result = bits[returned]
                elif isinstance(returned, (tuple, list)) and not any(isinstance(r, (tuple, list)) for r in returned):
                    result = [bits[each] if isinstance(each, fx.Node) else 0 for each in returned]
            elif node in self._stops:
                bits[node] = self._new()
            elif node.op == "get_attr" or not _carries_tensors(scope.reader.value(node)):
                bits[node] = 0
            elif node.target is operator.getitem and node.args[0] in outputs and isinstance(node.args[1], int):
                bits[node] = outputs[node.args[0]][node.args[1]]
            else:
                bits[node] = functools.reduce(operator.or_, (bits[each] for each in _inputs(scope, node)), 0)
            if mutates(node):  # rotary embeddings are written into halves of an empty tensor
                for written in _written(scope, node):
                    bits[written] |= bits[node]
            if node in self._bodies:
                called = [self._walk(body, _passed(caller, bits)) for body, caller in self._bodies[node]]
                merged = _merged(called)
                if isinstance(merged, list):
                    outputs[node] = merged
                elif merged is not None:
                    bits[node] = merged
        for node, sources in bits.items():
            self._seen.setdefault(node, []).append(sources)
        return result

    def _placeholder(self, scope: Scope, node: fx.Node) -> int:
        value = scope.reader.value(node)
        if isinstance(value, nn.Parameter) or not _carries_tensors(value):
            return 0
        if not scope.callers and (node.name in self._constants or "_buffers_" in str(node.target)):
            return 0
        return self._new(is_input=True)


def _inputs(scope: Scope, node: fx.Node) -> list[fx.Node]:
    """The nodes whose values, and not merely whose shapes or dtypes, the node needs."""
    call = scope.reader.call(node)
    if call is not None and (call.name.startswith("new_") or call.name.endswith("_like")):
        return []
    if call is not None and call.name.endswith("_as") and isinstance(call["input"], fx.Node):
        return [call["input"]]
    return node.all_input_nodes


def _written(scope: Scope, node: fx.Node) -> list[fx.Node]:
    """What an in-place operation writes to: its first argument, and the tensors of which that is a view."""
    found: list[fx.Node] = []
    target: Any = node.args[0] if node.args else None
    while isinstance(target, fx.Node):
        found.append(target)
        call = scope.reader.call(target)
        target = target.args[0] if call is not None and call.name in VIEWS and target.args else None
    return found


def _passed(caller: Caller, bits: dict[fx.Node, int]) -> list[int | None] | None:
    if caller.operands is None:
        return None
    return [bits[each] if isinstance(each, fx.Node) else None if each is None else 0 for each in caller.operands]


def _merged(called: list[list[int] | int | None]) -> list[int] | int | None:
    """The sources of a call's results, whichever of its graphs (the branches of a cond) it runs."""
    single = [each for each in called if isinstance(each, int)]
    if len(single) == len(called):
        return functools.reduce(operator.or_, single)
    several = [each for each in called if isinstance(each, list)]
    if len(several) == len(called) and len({len(each) for each in several}) == 1:
        return [functools.reduce(operator.or_, column) for column in zip(*several, strict=True)]
    return None


def _carries_tensors(value: Any) -> bool:
    """False for what is known to be no tensor: numbers and sizes."""
    return not isinstance(value, (bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
