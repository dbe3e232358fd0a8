"""The operators ``sla_compile::sparse_linear_attention`` and its backward: schema, fakes, autograd, autocast, dispatch.

Both are functional and opaque to the compiler. The kernels behind them load at the first real call, so that importing
this file needs neither Triton nor CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from sla_compile import transforms
from sla_compile.config import SLAConfig
from sla_compile.kernels import decomposed
from sla_compile.kernels.layout import transposed_empty
from sla_compile.kernels.masks import assert_shared, key_bias
from sla_compile.kernels.routing import route
from sla_compile.kernels.smoothing import has_complement, token_mean, without_mean
from sla_compile.kernels.spec import Spec

# NOTE [Implementation version]
# The compile caches of torch key on an op's name and arguments, not on its body (pytorch#160472): after an upgrade that
# changes the numbers, an old cache would keep serving whatever Inductor constant-folded or decomposed. The version is
# an argument of every call, so raising it misses those caches.
IMPL_VERSION = 2


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Optional[Tensor],
    proj_bias: Optional[Tensor],
    router_q: Optional[Tensor],
    router_k: Optional[Tensor],
    alpha: Optional[Tensor],
    key_padding_mask: Optional[Tensor],
    block_map: Optional[Tensor],
    scale: float,
    sparsity: float,
    negligible: float,
    critical_blocks: int,
    pinned_first: int,
    pinned_last: int,
    feature_map: str,
    linear: str,
    block_q: int,
    block_k: int,
    low_bit: str,
    impl_version: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) and log-sum-exp of the sparse branch (B, H, L); arguments as in SLAConfig, 0 critical_blocks
    meaning by share, low_bit "none" for 16 bits. With `alpha` it is SLA2, else SLA."""
    transforms.refuse_tangents(query, key, value, proj_weight, proj_bias, alpha)
    spec = Spec(scale, feature_map, linear, block_q, block_k, low_bit)
    routing = (sparsity, negligible, critical_blocks, (pinned_first, pinned_last), router_q, router_k)
    return _kernels(query, low_bit).forward(
        query,
        key,
        value,
        spec=spec,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
        **_prepared(query, key, alpha, key_padding_mask, block_map, spec, routing),
    )


sparse_linear_attention_op = torch.library.custom_op("sla_compile::sparse_linear_attention", forward, mutates_args=())


@torch.library.custom_op("sla_compile::sparse_linear_attention_backward", mutates_args=())
def sparse_linear_attention_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Optional[Tensor],
    logsumexp: Tensor,
    proj_weight: Optional[Tensor],
    proj_bias: Optional[Tensor],
    router_q: Optional[Tensor],
    router_k: Optional[Tensor],
    alpha: Optional[Tensor],
    key_padding_mask: Optional[Tensor],
    block_map: Optional[Tensor],
    scale: float,
    sparsity: float,
    negligible: float,
    critical_blocks: int,
    pinned_first: int,
    pinned_last: int,
    feature_map: str,
    linear: str,
    block_q: int,
    block_k: int,
    low_bit: str,
    impl_version: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, proj_weight, proj_bias and alpha; the last three are empty where there is none.

    The blocks are routed again from the same query and key: the map is cheap to find, and as a saved output its size
    would be a quotient of the length, which torch.export cannot carry for every length. The output may be None where
    `_reads_output` says so.
    """
    spec = Spec(scale, feature_map, linear, block_q, block_k, low_bit)
    routing = (sparsity, negligible, critical_blocks, (pinned_first, pinned_last), router_q, router_k)
    prepared = _prepared(query, key, alpha, key_padding_mask, block_map, spec, routing)
    grads = _kernels(query, low_bit).backward(
        grad_output,
        query,
        key,
        value,
        output,
        logsumexp,
        spec=spec,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
        **prepared,
    )
    grad_query, grad_key, grad_value, *of_parameters = grads
    if alpha is not None:
        grad_key = without_mean(grad_key, prepared["key_bias"])
        complement = has_complement(prepared["block_map"], prepared["key_bias"], block_k)
        of_parameters[2] = (of_parameters[2] * complement).sum_to_size(alpha.shape).to(alpha.dtype)
    grad_weight, grad_bias, grad_alpha = (query.new_empty(0) if grad is None else grad for grad in of_parameters)
    return grad_query, grad_key, grad_value, grad_weight, grad_bias, grad_alpha


def op_scalars(config: SLAConfig, head_dim: int, scale: float | None) -> tuple:
    """What follows the tensors in a call of ``sla_compile::sparse_linear_attention``."""
    return (
        default_scale(scale, head_dim),
        config.sparsity,
        config.negligible,
        config.critical_blocks or 0,
        *config.pinned,
        config.feature_map,
        config.linear,
        config.block_q,
        config.block_k,
        config.low_bit or "none",
        IMPL_VERSION,
    )


def default_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale: 1/sqrt(head_dim) unless given."""
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def routing_kernels(query: Tensor) -> dict[str, Callable[..., Any]]:
    """What of routing the tensor's device has kernels for, as arguments of route; none in a trace, as Dynamo does not
    follow what launches them."""
    if not query.is_cuda or torch.compiler.is_compiling():
        return {}
    kernels = _kernels(query, "none")
    return {"pool": kernels.pool_blocks, "select": kernels.select_blocks}


