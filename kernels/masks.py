"""Key-padding masks as a bias on the scores of each key."""

from __future__ import annotations

import torch
from torch import Tensor

# exp of less is 0 in float32.
LEAST_BIAS = -104.0


def key_bias(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(batch, length) float32 bias, 0 where a bool `mask` is True and -inf elsewhere; additive masks keep their values.

    Attention is invariant to a constant added to all keys, so the largest bias of a row is shifted to 0: its
    exponential then is a weight in [0, 1] that cannot overflow in the linear branch. A row of -inf stays so. Where that
    weight is 0 the bias becomes -inf: many models hide a key by -10000 or their dtype's least number, and the blocks of
    such keys must be no choice of a router's.

    Args:
        mask: bool or floating point, broadcastable to (batch, 1, 1, length) or that expanded.
    """
    if mask is None:
        return None
    for dim in shared_dims(mask):
        mask = mask.narrow(dim, 0, 1)
    mask = mask.expand(batch, 1, 1, length).reshape(batch, length)
    if mask.dtype == torch.bool:
        return torch.zeros(batch, length, dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)
    bias = mask.float()
    largest = bias.amax(-1, keepdim=True)
    bias = bias - largest.where(largest > -torch.inf, 0)
    return bias.masked_fill(bias < LEAST_BIAS, -torch.inf)


def assert_shared(mask: Tensor | None) -> None:
    """Raises RuntimeError, on a GPU where the work on it ends, for a mask that hides other keys from other queries.

    A program that was exported with a mask expanded over heads or queries is free to be given one that is not; only
    such a mask, which its strides tell, is looked at.
    """
    if mask is None:
        return
    for dim in shared_dims(mask):
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            torch._assert_async(
                (mask == mask.narrow(dim, 0, 1)).all(),
                "the attention mask hides other keys from other queries or heads, unlike the one that the program was "
                "exported with, which was expanded from (batch, 1, 1, tokens)",
            )


def shared_dims(mask: Tensor) -> range:
    """Its dimensions of heads and queries, over which a key-padding mask is the same."""
    return range(1 if mask.dim() == 4 else 0, mask.dim() - 1)
