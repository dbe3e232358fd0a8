"""Public checkpoints trained with SLA: those of TurboDiffusion (arXiv 2512.16093), in Wan models of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sla_compile.api import Choice, accelerate_module, restore
from sla_compile.config import SLAConfig
from sla_compile.kernels.spec import num_blocks
from sla_compile.redirect import CHILD

CONFIG = SLAConfig(sparsity=0.9, negligible=0.0, linear="all", block_q=128, min_seq_len=1)
"""How the checkpoints' attentions were trained, and the density that the authors' own scripts run them with."""

_PROJECTION = ".attn_op.local_attn.proj_l."
_ADDED = f".{CHILD}.proj_"  # weight, bias
_QUANTIZED = ".int8_weight"
_QUANTIZED_BLOCK = 128  # rows and columns of a weight that share a scale
_PREFIXES = ("net.", "module.")  # of training checkpoints, and of DDP


def load(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    sparsity: float | None = None,
    config: SLAConfig | None = None,
) -> nn.Module:
    """Accelerates a Wan transformer and gives it all weights of a TurboDiffusion checkpoint, its projections included.

    The authors fine-tuned these models with SLA (arXiv 2509.24006, linear branch over all keys) and distilled them to
    four steps or fewer; nothing is left to train. Quantized checkpoints (``-quant``) become ordinary weights.

    Args:
        model: diffusers' ``WanTransformer3DModel`` of the checkpoint's size, on any device and in any dtype, which
            stay; parameters on the meta device are replaced by the checkpoint's.
        checkpoint: the path of a ``.pth`` or ``.safetensors`` file, or its tensors by name.
        sparsity: share of blocks that are not computed exactly; default 0.9. The authors recommend 0.85 for quality.
        config: in place of :data:`CONFIG`, for example with `low_bit`; its linear branch must be that over all keys.

    Returns:
        The same model.

    Raises:
        ValueError: the file is no such checkpoint or belongs to another model; `model` is then what it was.
        RuntimeError: `model` is accelerated already.
        ImportError: diffusers is missing, which knows the names of Wan's weights.
    """
    config = config or CONFIG
    if config.linear != "all" or not config.has_projection:
        raise ValueError(
            f'TurboDiffusion trained a projection of linear attention over all keys: config needs method="sla" and '
            f'linear="all", got method="{config.method}" and linear="{config.linear}"'
        )
    if sparsity is not None:
        config = config.replace(sparsity=sparsity)
    source = f"a {type(checkpoint).__name__}" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    weights = _renamed(_read(checkpoint), source)
    origin = f"turbodiffusion.load({type(model).__name__}, {source!r})"
    accelerate_module(model, Choice(config, None, None, None), origin, allow_no_match=True)
    try:
        weights = _fitted(weights, model.state_dict(), source)
    except ValueError:
        restore(model)
        raise
    has_meta = any(parameter.is_meta for parameter in model.parameters())
    if has_meta:  # then dtypes are the checkpoint's, and a projection's that of its owner
        weights = {name: _as_owner(name, tensor, weights) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=has_meta)
    return model


def _read(checkpoint: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    if os.fspath(checkpoint).endswith(".safetensors"):
        return load_file(checkpoint)
    tensors = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return dict(tensors.get("state_dict", tensors))


def _renamed(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights under the names that an accelerated model of diffusers has for them, none of them quantized."""
    try:
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    except ImportError as error:
        raise ImportError(
            "TurboDiffusion's weights are loaded into Wan models of diffusers, and renamed by it: "
            'pip install "sla-compile[demo]"'
        ) from error
    for prefix in _PREFIXES:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not any(_PROJECTION in name for name in tensors):
        raise ValueError(
            f"{source} is no checkpoint of TurboDiffusion with SLA: no name in it holds {_PROJECTION!r}, the first are "
            f"{sorted(tensors)[:3]}"
        )
    for name in [name for name in tensors if name.endswith(_QUANTIZED)]:
        layer = name.removesuffix(_QUANTIZED)
        tensors[f"{layer}.weight"] = _dequantized(tensors.pop(name), tensors.pop(f"{layer}.scale", None), layer)
    converted = convert_wan_transformer_to_diffusers(tensors)
    return {name.replace(_PROJECTION, _ADDED): tensor for name, tensor in converted.items()}


def _dequantized(weight: Tensor, scale: Tensor | None, layer: str) -> Tensor:
    """bfloat16, what the layer had been, of int8 (out, in) and a scale for every block of 128 x 128."""
    rows, columns = weight.shape
    shape = num_blocks(rows, _QUANTIZED_BLOCK), num_blocks(columns, _QUANTIZED_BLOCK)
    if scale is None or tuple(scale.shape) != shape:
        found = "none" if scale is None else tuple(scale.shape)
        raise ValueError(f"{layer}: an int8 weight {tuple(weight.shape)} needs scales {shape}, found {found}")
    scale = scale.repeat_interleave(_QUANTIZED_BLOCK, 0)[:rows].repeat_interleave(_QUANTIZED_BLOCK, 1)[:, :columns]
    return (weight * scale).to(torch.bfloat16)


def _fitted(weights: dict[str, Tensor], mine: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights in the shapes of the model's.

    Raises:
        ValueError: they are others than the model's.
    """
    only_file, only_model = sorted(set(weights) - set(mine)), sorted(set(mine) - set(weights))
    problem = ""
    if only_file or only_model:
        problem = (
            f"{len(only_file)} weights are only in the file {only_file[:3]}, {len(only_model)} only in the model "
            f"{only_model[:3]}"
        )
    else:
        name = "patch_embedding.weight"  # linear there, a convolution here
        if mine[name].numel() == weights[name].numel():
            weights = {**weights, name: weights[name].reshape(mine[name].shape)}
        for name, tensor in weights.items():
            if tensor.shape != mine[name].shape:
                problem = f"{name} is {tuple(tensor.shape)} in the file and {tuple(mine[name].shape)} in the model"
    if problem:
        raise ValueError(
            f"{source} does not belong to this model: {problem}; make the model from the configuration of the Wan "
            "model that was fine-tuned"
        )
    return weights


def _as_owner(name: str, tensor: Tensor, weights: dict[str, Tensor]) -> Tensor:
    owner, added, _ = name.partition(_ADDED)
    return tensor.to(weights[f"{owner}.to_q.weight"].dtype) if added else tensor
