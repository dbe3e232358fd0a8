"""The sparse branch on the CPU: exact attention of query blocks over their critical key blocks, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocks import Workspace, gather, row_chunks


def sparse_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    critical: Tensor,
    scale: float,
    linear: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    workspace: Workspace,
) -> None:
    """``output = softmax(s Q K^T + bias) V + linear`` over the critical blocks of one head (SLA, equation 4).

    Args:
        queries: (T_m, b_q, D); keys, values: (T_n, b_k, D), contiguous; bias: (T_n, b_k).
        critical: boolean (T_m, T_n).
        linear: (T_m, b_q, D), what the other branch adds, or None.
        output: (T_m, b_q, D), any strides; logsumexp: (T_m, b_q, 1): written.
    """
    rows_total, block_q, dim = queries.shape
    block_k = keys.shape[1]
    maxima = workspace("maxima", rows_total, block_q, 1).fill_(-torch.inf)
    sums = workspace("sums", rows_total, block_q, 1).zero_()
    done = 0
    for rows, columns in row_chunks(critical, block_k * dim):
        number, span = columns.shape[0], columns.shape[1] * block_k
        done += number
        selected = gather(keys, columns, workspace("keys", number, span, dim))
        scores = workspace("scores", number, block_q, span)
        torch.baddbmm(scores, queries[rows], selected.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if bias is not None:
            scores += bias[columns].view(number, 1, span)
        maximum = scores.amax(-1, keepdim=True)
        if bias is not None:  # all keys of a row masked: its weights become exp(-inf) = 0, not NaN
            maximum.clamp_(min=torch.finfo(maximum.dtype).min)
        total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
        maxima[rows], sums[rows] = maximum, total
        selected = gather(values, columns, workspace("values", number, span, dim))
        product = torch.bmm(scores, selected, out=workspace("product", number, block_q, dim))
        if bias is not None:
            total.clamp_(min=torch.finfo(total.dtype).tiny)
        product.div_(total)
        if linear is not None:
            product += linear[rows]
        output[rows] = product.to(output.dtype)
    if done < rows_total:
        empty = ~critical.any(1)
        output[empty] = 0 if linear is None else linear[empty].to(output.dtype)
    torch.add(maxima, sums.log_(), out=logsumexp)


def sparse_backward(
    grads: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    critical: Tensor,
    scale: float,
    logsumexp: Tensor,
    delta: Tensor,
    grad_queries: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    workspace: Workspace,
) -> None:
    """Adds the sparse branch's gradients of one head (algorithm 2 of SLA) to the three last tensors.

    Args:
        grads: dO, (T_m, b_q, D); logsumexp, delta: (T_m, b_q, 1), delta = rowsum(dO * O_s).
        grad_queries: (T_m, b_q, D); grad_keys, grad_values: (T_n, b_k, D), contiguous: added to.
    """
    _, block_q, dim = queries.shape
    block_k = keys.shape[1]
    shift = logsumexp.where(logsumexp > -torch.inf, torch.inf)  # exp(s - inf) = 0: an empty row has no weights
    for rows, columns in row_chunks(critical, block_k * dim):
        number, span = columns.shape[0], columns.shape[1] * block_k
        query, grad = queries[rows], grads[rows]
        key = gather(keys, columns, workspace("keys", number, span, dim))
        value = gather(values, columns, workspace("values", number, span, dim))
        weights = workspace("scores", number, block_q, span)
        torch.baddbmm(weights, query, key.transpose(1, 2), beta=0, alpha=scale, out=weights)
        if bias is not None:
            weights += bias[columns].view(number, 1, span)
        weights.sub_(shift[rows]).exp_()
        grad_scores = torch.bmm(grad, value.transpose(1, 2), out=workspace("grad_scores", number, block_q, span))
        grad_scores.sub_(delta[rows]).mul_(weights)
        grad_queries[rows] += torch.bmm(grad_scores, key, out=workspace("product", number, block_q, dim)).mul_(scale)
        scattered = workspace("scattered", number, span, dim)
        listed = columns.reshape(-1)
        torch.bmm(weights.transpose(1, 2), grad, out=scattered)
        grad_values.flatten(1).index_add_(0, listed, scattered.view(listed.numel(), -1))
        torch.baddbmm(scattered, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=scattered)
        grad_keys.flatten(1).index_add_(0, listed, scattered.view(listed.numel(), -1))
