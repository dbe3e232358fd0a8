"""Redirecting an owner's calls of scaled_dot_product_attention to its SparseLinearAttention, by a change of class.

NOTE [Redirect by class]
The owner keeps its identity, name, parameters and place in the model; only its class becomes a subclass whose forward
enters a TorchFunctionMode, as FSDP2's ``fully_shard`` changes classes in place. Dynamo traces the mode away, so eager,
compiled and exported models compute the same, and one compiled artefact serves all blocks of a class, each with its
own parameters. There is one subclass per class, because a class per instance would be a graph per block.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla_compile.array_operators import OPERATORS
from sla_compile.discovery import SDPA
from sla_compile.functional import why_alpha_does_not_fit
from sla_compile.module import SparseLinearAttention
from sla_compile.passes.eligibility import from_written_out, is_key_padding_mask, why_dense
from sla_compile.passes.sites import Call

CHILD = "sla"  # the name under which an owner holds its SparseLinearAttention
_NATIVE_BACKEND = "native"  # diffusers' name for scaled_dot_product_attention


@dataclass
class Redirection:
    """How the calls of one owner are treated; what they were is noted when the model runs eagerly.

    Args:
        name: the owner's path in the model.
        second: name and position of the forward argument that makes a call cross-attention, or None.
        nested: another redirected owner encloses this one.
        multi_head: the owner is an nn.MultiheadAttention.
        dense_reason: the owner is only shielded from an enclosing one; its calls stay dense.
        seen: the calls of the last eager forward, in order.
        observer: called inside sla_compile.dense with the reason why the call would stay dense outside, or None, and
            its query, key, value, mask and scale; set while sla_compile.calibrate collects them.
    """

    name: str
    second: tuple[str, int | None] | None = None
    nested: bool = False
    multi_head: bool = False
    dense_reason: str | None = None
    seen: tuple[Call, ...] = ()
    observer: Callable[..., None] | None = None


class _AttentionMode(TorchFunctionMode):
    """Sends scaled_dot_product_attention to the owner's parameters; everything else passes."""

    def __init__(
        self, sla: SparseLinearAttention | None, redirection: Redirection, second: tuple | None, calls: list[Any]
    ) -> None:
        super().__init__()
        self.sla = sla
        self.redirection = redirection
        self.second = second
        self.calls = calls
        self.noted: tuple[Call, ...] = ()
        self.trains = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.calls.append(func)
            return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and self.redirection.multi_head:
            self.calls.append(func)
            return multi_head_attention(self, *args, **kwargs)
        return _pass(func, args, kwargs)

    def note(self, query: tuple[int, ...], keys: int, reason: str | None) -> None:
        """Keeps an eager call for the report."""
        self.noted = self.redirection.seen = (*self.noted, Call(query, keys, reason))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        sla = self.sla
        if sla is None:
            reason = self.redirection.dense_reason
        elif sla.dense and self.redirection.observer is None:
            reason = "inside sla_compile.dense"
        elif self.second is not None and not _is_joint(query, *self.second):
            reason = "cross-attention: a second sequence was passed"
        else:
            reason = why_dense(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, sla.config)
        if reason is None and self.trains and not torch.compiler.is_compiling() and _has_own_backward():
            reason = "inside a checkpoint or autograd.Function of its owner's forward, whose backward sees no redirect"
            self.calls.clear()  # for a warning
        valid = None
        if reason is None and attn_mask is not None and not is_key_padding_mask(attn_mask, query):
            # A name that Dynamo reads is one that it compiles each block for.
            site = "an attention" if torch.compiler.is_compiling() else self.redirection.name or "the model"
            attn_mask, valid = from_written_out(attn_mask, query, site)
        if sla is not None and sla.dense and self.redirection.observer is not None:
            self.redirection.observer(reason, query, key, value, attn_mask, scale)
            reason = "inside sla_compile.dense"
        if not (torch.compiler.is_compiling() or (sla is not None and sla.dense)):
            self.note(tuple(query.shape), key.shape[-2], reason)
        if sla is not None and reason is None:
            _check_head_dim(sla, query, self.redirection)
            if sla.alpha_logit is not None:
                _check_alpha(sla, sla.alpha_logit, query, self.redirection)
            output = sla(query, key, value, attn_mask, scale, enable_gqa)
            return output if valid is None else output.masked_fill(~valid, 0)
        # Under a redirected ancestor the function would be caught again by the ancestor's mode; the operator is not.
        dense: Any = torch.ops.aten.scaled_dot_product_attention if self.redirection.nested else SDPA
        return dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _has_own_backward() -> bool:
    """Whether a torch.utils.checkpoint or autograd.Function stands between the owner's forward and this call. Its
    backward would compute dense attention anew, and with that gradients of something else; Dynamo, too, captures it
    dense."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not run_redirected.__code__:
        if frame.f_globals.get("__name__") in ("torch.utils.checkpoint", "torch.autograd.function"):
            return True
        frame = frame.f_back
    return False


def _check_head_dim(sla: SparseLinearAttention, query: Tensor, redirection: Redirection) -> None:
    if query.shape[-1] != sla.head_dim and (sla.config.has_projection or sla.config.has_alpha):
        raise ValueError(
            f"{redirection.name or 'the model'}: its parameters are for head dimension {sla.head_dim}, as declared or "
            f"seen when it was accelerated, but it attends with {query.shape[-1]}; pass example_inputs to accelerate, "
            "or exclude it"
        )


def _check_alpha(sla: SparseLinearAttention, logit: Tensor, query: Tensor, redirection: Redirection) -> None:
    problem = why_alpha_does_not_fit(logit, query if query.dim() == 4 else query.unsqueeze(1), sla.config)
    if problem:
        raise ValueError(f"{redirection.name or 'the model'}: {problem}")


class _NoRedirect(TorchFunctionMode):
    """Does nothing. Entered once around a compiled model: see NOTE [Checkpoints need a mode outside]."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _pass(func, args, kwargs or {})


