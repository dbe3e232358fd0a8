"""AOTInductor packages, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sla_compile.export.decompose import check_accelerated


def aoti(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    inductor_configs: dict[str, Any] | None = None,
) -> str:
    """Compiles an accelerated model to a package that runs from Python and from C++ without Python.

    It is ``torch.export.export`` without gradients, then ``torch._inductor.aoti_compile_and_package``. On CUDA the
    operator's Triton kernels are compiled into the package, on the CPU its decomposition is: either way the package
    needs no sla_compile.

    Args:
        model: an accelerated module, in eval mode, or its ExportedProgram.
        path: where the package goes, ending in ``.pt2``; an existing file is replaced once the new one is complete.
        args, kwargs: example inputs of a module.
        dynamic_shapes: of a module, as in torch.export.export.
        inductor_configs: options of Inductor.

    Returns:
        The path, for ``torch._inductor.aoti_load_package``.

    Raises:
        ValueError: the model is not accelerated, or the path does not end in ``.pt2``.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"the path of an AOTInductor package must end in .pt2, got {os.fspath(path)!r}")
    program = exported(model, args, kwargs, dynamic_shapes)
    check_accelerated(program, "torch._inductor.aoti_compile_and_package")
    # With "aot_inductor.package_cpp_only" a kernel's file has the kernel's name, and those of one name would be one.
    options = {"triton.unique_user_kernel_names": True, **(inductor_configs or {})}
    with written_whole(path) as partial:
        torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(partial), inductor_configs=options)
    return os.fspath(path)


def exported(
    model: nn.Module | ExportedProgram, args: tuple, kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    """The model's program for inference; a program is returned as it is."""
    if isinstance(model, ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise TypeError(
                "an ExportedProgram has its inputs and shapes already; pass args, kwargs and dynamic_shapes with a "
                "module only"
            )
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            "args must be a tuple of positional arguments of the model's forward, and kwargs a dict of named ones, got "
            f"args of type {type(args).__name__}"
        )
    if model.training and "eval" not in vars(model):  # a program's module has no modes, and refuses eval()
        raise ValueError("the model is in training mode; call model.eval() before exporting it")
    with torch.no_grad():
        return torch.export.export(model, tuple(args), kwargs, dynamic_shapes=dynamic_shapes)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside `path`; what was written there is moved in the end."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder to write {path.name} to")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        # The file itself last: it refers to the others.
        for written in sorted(Path(folder).iterdir(), key=lambda file: file == partial):
            os.replace(written, path.parent / written.name)
