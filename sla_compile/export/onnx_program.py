"""ONNX files of accelerated models, through torch.onnx.export."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sla_compile.export.decompose import OP, check_accelerated
from sla_compile.export.packages import exported, written_whole
from sla_compile.kernels.masks import shared_dims

MINIMUM_OPSET = 18  # sizes as inputs of reductions, Split by sizes; also torch's own minimum
# The newest that says nothing a runtime of the last years cannot read: ONNX Runtime from 1.17, TensorRT from 10.
DEFAULT_OPSET = 20
# Fewer, and the overhead of the loop shows on the CPU; more, and what is gathered leaves the cache.
ROWS_PER_STEP = 8
_MASK = 8  # position of the operator's key_padding_mask


def onnx_translations(rows_per_step: int = ROWS_PER_STEP) -> dict[torch._ops.OpOverload, Callable]:
    """The ``custom_translation_table`` with which torch.onnx.export(..., dynamo=True) understands the operator.

    Args:
        rows_per_step: as in :func:`onnx`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: `rows_per_step` is not positive.
    """
    _check_installed()
    from sla_compile.export.onnx_operator import translation

    if isinstance(rows_per_step, bool) or not isinstance(rows_per_step, int) or rows_per_step < 1:
        raise ValueError(f"rows_per_step must be a positive integer, got {rows_per_step!r}")
    return {OP: translation(rows_per_step)}


def onnx(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike | None,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset_version: int = DEFAULT_OPSET,
    rows_per_step: int = ROWS_PER_STEP,
    bfloat16: bool = False,
    external_data: bool = False,
    **options: Any,
) -> Any:
    """Exports an accelerated model to ONNX, in standard operators that do the work of sparse attention only.

    Args:
        model: an accelerated module, in eval mode, or its ExportedProgram.
        path: where the file goes, once it is complete and checked by onnx.checker; None writes none.
        args, kwargs: example inputs of a module.
        dynamic_shapes: of a module, as in torch.export.export.
        opset_version: 18 or newer.
        rows_per_step: query blocks that one step of the loop over critical blocks takes. The default suits a CPU; a GPU
            wants hundreds. A step holds ``2 * rows_per_step * critical_blocks * block_k * D`` gathered numbers.
        bfloat16: whether bfloat16 is fine: ONNX Runtime has no kernels for most operators of it, TensorRT has.
        external_data: whether weights go to a file of their own, ``<path>.data``; needed from 2 GB on.
        options: to torch.onnx.export, such as ``input_names`` and ``output_names``.

    Returns:
        The torch.onnx.ONNXProgram.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is not accelerated, the opset is too old or too new for the installed onnx, or the example
            of an input that is a mask was expanded over queries.
        TypeError: the model holds bfloat16 tensors.
    """
    translations = {**onnx_translations(rows_per_step), **options.pop("custom_translation_table", {})}
    from sla_compile.export.onnx_boolean import replace_boolean_where

    check_opset(opset_version)
    program = exported(model, args, kwargs, dynamic_shapes)
    check_accelerated(program, "torch.onnx.export")
    _check_masks(program)
    if not bfloat16:
        _check_no_bfloat16(program)
    options = {"verbose": False, **options}
    result: Any = torch.onnx.export(
        program, dynamo=True, opset_version=opset_version, custom_translation_table=translations, **options
    )
    replace_boolean_where(result.model)
    if path is not None:
        import onnx.checker

        with written_whole(path) as partial:
            result.save(partial, external_data=external_data)
            onnx.checker.check_model(os.fspath(partial), full_check=True)
    return result


def check_opset(version: int) -> None:
    """Raises ValueError for an opset that cannot be written."""
    import onnx.defs

    newest = onnx.defs.onnx_opset_version()
    if isinstance(version, bool) or not isinstance(version, int) or not MINIMUM_OPSET <= version <= newest:
        raise ValueError(
            f"opset_version must be from {MINIMUM_OPSET} to {newest}, the newest of the installed onnx, got {version!r}"
        )


def _check_installed() -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f'ONNX export needs {error.name}: pip install "sla-compile[onnx]"') from error
    del onnx


def _check_masks(program: ExportedProgram) -> None:
    """An ONNX file cannot tell an expanded mask, of which the operator reads one row, from another."""
    for node in program.graph.find_nodes(op="call_function", target=OP):
        mask = node.args[_MASK]
        if not isinstance(mask, torch.fx.Node) or not _is_expanded(mask):
            continue
        while mask.args and isinstance(mask.args[0], torch.fx.Node):
            mask = mask.args[0]
        if mask.op == "placeholder" and _is_expanded(mask):
            raise ValueError(
                f"the mask {mask.name} that the program was exported with is expanded over heads or queries, and "
                "nothing in an ONNX file would hold its next one to that; export with a mask of shape "
                "(batch, 1, 1, tokens)"
            )


def _is_expanded(mask: torch.fx.Node) -> bool:
    value = mask.meta["val"]
    return any(value.shape[dim] != 1 and value.stride(dim) == 0 for dim in shared_dims(value))


def _check_no_bfloat16(program: ExportedProgram) -> None:
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            raise TypeError(
                f"{node.name} is bfloat16, which ONNX Runtime does not run on the CPU; convert the model with "
                "model.float() or model.half(), or pass bfloat16=True for a runtime that has it, such as TensorRT"
            )
