"""``import sla_compile.flops``: then torch's FlopCounterMode counts the operator and its backward, by arithmetic.py.

Not part of ``import sla_compile``: the counter imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sla_compile.ops  # noqa: F401  # registers the operator
from sla_compile.arithmetic import BACKWARD_PRODUCTS, attention_operations
from sla_compile.config import SLAConfig


@register_flop_formula(torch.ops.sla_compile.sparse_linear_attention)
def forward_operations(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    proj_weight: Sequence[int] | None,
    proj_bias: Sequence[int] | None,
    router_q: Sequence[int] | None,
    router_k: Sequence[int] | None,
    alpha: Sequence[int] | None,
    key_padding_mask: Sequence[int] | None,
    block_map: Sequence[int] | None,
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
    **__: Any,
) -> int:
    """Of a call with tensors of these shapes; a given block map counts as the configuration's would."""
    config = SLAConfig(
        method="sla" if alpha is None else "sla2", sparsity=sparsity, negligible=negligible, feature_map=feature_map,
        linear=linear, block_q=block_q, block_k=block_k, critical_blocks=critical_blocks or None,
        pinned=(pinned_first, pinned_last),
    )  # fmt: skip
    return int(attention_operations(tuple(query), key[2], config).after)


@register_flop_formula(torch.ops.sla_compile.sparse_linear_attention_backward)
def backward_operations(
    grad_output: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    output: Sequence[int] | None,
    logsumexp: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Of a backward with tensors of these shapes."""
    return int(BACKWARD_PRODUCTS * forward_operations(query, key, value, *rest))
