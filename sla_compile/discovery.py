"""Which attentions a model really calls, from one run on fake tensors.

NOTE [Self-attention by provenance]
Equal lengths of queries and keys do not make a self-attention: 512 video tokens may attend to 512 text tokens. While
the run goes on, every tensor carries the labels of the arguments of the enclosing module call that it stems from. A
call is self-attention (or joint attention of several sequences) when query, key and value share a label and value has
none that query lacks; a cross-attention's values come from a second sequence that the queries have not seen. Scopes
are module calls, because after one block every token depends on everything the model was given.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)

SDPA = torch._C._nn.scaled_dot_product_attention  # what F has under that name, unless a library put a wrapper there

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention: its owner's path, its arguments (fake), whether it is self-attention, and what the owner's
    forward was given."""

    owner: str
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    enable_gqa: bool
    is_self: bool
    given: tuple[tuple, dict[str, Any]] = ((), {})


def discover(model: nn.Module, example_inputs: Any) -> list[AttentionCall]:
    """The attention calls of ``model(*example_inputs)`` (or ``**``, for a dict), in order.

    The run happens in evaluation mode on a copy whose parameters are fake, so it takes neither memory nor time of note
    and cannot touch what the model caches. A model that reads values (``.item()``) cannot run on fakes, and one that
    holds a lock or a generator cannot be copied; then the model itself runs once, without gradients.

    Raises:
        TypeError: example_inputs is neither a tuple nor a dict.
        ValueError: the model does not run with them.
    """
    return run_on_fakes(model, example_inputs, _observe)


Result = TypeVar("Result")


