"""How tensors lie in memory: what the operator returns, and what the launcher of the Triton kernels tells them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla_compile.kernels.symbolic import known
from sla_compile.kernels.tuning import MAX_TILE


def transposed_empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of `like`'s shape and dtype, with the strides of a transposed (B, L, H, D) tensor: what the next
    reshape wants. No view of one, which autograd would let nobody change in place."""
    _, heads, length, dim = like.shape
    strides = (length * heads * dim, dim, heads * dim, 1)
    return like.new_empty_strided(like.shape, strides, dtype=dtype)


def padded_dims(dim: int) -> int:
    """Columns of a tile that holds `dim`: a power of two, and enough for a matrix product."""
    return max(16, 1 << (dim - 1).bit_length())


def strides_of(name: str, tensor: Tensor | None, *dimensions: str) -> dict[str, int]:
    """Keyword arguments stride_<name>_<dimension> of a tensor, zeros where there is none."""
    dimensions = dimensions or ("batch", "head", "token", "dim")
    prefix = f"stride_{name}_" if name else "stride_"
    strides = (0,) * len(dimensions) if tensor is None else tensor.stride()
    return {prefix + dimension: stride for dimension, stride in zip(dimensions, strides, strict=True)}


def stride_of(tensor: Tensor | None, dimension: int) -> int:
    return 0 if tensor is None else tensor.stride(dimension)


def addressing(*tensors: Tensor) -> dict[str, Any]:
    """How the kernels may address these (B, H, L, D) tensors.

    WIDE: offsets inside a tile may pass 32 bits. ALIGN: a power of two, at most 16 bytes of elements, that divides the
    strides of batch, head and token.
    """
    narrow = all(known(MAX_TILE * tensor.stride(2) + tensor.shape[3] * tensor.stride(3) < 2**31) for tensor in tensors)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    align = 16 // tensors[0].element_size()
    while not all(known(stride % align == 0) for stride in strides):
        align //= 2
    return {"WIDE": not narrow, "ALIGN": align}
