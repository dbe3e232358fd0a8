"""Block maps of a model's attentions, from the queries and keys of one real run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.config import SLAConfig
from sla_compile.discovery import _Observer, _scopes, arguments
from sla_compile.functional import route
from sla_compile.redirect import CHILD


@torch.no_grad()
def block_maps(model: nn.Module, example_inputs: Any, configs: Mapping[str, SLAConfig]) -> dict[str, Tensor]:
    """Runs the model and routes the first qualifying call of each attention.

    Args:
        model: accelerated or not, with its weights.
        example_inputs: a tuple or dict of the forward's arguments, real tensors.
        configs: the configuration by the attention's path.

    Returns:
        int8 (H, T_m, T_n) of the first batch entry, by path; attentions that made no such call are left out.
    """
    args, kwargs = arguments(example_inputs)
    maps: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    handles = [
        owner._modules[CHILD].register_forward_pre_hook(functools.partial(_route_redirected, maps, name, configs[name]))
        for name, owner in model.named_modules()
        if name in configs and CHILD in owner._modules
    ]
    try:
        model.eval()
        with _Router(maps, configs) as router, _scopes(model, router):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return maps


def pick(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names, spread evenly from the first to the last."""
    names = list(dict.fromkeys(names))
    if count < 2 or len(names) <= count:
        return names[:count]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _route_redirected(maps: dict[str, Tensor], name: str, config: SLAConfig, _module: nn.Module, args: tuple) -> None:
    query, key, _value, mask, scale, enable_gqa = args  # as the redirect calls it
    _keep(maps, name, config, query, key, mask, scale, enable_gqa)


def _keep(
    maps: dict[str, Tensor],
    name: str,
    config: SLAConfig,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    if name in maps or query.dim() != 4:
        return
    found = route(query, key, config=config, key_padding_mask=mask, scale=scale, enable_gqa=enable_gqa)
    maps[name] = found[0].cpu()


class _Router(_Observer):
    """Routes what a model that is not accelerated calls."""

    def __init__(self, maps: dict[str, Tensor], configs: Mapping[str, SLAConfig]) -> None:
        super().__init__()
        self.maps, self.configs = maps, configs

    def note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        name = self.scopes[-1][0]
        if name in self.configs and query.shape[-2] == key.shape[-2] and not is_causal:
            with torch._C.DisableTorchFunction():
                _keep(self.maps, name, self.configs[name], query, key, attn_mask, scale, enable_gqa)

    def note_multi_head(self, *args: Any, **kwargs: Any) -> None:
        """Its queries and keys are not to be seen from outside."""
