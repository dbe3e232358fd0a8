"""Spares Triton's interpreter work that changes no result and takes more than half of its time on small cases.

Tests only; in a process of its own, in which no kernel is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Patches this process's interpreter, before interpreter_bf16 does."""
    builder, patch_language = interpreter.interpreter_builder, interpreter._patch_lang
    # The 64-bit copies of integer operations end in an assertion that only options.debug, which is off, would make.
    builder.options = replace(builder.options, sanitize_overflow=False)
    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type_once(dtype: Any) -> Any:  # a table of all types is made to look up one
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    interpreter._get_np_dtype = numpy_type_once
    patched: set[str] = set()

    def patch_once(function: FunctionType) -> Any:
        # At every call of every function all of triton.language is searched, and at a launch's end it is put back.
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch_language(function)
        return interpreter._LangPatchScope()  # without anything to put back

    interpreter._patch_lang = patch_once
