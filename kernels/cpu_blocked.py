"""Sparse-linear attention in blocked PyTorch operations: forward and backward with explicit formulas."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocks import CriticalBlocks, blocks_of, contiguous_blocks, row_groups, thread_workspace
from sla_compile.kernels.cpu_linear import LinearHead
from sla_compile.kernels.cpu_low_bit import LowBitHead
from sla_compile.kernels.cpu_sparse import quotient, sparse_backward, sparse_forward
from sla_compile.kernels.layout import transposed_empty
from sla_compile.kernels.smoothing import token_mean
from sla_compile.kernels.spec import Spec, num_blocks


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``O_s + O_l W^T + b`` over a block map (SLA, arXiv 2509.24006, equations 4 to 6); see NOTE [Operands].

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, L, D), any strides; block_map: int8 (B, H, T_m, T_n).
        proj_weight: (D, D), proj_bias: (D): of the linear branch; None with ``spec.linear == "none"``.
        key_bias: (B, L), at most 0, added to a key's scores; its exponential weighs the key in the linear branch.
        alpha: (B, H, T_m), 1 where a row has no marginal block: then it is ``alpha O_s + (1 - alpha) O_l``, without a
            projection (SLA2, arXiv 2602.12675).
        key_mean: (B, H_kv, D), subtracted from the keys before the feature map.

    Returns:
        output (B, H, L, D) in the query's dtype, a transposed (B, L, H, D), and the log-sum-exp of the sparse branch
        (B, H, L).
    """
    batch, heads, length, _ = query.shape
    dtype, operand = _dtypes(query)
    output = transposed_empty(query)
    logsumexp = query.new_empty(batch, heads, length, dtype=dtype)
    weight, offset = _projection(proj_weight, proj_bias, alpha, spec, dtype)
    group = heads // key.shape[1]
    with thread_workspace(dtype) as workspace:
        for entry in range(batch):
            bias, key_weight = key_biases(key_bias, entry, length, spec.block_k, dtype)
            for kv_head in range(key.shape[1]):
                keys = contiguous_blocks(key[entry, kv_head], spec.block_k, operand, workspace, "keys")
                values = contiguous_blocks(value[entry, kv_head], spec.block_k, operand, workspace, "values")
                mean = None if key_mean is None else key_mean[entry, kv_head]
                linear = low_bit = None
                if spec.linear != "none":
                    linear = LinearHead(keys, values, key_weight, length, weight, mean, spec, workspace, kept=False)
                if spec.low_bit != "none":
                    token_bias = None if key_bias is None else key_bias[entry]
                    low_bit = LowBitHead(key[entry, kv_head], value[entry, kv_head], token_bias, mean, spec, dtype)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    queries = blocks_of(query[entry, head], spec.block_q, operand, workspace, "queries")
                    critical = CriticalBlocks(block_map[entry, head] == 1)
                    target, statistics = _targets(output[entry, head], logsumexp[entry, head], spec.block_q)
                    if linear is not None:
                        linear.start(block_map[entry, head] == 0)
                    if low_bit is not None:
                        low_bit.start(query[entry, head])
                    for rows in row_groups(queries.shape[0]):
                        share, rest = _shares(alpha, entry, head, rows)
                        added = None if linear is None else linear.forward(queries[rows], rows, offset, rest)
                        sparse_forward(
                            queries[rows], keys, values, bias, critical, rows, spec.scale, share, added,
                            low_bit, target[rows], statistics[rows], workspace,
                        )  # fmt: skip
                    _store(output[entry, head], target)
                    _store(logsumexp[entry, head, :, None], statistics)
    return output, logsumexp