def _prepared(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    block_map: Tensor | None,
    spec: Spec,
    routing: tuple,
) -> dict[str, Any]:
    """What the kernels of both directions take besides the tokens and the projection."""
    assert_shared(key_padding_mask)
    bias = key_bias(key_padding_mask, query.shape[0], query.shape[2])
    if block_map is None:
        sparsity, negligible, critical_blocks, pinned, router_q, router_k = routing
        block_map = route(
            query,
            key,
            scale=spec.scale,
            block_q=spec.block_q,
            block_k=spec.block_k,
            sparsity=sparsity,
            negligible=negligible,
            critical_blocks=critical_blocks or None,
            pinned=pinned,
            key_bias=bias,
            router_q=router_q,
            router_k=router_k,
            **routing_kernels(query),
        )
    prepared = {"block_map": block_map, "key_bias": bias, "alpha": None, "key_mean": None}
    if alpha is not None:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        prepared["alpha"] = torch.where(has_complement(block_map, bias, spec.block_k), alpha.to(dtype), 1)
        prepared["key_mean"] = token_mean(key, bias)
    return prepared


def _kernels(query: Tensor, low_bit: str) -> ModuleType:
    """The module whose forward and backward run on the tensor's device."""
    kernels: ModuleType
    if query.device.type == "cuda":
        try:
            from sla_compile.kernels import gpu as kernels
        except ModuleNotFoundError as error:
            raise NotImplementedError(f"CUDA tensors need Triton, which this build of torch lacks: {error}") from error
    elif query.device.type == "cpu":
        from sla_compile.kernels import cpu as kernels
    else:
        raise NotImplementedError(f"sparse_linear_attention runs on cpu and cuda tensors, got {query.device}")
    if low_bit not in getattr(kernels, "LOW_BIT", ("none",)):
        raise NotImplementedError(
            f'low_bit="{low_bit}" has no kernels for {query.device.type} tensors yet; use low_bit=None'
        )
    return kernels


@sparse_linear_attention_op.register_fake
def _forward_fake(query, key, value, *_):
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return transposed_empty(query), query.new_empty(query.shape[:3], dtype=statistics)


@sparse_linear_attention_backward_op.register_fake
def _backward_fake(
    grad_output, query, key, value, output, logsumexp, proj_weight, proj_bias, router_q, router_k, alpha, *_
):
    parameters = (query.new_empty(0) if p is None else p.new_empty(p.shape) for p in (proj_weight, proj_bias, alpha))
    return (*(transposed_empty(t) for t in (query, key, value)), *parameters)


_TENSORS = 10  # leading tensor arguments of the forward op, before the scalars


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.scalars = inputs[_TENSORS:]
    result = output[0] if _reads_output(inputs[0], low_bit=inputs[-2]) else None
    ctx.save_for_backward(*inputs[:_TENSORS], result, output[1])
    ctx.save_for_forward(*inputs[:_TENSORS])


def _reads_output(query: Tensor, low_bit: str) -> bool:
    """Whether the backward needs the output; where it does not, the output may be changed in place before it."""
    return query.device.type != "cpu" or low_bit != "none"


