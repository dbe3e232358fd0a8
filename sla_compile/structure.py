"""Which modules own an attention, told from their structure alone, without running the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sla_compile.source import ATTENTION, calls_attention, concatenates, names_used, passes, takes_apart

_HEADS = tuple(
    "heads num_heads n_heads num_attention_heads n_head nheads heads_num num_query_heads num_q_heads".split()
)
_HEAD_DIM = ("head_dim", "dim_head", "dim_heads", "attention_head_dim", "head_size")
_INNER = ("inner_dim", "embed_dim", "all_head_size", "hidden_size", "dim", "hidden_dim", "d_model")
_QUERY = re.compile(r"^(to_)?(w?q|query|q_proj|query_proj|linear_q|wq)$")
_PACKED = re.compile(r"(^|_)(to_)?qkv(_|$)|^c_attn$|^in_proj$")
_JOINT = re.compile(r"^(add_[qkv]+_proj|to_added_q?kv|(txt|text|context|encoder)_.*(qkv|q_proj|attn).*)$")
_SECOND = re.compile(
    r"^(encoder_.*|context.*|cond(ition.*)?|memory|k|keys?|key_value.*|cross_.*|x?_?kv|y|text.*|txt.*)$"
)
_NO_SEQUENCE = re.compile(r"mask|emb|rope|rotary|freq|pos|cache|len|ids|scale|shape|size|kwargs")
_INDIRECT = {"getattr", "children", "named_children", "modules", "named_modules", "get_submodule", "_modules"}
_CROSS = re.compile(r"cross", re.IGNORECASE)
BYPASSED = (
    "nn.TransformerEncoderLayer may bypass its attention by a fused path; call "
    "torch.backends.mha.set_fastpath_enabled(False) before accelerate, and wherever the model runs"
)
_OTHER_ATTENTION = re.compile(
    r"^(softmax|multi_head_attention_forward|get_attention_scores|flex_attention|memory_efficient_attention"
    r"|_?(flash|sage)_?att(n|ention)\w*)$"
)


@dataclass(frozen=True)
class Owner:
    """A module whose forward calls attention.

    Args:
        name: path in the model, empty for the model itself.
        head_dim: D, or None where the structure does not tell.
        heads: H, as the module declares it, or None.
        second: name of the forward argument that carries a second sequence, if there is one.
        joint: both sequences attend together, so that a second sequence does not make it cross-attention.
        verdict: ``"self"``, ``"dense"`` (cross-attention, or nothing to redirect) or ``"unknown"``.
        why: what the verdict rests on.
    """

    name: str
    module: nn.Module
    head_dim: int | None
    heads: int | None
    second: str | None
    joint: bool
    verdict: str
    why: str


def find_owners(model: nn.Module) -> list[Owner]:
    """Every module that looks like an attention, by a number of heads and projections to queries, or whose forward
    calls scaled_dot_product_attention itself, as that of a block does which takes an attention's projections apart.

    A module that several parents share appears once, under its first name.
    """
    modules = dict(model.named_modules())
    owners = []
    for name, module in modules.items():
        ancestors = [modules[ancestor] for ancestor in _ancestors(name)]
        # An attention may leave the call to a child that is given query, key and value.
        if _looks_like_attention(module) or (
            calls_attention(module) and not any(map(_looks_like_attention, ancestors))
        ):
            owners.append(_describe(name, module, ancestors))
    return owners


def _ancestors(name: str) -> list[str]:
    """Paths above `name`, nearest first, ending with the model's own empty one."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)] if name else []


def _describe(name: str, module: nn.Module, ancestors: list[nn.Module]) -> Owner:
    second = second_sequence(module)
    joint = getattr(module, "is_cross_attention", None) is not True and (
        any(_JOINT.match(child) and layer is not None for child, layer in module.named_children())
        or isinstance(getattr(module, "added_kv_proj_dim", None), int)
    )
    verdict, why = _verdict(name.rpartition(".")[2], module, ancestors, second, joint)
    declaring = [module, *(part for part in module.modules() if _looks_like_attention(part))]
    return Owner(name, module, _common(head_dim, declaring), _common(_heads, declaring), second, joint, verdict, why)


def _common(read: Callable[[nn.Module], int | None], modules: Sequence[nn.Module]) -> int | None:
    """What the first module declares or, where it does not, all others that do: a block attends with the projections of
    its attentions."""
    first, *rest = map(read, modules)
    declared = {value for value in rest if value is not None} if first is None else {first}
    return declared.pop() if len(declared) == 1 else None


