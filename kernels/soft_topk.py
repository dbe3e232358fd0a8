"""SoftTop-k: a differentiable choice of blocks, with which SLA2's router is trained.

NOTE [Implicit gradient]
lambda is a function of the logits, given by ``sum_j y_j = n``. With ``w = y (1 - y)`` the constraint's derivative is
``sum_l w_l (dP_l / tau + dlambda) = 0``, so that ``dy_j = w_j (dP_j - sum_l w_l dP_l / sum_l w_l) / tau``. The Jacobian
is symmetric, and the backward is the same expression. With lambda as a constant the second term would be missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def soft_topk(logits: Tensor, count: int, tau: float = 0.1, steps: int | None = None) -> Tensor:
    """``y_j = sigmoid(P_j / tau + lambda)`` with ``sum_j y_j = count`` in each row (SLA2, arXiv 2602.12675).

    lambda is found by bisection, between ``logit(count / n) - max_j P_j / tau`` and the same with the minimum, in a
    fixed number of steps, without a look at the values: it can be compiled, and a GPU is not waited for.

    Args:
        logits: (..., n), floating point; -inf leaves a column out, y = 0 there. Unnormalised: softmaxed scores are so
            small that y is almost uniform.
        count: how many columns are chosen, at least 1. A row with no more columns than that chooses all of them.
        tau: temperature, over 0; y tends to the hard choice as it tends to 0.
        steps: halvings of the interval; by default until the rounding of the logits.

    Returns:
        (..., n), float32 (float64 for float64 logits), differentiable with respect to the logits, twice if needed.

    Raises:
        ValueError: `count`, `tau` or `steps` is out of range.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if steps is None:  # the mantissa's bits, and a few more for the interval's share of the largest logit
        steps = 60 if logits.dtype == torch.float64 else 32
    elif steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return _SoftTopK.apply(logits, count, tau, steps)


class _SoftTopK(torch.autograd.Function):
    """The bisection, with the gradient of NOTE [Implicit gradient]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, count: int, tau: float, steps: int) -> Tensor:
        chosen = _bisect(logits, count, tau, steps)
        ctx.save_for_backward(chosen)
        ctx.tau = tau
        return chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (chosen,) = ctx.saved_tensors
        weight = chosen * (1 - chosen)
        # Where every y is 0 or 1 the weights vanish, and the gradient with them.
        total = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return weight * (grad - (weight * grad).sum(-1, keepdim=True) / total) / ctx.tau, None, None, None


def _bisect(logits: Tensor, count: int, tau: float, steps: int) -> Tensor:
    """y of each row; logits below -inf do not exist, so a row's finite ones are its columns."""
    taking_part = logits > -torch.inf
    columns = taking_part.sum(-1, keepdim=True)
    everything = columns <= count
    # Relative to the row's largest logit, which cancels in the sum with lambda.
    largest = logits.amax(-1, keepdim=True)
    scaled = (logits - largest.where(largest > -torch.inf, 0)) / tau
    share = count / columns.clamp(min=count + 1).to(logits.dtype)
    low = torch.logit(share)
    high = low - scaled.where(taking_part, 0).amin(-1, keepdim=True)
    for _ in range(steps):
        middle = (low + high) / 2
        enough = (scaled + middle).sigmoid().sum(-1, keepdim=True) >= count
        low, high = low.where(enough, middle), middle.where(enough, high)
    return (scaled + (low + high) / 2).sigmoid().where(~everything, taking_part.to(logits.dtype))
