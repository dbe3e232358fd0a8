"""Sparse-linear attention in a torch.export.ExportedProgram.

The attentions of its graph become the op, as in rewrite.py; the added parameters become inputs of the graph behind the
parameters it has, and entries of the signature and of the state dict: it is trained, saved and loaded as before.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from sla_compile.passes import rewrite
from sla_compile.passes.edit import Edits
from sla_compile.passes.layout import Operand
from sla_compile.passes.rewrite import Choose
from sla_compile.passes.sites import Site


def accelerate_exported(
    program: ExportedProgram,
    choose: Choose,
    allow_no_match: bool = False,
    check: Callable[[list[Site]], None] | None = None,
) -> tuple[ExportedProgram, list[Site]]:
    """A new program whose qualifying attentions are sparse-linear ones; `program` stays as it is.

    Training IR (what torch.export.export gives) and decomposed programs both work; dynamic sizes stay dynamic, and
    ``min_seq_len`` is compared with the length of the example it was exported with. Parameters are shared with
    `program`, the added ones are new.

    Args:
        program: strict or not.
        choose: from an owner's name to its configuration, or to the reason why it is left dense.
        allow_no_match: whether it is fine that nothing qualifies.

        check: sees the sites before anything is made of them, and may raise.

    Raises:
        ValueError: nothing qualifies.
        RuntimeError: accelerated before.
    """
    rewrite.check_fresh(program.graph_module)
    module = copy.deepcopy(program.graph_module)
    constants = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind not in (InputKind.USER_INPUT,) and hasattr(spec.arg, "name")
    }
    decisions = rewrite.decide(module, choose, constants=constants)
    sites = [rewrite.site(decision) for decision in decisions]
    if check is not None:
        check(sites)
    rewrite.check_found(sites, allow_no_match)
    parameters = _ProgramParameters(module, program)
    edits = Edits(parameters)
    edits.rewrite((d.match, d.config) for d in decisions if d.config is not None)
    edits.commit()
    module.meta[rewrite.META_KEY] = rewrite.record(decisions)
    outputs, calls = _renamed_outputs(program, module.graph)
    signature = ExportGraphSignature(input_specs=parameters.input_specs(), output_specs=outputs)
    rewritten = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict={**program.state_dict, **parameters.state()},
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return rewritten, sites


def _renamed_outputs(program: ExportedProgram, graph: fx.Graph) -> tuple[list[OutputSpec], list[ModuleCallEntry]]:
    """The output specifications and the module call graph, where a node that was replaced is an output itself."""
    (arguments,) = graph.output_node().args
    assert isinstance(arguments, (tuple, list))
    specs, renamed = [], {}
    for spec, argument in zip(program.graph_signature.output_specs, arguments, strict=True):
        if isinstance(spec.arg, TensorArgument) and isinstance(argument, fx.Node):
            renamed[spec.arg.name] = argument.name
            spec = dataclasses.replace(spec, arg=TensorArgument(argument.name))
        specs.append(spec)
    # tree specifications are immutable, and their class warns when it is copied
    signatures = [entry.signature for entry in program.module_call_graph if entry.signature is not None]
    shared = {id(spec): spec for signature in signatures for spec in (signature.in_spec, signature.out_spec)}
    calls = copy.deepcopy(program.module_call_graph, shared)
    for entry in calls:
        for argument in entry.signature.outputs if entry.signature is not None else ():
            if isinstance(argument, TensorArgument):
                argument.name = renamed.get(argument.name, argument.name)
    return specs, calls


class _ProgramParameters(rewrite.ModuleParameters):
    """Makes an owner's parameters inputs of the graph, behind the last parameter."""

    def __init__(self, module: fx.GraphModule, program: ExportedProgram) -> None:
        super().__init__(module, {})
        self._specs = list(program.graph_signature.input_specs)
        self._parameters = program.state_dict
        self._taken = set(program.state_dict) | set(program.constants)
        self._state: dict[str, nn.Parameter] = {}

    def module(self, owner: str, config: Any, query: Operand, device: torch.device) -> Any:
        path, module = super().module(owner, config, query, device)
        clash = sorted(name for name in self._taken if name == path or name.startswith(f"{path}."))
        if clash:
            raise ValueError(
                f"the parameters of sparse-linear attention belong at {path}, but the program has {clash[0]}"
            )
        return path, module

    def tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._parameters.items()

    def node(self, graph: fx.Graph, path: str, parameter: nn.Parameter) -> fx.Node:
        kinds = (InputKind.TOKEN, InputKind.PARAMETER)
        position = next((i for i, spec in enumerate(self._specs) if spec.kind not in kinds), len(self._specs))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        following = placeholders[position] if position < len(placeholders) else placeholders[-1].next
        with graph.inserting_before(following):
            node = graph.placeholder(f"p_{path.replace('.', '_')}")
        self._specs.insert(position, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), path))
        self._state[path] = parameter
        return node

    def input_specs(self) -> list[InputSpec]:
        """The program's inputs, the added ones among them."""
        return self._specs

    def state(self) -> dict[str, nn.Parameter]:
        """The added entries of the state dict."""
        return self._state
