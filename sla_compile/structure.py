"""Which modules own an attention, told from their structure alone, without running the model."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "n_head", "nheads", "num_query_heads", "num_q_heads")
_HEAD_DIM = ("head_dim", "dim_head", "dim_heads", "attention_head_dim", "head_size")
_INNER = ("inner_dim", "embed_dim", "all_head_size", "hidden_size", "dim", "hidden_dim", "d_model")
_QUERY = re.compile(r"^(to_)?(w?q|query|q_proj|query_proj|linear_q|wq)$")
_PACKED = re.compile(r"(^|_)(to_)?qkv(_|$)|^c_attn$|^in_proj$")
_JOINT = re.compile(r"^(add_[qkv]+_proj|to_added_q?kv|(txt|text|context|encoder)_.*(qkv|q_proj|attn).*)$")
_SECOND = re.compile(r"^(encoder_hidden_states|context|cond|memory|key|encoder_.*|cross_.*|kv|y)$")
_CROSS = re.compile(r"dense", re.IGNORECASE)
_ATTENTION = {"scaled_dot_product_attention", "dispatch_attention_fn"}
_OTHER_ATTENTION = {"softmax", "multi_head_attention_forward", "get_attention_scores", "flex_attention"}
_METADATA = {"shape", "ndim", "dtype", "device"}
_CONCATENATE = {"cat", "concat", "concatenate"}


@dataclass(frozen=True)
class Owner:
    """A module whose forward calls attention.

    Args:
        name: path in the model, empty for the model itself.
        head_dim: D, or None where the structure does not tell.
        second: name of the forward argument that carries a second sequence, if there is one.
        joint: both sequences attend together, so that a second sequence does not make it cross-attention.
        verdict: ``"self"``, ``"dense"`` (cross-attention, or nothing to redirect) or ``"unknown"``.
        why: what the verdict rests on.
    """

    name: str
    module: nn.Module
    head_dim: int | None
    second: str | None
    joint: bool
    verdict: str
    why: str


def find_owners(model: nn.Module) -> list[Owner]:
    """Every module that looks like an attention: a number of heads and projections to queries.

    A module that several parents share appears once, under its first name.
    """
    modules = dict(model.named_modules())
    return [
        _describe(name, module, [modules[ancestor] for ancestor in _ancestors(name)])
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or _heads(module) and _has_query_projection(module)
    ]


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
    return Owner(name, module, head_dim(module), second, joint, verdict, why)


def _verdict(
    name: str, module: nn.Module, ancestors: list[nn.Module], second: str | None, joint: bool
) -> tuple[str, str]:
    if getattr(module, "is_cross_attention", None) is True:
        return "dense", "cross-attention: is_cross_attention is set"
    processor = getattr(module, "processor", None)
    for text in (name, type(module).__name__, type(processor).__name__):
        if _CROSS.search(text):
            return "dense", f"cross-attention: named {text}"
    if isinstance(module, nn.MultiheadAttention):
        if ancestors and isinstance(ancestors[0], nn.TransformerEncoderLayer):
            return "dense", "nn.TransformerEncoderLayer may bypass its attention by a fused path"
        return "self", "decided per call: query, key and value are one tensor"
    caller = module if processor is None else processor
    calls = names_used(caller)
    if not calls & _ATTENTION and (processor is not None or calls & _OTHER_ATTENTION):
        return "dense", f"{type(caller).__name__} does not call scaled_dot_product_attention"
    if joint:
        return "self", "joint attention of two sequences"
    if second is None:
        return "self", "takes one sequence"
    if getattr(module, "is_cross_attention", None) is False:
        return "self", "is_cross_attention is not set"
    if concatenates(_attention_function(module), second):
        return "self", f"its queries contain {second}"
    answers = [_passes(ancestor, name, module, second) for ancestor in ancestors]
    passed = next((answer for answer in answers if answer is not None), None)
    if passed is None:
        return "unknown", f"its forward takes {second}, and the calling code does not tell whether it is given"
    return ("dense", f"cross-attention: its caller passes {second}") if passed else ("self", f"its caller passes no {second}")


def _heads(module: nn.Module) -> int | None:
    return next((module.__dict__[a] for a in _HEADS if isinstance(module.__dict__.get(a), int)), None)


def _has_query_projection(module: nn.Module) -> bool:
    return any(_QUERY.match(name) or _PACKED.search(name) for name, _ in module.named_children())


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
    for name, child in module.named_children():
        features = getattr(child, "out_features", None)
        if isinstance(features, int) and _PACKED.search(name) and features % (3 * heads) == 0:
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
        found = next((p for p in parameters if _SECOND.match(p)), None)
        if found:
            return found
    return None


def _attention_function(module: nn.Module) -> Any:
    """What computes the attention: the call of the owner's processor, or its own forward."""
    processor = getattr(module, "processor", None)
    return module.forward if processor is None else type(processor).__call__


