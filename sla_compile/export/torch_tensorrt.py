"""Torch-TensorRT: TensorRT engines around the operator. Import this module by name; nothing else here imports it.

NOTE [Left to PyTorch]
Torch-TensorRT cuts a graph where an operator has no converter, and this one gets none: between two engines it runs in
the Triton kernels, at their full speed. The other ways lose that. Its decomposition holds a `while_loop`, which has no
converter either, so that the cuts stay; and a plugin takes no optional tensors, does not exist in TensorRT for
RTX, and calls back into Python anyway. One engine without PyTorch comes from the ONNX file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sla_compile.export.decompose import OP, check_accelerated, count_operators
from sla_compile.export.packages import exported


def compile(
    model: nn.Module | ExportedProgram,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> GraphModule:
    """Compiles an accelerated model with Torch-TensorRT: the operator in PyTorch, the rest in engines.

    It is ``torch.export.export`` without gradients, then ``torch_tensorrt.dynamo.compile``, which is told the ranges of
    dynamic sizes that the program knows.

    Args:
        model: an accelerated module, in eval mode and on its CUDA device, or its ExportedProgram.
        args, kwargs: example inputs of a module; engines are tuned for their sizes.
        dynamic_shapes: of a module, as in torch.export.export; each dimension needs a largest size.
        options: to torch_tensorrt.dynamo.compile.

    Returns:
        What torch_tensorrt.dynamo.compile returns.

    Raises:
        ImportError: torch_tensorrt is not installed, or does not load.
        ValueError: the model is not accelerated, a dimension has no largest size, or `require_full_compilation` is
            asked.
        RuntimeError: Torch-TensorRT did something else with the operator.
    """
    if options.get("require_full_compilation"):
        raise ValueError(
            "require_full_compilation=True cannot be: sla_compile::sparse_linear_attention runs in PyTorch, between "
            "the engines; for one engine of everything build it from the file that sla_compile.export.onnx writes"
        )
    program = exported(model, args, kwargs, dynamic_shapes)
    check_accelerated(program, "torch_tensorrt.dynamo.compile")
    try:
        import torch_tensorrt
    except ImportError as error:
        raise ImportError(f'Torch-TensorRT does not load, try pip install "torch-tensorrt": {error}') from error

    def described(value: Any) -> Any:
        if not isinstance(value, Sizes):
            return value
        return torch_tensorrt.Input(
            min_shape=value.smallest, opt_shape=value.usual, max_shape=value.largest, dtype=value.dtype
        )

    positional, named = pytree.tree_map_only(Sizes, described, input_sizes(program))
    result = torch_tensorrt.dynamo.compile(program, arg_inputs=positional, kwarg_inputs=named, **options)
    left, expected = operators_in_pytorch(result), count_operators(program)
    if left != expected:
        raise RuntimeError(f"Torch-TensorRT left {left} of {expected} calls of {OP.name()} to PyTorch")
    return result


@dataclass(frozen=True)
class Sizes:
    """The sizes that an input tensor may have."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]
    dtype: torch.dtype


def input_sizes(program: ExportedProgram) -> tuple[tuple, dict[str, Any]]:
    """The program's positional and named inputs, with Sizes in place of tensors.

    Raises:
        ValueError: a dimension has no largest size.
    """
    if program.example_inputs is None:
        raise ValueError("the program has no example inputs, whose sizes the engines would be tuned for")
    leaves, structure = pytree.tree_flatten(program.example_inputs)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    described = []
    for name, leaf in zip(program.graph_signature.user_inputs, leaves, strict=True):
        if isinstance(leaf, Tensor):
            ranges = [_range(size, program, str(name)) for size in placeholders[str(name)].meta["val"].shape]
            smallest, largest = tuple(low for low, _ in ranges), tuple(high for _, high in ranges)
            leaf = Sizes(smallest, tuple(leaf.shape), largest, leaf.dtype)
        described.append(leaf)
    return pytree.tree_unflatten(described, structure)


def _range(size: int | torch.SymInt, program: ExportedProgram, name: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    expression = size.node.expr
    limits = []
    for end in ("lower", "upper"):
        limit = expression.subs({s: getattr(program.range_constraints[s], end) for s in expression.free_symbols})
        if not limit.is_Integer:
            raise ValueError(f'a dimension of {name} has no largest size: give it one, as in Dim("length", max=65536)')
        limits.append(int(limit))
    return max(limits[0], 1), limits[1]  # no engine takes empty inputs


def operators_in_pytorch(compiled: GraphModule) -> int:
    """How often the operator is called from the PyTorch segments of a compiled module."""
    segments = [module for module in compiled.modules() if isinstance(module, GraphModule)]
    return sum(node.target is OP for segment in segments for node in segment.graph.nodes)
