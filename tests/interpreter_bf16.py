"""Makes Triton's interpreter compute bfloat16 right: as float32 values, rounded to nearest even where they become bf16.

The interpreter keeps bfloat16 as bare 16-bit integers and computes on those. Tests only; in a process of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, still as float32; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded & np.uint32(0xFFFF0000))
    return rounded.astype(np.uint32).view(np.float32).reshape(np.shape(values))


def install() -> None:
    """Patches this process's interpreter."""
    builder = interpreter.InterpreterBuilder
    numpy_type, fits = interpreter._get_np_dtype, getattr(interpreter, "_validate_np_data_size", None)
    load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
    handle = interpreter.TensorHandle

    def scalar(dtype: Any) -> Any:
        while isinstance(dtype, (tl.block_type, tl.pointer_type)):
            dtype = dtype.element_ty
        return dtype

    def patched_numpy_type(dtype: Any) -> np.dtype:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.float32) if element == tl.bfloat16 else numpy_type(dtype)

    def patched_fits(data: np.ndarray, dtype: Any) -> bool:
        return scalar(dtype) == tl.bfloat16 or fits(data, dtype)

    def patched_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(self, ptrs, mask, other, *rest)
        fill = np.zeros(ptrs.data.shape, np.float32) if other is None else np.asarray(other.data, np.float32)
        fill = (round_to_bf16(fill).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        bits = interpreter._interpreter.load(ptrs.data, mask.data, fill, np.dtype(np.uint16))
        return handle((bits.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.bfloat16)

    def patched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if ptrs.get_element_ty() != tl.bfloat16:
            return store(self, ptrs, value, mask, *rest)
        bits = (round_to_bf16(np.asarray(value.data)).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return interpreter._interpreter.store(ptrs.data, bits, mask.data)

    def patched_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if scalar(dst_type) == tl.bfloat16:
            return handle(round_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        if scalar(src.dtype) == tl.bfloat16:
            return handle(src.data.astype(numpy_type(dst_type)), scalar(dst_type))
        return cast(self, src, dst_type)

    def rounded(operation: Any) -> Any:
        def run(self: Any, *operands: Any) -> Any:
            result = operation(self, *operands)
            if scalar(result.dtype) == tl.bfloat16:
                result.data = round_to_bf16(result.data)
            return result

        return run

    interpreter._get_np_dtype = patched_numpy_type
    if fits is not None:
        interpreter._validate_np_data_size = patched_fits
    builder.create_masked_load, builder.create_masked_store = patched_load, patched_store
    builder.cast_impl = patched_cast
    builder.binary_op, builder.unary_op = rounded(builder.binary_op), rounded(builder.unary_op)
