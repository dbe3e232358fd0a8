"""One call of the operator in ONNX: its sizes, its tensors in blocks, and sums over these."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from sla_compile.export.onnx_builder import Builder, Size, known_size, shape_of
from sla_compile.kernels.spec import Spec

FLOAT, DOUBLE, BOOL = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL


class Blocks:
    """One call of the operator: its sizes, and its tensors in blocks.

    queries: (B H T_m, b_q, D), keys, values: (B H_kv T_n, b_k, D), padded with zeros, in `dtype`.
    bias: (B T_n or T_n, b_k), -inf for a key that takes no part, or None where all do.
    mask_bias: the same if there is a mask, else None.
    """

    def __init__(
        self, build: Builder, spec: Spec, query: ir.Value, key: ir.Value, value: ir.Value, rows_per_step: int
    ) -> None:
        self.build, self.spec, self.rows_per_step = build, spec, rows_per_step
        self.result_type = query.dtype or FLOAT
        self.dtype = DOUBLE if query.dtype == DOUBLE else FLOAT
        self.batch, self.length = build.size(query, 0), build.size(query, 2)
        self.heads, self.kv_heads, self.dim = known_size(query, 1), known_size(key, 1), known_size(query, 3)
        self.rows = build.ceil_divide(self.length, spec.block_q)
        self.columns = build.ceil_divide(self.length, spec.block_k)
        self.queries = self._blocks(query, self.rows, spec.block_q)
        self.keys, self.values = (self._blocks(tokens, self.columns, spec.block_k) for tokens in (key, value))
        self.mask_bias: ir.Value | None = None
        self.bias: ir.Value | None = None
        if not (isinstance(self.length, int) and self.length % spec.block_k == 0):
            past = self._before(self.columns, spec.block_k, self.length)
            self.bias = build("Where", past, self._number(0), self._number(-np.inf))

    def _number(self, value: float, dtype: ir.DataType | None = None) -> ir.Value:
        return self.build.number(value, dtype or self.dtype)

    def _blocks(self, tokens: ir.Value, blocks: Size, block: int) -> ir.Value:
        build = self.build
        tokens = build.cast(tokens, self.dtype) if tokens.dtype != self.dtype else tokens
        tokens = build.pad(tokens, 2, build.subtract(build.multiply(blocks, block), self.length))
        return build.reshape(tokens, -1, block, self.dim)

    def _before(self, blocks: Size, block: int, end: Size) -> ir.Value:
        """Boolean (blocks, block): the position is before `end`."""
        positions = self.build.reshape(self.build.arange(self.build.multiply(blocks, block)), -1, block)
        return self.build("Less", positions, self.build.as_value(end))

    def mask(self, mask: ir.Value | None) -> None:
        """Takes a key-padding mask into the bias, as masks.key_bias does."""
        if mask is None:
            return
        build, rank = self.build, len(shape_of(mask))
        narrowed = list(range(1 if rank == 4 else 0, rank - 1))
        is_bool = mask.dtype == BOOL
        if narrowed:
            mask = build("Slice", mask, [0] * len(narrowed), [1] * len(narrowed), narrowed)
        mask = build("Expand", mask, build.shape(self.batch, 1, 1, self.length))
        if is_bool:
            bias = build("Where", mask, self._number(0), self._number(-np.inf))
        else:
            bias = build.cast(build.cast(mask, FLOAT), self.dtype)
            largest = build("ReduceMax", bias, [-1], keepdims=1)
            some = build("Greater", largest, self._number(-np.inf))
            bias = build("Sub", bias, build("Where", some, largest, self._number(0)))
        padding = build.subtract(build.multiply(self.columns, self.spec.block_k), self.length)
        bias = build.reshape(bias, self.batch, self.length)
        if not (isinstance(padding, int) and padding == 0):
            bias = build("Pad", bias, build.shape(0, padding), self._number(-np.inf), [1])
        self.bias = self.mask_bias = build.reshape(bias, -1, self.spec.block_k)

    @cached_property
    def valid_keys(self) -> tuple[ir.Value, ir.Value]:
        """The keys with zeros where one takes no part, and how many of each block do: float32 (B or 1, 1, T_n, 1)."""
        build, block, keys = self.build, self.spec.block_k, self.keys
        if self.bias is None:  # the length is known, and full blocks
            return keys, build("Expand", self._number(block, FLOAT), build.shape(1, 1, self.columns, 1))
        valid = build("Greater", self.bias, self._number(-np.inf))
        if self.mask_bias is not None:
            by_batch = build.reshape(keys, self.batch, self.kv_heads, self.columns, block, self.dim)
            keep = build.reshape(valid, self.batch, 1, self.columns, block, 1)
            keys = build.reshape(build("Where", keep, by_batch, self._number(0)), -1, block, self.dim)
        counts = build("ReduceSum", build.cast(valid, FLOAT), [1], keepdims=0)
        return keys, build.reshape(counts, -1, 1, self.columns, 1)

    @cached_property
    def smooth_keys(self) -> ir.Value:
        """The keys less their mean over the tokens that take part, see smoothing.py."""
        build, (keys, counts) = self.build, self.valid_keys
        shape = (self.batch, self.kv_heads, self.columns, self.spec.block_k, self.dim)
        total = build("ReduceSum", build.reshape(keys, *shape), [2, 3], keepdims=1)
        count = build("Max", build("ReduceSum", counts, [2], keepdims=1), self._number(1, FLOAT))
        mean = build("Div", total, build("Unsqueeze", build.cast(count, self.dtype), [-1]))
        return build.reshape(build("Sub", build.reshape(self.keys, *shape), mean), -1, self.spec.block_k, self.dim)
