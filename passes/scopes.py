"""The graphs of a graph module: its own and those of the higher-order operations and sub-modules it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import GraphModule

from sla_compile.passes.nodes import Reader


@dataclass(eq=False)
class Caller:
    """A node that calls a graph, and what it passes for each placeholder: None where that is not known."""

    scope: Scope
    node: fx.Node
    operands: list[Any] | None


@dataclass(eq=False)
class Scope:
    """One graph.

    Args:
        module: the graph's module.
        path: where it hangs in the root module; empty for the root.
        callers: the nodes that call it; none for the root, several for a region that is compiled once.
        siblings: the scopes that the first caller calls, this one among them (the branches of a cond).
    """

    module: GraphModule
    path: str
    reader: Reader
    callers: list[Caller] = field(default_factory=list)
    siblings: list[Scope] = field(default_factory=list)

    @property
    def parent(self) -> Scope | None:
        return self.callers[0].scope if self.callers else None

    @property
    def calls(self) -> int:
        """How often one run of the root calls this graph."""
        return sum(caller.scope.calls for caller in self.callers) or 1

    @property
    def operation(self) -> str:
        """Name of the operation that calls the graph, empty for the root."""
        if not self.callers:
            return ""
        node = self.callers[0].node
        return "call_module" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def chain(self) -> Iterator[Scope]:
        """This scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


def metadata_value(node: fx.Node) -> Any:
    """What capture noted of a node's result: torch.export in ``val``, Dynamo in ``example_value``."""
    return node.meta.get("val", node.meta.get("example_value"))


def scopes(root: GraphModule, values: Mapping[fx.Node, Any] | None = None) -> list[Scope]:
    """All graphs of `root`, callers before what they call; a graph that several nodes call comes once.

    Args:
        values: results of nodes that have no metadata.
    """

    def value(node: fx.Node) -> Any:
        known = metadata_value(node)
        return values.get(node) if known is None and values is not None else known

    found: list[Scope] = []
    seen: dict[int, Scope] = {}
    queue = [Scope(root, "", Reader(root, value))]
    while queue:
        scope = queue.pop(0)
        if id(scope.module) in seen:
            seen[id(scope.module)].callers += scope.callers
            continue
        seen[id(scope.module)] = scope
        found.append(scope)
        for node in scope.module.graph.nodes:
            queue += _called(scope, node, value)
    return found


def _called(scope: Scope, node: fx.Node, value: Callable[[fx.Node], Any]) -> list[Scope]:
    if node.op == "call_module":
        module = _attribute(scope.module, str(node.target))
        bodies = [(str(node.target), module)] if isinstance(module, GraphModule) else []
        last = -1
    elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        bodies, last = [], -1
        for position, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                module = _attribute(scope.module, str(argument.target))
                if isinstance(module, GraphModule):
                    bodies.append((str(argument.target), module))
                    last = position
    else:
        return []
    result = []
    for name, body in bodies:
        operands = _operands(node, last, sum(n.op == "placeholder" for n in body.graph.nodes))
        path = f"{scope.path}.{name}" if scope.path else name
        result.append(Scope(body, path, Reader(body, value), [Caller(scope, node, operands)]))
    for each in result:
        each.siblings = result
    return result


def _operands(node: fx.Node, last: int, count: int) -> list[Any] | None:
    """The caller's arguments for the `count` placeholders of a body whose own argument is number `last`."""
    rest = list(node.args[last + 1 :])
    if getattr(node.target, "__name__", "") == "invoke_subgraph":
        rest = rest[1:]  # an identifier
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = list(rest[0])
    return rest if len(rest) == count else None


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