def _pass(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is torch.Tensor.unflatten:  # Dynamo cannot trace the method, which calls super(), under a mode
        return torch.unflatten(*args, **kwargs)
    if args and type(args[0]).__name__ == "ndarray" and func.__name__ in OPERATORS:
        return OPERATORS[func.__name__](*args)  # NOTE [Arrays under a mode]
    return func(*args, **kwargs)


def multi_head_attention(
    mode: _AttentionMode,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """F.multi_head_attention_forward over (L, B, E) tensors.

    It is one opaque function to a mode and hides its attention: written out here where it is plain self-attention.
    """
    plain = (
        query is key
        and key is value
        and query.dim() == 3
        and in_proj_weight is not None
        and bias_k is None
        and bias_v is None
        and not add_zero_attn
        and not need_weights
        and attn_mask is None
        and not options.get("is_causal", False)
    )
    if not plain or in_proj_weight is None or mode.sla is None:
        if mode.sla is not None and not torch.compiler.is_compiling():
            reason = "nn.MultiheadAttention wants weights, has a mask, or attends to another sequence"
            shape = (*query.shape[1:-1], num_heads, query.shape[0], embed_dim // num_heads)
            mode.note(shape, key.shape[0], reason)
        return F.multi_head_attention_forward(
            query, key, value, embed_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
            dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask, **options,
        )  # fmt: skip
    length, batch, _ = query.shape
    packed = F.linear(query, in_proj_weight, in_proj_bias).view(length, batch, 3, num_heads, embed_dim // num_heads)
    heads = packed.permute(2, 1, 3, 0, 4)
    mask = None
    if key_padding_mask is not None:  # True means ignored there
        mask = key_padding_mask if key_padding_mask.is_floating_point() else ~key_padding_mask
        mask = mask[:, None, None, :]
    output = mode.attention(heads[0], heads[1], heads[2], mask, dropout_p if training else 0.0)
    return F.linear(output.permute(2, 0, 1, 3).reshape(length, batch, embed_dim), out_proj_weight, out_proj_bias), None


def run_redirected(owner: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `forward` with the owner's attention redirected."""
    redirection = getattr(owner, "_sla_redirection", None)
    if redirection is None:  # made anew, by type(owner)(...)
        return forward(*args, **kwargs)
    sla = owner._modules.get(CHILD)
    if sla is not None:
        _check_context_parallel(owner, redirection, sla)
    calls: list[Any] = []  # not an attribute of the mode: Dynamo does not follow writes to that
    with _AttentionMode(sla, redirection, _second_given(redirection.second, args, kwargs), calls):
        output = forward(*args, **kwargs)
    if not calls and redirection.dense_reason is None:
        _warn_unseen(redirection.name)
    return output


def second_attended(second: tuple[str, int | None] | None, query: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a call with this query in the owner's ``forward(*args, **kwargs)`` is taken for cross-attention."""
    given = _second_given(second, args, kwargs)
    return given is not None and not _is_joint(query, *given)


def _second_given(second: tuple[str, int | None] | None, args: tuple, kwargs: dict) -> tuple[Any, Any] | None:
    """The first and second sequence of a call of the owner's forward, where a second one is passed."""
    if second is None:
        return None
    name, position = second
    given = kwargs.get(name)
    if given is None and position is not None and len(args) > position:
        given = args[position]
    first = args[0] if args else next((value for key, value in kwargs.items() if key != name), None)
    return None if given is None or given is first else (first, given)


def _is_joint(query: Tensor, first: Any, second: Any) -> bool:
    """Whether the query holds the tokens of both (B, L, C) sequences: they were concatenated to attend jointly."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() == second.dim() == 3):
        return False
    return query.shape[-2] == first.shape[-2] + second.shape[-2]


def _warn_unseen(name: str) -> None:
    """Runs while Dynamo traces, too (see `attach`). The name becomes a guard: read only where something is wrong."""
    warnings.warn(
        f"sla_compile: {name or 'the model'} ran without calling scaled_dot_product_attention, so it computed dense "
        "attention or none (another attention backend, a cached result, or a checkpoint inside its own forward); use "
        "the native attention backend there, or exclude it from accelerate",
        stacklevel=2,
    )


def _check_context_parallel(owner: nn.Module, redirection: Redirection, sla: SparseLinearAttention) -> None:
    parallel = getattr(getattr(owner, "processor", None), "_parallel_config", None)
    if parallel is None:
        return
    context = getattr(parallel, "context_parallel_config", parallel)
    if (getattr(context, "ring_degree", 1) or 1) > 1:
        raise NotImplementedError(
            f"{redirection.name}: ring attention splits the keys of one query over devices, and block routing needs "
            "all of them; use Ulysses context parallelism (ring_degree=1), or sla_compile.restore(model)"
        )
    if sla.alpha_logit is not None:
        raise NotImplementedError(
            f"{redirection.name}: under context parallelism a device computes some of the heads, and SLA2's alpha is "
            'for all of them; use method="sla", or sla_compile.restore(model)'
        )
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in sla.parameters()):
        raise NotImplementedError(
            f"{redirection.name}: under Ulysses context parallelism the projection would get no gradient; run under "
            "torch.no_grad(), freeze sla_compile.parameters(model), or train without context parallelism"
        )


@functools.cache
def redirected_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward redirects attention.

    It looks the base's forward up in every call: other libraries put their own there (TeaCache does).
    """

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, cls):  # restored, while somebody kept this bound
            return base.forward(self, *args, **kwargs)
        return run_redirected(self, super(cls, self).forward, *args, **kwargs)

    cls: Any = _subclass(base, forward, redirected_class)
    return cls


@functools.cache
def root_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` for the accelerated model itself.

    NOTE [Checkpoints need a mode outside]
    Dynamo refuses a mode that is first entered inside a compiled activation checkpoint, as an unsafe side effect; one
    that was entered outside before makes it none. So a mode that does nothing surrounds the model while it is traced
    for training. For inference it is left at once, which serves checkpoints up to the first graph break: Dynamo
    mistakes values after a break inside of a mode (Mochi has one).
    """

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, cls):
            return base.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            with _NoRedirect():
                if torch.is_grad_enabled():
                    return super(cls, self).forward(*args, **kwargs)
        return super(cls, self).forward(*args, **kwargs)

    cls: Any = _subclass(base, forward, root_class)
    return cls


class _Quiet:
    """Keeps our subclass from a base that registers its subclasses, which would refuse or keep a second of a name."""

    def __init_subclass__(cls) -> None:
        """Does not go on to the base's."""


def _subclass(base: type[nn.Module], forward: Any, factory: Any) -> type[nn.Module]:
    """A subclass that passes for its base: same names (save_pretrained writes them), picklable by rebuilding."""

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        function, args, *rest = super(cls, self).__reduce_ex__(max(protocol, 2))
        if args and args[0] is cls:  # an ordinary instance: made by cls.__new__, then given its state
            return (_new_instance, (factory, base), *rest)
        return (function, args, *rest)

    cls: Any = type(base)(  # type: ignore[misc]
        base.__name__,
        (_Quiet, base),
        {
            "forward": forward,
            "__reduce_ex__": reduce_ex,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_sla_base": base,
        },
    )
    return cls


def _new_instance(factory: Any, base: type[nn.Module]) -> nn.Module:
    cls = factory(base)
    return cls.__new__(cls)


def attach(owner: Any, redirection: Redirection, sla: SparseLinearAttention | None) -> None:
    """Redirects the owner's attention to `sla`, or with None shields it from a redirected ancestor."""
    torch.compiler.assume_constant_result(_warn_unseen)  # not where it is defined: this imports Dynamo, and so Triton
    base: Any = type(owner)
    owner.__class__ = redirected_class(base)  # first: where a metaclass refuses it, nothing has changed
    owner._sla_redirection = redirection
    if sla is not None:
        owner.add_module(CHILD, sla)
    _follow_instance_forward(owner, base.forward)
    if sla is not None:
        _pin_attention_backend(owner)


def _pin_attention_backend(owner: Any) -> None:
    """Makes a diffusers processor call scaled_dot_product_attention, whatever backend is active in the process."""
    processor: Any = getattr(owner, "processor", None)
    if hasattr(processor, "_attention_backend"):
        backend = processor._attention_backend
        if getattr(backend, "value", backend) != _NATIVE_BACKEND:  # also None, which follows the process
            owner._sla_backend = backend
            processor._attention_backend = _NATIVE_BACKEND


def attach_root(model: Any) -> None:
    """Makes the model the root of an acceleration, unless it is redirected itself."""
    base: Any = type(model)
    if not is_changed(model):
        model.__class__ = root_class(base)
        _follow_instance_forward(model, base.forward, wrap=False)


def detach(module: Any) -> None:
    """Undoes :func:`attach` or :func:`attach_root`."""
    cls: Any = type(module)
    module.__class__ = cls._sla_base
    state = module.__dict__
    _rebind(module, cls.forward, cls._sla_base.forward)
    if "_sla_forward" in state:
        state["forward"] = state.pop("_sla_forward")
    if "_sla_backend" in state:
        module.processor._attention_backend = state.pop("_sla_backend")
    state.pop("_sla_redirection", None)
    module._modules.pop(CHILD, None)


def is_ours(cls: type) -> bool:
    """Whether :func:`attach` or :func:`attach_root` gives modules this class."""
    return "_sla_base" in cls.__dict__


def is_changed(module: nn.Module) -> bool:
    """Whether the module's class is one of ours, or was made of one."""
    return any(map(is_ours, type(module).__mro__))


def _follow_instance_forward(module: nn.Module, base_forward: Any, wrap: bool = True) -> None:
    """Reaches behind a forward in the instance's dict (hooks of accelerate, caches), which would bypass the class.

    Such a forward usually keeps the class's own as a bound method: that one is bound anew, so that the redirect
    survives the hook's removal. Where there is none, the instance's forward itself is wrapped.
    """
    state = module.__dict__
    if "forward" in state and not _rebind(module, base_forward, type(module).forward) and wrap:
        state["_sla_forward"] = state["forward"]
        state["forward"] = functools.partial(run_redirected, module, state["forward"])


def _rebind(module: nn.Module, old: Any, new: Any) -> bool:
    """Replaces `old` by `new` wherever it is kept bound to the module: beside its forward, or in diffusers' hooks."""
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    places: list[Any] = [module.__dict__, *map(vars, hooks)]
    found = False
    for place in places:
        for name, value in list(place.items()):
            if isinstance(value, types.MethodType) and value.__func__ is old and value.__self__ is module:
                place[name] = types.MethodType(new, module)
                found = True
    return found
