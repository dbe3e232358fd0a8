"""The operators under torch.func and forward-mode differentiation.

``torch.library.register_autograd`` makes an autograd.Function that torch.func does not take; under ``torch.func.jvp``,
and for dual tensors under ``torch.no_grad``, the operator would count as a constant: a wrong derivative without a word.
So while a transform is active the operators run as autograd.Functions that know of transforms: ``grad``, ``vjp``,
``vmap`` and ``jvp``. Outside of transforms dual tensors are refused, and second derivatives are anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

_DENSE = (
    "compute it inside `with sla_compile.dense(model):`, where PyTorch's own attention needs the backend "
    "torch.nn.attention.SDPBackend.MATH for it"
)


def register(
    library: torch.library.Library,
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
) -> None:
    """Lets torch.func take the operator ``sla_compile::<name>``, which has several outputs.

    Args:
        setup_context, backward: as ``torch.library.register_autograd`` takes them.
        jvp: as that of an autograd.Function.
    """
    operator = getattr(torch.ops.sla_compile, name)

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return operator(*arguments)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        samples = [
            operator(*(a if dim is None else a.select(dim, index) for a, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(output) for output in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    methods: dict[str, Callable[..., Any]] = dict(
        forward=forward, setup_context=setup_context, backward=backward, vmap=vmap, jvp=jvp
    )
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(body) for key, body in methods.items()})
    library.impl(name, lambda *arguments: function.apply(*arguments), "FuncTorchDynamicLayerFrontMode")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError where a tensor is dual: no operator's kernel carries tangents on."""
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "sparse_linear_attention has no forward-mode derivative of dual tensors; call torch.func.jvp"
        )


def untransformed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """The function of what the tensors wrap, outside of all transforms: it has memory, which kernels can read.

    Raises:
        NotImplementedError: torch.func.vmap maps over one of them.
    """
    with temporarily_clear_interpreter_stack():
        return function(*map(_unwrapped, tensors))


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    while tensor is not None and is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            raise NotImplementedError(
                "sparse_linear_attention has no torch.func.vmap over torch.func.jvp; loop over it"
            )
        tensor = get_unwrapped(tensor)
    return tensor


def second_derivative(ctx: Any, *grads: Tensor | None) -> Any:
    """The backward and the jvp of the backward operators."""
    raise NotImplementedError(f"sparse_linear_attention has no second derivative: {_DENSE}")