def _verdict(
    name: str, module: nn.Module, ancestors: list[nn.Module], second: str | None, joint: bool
) -> tuple[str, str]:
    if getattr(module, "is_cross_attention", None) is True:
        return "dense", "cross-attention: is_cross_attention is set"
    processor = getattr(module, "processor", None)
    if processor is None and ancestors and _is_taken_apart(name, ancestors[0]):
        return "dense", f"{type(ancestors[0]).__name__} calls parts of it, not it"
    # A class named so may serve self-attention too, where its second sequence is optional.
    for text in (name, type(processor).__name__, *[type(module).__name__] * (second is None)):
        if _CROSS.search(text):
            return "dense", f"cross-attention: named {text}"
    if isinstance(module, nn.MultiheadAttention):
        if (
            ancestors
            and isinstance(ancestors[0], nn.TransformerEncoderLayer)
            and torch.backends.mha.get_fastpath_enabled()
        ):
            return "dense", BYPASSED
        return "self", "decided per call: query, key and value are one tensor"
    caller = module if processor is None else processor
    calls = names_used(caller)
    others = ", ".join(sorted(filter(_OTHER_ATTENTION.match, calls)))
    if not calls & ATTENTION and (processor is not None or others):
        why = f"{type(caller).__name__} does not call scaled_dot_product_attention"
        if processor is None:  # models of transformers take it from a table, and name what they write out
            why += f" by name but {others}; let it call that, or pass example_inputs where it does, from a table"
        return "dense", why
    if joint:
        return "self", "joint attention of two sequences"
    if second is None:
        return "self", "takes one sequence"
    if getattr(module, "is_cross_attention", None) is False:
        return "self", "is_cross_attention is not set"
    if concatenates(_attention_function(module), second):
        return "self", f"its queries contain {second}"
    answers = (passes(ancestor, name, module, second) for ancestor in ancestors)
    passed = next((answer for answer in answers if answer is not None), None)
    if passed is None:
        if ancestors and _never_called(name, ancestors[0]):
            return "dense", f"{type(ancestors[0]).__name__} does not call it"
        return "unknown", f"its forward takes {second}, and the calling code does not tell whether it is given"
    return (
        ("dense", f"cross-attention: its caller passes {second}")
        if passed
        else ("self", f"its caller passes no {second}")
    )


def _never_called(name: str, parent: nn.Module) -> bool:
    """Whether the parent's code never mentions the child `name`: one of its base class that it does without."""
    return not _is_reached_indirectly(name, parent) and name not in names_used(parent)


def _is_taken_apart(name: str, parent: nn.Module) -> bool:
    return not _is_reached_indirectly(name, parent) and takes_apart(parent, name)


def _is_reached_indirectly(name: str, parent: nn.Module) -> bool:
    return name.isdigit() or bool(names_used(parent, 0) & _INDIRECT)


def _heads(module: nn.Module) -> int | None:
    return next((module.__dict__[a] for a in _HEADS if isinstance(module.__dict__.get(a), int)), None)


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    children = (name for name, _ in module.named_children())
    return bool(_heads(module)) and any(_QUERY.match(name) or _PACKED.search(name) for name in children)


def head_dim(module: nn.Module) -> int | None:
    """The head dimension D as the module declares it, or as its projections imply."""
    heads = _heads(module)
    for attribute in _HEAD_DIM:
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    if not heads:
        return None
    for name, child in module.named_children():
        features = getattr(child, "out_features", None)
        if isinstance(features, int) and _QUERY.match(name) and features % heads == 0:
            return features // heads
    for attribute in _INNER:
        width = getattr(module, attribute, None)
        if isinstance(width, int) and width % heads == 0:
            return width // heads
    for path, part in module.named_modules():  # of a block that attends itself, the projection may be in a child
        features = getattr(part, "out_features", None)
        if isinstance(features, int) and _PACKED.search(path.rpartition(".")[2]) and features % (3 * heads) == 0:
            return features // (3 * heads)
    return None


def second_sequence(module: nn.Module) -> str | None:
    """The argument of the forward (or of the attention processor behind it) that may carry a second sequence."""
    for function in (_attention_function(module), module.forward):
        try:
            parameters = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            continue
        # self, attn and the first sequence are positional; a second one has a telling name.
        found = next((p for p in parameters if _SECOND.match(p) and not _NO_SEQUENCE.search(p)), None)
        if found:
            return found
    return None


def _attention_function(module: nn.Module) -> Any:
    """What computes the attention: the call of the owner's processor, or its own forward."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return module.forward
    return processor if inspect.isroutine(processor) else type(processor).__call__