@torch.no_grad()
def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    logsumexp: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, proj_weight, proj_bias and alpha (algorithm 2 of SLA, its ``dV_j =`` as ``+=``).

    Arguments as of :func:`forward`, with its two results, of which `output` is needed after a low-bit forward only;
    `grad_output` (B, H, L, D) has any strides. The key's gradient is that for a constant `key_mean`.
    """
    batch, heads, length, _ = query.shape
    dtype, operand = _dtypes(query)
    grads = tuple(map(transposed_empty, (query, key, value)))
    weight, offset = _projection(proj_weight, proj_bias, alpha, spec, dtype)
    grad_weight = None if weight is None else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grad_offset = None if offset is None else torch.zeros_like(offset)
    grad_alpha = None if alpha is None else torch.zeros(alpha.shape, dtype=dtype)
    group = heads // key.shape[1]
    smoothings = None
    if spec.low_bit != "none":
        smoothings = token_mean(key, key_bias) if key_mean is None else key_mean
    with thread_workspace(dtype) as workspace:
        for entry in range(batch):
            bias, key_weight = key_biases(key_bias, entry, length, spec.block_k, dtype)
            for kv_head in range(key.shape[1]):
                keys = contiguous_blocks(key[entry, kv_head], spec.block_k, operand, workspace, "keys")
                values = contiguous_blocks(value[entry, kv_head], spec.block_k, operand, workspace, "values")
                grad_keys = workspace("grad_keys", *keys.shape).zero_()
                grad_values = workspace("grad_values", *keys.shape).zero_()
                linear = smoothing = None
                if spec.linear != "none":
                    mean = None if key_mean is None else key_mean[entry, kv_head]
                    linear = LinearHead(keys, values, key_weight, length, weight, mean, spec, workspace, kept=True)
                if smoothings is not None:
                    smoothing = smoothings[entry, kv_head].to(dtype)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    queries = blocks_of(query[entry, head], spec.block_q, operand, workspace, "queries")
                    grad = blocks_of(grad_output[entry, head], spec.block_q, operand, workspace, "grads")
                    statistics = blocks_of(
                        logsumexp[entry, head, :, None], spec.block_q, dtype, workspace, "statistics"
                    )
                    critical = CriticalBlocks(block_map[entry, head] == 1)
                    target = _target(grads[0][entry, head], spec.block_q)
                    outputs = None
                    if spec.low_bit != "none":
                        if output is None:
                            raise ValueError("the backward of a low-bit forward needs its output")
                        outputs = blocks_of(output[entry, head], spec.block_q, dtype, workspace, "outputs")
                    if linear is not None:
                        linear.start(block_map[entry, head] == 0)
                        linear.start_backward()
                    for rows in row_groups(queries.shape[0]):
                        part = grad[rows]
                        share, rest = _shares(alpha, entry, head, rows)
                        # The quantised O_s is not sum P V: its delta is what is left of the output's.
                        of_sparse = (
                            None if outputs is None else (part * outputs[rows]).sum(-1, keepdim=True, dtype=dtype)
                        )
                        if of_sparse is not None and offset is not None:
                            of_sparse -= (part * offset).sum(-1, keepdim=True, dtype=dtype)
                        if linear is None:
                            grad_queries = workspace("query_grads", *part.shape).zero_()
                        else:
                            grad_linear = part if rest is None else (rest * part).to(operand)
                            grad_queries, delta = linear.query_backward(grad_linear, queries[rows], rows)
                            if of_sparse is not None:
                                of_sparse -= delta
                            if grad_alpha is not None and rest is not None:
                                grad_alpha[entry, head, rows] -= quotient(delta.sum((1, 2)), rest.view(-1))
                        if grad_offset is not None:
                            grad_offset += part.sum((0, 1), dtype=dtype)
                        of_share = sparse_backward(
                            part, queries[rows], keys, values, bias, critical, rows, spec.scale, statistics[rows],
                            share, of_sparse, grad_queries, grad_keys, grad_values, smoothing, workspace,
                        )  # fmt: skip
                        if grad_alpha is not None and of_share is not None:
                            grad_alpha[entry, head, rows] += of_share
                        target[rows] = grad_queries
                    _store(grads[0][entry, head], target)
                    if linear is not None:
                        linear.key_backward(grad_keys, grad_values, grad_weight)
                _store(grads[1][entry, kv_head], grad_keys)
                _store(grads[2][entry, kv_head], grad_values)
    of_parameters = (
        None if grad is None or parameter is None else grad.to(parameter.dtype)
        for grad, parameter in ((grad_weight, proj_weight), (grad_offset, proj_bias))
    )
    return *grads, *of_parameters, grad_alpha  # type: ignore[return-value]


def _shares(alpha: Tensor | None, entry: int, head: int, rows: slice) -> tuple[Tensor | None, Tensor | None]:
    """alpha and 1 - alpha of some query blocks, (rows, 1, 1)."""
    if alpha is None:
        return None, None
    share = alpha[entry, head, rows, None, None]
    return share, 1 - share


def _dtypes(query: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What sums and statistics are computed in, and the operands of matrix products."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32, operand_dtype(query)


def operand_dtype(query: Tensor) -> torch.dtype:
    """The operands of matrix products."""
    if query.dtype == torch.float64 or (query.dtype == torch.bfloat16 and _has_bfloat16_tiles()):
        return query.dtype
    return torch.float32


@functools.cache
def _has_bfloat16_tiles() -> bool:
    """Whether bfloat16 products run on AMX tiles, some four times as fast as float32; without, they are not faster."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _projection(
    weight: Tensor | None, bias: Tensor | None, alpha: Tensor | None, spec: Spec, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The linear branch's parameters in `dtype`, None where there is no such branch or no projection."""
    if spec.linear == "none" or alpha is not None:
        return None, None
    if weight is None:
        raise ValueError(f'linear="{spec.linear}" needs proj_weight or alpha')
    return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def key_biases(
    key_bias: Tensor | None, entry: int, length: int, block: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Bias (T_n, b_k) with -inf past the end, and its exponential (T_n, b_k, 1); None where there is nothing to add."""
    blocks = num_blocks(length, block)
    if key_bias is None and length == blocks * block:
        return None, None
    bias = torch.full((blocks * block,), -torch.inf, dtype=dtype)
    bias[:length] = 0 if key_bias is None else key_bias[entry]
    return bias.view(blocks, block), None if key_bias is None else bias.exp().view(blocks, block, 1)


def _targets(output: Tensor, logsumexp: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Where a head's output (T_m, b_q, D) and log-sum-exp (T_m, b_q, 1) are written."""
    return _target(output, block), _target(logsumexp[:, None], block)


def _target(tokens: Tensor, block: int) -> Tensor:
    """Blocks (T, b, D) to write the tokens (L, D) to: in place, or padded, for `_store` to copy."""
    length, dim = tokens.shape
    blocks = num_blocks(length, block)
    if length == blocks * block:
        return tokens.unflatten(0, (blocks, block))
    return tokens.new_empty(blocks, block, dim)


def _store(tokens: Tensor, blocks: Tensor) -> None:
    """Copies the valid tokens of padded blocks (T, b, D) to (L, D) where they were not written in place."""
    if blocks.data_ptr() != tokens.data_ptr():
        tokens.copy_(blocks.flatten(0, 1)[: tokens.shape[0]])
