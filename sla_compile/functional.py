"""The functional form of sparse-linear attention, checked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sla_compile.config import MAX_HEAD_DIM, SLAConfig
from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.routing import route as _route
from sla_compile.kernels.spec import num_blocks
from sla_compile.ops import autocast_tokens, default_scale, op_scalars, routing_kernels
from sla_compile.passes.eligibility import DTYPES, is_key_padding_mask


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SLAConfig,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    router_q: Tensor | None = None,
    router_k: Tensor | None = None,
    alpha: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    block_map: Tensor | None = None,
) -> Tensor:
    """Sparse-linear attention: ``O = O_s + O_l W^T + b`` (SLA, arXiv 2509.24006, equations 4 to 6), or with
    ``config.method="sla2"`` ``O = alpha O_s + (1 - alpha) O_l`` (SLA2, arXiv 2602.12675).

    ``O_s`` is exact attention over the critical blocks of each query block; ``O_l`` is linear attention over the
    marginal blocks (``config.linear="marginal"``) or all keys (``"all"``). SLA2 takes the keys less their mean over the
    tokens that take part, and is exact attention where a query block has nothing marginal left.

    Args:
        query: (B, H, L, D), D at most 256, float16, bfloat16 or float32 (float64 on the CPU); any strides.
        key, value: (B, H, L, D), or with `enable_gqa` (B, H_kv, L, D) where H is a multiple of H_kv.
        config: what is critical, marginal and negligible; `min_seq_len` is not looked at here.
        proj_weight: (D, D) as in nn.Linear, any floating dtype, computed in float32; SLA needs it unless
            ``config.linear="none"``.
        proj_bias: (D).
        router_q, router_k: (D, D) as in nn.Linear, both or neither; they multiply SLA2's pooled queries and keys before
            these are ranked. None is the identity, SLA's own choice. They get no gradient: the choice is discrete.
        alpha: (H, 1) or (H, ceil(L / block_q)), values from 0 to 1 (checked on the CPU); SLA2 needs it. At exactly
            0 or 1 its gradient lacks the branch whose weight is 0; the derivative of a sigmoid is 0 there.
        key_padding_mask: broadcastable to (B, 1, 1, L); bool, True takes part, or floating point, added to the scores,
            where a key that is 104 or more below the largest, exp of which is 0, takes no part. It gets no gradient. A
            batch entry without any valid key gives zeros.
        scale: factor of the scores; default 1/sqrt(D).
        block_map: int8 (B, H, ceil(L / block_q), ceil(L / block_k)) of 1 critical, 0 marginal, -1 negligible, with a
            critical block in every row; overrides routing.

    Returns:
        (B, H, L, D) in the query's dtype, with the strides of a transposed (B, L, H, D) tensor.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument does not fit; the text says which and how.
    """
    _check_inputs(query, key, value, enable_gqa, key_padding_mask)
    _check_projection(query, proj_weight, proj_bias, config)
    _check_routers(query, router_q, router_k, config)
    _check_alpha(query, alpha, config)
    if block_map is not None:
        _check_block_map(block_map, query, config)
    output, _ = torch.ops.sla_compile.sparse_linear_attention(
        query,
        key,
        value,
        proj_weight,
        proj_bias,
        router_q,
        router_k,
        alpha,
        key_padding_mask,
        block_map,
        *op_scalars(config, query.shape[-1], scale),
    )
    return output


def route(
    query: Tensor,
    key: Tensor,
    *,
    config: SLAConfig,
    router_q: Tensor | None = None,
    router_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The block map that :func:`sparse_linear_attention` would use: int8 (B, H, ceil(L / block_q), ceil(L / block_k)).

    1 is critical, 0 marginal, -1 negligible (SLA, arXiv 2509.24006, equations 2 and 3). Arguments as there.
    torch.compile takes it with dynamic lengths, too, torch.export with a static one.
    """
    _check_inputs(query, key, key, enable_gqa, key_padding_mask)
    _check_routers(query, router_q, router_k, config)
    device = query.device.type
    if device in DTYPES and torch.is_autocast_enabled(device):
        query, key = autocast_tokens(query, key)
        with torch.autocast(device, enabled=False):
            return route(
                query, key, config=config, router_q=router_q, router_k=router_k, key_padding_mask=key_padding_mask,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
    return _route(
        query,
        key,
        scale=default_scale(scale, query.shape[-1]),
        block_q=config.block_q,
        block_k=config.block_k,
        sparsity=config.sparsity,
        negligible=config.negligible,
        critical_blocks=config.critical_blocks,
        pinned=config.pinned,
        key_bias=key_bias(key_padding_mask, query.shape[0], query.shape[2]),
        router_q=router_q,
        router_k=router_k,
        **routing_kernels(query),
    )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"query, key and value must share a dtype, got {query.dtype} and {tensor.dtype} for {name}")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device} but {name} is on {tensor.device}")
    shapes = tuple(tuple(t.shape) for t in (query, key, value))
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape, got {shapes[1]} and {shapes[2]}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must agree in batch and head dimension, got {shapes[0]} and {shapes[1]}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"sparse-linear attention is for self-attention: query has {query.shape[2]} tokens and key {key.shape[2]}; "
            "use scaled_dot_product_attention for cross-attention"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"query and key must not be empty, got {shapes[0]} and {shapes[1]}")
    if query.shape[3] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dimensions up to {MAX_HEAD_DIM} are supported, got {query.shape[3]}")
    if query.shape[1] != key.shape[1]:
        if not enable_gqa:
            raise ValueError(f"query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True to share")
        if query.shape[1] % key.shape[1]:
            raise ValueError(f"the {query.shape[1]} query heads are not a multiple of the {key.shape[1]} key heads")
    device = query.device.type
    if device != "meta" and device not in DTYPES:
        raise NotImplementedError(f"sparse_linear_attention runs on {', '.join(DTYPES)}, got {query.device}")
    if query.dtype not in DTYPES.get(device, DTYPES["cpu"]):
        names = ", ".join(str(dtype) for dtype in DTYPES.get(device, DTYPES["cpu"]))
        raise TypeError(f"query must be one of {names} on {device}, got {query.dtype}")
    if mask is not None:
        if mask.device != query.device:
            raise ValueError(f"query is on {query.device} but key_padding_mask is on {mask.device}")
        if mask.requires_grad:
            raise NotImplementedError("key_padding_mask gets no gradient; detach it")
        if not is_key_padding_mask(mask, query):
            raise ValueError(
                f"key_padding_mask must be bool or floating point and broadcastable to (batch, 1, 1, tokens) = "
                f"({query.shape[0]}, 1, 1, {query.shape[2]}), got {mask.dtype} of {tuple(mask.shape)}; masks that "
                "differ between queries or heads are not supported"
            )


