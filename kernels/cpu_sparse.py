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
    """``output = softmax(s Q K^T + bias) V + linear`` over the critical blocks of some query blocks (SLA, equation 4).

    Args:
        queries: (rows, b_q, D); keys, values: (T_n, b_k, D), contiguous; bias: (T_n, b_k).
        critical: boolean (rows, T_n).
        linear: (rows, b_q, D), contiguous, what the other branch adds, or None.
        output: (rows, b_q, D), any strides; logsumexp: (rows, b_q, 1): written.
    """
    number, block_q, dim = queries.shape
    block_k = keys.shape[1]
    maxima = workspace("maxima", number, block_q, 1).fill_(-torch.inf)
    sums = workspace("sums", number, block_q, 1).zero_()
    done = 0
    for rows, columns in row_chunks(critical, block_k * dim):
        number, span = columns.shape[0], columns.shape[1] * block_k
        done += number
        # Keys and values share one buffer: the keys are done with when the values come, and the cache holds both.
        selected = gather(keys, columns, workspace("gathered", number, span, dim))
        scores = workspace("scores", number, block_q, span)
        torch.baddbmm(scores, queries[rows], selected.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if bias is not None:
            scores += bias[columns].view(number, 1, span)
        maximum = scores.amax(-1, keepdim=True)
        if bias is not None:  # all keys of a row masked: its weights become exp(-inf) = 0, not NaN
            maximum.clamp_(min=torch.finfo(maximum.dtype).min)
        total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
        maxima[rows], sums[rows] = maximum, total
        if bias is not None:
            total.clamp_(min=torch.finfo(total.dtype).tiny)
        selected = gather(values, columns, workspace("gathered", number, span, dim))
        product = torch.bmm(scores, selected, out=workspace("product", number, block_q, dim))
        if linear is None:
            result = product.div_(total)
        elif isinstance(rows, slice) and output.dtype == product.dtype:
            torch.addcdiv(linear[rows], product, total, out=output[rows])
            continue
        else:
            result = product.div_(total).add_(linear[rows])
        output[rows] = result.to(output.dtype)
    if done < queries.shape[0]:
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
    """Adds the sparse branch's gradients of some query blocks (algorithm 2 of SLA) to the three last tensors.

    Args:
        grads: dO, (rows, b_q, D); logsumexp, delta: (rows, b_q, 1), delta = rowsum(dO * O_s).
        grad_queries: (rows, b_q, D); grad_keys, grad_values: (T_n, b_k, D), contiguous: added to.
    """
    _, block_q, dim = queries.shape
    block_k = keys.shape[1]
    shift = logsumexp.where(logsumexp > -torch.inf, torch.inf)  # exp(s - inf) = 0: an empty row has no weights
    for rows, columns in row_chunks(critical, block_k * dim):
        number, span = columns.shape[0], columns.shape[1] * block_k
        query, grad, listed = queries[rows], grads[rows], columns.reshape(-1)
        weights = workspace("scores", number, block_q, span)
        grad_scores = workspace("grad_scores", number, block_q, span)
        gathered = workspace("gathered", number, span, dim)
        value = gather(values, columns, gathered)
        torch.bmm(grad, value.transpose(1, 2), out=grad_scores)
        key = gather(keys, columns, gathered)
        torch.baddbmm(weights, query, key.transpose(1, 2), beta=0, alpha=scale, out=weights)
        if bias is not None:
            weights += bias[columns].view(number, 1, span)
        weights.sub_(shift[rows]).exp_()
        grad_scores.sub_(delta[rows]).mul_(weights)
        product = workspace("product", number, block_q, dim)
        grad_queries[rows] += torch.baddbmm(product, grad_scores, key, beta=0, alpha=scale, out=product)
        # The gathered keys have served: their buffer takes what is scattered.
        torch.bmm(weights.transpose(1, 2), grad, out=gathered)
        grad_values.flatten(1).index_add_(0, listed, gathered.view(listed.numel(), -1))
        torch.baddbmm(gathered, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=gathered)
        grad_keys.flatten(1).index_add_(0, listed, gathered.view(listed.numel(), -1))
