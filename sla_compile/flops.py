"""What torch's FlopCounterMode counts for the operator and its backward: the operations of arithmetic.py.

NOTE [Registered later]
torch.utils.flop_counter imports Triton. The formulas are registered when somebody imports it, by a finder that waits
for that and then is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

import sla_compile.ops  # noqa: F401  # registers the operator
from sla_compile.arithmetic import BACKWARD_PRODUCTS, attention_operations
from sla_compile.config import SLAConfig

_COUNTER = "torch.utils.flop_counter"


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


class _Registration(MetaPathFinder):
    """NOTE [Registered later]"""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: Any) -> None:
    counter.register_flop_formula(torch.ops.sla_compile.sparse_linear_attention)(forward_operations)
    counter.register_flop_formula(torch.ops.sla_compile.sparse_linear_attention_backward)(backward_operations)


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Registration())