def _check_projection(query: Tensor, weight: Tensor | None, bias: Tensor | None, config: SLAConfig) -> None:
    dim = query.shape[3]
    if not config.has_projection:
        if weight is not None or bias is not None:
            raise ValueError(
                'proj_weight and proj_bias are for method="sla": SLA2 has no projection'
                if config.has_alpha
                else 'proj_weight and proj_bias belong to the linear branch, which linear="none" leaves out'
            )
        return
    if weight is None:
        raise ValueError(
            f'linear="{config.linear}" needs proj_weight of shape ({dim}, {dim}); pass one, or linear="none" for '
            "block-sparse attention alone"
        )
    _check_parameter(query, "proj_weight", weight, (dim, dim))
    if bias is not None:
        _check_parameter(query, "proj_bias", bias, (dim,))


def _check_routers(query: Tensor, router_q: Tensor | None, router_k: Tensor | None, config: SLAConfig) -> None:
    if router_q is None and router_k is None:
        return
    if not config.has_alpha:
        raise ValueError('router_q and router_k are for method="sla2"; SLA ranks the pooled tokens as they are')
    if router_q is None or router_k is None:
        missing = "router_q" if router_q is None else "router_k"
        raise ValueError(f"{missing} is missing: pass both routers, or neither for the identity")
    dim = query.shape[3]
    _check_parameter(query, "router_q", router_q, (dim, dim))
    _check_parameter(query, "router_k", router_k, (dim, dim))


