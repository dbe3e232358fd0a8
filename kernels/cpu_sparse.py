"""The sparse branch on the CPU: exact attention of query blocks over their critical key blocks, chunk by chunk.

NOTE [Operands]
Operands of matrix products are float32 (float64 for float64 inputs), or bfloat16 where the processor has tiles for it;
statistics, weights and everything that is summed over blocks are float32 in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocks import CriticalBlocks, Workspace, gather
from sla_compile.kernels.cpu_low_bit import LowBitHead


def sparse_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    critical: CriticalBlocks,
    rows: slice,
    scale: float,
    alpha: Tensor | None,
    linear: Tensor | None,
    low_bit: LowBitHead | None,
    output: Tensor,
    logsumexp: Tensor,
    workspace: Workspace,
) -> None:
    """``output = alpha softmax(s Q K^T + bias) V + linear`` over the critical blocks of some query blocks.

    Equation 4 of SLA, arXiv 2509.24006; with alpha SLA2, arXiv 2602.12675.

    Args:
        queries: (rows, b_q, D); keys, values: (T_n, b_k, D), contiguous; bias: (T_n, b_k).
        critical, rows: which key blocks, and which of the head's query blocks these are.
        alpha: (rows, 1, 1), the share of this branch, or None for 1.
        linear: (rows, b_q, D), contiguous, what the other branch adds, or None; overwritten.
        low_bit: the quantised operands to take instead, or None.
        output: (rows, b_q, D), any strides; logsumexp: (rows, b_q, 1): written.
    """
    attend = _attend_fused if keys.dtype == torch.bfloat16 else _attend
    result = workspace("result", *queries.shape) if linear is None else linear.to(workspace.dtype)
    if linear is None:
        result.zero_()
    for part, columns in critical.chunks(rows, keys[0].numel()):
        if not columns.shape[1]:
            logsumexp[part] = -torch.inf
            continue
        mask = None if bias is None else bias[columns].flatten(1).unsqueeze(1)
        # A slice of rows is added to in place, listed rows in a copy.
        added = result[part]
        share = None if alpha is None else alpha[part]
        if low_bit is not None:
            listed = torch.arange(rows.start, rows.stop)[part]
            logsumexp[part] = low_bit.attend(listed, columns, mask, share, added, workspace)
        else:
            logsumexp[part] = attend(queries[part], keys, values, mask, columns, scale, share, added, workspace)
        if isinstance(part, Tensor):
            result[part] = added
    output.copy_(result)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    scale: float,
    alpha: Tensor | None,
    added: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Adds alpha O_s of a chunk to `added` (n, b_q, D), with `mask` (n, 1, span) on the scores; returns its log-sum-exp
    (n, b_q, 1)."""
    (number, block_q, dim), span = query.shape, columns.shape[1] * keys.shape[1]
    # Keys and values share one buffer: the keys are done with when the values come, and the cache holds both.
    buffer = workspace("gathered", number, span, dim)
    scores = workspace("scores", number, block_q, span)
    key = gather(keys, columns, buffer)
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    if mask is not None:
        scores += mask
    maximum = scores.amax(-1, keepdim=True)
    weights = torch.softmax(scores, -1, out=scores)
    # The largest weight is exp(maximum - logsumexp).
    logsumexp = maximum.sub_(weights.amax(-1, keepdim=True).log_())
    if mask is not None:  # all keys of a row masked: its weights are 0, not NaN
        empty = logsumexp.isnan()
        weights.masked_fill_(empty, 0)
        logsumexp.masked_fill_(empty, -torch.inf)
    if alpha is not None:
        weights *= alpha
    added.baddbmm_(weights, gather(values, columns, buffer))
    return logsumexp


