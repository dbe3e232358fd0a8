"""The operator's decomposition into core ATen: on request, and on its own in AOTInductor.

NOTE [Inlined ahead of time]
An AOTInductor package runs without Python, where the operator cannot be called. So while AOTInductor traces, the
operator is replaced, as torch does it with the bodies of triton ops: on CUDA by launches of its Triton kernels, on the
CPU by its decomposition. Anywhere else, under torch.export and torch.compile too, it stays one node, and runs in the
kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

import sla_compile.ops  # noqa: F401  # registers the operator
from sla_compile.export import visible
from sla_compile.kernels import decomposed

OP = torch.ops.sla_compile.sparse_linear_attention.default


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """The table ``ExportedProgram.run_decompositions(table)`` takes to turn the operator into core ATen operators and a
    ``while_loop``, and the rest as the default table does. For inference: the backward has no decomposition."""
    table = torch.export.default_decompositions()
    table[OP] = decomposed.forward
    return table


def count_operators(program: torch.export.ExportedProgram) -> int:
    """How often a program calls the operator, in subgraphs too."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum(node.target is OP for graph in graphs for node in graph.graph.nodes)


def check_accelerated(program: torch.export.ExportedProgram, plainly: str) -> None:
    """Raises ValueError for a program without the operator, which was not meant to come here."""
    if not count_operators(program):
        raise ValueError(
            "the program does not call sla_compile::sparse_linear_attention: accelerate the model first (see "
            f"sla_compile.report(model) for why an attention stays dense), or export the dense one with {plainly}"
        )


def _is_ahead_of_time() -> bool:
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def _inline_ahead_of_time(mode: Any, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
    if not _is_ahead_of_time():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    body = visible.forward if args[0].device.type == "cuda" else decomposed.forward
    with mode:
        return body(*args, **(kwargs or {}))


torch.library.register_torch_dispatch(OP.name(), FunctionalTensorMode, _inline_ahead_of_time)