def _check_alpha(query: Tensor, alpha: Tensor | None, config: SLAConfig) -> None:
    if not config.has_alpha:
        if alpha is not None:
            raise ValueError('alpha is for method="sla2"; SLA adds its branches and needs none')
        return
    heads, blocks = query.shape[1], num_blocks(query.shape[2], config.block_q)
    if alpha is None:
        raise ValueError(
            f'method="sla2" needs alpha, the weight of the sparse branch: ({heads}, 1), or ({heads}, {blocks}) for '
            "each query block"
        )
    problem = why_alpha_does_not_fit(alpha, query, config)
    if problem:
        raise ValueError(problem)
    _check_parameter(query, "alpha", alpha, tuple(alpha.shape))
    # Reading the values from a GPU would hold it up in every call.
    if alpha.device.type == "cpu" and _has_values(alpha):
        with torch.no_grad():
            if not ((alpha >= 0) & (alpha <= 1)).all():
                raise ValueError("alpha weighs two branches and must be between 0 and 1; pass torch.sigmoid(logit)")


def why_alpha_does_not_fit(alpha: Tensor, query: Tensor, config: SLAConfig) -> str | None:
    """Why an alpha or its logit is not for this (B, H, L, D) query, or None where it is."""
    heads, length = query.shape[1], query.shape[2]
    if alpha.dim() != 2 or alpha.shape[0] != heads:
        return f"alpha must be ({heads}, 1) or ({heads}, query blocks) for {heads} heads, got {tuple(alpha.shape)}"
    if alpha.shape[1] != 1 and alpha.shape[1] != num_blocks(length, config.block_q):
        return (
            f"alpha is for sequences of {alpha.shape[1]} query blocks, but {length} tokens are "
            f"{num_blocks(length, config.block_q)} blocks of {config.block_q}; an alpha for each block is bound to one "
            'length, use alpha_per="head" for others'
        )
    return None


def _check_parameter(query: Tensor, name: str, parameter: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(parameter.shape) != shape or not parameter.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape {shape}, got {parameter.dtype} of {tuple(parameter.shape)}"
        )
    if parameter.device != query.device:
        raise ValueError(f"query is on {query.device} but {name} is on {parameter.device}")


def _check_block_map(block_map: Tensor, query: Tensor, config: SLAConfig) -> None:
    batch, heads, length, _ = query.shape
    shape = (batch, heads, num_blocks(length, config.block_q), num_blocks(length, config.block_k))
    if block_map.dtype != torch.int8 or tuple(block_map.shape) != shape:
        raise ValueError(f"block_map must be int8 of shape {shape}, got {block_map.dtype} of {tuple(block_map.shape)}")
    if block_map.device != query.device:
        raise ValueError(f"query is on {query.device} but block_map is on {block_map.device}")
    # Reading the values from a GPU would break a stream capture.
    if not _has_values(block_map) or (block_map.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not (block_map == 1).any(-1).all():
        raise ValueError("every row of block_map needs a critical block (1)")
    if (block_map.abs() > 1).any():
        raise ValueError("block_map must hold 1 (critical), 0 (marginal) and -1 (negligible) only")


def _has_values(tensor: Tensor) -> bool:
    """Whether its values can be read: not in a trace, by Dynamo or by a dispatch mode, nor from a fake tensor or one of
    torch.func, behind which there may be several."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