def _autograd(ctx: Any, grad_output: Tensor | None, _grad_logsumexp: None) -> tuple:
    if grad_output is None:
        return (None,) * (_TENSORS + len(ctx.scalars))
    *inputs, output, logsumexp = ctx.saved_tensors
    query, key, value, proj_weight, proj_bias, _, _, alpha, _, _ = inputs
    grads = torch.ops.sla_compile.sparse_linear_attention_backward(
        grad_output, query, key, value, output, logsumexp, *inputs[3:], *ctx.scalars
    )
    differentiable = (query, key, value, proj_weight, proj_bias, alpha)
    *kept, of_alpha = (None if tensor is None else grad for tensor, grad in zip(differentiable, grads, strict=True))
    # The routers' choice is discrete: they learn in stage 1, outside of the op.
    return (*kept, None, None, of_alpha, *(None,) * (2 + len(ctx.scalars)))


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
    """The output's tangent: that of the operator written out in PyTorch operations, over the blocks of the forward."""
    query, key, value, proj_weight, proj_bias, router_q, router_k, alpha, mask, block_map = ctx.saved_tensors
    scale, sparsity, negligible, critical, first, last, feature_map, linear, block_q, block_k, low_bit, _ = ctx.scalars
    if low_bit != "none":
        raise NotImplementedError(
            f'low_bit="{low_bit}" has no forward-mode derivative; use low_bit=None, whose parameters are the same'
        )
    primals: list[Tensor | None] = [query, key, value, proj_weight, proj_bias, alpha]
    along = [*tangents[:5], tangents[7]]
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # the operator's own cast comes after this
        primals[:3] = tokens = autocast_tokens(query, key, value)
        along[:3] = [None if t is None else t.to(token.dtype) for t, token in zip(along[:3], tokens, strict=True)]
    along = [torch.zeros_like(p) if t is None and p is not None else t for t, p in zip(along, primals, strict=True)]

    def route_again(query: Tensor, key: Tensor, *given: Tensor | None) -> Tensor:
        router_q, router_k, mask, block_map = given
        routing = (sparsity, negligible, critical, (first, last), router_q, router_k)
        spec = Spec(scale, feature_map, linear, block_q, block_k)
        return _prepared(query, key, None, mask, block_map, spec, routing)["block_map"]

    def output(*inputs: Tensor) -> Tensor:
        rest = iter(inputs)
        query, key, value, weight, bias, alpha = (None if primal is None else next(rest) for primal in primals)
        arguments = (query, key, value, weight, bias, None, None, alpha, mask, block_map, *ctx.scalars)
        return decomposed.forward(*arguments, eager=True)[0]

    with torch.autocast(device_type, enabled=False):
        block_map = transforms.untransformed(route_again, *primals[:2], router_q, router_k, mask, block_map)
        present = [[tensor for tensor in tensors if tensor is not None] for tensors in (primals, along)]
        return torch.func.jvp(output, *map(tuple, present))[1], None


def _save_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    """The context of an operator without a derivative."""


sparse_linear_attention_op.register_autograd(_autograd, setup_context=_setup_context)
sparse_linear_attention_backward_op.register_autograd(transforms.second_derivative)


def autocast_tokens(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value in the autocast dtype of their device, as scaled_dot_product_attention takes them."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """The tokens run in the autocast dtype; the parameters keep their own, which torch's register_autocast would cast
    too. The backward, called inside an autocast region, computes as it does outside: its blocks are the forward's."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        tokens = autocast_tokens(query, key, value)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.sla_compile.sparse_linear_attention(*tokens, *rest)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device_type, enabled=False):
            return torch.ops.sla_compile.sparse_linear_attention_backward(*arguments)

    _LIBRARY.impl("sparse_linear_attention", forward, dispatch_key)
    _LIBRARY.impl("sparse_linear_attention_backward", backward, dispatch_key)


_LIBRARY = torch.library.Library("sla_compile", "FRAGMENT")
transforms.register(_LIBRARY, "sparse_linear_attention", _setup_context, _autograd, _jvp)
transforms.register(
    _LIBRARY,
    "sparse_linear_attention_backward",
    _save_nothing,
    transforms.second_derivative,
    transforms.second_derivative,
)
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
