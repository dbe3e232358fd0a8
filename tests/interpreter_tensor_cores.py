"""Makes Triton's interpreter multiply as inexactly as tensor cores do; its own products are exact.

They read the upper 19 bits of a float32 operand and drop the rest, and those of sm_90 add E4M3 products with 14 bits.
Tests only; in a process of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from low_bit_reference import e4m3_product
from triton.runtime import interpreter


def truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(values.shape)


def install() -> None:
    """Patches this process's interpreter."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched_dot(self: Any, left: Any, right: Any, total: Any, precision: Any, imprecise_terms: int) -> Any:
        operands = left.data, right.data
        if left.dtype.scalar == tl.float8e4nv:
            found = [torch.from_numpy(data).view(torch.float8_e4m3fn).float() for data in operands]
            if not imprecise_terms and total.data.any():
                raise AssertionError("sm_90 would add these E4M3 products to the sum so far, with 14 bits")
            product = e4m3_product(*found, imprecise_terms or found[0].shape[-1]).numpy()
            return interpreter.TensorHandle(product + total.data, total.dtype.scalar)
        if left.dtype.scalar == tl.float32 and precision.name == "TF32":
            left, right = (interpreter.TensorHandle(truncated_to_tf32(data), tl.float32) for data in operands)
        return create_dot(self, left, right, total, precision, imprecise_terms)

    interpreter.InterpreterBuilder.create_dot = patched_dot
