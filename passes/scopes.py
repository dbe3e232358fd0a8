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
    """A node that calls a graph, and what it passes for each placeholder: None where that is not known, for one of them
    or for all."""

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
    rest: list[Any] = list(node.args[last + 1 :])
    name = getattr(node.target, "__name__", "")
    if name == "invoke_subgraph":
        rest = rest[1:]  # an identifier
    if name in ("while_loop", "scan") and rest and isinstance(rest[0], (tuple, list)):
        rest[0] = [None] * len(rest[0])  # what the step before returned
    if rest and all(isinstance(each, (tuple, list)) for each in rest):
        rest = [operand for each in rest for operand in each]
    return rest if len(rest) == count else None


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
