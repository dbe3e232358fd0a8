"""What the source of a model's forwards tells about its attentions, without running them."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

ATTENTION = {"scaled_dot_product_attention", "dispatch_attention_fn"}
_CONCATENATE = {"cat", "concat", "concatenate"}
_CALLS = {"forward", "__call__"}
_METADATA = {"shape", "ndim", "dtype", "device"}


def names_used(caller: Any, followed: int = 3) -> set[str]:
    """Names of functions and attributes in the code behind a call of `caller`, a module or any other callable.

    It follows what the code refers to by name, so many calls deep: methods and callable attributes of `caller`,
    functions of its file. A function that goes by another name there counts by its own, too.
    """
    used: set[str] = set()
    pending = [(caller, caller, followed)]  # what is called, the object that its `self` is, calls left to follow
    seen: set[tuple[int, int]] = set()
    while pending:
        target, owner, left = pending.pop()
        function = _function(target)
        if function is None or (id(function), id(owner)) in seen:
            continue
        seen.add((id(function), id(owner)))
        names = set(_names(function.__code__))
        used |= names
        for name in names if left else ():
            value = _member(owner, name)
            if value is None:
                value = function.__globals__.get(name)
            if callable(value) and not inspect.isclass(value):
                used.add(getattr(value, "__name__", name))
                pending.append((value, owner if inspect.isroutine(value) else value, left - 1))
            if "super" in names:
                pending.append((_inherited(owner, name, function), owner, left - 1))
    return used


def _member(owner: Any, name: str) -> Any:
    """An attribute of an object, without running the code of a property."""
    state = getattr(owner, "__dict__", {})
    found = (place[name] for place in (state, state.get("_modules", {})) if name in place)
    return next(found, getattr(type(owner), name, None))


def _inherited(owner: Any, name: str, function: types.FunctionType) -> Any:
    """What ``super().name`` is in a method of `owner`."""
    bases = iter(type(owner).__mro__)
    for base in bases:
        if _function(vars(base).get(function.__name__)) is function:
            return next((getattr(above, name) for above in bases if name in vars(above)), None)
    return None


def calls_attention(module: nn.Module, followed: int = 3) -> bool:
    """Whether the forward of `module` itself calls attention: in its own code, or in that of its methods and of
    functions that they call by name, so many calls deep. What its children do does not count."""
    pending = [(_function(module), followed)]
    seen: set[types.FunctionType] = set()
    while pending:
        function, left = pending.pop()
        if function is None or function in seen or str(function.__module__).startswith("torch."):
            continue
        seen.add(function)
        for call in _calls(_tree(function)):
            value = _callee(call, function, module)
            if _called(call) in ATTENTION or getattr(value, "__name__", "") in ATTENTION:
                return True
            if left and inspect.isroutine(value):
                pending.append((_function(value), left - 1))
    return False


def _callee(call: ast.Call, function: types.FunctionType, module: Any) -> Any:
    """What a call in the code of `function` reaches by a global name, as `file.name` or as a method of `module`."""
    called = call.func
    if isinstance(called, ast.Name):
        return function.__globals__.get(called.id)
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Call) and _called(called.value) == "super":
        return _inherited(module, called.attr, function)
    if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
        return None
    if called.value.id in function.__code__.co_varnames[:1]:  # self
        return _member(module, called.attr)
    place = function.__globals__.get(called.value.id)
    return getattr(place, called.attr, None) if isinstance(place, types.ModuleType) else None


def _attends(call: ast.Call, function: types.FunctionType, owner: Any) -> bool:
    """Whether a call in the code of `function` is one of attention, or of a function that calls it."""
    if _called(call) in ATTENTION:
        return True
    value = _callee(call, function, owner)
    return inspect.isroutine(value) and bool(names_used(value) & ATTENTION)


def takes_apart(caller: nn.Module, attribute: str) -> bool:
    """Whether the code of `caller` only ever uses parts of its child `attribute`, as in ``self.attn.qkv(x)``, and
    neither calls it nor hands it on."""
    whole = parts = False
    for base in type(caller).__mro__[: type(caller).__mro__.index(nn.Module)]:
        nodes = list(ast.walk(_tree(base)))
        owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr not in _CALLS}
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Load):
                whole, parts = whole or id(node) not in owners, parts or id(node) in owners
    return parts and not whole


def concatenates(function: Any, second: str) -> bool:
    """Whether the queries of the attention in `function` come from a concatenation with its argument `second`."""
    derived: set[str] = {second}  # names computed from `second`
    joined: set[str] = set()  # names computed from a concatenation with it
    plain = _function(function)
    if plain is None:
        return False
    for statement in _statements(plain):
        for call in _calls(statement.value):
            if call.args and _attends(call, plain, getattr(function, "__self__", None)):
                return bool(_read(call.args[0]) & joined)
        written: list[tuple[set[str], set[str]]] = []  # names that become joined, and derived
        for targets, value in _assignments(statement):
            names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
            read = _read(value)
            joins = any(_called(call) in _CONCATENATE and _read(call) & derived for call in _calls(value))
            written.append((names if joins or read & joined else set(), names if read & derived else set()))
        for from_joined, from_second in written:
            joined |= from_joined
            derived |= from_second
    return False


def passes(caller: nn.Module, attribute: str, module: nn.Module, second: str) -> bool | None:
    """Whether the code of `caller` gives its child `module`, kept under `attribute`, an argument `second`.

    None where it does not say: no call by that name, or several that differ.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    answers = {
        _call_passes(call, second, names)
        for base in type(caller).__mro__[: type(caller).__mro__.index(nn.Module)]
        for call in _method_calls(base).get(attribute, ())
    }
    return answers.pop() if len(answers) == 1 else None