def names_used(caller: Any, depth: int = 3) -> set[str]:
    """Names of functions and attributes in the code behind a call of `caller`, a module or any other callable.

    It follows what the code refers to by name: methods and callable attributes of `caller`, functions of its file.
    """
    used: set[str] = set()
    pending = [(caller, depth)]
    seen: set[int] = set()
    while pending:
        target, left = pending.pop()
        if id(target) in seen:
            continue
        seen.add(id(target))
        owner = target
        if not inspect.isroutine(target):
            target = getattr(type(target), "forward" if isinstance(target, nn.Module) else "__call__", None)
        function = inspect.unwrap(target) if callable(target) else None
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            continue
        names = set(_names(function.__code__))
        used |= names
        if left:
            for name in names:
                value = getattr(owner, name, None) if owner is not target else None
                value = function.__globals__.get(name) if value is None else value
                if callable(value) and not inspect.isclass(value):
                    pending.append((value, left - 1))
    return used


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def concatenates(function: Any, second: str) -> bool:
    """Whether the queries of `function` come from a concatenation with the argument `second`: joint attention."""
    source = _source(inspect.unwrap(function))
    if source is None:
        return False
    derived, joined = {second}, set()  # names computed from `second`, and from a concatenation with it
    for statement in _assignments(ast.parse(source)):
        value = statement.value
        for call in (node for node in ast.walk(value) if isinstance(node, ast.Call)):
            if _called(call) in _ATTENTION and call.args:
                return bool(_read(call.args[0]) & joined)
        read = _read(value)
        written = {node.id for target in _targets(statement) for node in ast.walk(target) if isinstance(node, ast.Name)}
        concatenated = any(
            _called(call) in _CONCATENATE and _read(call) & derived for call in ast.walk(value) if isinstance(call, ast.Call)
        )
        if read & derived:
            derived |= written
        if concatenated or read & joined:
            joined |= written
    return False


def _source(definition: object) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(definition))
    except (OSError, TypeError):  # built at run time, or shipped without source
        return None


def _passes(ancestor: nn.Module, attribute: str, module: nn.Module, second: str) -> bool | None:
    """Whether the ancestor's forward gives the child `second`; None where its source does not say."""
    source = _source(type(ancestor).forward)
    if source is None:
        return None
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    answers = {
        _call_passes(call, second, names)
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == attribute
    }
    return answers.pop() if len(answers) == 1 else None


def _call_passes(call: ast.Call, second: str, names: list[str]) -> bool | None:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    # A ** is taken not to carry it: at run time a call that does stays dense.
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    value = given.get(second)
    if value is None or isinstance(value, ast.Constant) and value.value is None:
        return False
    first = call.args[0] if call.args else given.get(names[0]) if names else None
    return not (first is not None and ast.dump(first) == ast.dump(value))


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def _assignments(tree: ast.AST) -> list[ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr]:
    """Statements with a value, in the order of the source."""
    kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.value is not None]
    return sorted(found, key=lambda node: node.lineno)


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, (ast.AnnAssign, ast.AugAssign)) else []


def _read(expression: ast.AST) -> set[str]:
    """Names whose values go into an expression; shapes and comparisons do not count."""
    if isinstance(expression, ast.Compare) or isinstance(expression, ast.Attribute) and expression.attr in _METADATA:
        return set()
    if isinstance(expression, ast.Call) and _called(expression) in ("size", "len"):
        return set()
    if isinstance(expression, ast.Name):
        return {expression.id}
    children = list(ast.iter_child_nodes(expression))
    if isinstance(expression, ast.IfExp):
        children.remove(expression.test)
    return set().union(*(_read(child) for child in children))
