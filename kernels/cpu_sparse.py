"""The sparse branch on the CPU: exact attention of query blocks over their critical key blocks, chunk by chunk.

NOTE [Operands]
Operands of matrix products are float32 (float64 for float64 inputs), or bfloat16 where the processor has tiles for it;
statistics, weights and everything that is summed over blocks are float32 in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocks import CriticalBlocks, Workspace, gather


def sparse_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    critical: CriticalBlocks,
    rows: slice,
    scale: float,
    linear: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    workspace: Workspace,
) -> None:
    """``output = softmax(s Q K^T + bias) V + linear`` over the critical blocks of some query blocks (SLA, equation 4).

    Args:
        queries: (rows, b_q, D); keys, values: (T_n, b_k, D), contiguous; bias: (T_n, b_k).
        critical, rows: which key blocks, and which of the head's query blocks these are.
        linear: (rows, b_q, D), contiguous, what the other branch adds, or None.
        output: (rows, b_q, D), any strides; logsumexp: (rows, b_q, 1): written.
    """
    attend = _attend_fused if keys.dtype == torch.bfloat16 else _attend
    for part, columns in critical.chunks(rows, keys[0].numel()):
        if not columns.shape[1]:
            output[part] = 0 if linear is None else linear[part].to(output.dtype)
            logsumexp[part] = -torch.inf
            continue
        mask = None if bias is None else bias[columns].flatten(1).unsqueeze(1)
        result, logsumexp[part] = attend(queries[part], keys, values, mask, columns, scale, workspace)
        if linear is not None:
            result += linear[part]
        output[part] = result.to(output.dtype)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    scale: float,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """O_s (n, b_q, D) and log-sum-exp (n, b_q, 1) of a chunk, with `mask` (n, 1, span) added to the scores."""
    (number, block_q, dim), span = query.shape, columns.shape[1] * keys.shape[1]
    # Keys and values share one buffer: the keys are done with when the values come, and the cache holds both.
    buffer = workspace("gathered", number, span, dim)
    scores = workspace("scores", number, block_q, span)
    key = gather(keys, columns, buffer)
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    if mask is not None:
        scores += mask
    maximum = scores.amax(-1, keepdim=True)
    if mask is not None:  # all keys of a row masked: its weights become exp(-inf) = 0, not NaN
        maximum.clamp_(min=torch.finfo(maximum.dtype).min)
    total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
    logsumexp = total.log().add_(maximum)
    if mask is not None:
        total.clamp_(min=torch.finfo(total.dtype).tiny)
    product = torch.bmm(scores, gather(values, columns, buffer), out=workspace("product", number, block_q, dim))
    return product.div_(total), logsumexp


def _attend_fused(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    scale: float,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """As `_attend`, by torch's own attention over the gathered blocks, whose bfloat16 scores never leave float32."""
    (number, _, dim), span = query.shape, columns.shape[1] * keys.shape[1]
    key = gather(keys, columns, workspace("gathered", number, span, dim, dtype=keys.dtype))
    value = gather(values, columns, workspace("gathered_values", number, span, dim, dtype=keys.dtype))
    result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None], key[:, None], value[:, None], scale=scale, attn_mask=None if mask is None else mask[:, None]
    )
    logsumexp = logsumexp.view(number, -1, 1)
    if mask is not None:  # it says 0 where all keys of a row are masked
        logsumexp = logsumexp.masked_fill(mask.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return result[:, 0], logsumexp


def sparse_backward(
    grads: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    critical: CriticalBlocks,
    rows: slice,
    scale: float,
    logsumexp: Tensor,
    grad_queries: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    workspace: Workspace,
) -> None:
    """Adds the sparse branch's gradients of some query blocks (algorithm 2 of SLA) to the three last tensors.

    Args:
        critical, rows: as in the forward.
        grads: dO, (rows, b_q, D); logsumexp: (rows, b_q, 1).
        grad_queries: (rows, b_q, D); grad_keys, grad_values: (T_n, b_k, D), contiguous: added to.
    """
    _, block_q, dim = queries.shape
    operand, exact = keys.dtype, grad_keys.dtype
    shift = logsumexp.where(logsumexp > -torch.inf, torch.inf).neg_()  # exp(s - inf) = 0: an empty row has no weights
    for part, columns in critical.chunks(rows, keys[0].numel()):
        if not columns.shape[1]:
            continue
        number, span = columns.shape[0], columns.shape[1] * keys.shape[1]
        query, grad, listed = queries[part], grads[part], columns.reshape(-1)
        gathered = workspace("gathered", number, span, dim, dtype=operand)
        value = gather(values, columns, gathered)
        product = workspace("scores", number, block_q, span, dtype=operand)
        torch.bmm(grad, value.transpose(1, 2), out=product)
        grad_scores = workspace.copy(product, "grad_scores", exact)

        key = gather(keys, columns, gathered)
        weights = _scores(query, key, workspace)
        torch.add(shift[part], weights, alpha=scale, out=weights)
        if bias is not None:
            weights += bias[columns].view(number, 1, span)
        weights.exp_()
        # delta = rowsum(dO * O_s) = rowsum(P * dP): from the output it would carry the rounding of O_s + O_l W^T + b.
        grad_scores.mul_(weights)
        grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)

        grad_scores = workspace.copy(grad_scores, "operand", operand)
        product = workspace("product", number, block_q, dim, dtype=operand)
        grad_queries[part] += torch.bmm(grad_scores, key, out=product).mul_(scale)
        # The gathered keys have served: their buffer takes what is scattered.
        scattered = gathered.view(listed.numel(), -1)
        torch.baddbmm(gathered, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=gathered)
        grad_keys.flatten(1).index_add_(0, listed, workspace.copy(scattered, "scattered", exact))
        weights = workspace.copy(weights, "operand", operand)
        torch.bmm(weights.transpose(1, 2), grad, out=gathered)
        grad_values.flatten(1).index_add_(0, listed, workspace.copy(scattered, "scattered", exact))


def _scores(query: Tensor, key: Tensor, workspace: Workspace) -> Tensor:
    """Q K^T in the workspace's dtype.

    A bfloat16 product is rounded on its way to memory, so that a weight would be off by exp of a score's rounding. What
    the rounding took is computed by a second product, which starts from minus the first.
    """
    number, block_q, _ = query.shape
    product = workspace("weights", number, block_q, key.shape[1], dtype=query.dtype)
    torch.bmm(query, key.transpose(1, 2), out=product)
    if query.dtype == workspace.dtype:
        return product
    scores = workspace.copy(product, "weights", workspace.dtype)
    return scores.add_(torch.baddbmm(product, query, key.transpose(1, 2), beta=-1, out=product))
