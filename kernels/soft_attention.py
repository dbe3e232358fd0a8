"""SLA2's attention with a fractional choice of blocks, which gives the router a gradient.

With m_j in [0, 1] the share of key block j, h_j = phi(K_j)^T V_j and z_j = sum phi(K_j):

    sparse:  O_s = sum_t m_j(t) exp(s S_t) V_t / sum_t m_j(t) exp(s S_t)
    linear:  O_l = phi(Q) sum_j (1 - m_j) h_j / phi(Q) sum_j (1 - m_j) z_j
    output:  O   = alpha O_s + (1 - alpha) O_l

(SLA2, arXiv 2602.12675, stage 1.) With shares of 0 and 1 it is the attention over a hard choice. Every key is read, but
a few query blocks at a time: never L x L numbers, neither here nor for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sla_compile.kernels.reference import feature
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec, num_blocks

# Scores, or sums of block states, that are held at a time; a chunk has about three tensors of this size.
CHUNK_BYTES = 128 * 2**20


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shares: Tensor,
    alpha: Tensor,
    spec: Spec,
    key_bias: Tensor | None = None,
) -> Tensor:
    """``alpha O_s + (1 - alpha) O_l`` with shares of blocks instead of a choice; see the head of this file.

    Args:
        query: (B, H, L_q, D); queries may be some blocks of a longer sequence, of which only the last may be ragged.
        key, value: (B, H_kv, L, D), H a multiple of H_kv; the keys are smoothed (their mean is subtracted) here.
        shares: (B, H, T_m, T_n) in [0, 1], the m above.
        alpha: broadcastable to (B, H, T_m), in (0, 1); counts as 1 in rows where the shares of all keys are 1.
        spec: of the call; its `linear` is "marginal" (the complement, as above) or "all" (every key counts fully).
        key_bias: (B, L), at most 0, added to a key's scores; its exponential weighs the key in the linear branch.

    Returns:
        (B, H, L_q, D) in the query's dtype, differentiable with respect to all tensors but `key_bias`; computed in
        float32, or in float64 for float64 queries.
    """
    batch, heads, length, dim = query.shape
    group, keys = heads // key.shape[1], key.shape[2]
    rows, columns = num_blocks(length, spec.block_q), num_blocks(keys, spec.block_k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = torch.full((batch, columns * spec.block_k), -torch.inf, dtype=dtype, device=query.device)
    bias[:, :keys] = 0 if key_bias is None else key_bias
    weight = bias.exp()[:, None, :, None]

    key = _padded(key.to(dtype), columns * spec.block_k)
    taking_part = (bias > -torch.inf)[:, None, :, None]
    key = key - (key * taking_part).sum(2, keepdim=True) / taking_part.sum(2, keepdim=True).clamp(min=1)
    features = feature(key, spec.feature_map) * weight
    value = _padded(value.to(dtype), columns * spec.block_k)
    key, features, value = (tensor.repeat_interleave(group, 1).flatten(0, 1) for tensor in (key, features, value))
    bias, shares = bias.repeat_interleave(heads, 0), shares.to(dtype)

    padded = _padded(query.to(dtype), rows * spec.block_q)
    query_features = feature(padded, spec.feature_map).flatten(0, 1)
    blocks_in_use = taking_part.view(batch, 1, 1, columns, spec.block_k).any(-1)
    complement = ((shares < 1) & blocks_in_use).any(-1)
    alpha = alpha.to(dtype).where(complement, 1).expand(batch, heads, rows).flatten(0, 1)
    output = _SoftAttention.apply(
        padded.flatten(0, 1), query_features, key, features, value, shares.flatten(0, 1), alpha, bias, spec
    )
    return output.view(batch, heads, -1, dim)[:, :, :length].to(query.dtype)


class _SoftAttention(torch.autograd.Function):
    """Padded heads (N, T b, D), shares (N, T_m, T_n), alpha (N, T_m), bias (N, T_n b_k)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, spec = arguments
        query = tensors[0]
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:2])
        for heads, chunks in _chunks(query, tensors[2], spec):
            call = _Heads(tensors, heads, spec)
            for rows in chunks:
                part = call.rows(rows)
                output[heads, part.tokens] = part.forward().flatten(1, 2)
                logsumexp[heads, part.tokens] = part.logsumexp.flatten(1)
        ctx.save_for_backward(*tensors, logsumexp)
        ctx.spec = spec
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, logsumexp = ctx.saved_tensors
        tokens = any(ctx.needs_input_grad[:5])  # in stage 1 the shares and alpha alone
        grads = [torch.zeros_like(tensor) if tokens or i > 4 else None for i, tensor in enumerate(tensors[:7])]
        for heads, chunks in _chunks(tensors[0], tensors[2], ctx.spec):
            call = _Heads(tensors, heads, ctx.spec)
            for rows in chunks:
                call.rows(rows, logsumexp).backward(grad, grads)
            if tokens:
                call.finish(grads)
        return *grads, None, None


