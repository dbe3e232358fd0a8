"""The operator's body as AOTInductor takes it on CUDA: PyTorch operations and launches of the Triton kernels.

The launches are recorded together with their kernels (`launch` in gpu.py), which are compiled into the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla_compile import ops
from sla_compile.kernels import decomposed
from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.spec import Spec, num_blocks


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    router_q: Tensor | None,
    router_k: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    block_map: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of the op ``sla_compile::sparse_linear_attention``, for inference; the length may be
    symbolic."""
    if block_map is None:
        block_map = _route(query, key, router_q, router_k, key_padding_mask, *scalars)
    return ops.forward(
        query, key, value, proj_weight, proj_bias, router_q, router_k, alpha, key_padding_mask, block_map, *scalars
    )


def _route(
    query: Tensor,
    key: Tensor,
    router_q: Tensor | None,
    router_k: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    sparsity: float,
    negligible: float,
    critical_blocks: int,
    pinned_first: int,
    pinned_last: int,
    feature_map: str,
    linear: str,
    block_q: int,
    block_k: int,
    *_: Any,
) -> Tensor:
    """The block map by rank, as the decomposition has it: the kernels' own routing takes a `topk`, whose count tracing
    would freeze to the example's."""
    length, spec = query.shape[2], Spec(scale, feature_map, linear, block_q, block_k)
    block_map = decomposed.route(
        decomposed.blocks(query, block_q, decomposed.padded_blocks(length, block_q)),
        decomposed.blocks(key, block_k, decomposed.padded_blocks(length, block_k)),
        length, key_bias(key_padding_mask, query.shape[0], length), spec, sparsity=sparsity, negligible=negligible,
        critical_blocks=critical_blocks, pinned=(pinned_first, pinned_last), router_q=router_q, router_k=router_k,
    ).to(torch.int8)  # fmt: skip
    for dim, block in ((2, block_q), (3, block_k)):  # indices, as a slice would compare sizes that are symbolic
        block_map = block_map.index_select(dim, torch.arange(num_blocks(length, block), device=query.device))
    return block_map
