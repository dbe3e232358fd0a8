"""Arithmetic of NumPy's arrays where Dynamo traces it under a TorchFunctionMode.

NOTE [Arrays under a mode]
Dynamo keeps arrays of NumPy, and the scalars that NumPy's functions return, as tensors. Under a mode it takes their
operators for those of tensors and hands the mode a method of Tensor, such as ``Tensor.div`` for ``/``, which it then
does not find on the array. A mode that passes a call on has to say the operator again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_UNARY = (operator.abs, operator.pos, operator.neg)
_BINARY = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
)  # fmt: skip


class _Recorder(TorchFunctionMode):
    """Keeps the name of the function that it was last handed."""

    name = ""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.name = func.__name__
        return func(*args, **(kwargs or {}))


def _handed(function: Callable[..., Any], *args: Any) -> str:
    with _Recorder() as recorder:
        function(*args)
    return recorder.name


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda one, other: function(other, one)


def _by_method() -> dict[str, Callable[..., Any]]:
    one = torch.ones(1, device="cpu")
    found: dict[str, Callable[..., Any]] = {_handed(function, one): function for function in _UNARY}
    found |= {_handed(function, one.clone(), one): function for function in (*_BINARY, operator.matmul)}
    for function in _BINARY:  # of a number and an array, where Python asks the array: Tensor.__rsub__ for -
        found.setdefault(_handed(function, 1.0, one), _swapped(function))
    return found


OPERATORS = _by_method()
"""The operator, its first argument an array, by the name of the method of Tensor that a mode is handed for it."""
