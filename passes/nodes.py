"""What an FX node computes: one name and one set of arguments for every spelling of a call.

``torch.softmax(x, -1)``, ``x.softmax(dim=-1)``, ``F.softmax(x, -1)``, ``nn.Softmax(-1)(x)`` and
``aten.softmax.int(x, -1)`` are all ``Call("softmax", {"input": x, "dim": -1, ...})``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "iadd": "add",
    "imul": "mul",
    "itruediv": "div",
    "isub": "sub",
    "imatmul": "matmul",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "native_dropout": "dropout",
}
"""One name per computation."""

RESHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze contiguous clone expand expand_as view_as "
    "reshape_as alias lift_fresh_copy identity".split()
)
"""Operations that keep the elements in row-major order; what they do is read from the shapes."""

CASTS = frozenset("to _to_copy float half bfloat16 double type type_as convert_element_type".split())

PERMUTES = frozenset("transpose permute t mT adjoint mH".split())

VIEWS = RESHAPES | PERMUTES | frozenset("getitem select slice narrow chunk split unbind".split())

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
) - {operator.index, operator.inv, operator.invert}

_LIST_ARGUMENTS = frozenset("view reshape permute expand unflatten".split())
_NAMESPACES = (torch, F, torch._C._nn, operator, torch.special, torch.functional)


@dataclass(frozen=True)
class Call:
    """A node's computation: its name, and its arguments by the names of the op's schema ("self" is "input")."""

    name: str
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)


class Reader:
    """Reads the nodes of one graph module.

    Args:
        module: owner of the graph, for its ``call_module`` and ``get_attr`` targets.
        value: what is known of a node's result: a fake tensor, a number, or None.
    """

    def __init__(self, module: nn.Module, value: Callable[[fx.Node], Any]) -> None:
        self.module = module
        self.value = value
        self._calls: dict[fx.Node, Call | None] = {}

    def shape(self, node: fx.Node) -> tuple | None:
        """The shape of the node's tensor, or None where it is no tensor or unknown."""
        value = self.value(node)
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def call(self, node: Any) -> Call | None:
        """The node's computation, or None where it is none that is known."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._calls:
            self._calls[node] = self._floating(node, self._read(node))
        return self._calls[node]

    def _floating(self, node: fx.Node, call: Call | None) -> Call | None:
        """The call, by another name where it casts to integers: that cuts values off, and none of CASTS does."""
        value = self.value(node)
        if call is None or call.name not in CASTS or not isinstance(value, Tensor) or value.is_floating_point():
            return call
        return Call(f"a cast to {value.dtype}", call.arguments)

    def _read(self, node: fx.Node) -> Call | None:
        if node.op == "call_module":
            return _module_call(self.module.get_submodule(str(node.target)), node)
        if node.op == "call_method":
            name = str(node.target)
            return _bound(name[:-1] if name.endswith("_") and not name.endswith("__") else name, node, None)
        if node.op != "call_function":
            return None
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            namespace, _, name = target._schema.name.partition("::")
            if namespace not in ("aten", "prims"):
                return None
            return _bound(name[:-1] if name.endswith("_") else name, node, [target._schema])
        if target is getattr and isinstance(node.args[1], str):
            return Call(node.args[1], {"input": node.args[0]})
        name = getattr(target, "__name__", "")
        if not any(getattr(space, name, None) is target for space in _NAMESPACES):
            return None
        if inspect.isfunction(target) and name != "einsum":
            try:
                bound = inspect.signature(target).bind(*node.args, **node.kwargs)
            except (TypeError, ValueError):
                return None
            bound.apply_defaults()
            return Call(ALIASES.get(name, name), dict(bound.arguments))
        return _bound(name[:-1] if name.endswith("_") else name, node, None)


def _module_call(module: nn.Module, node: fx.Node) -> Call | None:
    if isinstance(module, nn.Softmax):
        return Call("softmax", {"input": node.args[0], "dim": module.dim})
    if isinstance(module, nn.Dropout):
        return Call("dropout", {"input": node.args[0], "p": module.p, "training": module.training})
    if isinstance(module, nn.Identity):
        return Call("identity", {"input": node.args[0]})
    return None


def _bound(name: str, node: fx.Node, schemas: Sequence[torch.FunctionSchema] | None) -> Call | None:
    name = ALIASES.get(name, name)
    args, kwargs = list(node.args), dict(node.kwargs)
    if name == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return Call(name, {"equation": args[0], "operands": list(operands)})
    if name in CASTS:  # the dtype is read from the result
        return Call(name, {"input": args[0] if args else kwargs.get("input", kwargs.get("self"))})
    if schemas is None:
        if name in _LIST_ARGUMENTS and not any(isinstance(a, (list, tuple, torch.dtype)) for a in args[1:3]):
            first = 2 if name == "unflatten" else 1
            args[first:] = [args[first:]] if len(args) > first else []
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            return Call(name, {"input": args[0]}) if args else None
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    for schema in schemas:
        arguments = _bind(schema, args, kwargs)
        if arguments is not None:
            if name in ("mul", "add") and not isinstance(arguments["input"], fx.Node):  # 0.5 * x
                arguments["input"], arguments["other"] = arguments["other"], arguments["input"]
            return Call(name, arguments)
    # an unbindable call still has a name, which reasons can tell
    return Call(name, {"input": args[0], "unbound": True}) if args else None


def _bind(schema: torch.FunctionSchema, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, defaults filled in, or None where the call is not one of this schema."""
    kwargs = {"self" if key == "input" else key: value for key, value in kwargs.items()}
    arguments: dict[str, Any] = {}
    positional = list(args)
    for argument in schema.arguments:
        if argument.name == "self" and "self" not in kwargs and not positional:
            return None
        if positional and not argument.kwarg_only:
            value = positional.pop(0)
        elif argument.name in kwargs:
            value = kwargs.pop(argument.name)
        elif argument.has_default_value():
            value = argument.default_value
        else:
            return None
        if not _fits(str(argument.type), value):
            return None
        arguments["input" if argument.name == "self" else argument.name] = value
    return None if positional or kwargs else arguments


