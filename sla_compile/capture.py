"""Whether Dynamo's graphs of an accelerated model hold the op wherever the eager model calls it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx.graph_module import GraphModule

from sla_compile.api import by_plain_name
from sla_compile.discovery import arguments
from sla_compile.examine import Calls, accelerated_roots, owner_of, watch
from sla_compile.passes.find import find_attention, owner
from sla_compile.passes.scopes import scopes
from sla_compile.passes.sites import plain_name
from sla_compile.redirect import CHILD, is_changed


@dataclass(frozen=True)
class Captured:
    """Attentions of one graph, by the accelerated owner they belong to."""

    redirected: Counter[str]
    dense: Counter[str]


class Collector:
    """A Dynamo backend that runs graphs as they are and keeps what is in them."""

    def __init__(self, owners: set[str]) -> None:
        self.owners = owners
        self.graphs: list[Captured] = []
        self.ran: list[Captured] = []

    def __call__(self, graph_module: GraphModule, _example_inputs: Any) -> Callable[..., Any]:
        captured = _contents(graph_module, self.owners)
        self.graphs.append(captured)

        def run(*args: Any) -> Any:
            self.ran.append(captured)
            return graph_module.forward(*args)

        return run


def _contents(graph_module: GraphModule, owners: set[str]) -> Captured:
    redirected: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    op = torch.ops.sla_compile.sparse_linear_attention
    for scope in scopes(graph_module):
        for node in scope.nodes:
            if node.target in (op, op.default):
                redirected[owner_of(owner(node).removesuffix(CHILD).removesuffix("."), owners)] += scope.calls
    for match in find_attention(graph_module):
        name = _accelerated_owner(match.output, owners)
        if name is not None:
            dense[name] += match.scope.calls
    return Captured(redirected, dense)


def _accelerated_owner(node: torch.fx.Node, owners: set[str]) -> str | None:
    """The innermost accelerated owner whose forward made the node."""
    for entry in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        one: Any = SimpleNamespace(meta={"nn_module_stack": {"": entry}})  # owner() reads the innermost entry
        name = owner(one)
        if name in owners:
            return name
    return None


def check_capture(
    model: nn.Module, inputs_list: Sequence[Any], *, fullgraph: bool, dynamic: bool | None
) -> list[Captured]:
    """See :func:`sla_compile.testing.assert_captured`; returns the graphs."""
    from torch._dynamo.exc import RecompileError, Unsupported, UserError

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not accelerated_roots(model):
        raise ValueError(f"assert_captured checks an accelerated module; accelerate this {type(model).__name__} first")
    if isinstance(inputs_list, (torch.Tensor, dict)) or not isinstance(inputs_list, Sequence) or not inputs_list:
        raise TypeError("inputs_list must be a list of example inputs, each a tuple or dict of the forward's arguments")
    owners = {name for name, module in by_plain_name(model).items() if is_changed(module) and CHILD in module._modules}
    watched = (watch(model, inputs, training=True) for inputs in inputs_list)
    expected = [{plain_name(name): calls for name, calls in each.items()} for each in watched]
    try:
        try:
            return _capture_all(model, inputs_list, expected, owners, fullgraph, dynamic)
        except RecompileError:  # a table or cache that the first run of the model fills is no fault of these inputs
            return _capture_all(model, inputs_list, expected, owners, fullgraph, dynamic)
    except RecompileError as error:
        raise AssertionError(f"one of these inputs is captured anew: {error}") from error
    except (Unsupported, UserError) as error:
        modes = [type(mode).__name__ for mode in torch.overrides._get_current_function_mode_stack()]
        hint = f"capture it outside of {', '.join(modes)} (with torch.device(...): is one), which Dynamo traces too; "
        raise AssertionError(f"the model does not capture as one graph: {hint if modes else ''}{error}") from error
    finally:
        torch._dynamo.reset()


def _capture_all(
    model: nn.Module,
    inputs_list: Sequence[Any],
    expected: list[dict[str, Calls]],
    owners: set[str],
    fullgraph: bool,
    dynamic: bool | None,
) -> list[Captured]:
    """Captures the model for all inputs and runs all again; RecompileError where that takes more graphs than it may."""
    torch._dynamo.reset()  # earlier captures would count as captures of ours, and ours as later ones
    collector = Collector(owners)
    compiled = torch.compile(model, backend=collector, fullgraph=fullgraph, dynamic=dynamic)
    first = 0
    for again in (False, True):
        for position, (inputs, calls) in enumerate(zip(inputs_list, expected, strict=True)):
            # Dynamo takes sizes as fixed at first and, where it may choose, as dynamic once they differ.
            limit = {True: first, None: 2 * first, False: len(inputs_list) * first}[dynamic]
            final = again or (position > 0 and len(collector.graphs) >= limit)
            args, kwargs = arguments(inputs)
            collector.ran.clear()
            with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=final):
                warnings.filterwarnings("ignore", "sla_compile: .* ran without calling", UserWarning)
                compiled(*args, **kwargs)
            first = first or len(collector.graphs)
            _check_ran(f"inputs_list[{position}]", calls, collector.ran, owners, fullgraph)
    return collector.graphs


def _check_ran(which: str, calls: dict[str, Calls], ran: list[Captured], owners: set[str], by_name: bool) -> None:
    """Raises AssertionError where the graphs that ran hold other attentions than the eager model calls."""
    eager = Counter({name: len(made.redirected) for name, made in calls.items()})
    eager_dense = Counter({name: len(made.dense) for name, made in calls.items() if name in owners})
    redirected = sum((each.redirected for each in ran), Counter())
    dense = sum((each.dense for each in ran), Counter())
    told = []
    # Pieces of a broken graph name their owners from the piece's own root.
    for name in sorted(owners) if by_name else ():
        if redirected[name] != eager[name] or dense[name] > eager_dense[name]:
            told.append(
                f"  {name or 'the model itself'}: {eager[name]} calls of the op in eager mode and {redirected[name]} "
                f"in the graph; dense attentions: {eager_dense[name]} and {dense[name]}"
            )
    if not told and sum(redirected.values()) != sum(eager.values()):
        told.append(f"  {sum(eager.values())} calls of the op in eager mode, {sum(redirected.values())} in the graphs")
    if told:
        raise AssertionError(
            f"{which}: the captured graph is not the model that runs in eager mode\n" + "\n".join(told) + "\n"
            "where the op is missing, look for a torch.utils.checkpoint inside the attention's own forward, which is "
            "captured without the redirect: checkpoint the block around it instead"
        )
