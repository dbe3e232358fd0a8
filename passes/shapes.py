"""Shapes of a graph that carries none, such as ``torch.fx.symbolic_trace`` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph_module import GraphModule


def propagate(graph_module: GraphModule, example_inputs: Sequence[Any] | Mapping[str, Any]) -> dict[fx.Node, Any]:
    """The fake result of every node, sub-modules that are graphs included; the graph and its metadata stay as they are.

    Args:
        example_inputs: a tuple in the order of the graph's inputs, or a mapping from their names.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, Mapping):
        names = {str(node.target) for node in inputs}
        if not set(example_inputs) <= names:
            raise ValueError(
                f"example_inputs has {sorted(set(example_inputs) - names)}; the graph's inputs are {sorted(names)}"
            )
        missing = [n for n in inputs if str(n.target) not in example_inputs and not n.args]
        if missing:
            raise ValueError(f"example_inputs lacks {[str(node.target) for node in missing]}")
        values = [example_inputs.get(str(node.target), node.args[0] if node.args else None) for node in inputs]
    else:
        values = list(example_inputs)
        if len(values) > len(inputs) or any(not node.args for node in inputs[len(values) :]):
            raise ValueError(f"{len(values)} example_inputs for a graph whose inputs are {[n.name for n in inputs]}")
        values += [node.args[0] for node in inputs[len(values) :]]
    mode = detect_fake_mode(values) or FakeTensorMode()
    known: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        _Propagation(graph_module, mode, known).run(*(_fake(mode, value) for value in values))
    return known


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


class _Propagation(fx.Interpreter):
    """Runs on fake tensors and keeps what every node gave."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode, known: dict[fx.Node, Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mode, self.known = mode, known

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.known[n] = result
        return result

    def fetch_attr(self, target: str) -> Any:
        return _fake(self.mode, super().fetch_attr(target))

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.module.get_submodule(target)
        if isinstance(module, GraphModule):
            return _Propagation(module, self.mode, self.known).run(*args, **kwargs)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fakes = {name: _fake(self.mode, tensor) for name, tensor in tensors.items()}
        return torch.func.functional_call(module, fakes, args, kwargs)