def _chunks(query: Tensor, key: Tensor, spec: Spec) -> Iterator[tuple[slice, list[slice]]]:
    """Heads, and blocks of query rows, to compute at a time."""
    count, length, dim = query.shape
    blocks = length // spec.block_q
    states = key.shape[1] // spec.block_k * dim * dim  # h of a head
    scores = spec.block_q * max(key.shape[1], dim)  # S, or a row's sum of h, of a query block
    heads = max(1, CHUNK_BYTES // query.element_size() // max(states, scores))
    for start in range(0, count, heads):
        stop = min(start + heads, count)
        rows = max(1, CHUNK_BYTES // query.element_size() // ((stop - start) * max(scores, dim * dim)))
        yield slice(start, stop), [slice(first, min(first + rows, blocks)) for first in range(0, blocks, rows)]


class _Heads:
    """Some heads, with the states of their key blocks."""

    def __init__(self, tensors: list[Tensor], heads: slice, spec: Spec) -> None:
        self.tensors = [tensor[heads] for tensor in tensors]
        self.heads, self.spec = heads, spec
        features, values = (self.tensors[i].unflatten(1, (-1, spec.block_k)) for i in (3, 4))
        self.states = (features.transpose(-1, -2) @ values).flatten(2)  # (N, T_n, D * D)
        self.sums = features.sum(2)  # (N, T_n, D)
        self.grad_states, self.grad_sums = torch.zeros_like(self.states), torch.zeros_like(self.sums)

    def rows(self, rows: slice, logsumexp: Tensor | None = None) -> _Rows:
        """A range of query blocks."""
        return _Rows(self, rows, None if logsumexp is None else logsumexp[self.heads])

    def finish(self, grads: list[Any]) -> None:
        """Hands the gradients of the states on to the features and values of the keys."""
        features, values = (self.tensors[i].unflatten(1, (-1, self.spec.block_k)) for i in (3, 4))
        grad_states = self.grad_states.unflatten(-1, (features.shape[-1], -1))
        of_features = values @ grad_states.transpose(-1, -2) + self.grad_sums[:, :, None]
        grads[3][self.heads] += of_features.flatten(1, 2)
        grads[4][self.heads] += (features @ grad_states).flatten(1, 2)


class _Rows:
    """Some query blocks of some heads: (N, R, b_q, ...) tensors."""

    def __init__(self, call: _Heads, rows: slice, logsumexp: Tensor | None) -> None:
        spec = self.spec = call.spec
        query, features, self.key, _, self.value, shares, alpha, bias = call.tensors
        self.call, self.blocks = call, rows
        self.tokens = slice(rows.start * spec.block_q, rows.stop * spec.block_q)
        split = (rows.stop - rows.start, spec.block_q)
        self.query, self.features = (t[:, self.tokens].unflatten(1, split) for t in (query, features))
        self.shares, self.alpha = shares[:, rows], alpha[:, rows, None, None]

        scores = torch.matmul(self.query.flatten(1, 2), self.key.transpose(1, 2)).mul_(spec.scale).add_(bias[:, None])
        self.scores = scores.view(*self.query.shape[:3], -1, spec.block_k)  # (N, R, b_q, T_n, b_k)
        if logsumexp is None:
            weighted = self.scores + self.shares.log()[:, :, None, :, None]
            self.logsumexp = weighted.flatten(3).logsumexp(-1)
        else:
            self.logsumexp = logsumexp[:, self.tokens].unflatten(1, split)
        # Without the share, which is a factor; a row without any key has nothing to share.
        shift = self.logsumexp.where(self.logsumexp > -torch.inf, torch.inf)
        self.unshared = self.scores.sub_(shift[..., None, None]).clamp_(max=_largest_exponent(query.dtype)).exp_()
        self.probabilities = (self.unshared * self.shares[:, :, None, :, None]).flatten(3)

        self.complement = torch.ones_like(self.shares) if spec.linear == "all" else 1 - self.shares
        self.states = (self.complement @ call.states).unflatten(-1, (query.shape[-1], -1))  # H
        self.sums = (self.complement @ call.sums)[..., None]  # Z
        denominator = self.features @ self.sums + spec.epsilon
        self.inverse = torch.where(denominator > MIN_DENOMINATOR, 1 / denominator, 0)
        self.linear = self.features @ self.states * self.inverse

    def forward(self) -> Tensor:
        """The output."""
        sparse = (self.probabilities.flatten(1, 2) @ self.value).view_as(self.query)
        return self.alpha * sparse + (1 - self.alpha) * self.linear

    def backward(self, grad_output: Tensor, grads: list[Any]) -> None:
        """Adds to the gradients of `_SoftAttention.forward`'s arguments; those of tokens may be left out as None."""
        call, heads, spec = self.call, self.call.heads, self.spec
        grad = grad_output[heads, self.tokens].view_as(self.query)

        # dP = dO V^T; dS = P (dP - delta); dM = sum over the block of (P / M) (dP - delta)
        grad_scores = (grad.flatten(1, 2) @ self.value.transpose(1, 2)).view_as(self.probabilities)
        delta = (grad_scores * self.probabilities).sum(-1, keepdim=True)
        grad_scores = (
            grad_scores.sub_(delta).unflatten(-1, (-1, spec.block_k)).mul_(self.unshared).mul_(self.alpha[..., None])
        )
        grad_shares = grad_scores.sum((2, 4))
        if grads[0] is not None:
            grad_scores = grad_scores.mul_(self.shares[:, :, None, :, None]).flatten(3).flatten(1, 2).mul_(spec.scale)
            grads[0][heads, self.tokens] += grad_scores @ self.key
            grads[2][heads] += grad_scores.transpose(1, 2) @ self.query.flatten(1, 2)
            shared = (self.alpha * grad).flatten(1, 2)
            grads[4][heads] += self.probabilities.flatten(1, 2).transpose(1, 2) @ shared

        # dH = (phi(Q) / den)^T dO_l; dZ = -(phi(Q) / den)^T delta_l; dM = -(dH h + dZ z)
        delta_linear = (grad * self.linear).sum(-1, keepdim=True)
        grads[6][heads, self.blocks] += (delta - delta_linear).sum((2, 3))
        rest = (1 - self.alpha) * grad
        delta_linear = (1 - self.alpha) * delta_linear
        scaled = (self.features * self.inverse).transpose(2, 3)
        grad_states = (scaled @ rest).flatten(2)
        grad_sums = -(scaled @ delta_linear).squeeze(-1)
        if spec.linear != "all":
            grad_shares -= grad_states @ call.states.transpose(1, 2) + grad_sums @ call.sums.transpose(1, 2)
        grads[5][heads, self.blocks] += grad_shares
        if grads[0] is not None:
            grad_features = rest @ self.states.transpose(2, 3) - delta_linear * self.sums.transpose(2, 3)
            grads[1][heads, self.tokens] += (grad_features * self.inverse).flatten(1, 2)
            call.grad_states += self.complement.transpose(1, 2) @ grad_states
            call.grad_sums += self.complement.transpose(1, 2) @ grad_sums


def _largest_exponent(dtype: torch.dtype) -> float:
    """NOTE [Shares near zero]: dM has P / M, which is exp(S - lse) and has no bound where M is nearly 0. Left finite,
    it meets the sigmoid's factor M, and what is cut is a block that M = exp(-59) hides (float32)."""
    return 2 / 3 * math.log(torch.finfo(dtype).max)


def _padded(tokens: Tensor, length: int) -> Tensor:
    """Zeros behind (B, H, L, D) tokens, up to `length`."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[2]))