def _fits(kind: str, value: Any) -> bool:
    if isinstance(value, fx.Node) or value is None:
        return "Dimname" not in kind
    if "Dimname" in kind or kind == "str":
        return isinstance(value, str)
    if kind == "int":
        return isinstance(value, int)
    if kind.startswith("List"):
        return isinstance(value, (list, tuple))
    return not isinstance(value, (str, list, tuple)) or "List" in kind


def mutates(node: fx.Node) -> bool:
    """Whether the node may write into a tensor it was given."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if target in _IN_PLACE_OPERATORS or target is operator.setitem or node.kwargs.get("inplace"):
        return True
    if isinstance(node.kwargs.get("out"), (fx.Node, tuple, list)):
        return True
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def is_idle(node: fx.Node, depth: int = 8) -> bool:
    """Whether nothing needs the node: assertions about metadata, and short chains that capture leaves behind unused."""
    if not depth or node.op not in ("call_function", "call_method") or mutates(node):
        return False
    return all(is_idle(user, depth - 1) for user in node.users)


def permutation(call: Call, rank: int) -> tuple[int, ...] | None:
    """The order in which a permuting call reads its input's dimensions."""
    order = list(range(rank))
    if call.name == "transpose":
        first, second = call["dim0"], call["dim1"]
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first], order[second] = order[second], order[first]
    elif call.name == "permute":
        dims = call["dims"]
        if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
            return None
        order = [d % rank for d in dims]
    elif rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return tuple(order)


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every value their symbols can take; installs no guard."""
    return statically_known_true(left == right)


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """:func:`same` for whole shapes."""
    return len(left) == len(right) and all(map(same, left, right))


def hint(size: Any) -> int | None:
    """The size seen while tracing; None where it depends on data."""
    if isinstance(size, torch.SymInt):
        node_hint = size.node.hint
        return None if node_hint is None else int(node_hint)
    return int(size)
