"""``import sla_compile.flops``: then torch's FlopCounterMode counts the operator and its backward, by arithmetic.py.

Not part of ``import sla_compile``: the counter imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sla_compile.ops  # noqa: F401  # registers the operator
from sla_compile.arithmetic import BACKWARD_PRODUCTS, attention_operations
from sla_compile.config import SLAConfig

FORWARD = torch.ops.sla_compile.sparse_linear_attention
BACKWARD = torch.ops.sla_compile.sparse_linear_attention_backward


@register_flop_formula(FORWARD)
def forward_operations(*args: Any, **_: Any) -> int:
    """Of a call, tensors given by their shapes; a given block map counts as the configuration's would."""
    return _operations(FORWARD, args)


@register_flop_formula(BACKWARD)
def backward_operations(*args: Any, **_: Any) -> int:
    """Of a backward, tensors given by their shapes."""
    return int(BACKWARD_PRODUCTS * _operations(BACKWARD, args))


def _operations(operator: Any, args: tuple) -> int:
    """Of the forward, from the arguments of either operator."""
    names = [argument.name for argument in operator.default._schema.arguments]
    call = dict(zip(names, args, strict=False))
    copied = ("sparsity", "negligible", "feature_map", "linear", "block_q", "block_k")
    config = SLAConfig(
        method="sla" if call["alpha"] is None else "sla2",
        critical_blocks=call["critical_blocks"] or None,
        pinned=(call["pinned_first"], call["pinned_last"]),
        **{name: call[name] for name in copied},
    )
    return int(attention_operations(tuple(call["query"]), call["key"][2], config).after)
