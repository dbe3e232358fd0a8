"""The added parameters alone, as a safetensors file that says which attentions and configurations they belong to."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sla_compile.api import Choice, accelerate_module, added_modules, by_plain_name, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.module import SparseLinearAttention
from sla_compile.passes.sites import plain_name
from sla_compile.plan import Sizes
from sla_compile.redirect import CHILD

_KEY = "sla_compile"
_FORMAT = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the parameters that :func:`sla_compile.accelerate` added, with each attention's configuration.

    The file appears whole or not at all. A model may be wrapped by torch.compile, DDP or peft, and its blocks by
    torch.compile or checkpoint_wrapper: names in the file are those without the wrappers. Of one that fully_shard
    shards, every rank has to call this, to gather the shards.

    Raises:
        ValueError: `model` was not accelerated, or its added parameters are on the meta device.
        TypeError: it is an ExportedProgram.
    """
    _check_module(model)
    model = unwrapped(model)
    modules = _owners(model)
    if not modules:
        raise ValueError(f"this {type(model).__name__} has no attention accelerated by sla_compile.accelerate")
    tensors: dict[str, torch.Tensor] = {}
    for owner, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{owner}: its parameters are on the meta device and have no values to save")
            tensors[_join(owner, name)] = _whole(parameter).detach().cpu().contiguous()
    sites = {owner: _described(module) for owner, module in modules.items()}
    header = {"format": _FORMAT, "model": type(model).__name__, "sites": sites}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        save_file(tensors, written, metadata={_KEY: json.dumps(header, sort_keys=True)})
        os.replace(written, path)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads what :func:`save` wrote into a model, and returns the model.

    A model that is not accelerated yet is, at just the attentions of the file and with their configurations. One that
    is must have the same attentions with the same configurations. Parameters keep the model's device and dtype, except
    that those on the meta device are replaced.

    Raises:
        ValueError: the file is no such file, or belongs to another model; `model` is then what it was.
        TypeError: `model` is an ExportedProgram.
    """
    _check_module(model)
    header, tensors = _read(path)
    sites: dict[str, dict[str, Any]] = header["sites"]
    given, model = model, unwrapped(model)
    modules = _owners(model)
    fresh = not modules
    if fresh:
        missing = sorted(set(sites) - set(by_plain_name(model)))
        if missing:
            raise ValueError(_mismatch(path, header, model, f"the model has no {missing[0]} ({len(missing)} missing)"))
        _accelerate(model, path, sites)
        modules = _owners(model)
    try:
        _check_sites(path, header, model, modules, tensors)
    except ValueError:
        if fresh:
            from sla_compile.api import restore

            restore(model)
        raise
    for owner, module in modules.items():
        for name, parameter in list(module.named_parameters()):
            value = tensors[_join(owner, name)]
            if _is_sharded(parameter):
                value = _sharded_like(parameter, value)
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(value, parameter.requires_grad))
            else:
                with torch.no_grad():
                    parameter.copy_(value)
    return given


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sla_compile.save and load take an nn.Module, got {type(model).__name__}; torch.export.save and load keep "
            "an ExportedProgram with all its parameters"
        )


def _is_sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, whose module is not imported for this."""
    return hasattr(parameter, "full_tensor")


def _whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if _is_sharded(parameter) else parameter


def _sharded_like(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _described(module: SparseLinearAttention) -> dict[str, Any]:
    """What makes the same parameters in another model."""
    logit = module.alpha_logit
    blocks = None if logit is None or module.config.alpha_per == "head" else logit.shape[1]
    return {
        "head_dim": module.head_dim,
        "num_heads": module.num_heads,
        "query_blocks": blocks,
        "config": module.config.to_dict(),
    }


def _accelerate(model: nn.Module, path: Any, sites: dict[str, dict[str, Any]]) -> None:
    """Accelerates just the attentions of a file, with its sizes where structure tells none."""
    paths = {plain_name(name): name for name, _ in model.named_modules()}  # of what is wrapped, not of its wrapper
    here = {paths[name]: site for name, site in sites.items()}
    configs = {name: SLAConfig.from_dict(site["config"]) for name, site in here.items()}
    choice = Choice(SLAConfig(), lambda name, _: name in here, None, configs)
    sizes = {n: Sizes(s["head_dim"], s.get("num_heads"), s.get("query_blocks")) for n, s in here.items()}
    accelerate_module(model, choice, f"load({type(model).__name__}, {os.fspath(path)!r})", sizes=sizes)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"{os.fspath(path)} was not written by sla_compile.save")
    if header["format"] != _FORMAT:
        raise ValueError(f"{os.fspath(path)} has format {header['format']}; this version reads {_FORMAT}")
    return header, tensors


def _check_sites(path: Any, header: dict, model: nn.Module, modules: dict, tensors: dict) -> None:
    sites = header["sites"]
    if set(sites) != set(modules):
        only_file, only_model = sorted(set(sites) - set(modules)), sorted(set(modules) - set(sites))
        raise ValueError(
            _mismatch(
                path,
                header,
                model,
                f"attentions only in the file: {only_file[:4]}, only in the model: {only_model[:4]}",
            )
        )
    for owner, module in modules.items():
        if SLAConfig.from_dict(sites[owner]["config"]) != module.config:
            raise ValueError(
                _mismatch(path, header, model, f"{owner} has {module.config} but the file {sites[owner]['config']}")
            )
        for name, parameter in module.named_parameters():
            if parameter.is_meta and _is_sharded(parameter):
                raise ValueError(f"{owner}: its parameters are sharded and on the meta device; call to_empty first")
            value = tensors.get(_join(owner, name))
            if value is None or value.shape != parameter.shape:
                found = "nothing" if value is None else tuple(value.shape)
                raise ValueError(
                    _mismatch(path, header, model, f"{owner} needs {name} {tuple(parameter.shape)}, found {found}")
                )


def _mismatch(path: Any, header: dict, model: nn.Module, what: str) -> str:
    return f"{os.fspath(path)} (of a {header['model']}) does not belong to this {type(model).__name__}: {what}"


def _owners(model: nn.Module) -> dict[str, SparseLinearAttention]:
    return {
        plain_name(name).removesuffix(CHILD).removesuffix("."): module for name, module in added_modules(model).items()
    }


def _join(owner: str, name: str) -> str:
    return f"{owner}.{CHILD}.{name}" if owner else f"{CHILD}.{name}"