def run_on_fakes(
    model: nn.Module,
    example_inputs: Any,
    observe: Callable[[nn.Module, tuple, dict[str, Any]], Result],
    *,
    training: bool = False,
) -> Result:
    """``observe(copy, args, kwargs)`` on a copy of the model with fake tensors, as :func:`discover` says.

    Args:
        training: keep the modules' training mode, instead of evaluation mode.
    """
    args, kwargs = arguments(example_inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        try:
            copied = _copied(model, fakes)
            fake_args, fake_kwargs = tree_map_only(Tensor, fakes.from_tensor, (args, kwargs))
        except Exception as error:  # it holds a lock, a generator, an open file
            why = f"cannot be copied with fake tensors: {error}"
        else:
            try:
                with uncompiled():
                    return observe(copied if training else copied.eval(), fake_args, fake_kwargs)
            except _NEEDS_VALUES as error:
                why = f"reads tensor values in its forward: {error}"
            except Exception as error:
                raise ValueError(f"the model does not run with these example_inputs: {error}") from error
    logger.info("%s %s; running the model itself", type(model).__name__, why)
    if any(t.is_meta for t in (*model.parameters(), *tree_leaves((args, kwargs))) if isinstance(t, Tensor)):
        raise ValueError(
            f"meta tensors hold no values to run the model itself with, as must be because it {why}\n"
            "accelerate it without example_inputs (include= and exclude= choose), or after its weights are loaded"
        )
    was_training = {module: module.training for module in model.modules()}
    try:
        with uncompiled():
            return observe(model if training else model.eval(), args, kwargs)
    except Exception as error:
        raise ValueError(f"the model does not run with these example_inputs: {error}") from error
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def uncompiled() -> Iterator[None]:
    """Blocks of a model that are compiled one by one run as they are."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a forward."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tuple of positional or a dict of keyword arguments of the model's forward, got "
        f"{type(example_inputs).__name__}"
    )


def _copied(model: nn.Module, fakes: FakeTensorMode) -> nn.Module:
    """A copy with fake tensors and without diffusers' hooks (caches, offloading), which would run the original's blocks
    and leave fake tensors in its caches: they hold functions that are not copied."""
    memo: dict[int, Any] = {id(tensor): _fake(fakes, tensor) for tensor in model.parameters()}
    hooked = {
        name: module
        for name, module in model.named_modules()
        if getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()) and "forward" in module.__dict__
    }
    for module in hooked.values():
        left_out = (module.__dict__["_diffusers_hook"], module.__dict__["forward"])
        memo |= {id(each): "left out" for each in left_out}
    with _FakeCopies(fakes):
        copied = copy.deepcopy(model, memo)
        for name, module in hooked.items():
            registry, bare = module.__dict__["_diffusers_hook"], copied.get_submodule(name)
            innermost = registry._fn_refs[0]
            bare.__dict__["forward"] = copy.deepcopy(innermost.original_forward or innermost.forward, memo)
            del bare.__dict__["_diffusers_hook"]
            for hook in registry.hooks.values():
                if hasattr(hook, "compute_dtype"):  # layerwise casting, to which the storage is no dtype to compute in
                    bare.to(hook.compute_dtype)
    return copied


class _FakeCopies(TorchFunctionMode):
    """Makes deepcopy give fakes for tensors, wherever a model keeps them: in buffers, tables, helper objects."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = fake = _fake(self.fakes, tensor)
        return fake


def _fake(fakes: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = fakes.from_tensor(tensor.detach())
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _observe(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[AttentionCall]:
    with torch.no_grad(), _Observer() as observer, _scopes(model, observer):
        model(*args, **kwargs)
    return observer.calls


@contextmanager
def _scopes(model: nn.Module, observer: _Observer) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if module is not model and not _has_weights(module):
            continue  # a helper without parameters acts for its caller
        handles.append(module.register_forward_pre_hook(observer.enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(observer.leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_weights(module: nn.Module) -> bool:
    """Whether it has parameters, or weights that torch.ao packed, which are none."""
    packed = (name.endswith("_packed_params") for name, _ in module.named_modules())
    return next(module.parameters(), None) is not None or any(packed)


class _Observer(TorchFunctionMode):
    """Carries labels from arguments to results and notes every call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self.labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.scopes: list[tuple[str, int, tuple[tuple, dict[str, Any]]]] = []
        self.entered = 0

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.entered += 1
            self.scopes.append((name, self.entered, (args, kwargs)))
            for index, tensor in enumerate(tree_leaves((args, kwargs))):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    self.add(tensor, {(self.entered, index)})

        return hook

    def leave(self, *_: Any) -> None:
        self.scopes.pop()

    def add(self, tensor: Tensor, labels: set[tuple[int, int]]) -> None:
        self.labels[tensor] = self.labels.get(tensor, frozenset()) | labels

    def local(self, tensor: Tensor) -> set[tuple[int, int]]:
        """The labels of `tensor` that belong to the innermost module call."""
        scope = self.scopes[-1][1]
        return {label for label in self.labels.get(tensor, ()) if label[0] == scope}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.note(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self.note_multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        labels: set[tuple[int, int]] = set()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                labels |= self.labels.get(tensor, frozenset())
        if labels:
            name = getattr(func, "__name__", "")
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            written = [args[0]] if in_place and args else []
            for tensor in (*tree_leaves(result), *written, *[t._base for t in written if isinstance(t, Tensor)]):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    self.add(tensor, labels)
        return result

    def note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        query_from, key_from, value_from = (self.local(t) for t in (query, key, value))
        is_self = bool(query_from & key_from & value_from) and value_from <= query_from
        owner, _, given = self.scopes[-1]
        self.calls.append(
            AttentionCall(owner, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, is_self, given)
        )

    def note_multi_head(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *_: Any, **kwargs: Any
    ):
        def split(tokens: Tensor) -> Tensor:
            length, batch = tokens.shape[0], tokens.shape[1] if tokens.dim() == 3 else 1
            return tokens.new_empty(batch, heads, length, width // heads)

        with torch._C.DisableTorchFunction():
            tensors = (split(query), split(key), split(value))
        plain = query is key and key is value and not kwargs.get("need_weights", True)
        mask = kwargs.get("attn_mask")
        owner, _number, given = self.scopes[-1]
        self.calls.append(
            AttentionCall(owner, *tensors, mask, 0.0, kwargs.get("is_causal", False), False, plain, given)
        )