def _attend_fused(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    scale: float,
    alpha: Tensor | None,
    added: Tensor,
    workspace: Workspace,
) -> Tensor:
    """As `_attend`, by torch's own attention over the gathered blocks, whose bfloat16 scores never leave float32."""
    (number, _, dim), span = query.shape, columns.shape[1] * keys.shape[1]
    key = gather(keys, columns, workspace("gathered", number, span, dim, dtype=keys.dtype))
    value = gather(values, columns, workspace("gathered_values", number, span, dim, dtype=keys.dtype))
    result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None], key[:, None], value[:, None], scale=scale, attn_mask=None if mask is None else mask[:, None]
    )
    result = result[:, 0]
    added += result if alpha is None else alpha * result
    logsumexp = logsumexp.view(number, -1, 1)
    if mask is not None:  # it says 0 where all keys of a row are masked
        logsumexp = logsumexp.masked_fill(mask.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return logsumexp


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
    alpha: Tensor | None,
    delta: Tensor | None,
    grad_queries: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    smoothing: Tensor | None,
    workspace: Workspace,
) -> Tensor | None:
    """Adds the sparse branch's gradients of some query blocks (algorithm 2 of SLA) to the three last tensors.

    Returns, where there is an alpha, its gradient (rows,) through this branch.

    Args:
        critical, rows: as in the forward.
        grads: dO, (rows, b_q, D); logsumexp: (rows, b_q, 1); alpha: (rows, 1, 1) or None.
        delta: rowsum(dO_s * O_s), (rows, b_q, 1), or None where it is rowsum(P * dP).
        grad_queries: (rows, b_q, D); grad_keys, grad_values: (T_n, b_k, D), contiguous: added to.
        smoothing: (D,), what a low-bit forward took off the keys, NOTE [Frame] in quantize.py, or None.
    """
    _, block_q, dim = queries.shape
    operand, exact = keys.dtype, grad_keys.dtype
    grad_alpha = None if alpha is None else alpha.new_zeros(alpha.shape[0])
    shift = logsumexp.where(logsumexp > -torch.inf, torch.inf).neg_()  # exp(s - inf) = 0: an empty row has no weights
    for part, columns in critical.chunks(rows, keys[0].numel()):
        if not columns.shape[1]:
            continue
        number, span = columns.shape[0], columns.shape[1] * keys.shape[1]
        query, grad, listed = queries[part], grads[part], columns.reshape(-1)
        if alpha is not None:  # dO_s
            grad = (alpha[part] * grad).to(operand)
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
        sums = grad_scores.sum(-1, keepdim=True) if delta is None else delta[part]
        grad_scores.addcmul_(weights, sums, value=-1)
        if grad_alpha is not None:
            grad_alpha[part] = sums.sum((1, 2))

        grad_scores = workspace.copy(grad_scores, "operand", operand)
        into = grad_queries[part]
        if operand == exact:
            into.baddbmm_(grad_scores, key, alpha=scale)
        else:
            into += torch.bmm(grad_scores, key, out=workspace("product", number, block_q, dim, dtype=operand)).mul_(
                scale
            )
        if smoothing is not None:
            into.addcmul_(grad_scores.sum(-1, keepdim=True, dtype=exact), smoothing, value=-scale)
        if isinstance(part, Tensor):
            grad_queries[part] = into
        # The gathered keys have served: their buffer takes what is scattered.
        scattered = gathered.view(listed.numel(), -1)
        torch.baddbmm(gathered, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=gathered)
        grad_keys.flatten(1).index_add_(0, listed, workspace.copy(scattered, "scattered", exact))
        weights = workspace.copy(weights, "operand", operand)
        torch.bmm(weights.transpose(1, 2), grad, out=gathered)
        grad_values.flatten(1).index_add_(0, listed, workspace.copy(scattered, "scattered", exact))
    return None if grad_alpha is None or alpha is None else quotient(grad_alpha, alpha.view(-1))


def quotient(products: Tensor, factor: Tensor) -> Tensor:
    """sum(dO * O) of a branch from the sum for its share of dO; 0 where that share, a saturated sigmoid, is 0."""
    return torch.where(factor > 0, products / factor, 0)


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
