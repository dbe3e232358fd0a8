"""Sparse-linear attention on the CPU: the compiled kernels where they apply, else blocked PyTorch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla_compile.kernels import cpu_blocked, native
from sla_compile.kernels.quantize import LOW_BIT as LOW_BIT  # what the op may ask for
from sla_compile.kernels.spec import Spec


def forward(
    query: Tensor, key: Tensor, value: Tensor, block_map: Tensor, spec: Spec, **optional: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as of :func:`sla_compile.kernels.cpu_blocked.forward`."""
    return _kernels(query, spec).forward(query, key, value, block_map, spec, **optional)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    logsumexp: Tensor,
    block_map: Tensor,
    spec: Spec,
    **optional: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients; arguments as of :func:`sla_compile.kernels.cpu_blocked.backward`."""
    kernels = _kernels(query, spec)
    return kernels.backward(grad_output, query, key, value, output, logsumexp, block_map, spec, **optional)


def _kernels(query: Tensor, spec: Spec) -> Any:
    # Products of bfloat16 on AMX tiles, which only torch's own operations use, are faster than any of float32.
    if cpu_blocked.operand_dtype(query) == torch.bfloat16 or not native.supports(query, spec):
        return cpu_blocked
    return native