def _call_passes(call: ast.Call, second: str, names: list[str]) -> bool | None:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    # A ** is taken not to carry it: at run time a call that does stays dense.
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    value = given.get(second)
    if value is None or (isinstance(value, ast.Constant) and value.value is None):
        return False
    first = call.args[0] if call.args else given.get(names[0]) if names else None
    return not (first is not None and ast.dump(first) == ast.dump(value))


def _function(target: Any) -> types.FunctionType | None:
    """The plain function behind a call of `target`, under decorators."""
    if isinstance(target, nn.Module):
        target = type(target).forward
    elif not inspect.isroutine(target):
        target = type(target).__call__ if callable(target) else None
    function = inspect.unwrap(target) if callable(target) else None
    function = getattr(function, "__func__", function)
    return function if isinstance(function, types.FunctionType) else None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


@functools.cache
def _tree(definition: Any) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(definition)))
    except (OSError, TypeError, SyntaxError):  # built at run time, or shipped without source
        return ast.Module([], [])


def _statements(function: types.FunctionType) -> list[Any]:
    """Statements with a value, in the order of the source."""
    kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
    found = [node for node in ast.walk(_tree(function)) if isinstance(node, kinds) and node.value is not None]
    return sorted(found, key=lambda node: node.lineno)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _assignments(statement: Any) -> list[tuple[list[ast.expr], ast.expr]]:
    """Targets and value of a statement; several where a tuple is assigned to a tuple."""
    value = statement.value
    targets: list[ast.expr] = getattr(statement, "targets", None) or [getattr(statement, "target", ast.Tuple([]))]
    if len(targets) == 1 and isinstance(targets[0], ast.Tuple) and isinstance(value, ast.Tuple):
        one, other = targets[0].elts, value.elts
        if len(one) == len(other) and not any(isinstance(part, ast.Starred) for part in (*one, *other)):
            return [([target], part) for target, part in zip(one, other, strict=True)]
    return [(targets, value)]


@functools.cache
def _method_calls(definition: type) -> dict[str, list[ast.Call]]:
    """Calls like ``self.attribute(...)`` in the code of a class, by attribute."""
    found: dict[str, list[ast.Call]] = {}
    for call in _calls(_tree(definition)):
        if isinstance(call.func, ast.Attribute):
            found.setdefault(call.func.attr, []).append(call)
    return found


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", None) or getattr(call.func, "id", ""))


def _read(expression: ast.AST) -> set[str]:
    """Names whose values go into an expression; shapes and comparisons do not count."""
    if isinstance(expression, ast.Name):
        return {expression.id}
    if isinstance(expression, ast.Compare) or getattr(expression, "attr", None) in _METADATA:
        return set()
    if isinstance(expression, ast.Call) and _called(expression) in ("size", "len"):
        return set()
    children = [child for child in ast.iter_child_nodes(expression) if child is not getattr(expression, "test", None)]
    return set().union(*map(_read, children))