class Sources:
    """Where tensors come from: the activations that a node's value is computed of, token by token.

    NOTE [Self-attention]
    Equal numbers of queries and keys do not make self-attention: Wan attends from 512 video tokens to 512 text tokens.
    Neither does a look at the model's inputs alone, for after the first block every stream depends on every input. So
    the walk back from query, key and value ends at the inputs *and at the results of attentions* (and of called
    subgraphs, such as checkpointed blocks): between two attentions transformers work on each token by itself, hence
    streams that have not been joined keep different sources. Parameters, buffers and sizes are no sources. It is
    self-attention if

    * key has the sources of query and maybe more, a mask that zeroes padded keys, and value has none that query lacks:
      rotary tables reach query and key alone. A query with more sources than key is refused: conditioning by the prompt
      gives the query of a cross-attention all that its keys have. Or
    * query, key and value are computed of three unrelated inputs: a graph that begins behind the projections does not
      say, and equal lengths are all there is to go by. Cross-attention there has key and value of one input.

    Joint attention (Flux: text and image concatenated) has both streams as sources of all three; the attentions of
    Wan's blocks to the text have the text alone for key and value. Limit: streams that are slices of one tensor look
    alike.

    Args:
        found: the graphs.
        stops: the nodes where attentions end.
        constants: names of the root's placeholders that are parameters, buffers or constants.
    """

    def __init__(self, found: list[Scope], stops: set[fx.Node], constants: set[str]) -> None:
        self._bits: dict[fx.Node, int] = {}
        self._inputs = 0
        self._next = 0
        self._tagged: dict[tuple[int, int], int] = {}
        called = {caller.node for scope in found for caller in scope.callers}
        for scope in found:
            placeholders = 0
            for node in scope.module.graph.nodes:
                if node.op == "placeholder":
                    self._bits[node] = self._placeholder(scope, node, placeholders, constants)
                    placeholders += 1
                elif node.op == "get_attr" or not _carries_tensors(scope.reader.value(node)):
                    self._bits[node] = 0
                elif node in stops or any(source in called for source in node.all_input_nodes) or node in called:
                    self._bits[node] = self._new()
                else:
                    bits = 0
                    for source in node.all_input_nodes:
                        bits |= self._bits[source]
                    self._bits[node] = bits

    def _new(self) -> int:
        self._next += 1
        return 1 << self._next

    def _placeholder(self, scope: Scope, node: fx.Node, position: int, constants: set[str]) -> int:
        known: list[int | None] = []
        for caller in scope.callers:
            operand = None if caller.operands is None else caller.operands[position]
            known.append(self._bits.get(operand) if isinstance(operand, fx.Node) else None)
        if known and None not in known:
            bits = [each for each in known if each is not None]
            return bits[0] if len(bits) == 1 else sum(self._tag(number, each) for number, each in enumerate(bits))
        value = scope.reader.value(node)
        if isinstance(value, nn.Parameter) or not _carries_tensors(value):
            return 0
        if not scope.callers and (node.name in constants or "_buffers_" in str(node.target)):
            return 0
        bit = self._new()
        self._inputs |= bit
        return bit

    def _tag(self, caller: int, bits: int) -> int:
        """Sources as seen through one of several callers: they must not mix, for what holds must hold for each."""
        result = 0
        for position in range(bits.bit_length()):
            if bits >> position & 1:
                if (caller, position) not in self._tagged:
                    self._tagged[caller, position] = self._new()
                    if self._inputs >> position & 1:
                        self._inputs |= self._tagged[caller, position]
                result |= self._tagged[caller, position]
        return result

    def of(self, node: fx.Node) -> int:
        """The sources of a node as a set of bits."""
        return self._bits[node]

    def why_cross(self, query: fx.Node, key: fx.Node, value: fx.Node) -> str:
        """The reason why the three do not make self-attention, empty if they do. See NOTE [Self-attention]."""
        q, k, v = self._bits[query], self._bits[key], self._bits[value]
        if not (q and k and v):
            return "its query, key or value does not depend on any input"
        if not (q & ~k or v & ~q):
            return ""
        unrelated = not (q & k or q & v or k & v)
        if unrelated and (q | k | v) & ~self._inputs == 0:
            return ""
        return "cross-attention: key and value are not computed from what the query is computed from"


def _carries_tensors(value: Any) -> bool:
    """False for what is known to be no tensor: numbers and sizes."""
    return not isinstance(value, (bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
