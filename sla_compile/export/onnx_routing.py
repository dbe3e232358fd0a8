"""Routing in ONNX: pooled scores, and from them which blocks are critical and marginal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sla_compile.export.onnx_blocks import DOUBLE, FLOAT, Blocks
from sla_compile.export.onnx_builder import Size
from sla_compile.kernels.routing import pinned_first_last
from sla_compile.kernels.spec import critical_count, negligible_count, num_blocks

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Choice:
    """How blocks are chosen: as in SLAConfig, with 0 critical_blocks meaning by share, and SLA2's routers (D, D)."""

    sparsity: float
    negligible: float
    critical_blocks: int
    pinned: tuple[int, int]
    router_q: ir.Value | None
    router_k: ir.Value | None


class Routing(Blocks):
    """Blocks that are ranked by their scores."""

    def scores(self, choice: Choice) -> ir.Value:
        """Pooled scores (B, H, T_m, T_n), float32, -inf for a key block without a key that takes part."""
        build, one, (keys, counts) = self.build, self._number(1, FLOAT), self.valid_keys
        sums = build("ReduceSum", build.cast(keys, FLOAT), [1], keepdims=0)
        sums = build.reshape(sums, self.batch, self.kv_heads, self.columns, self.dim)
        total = build("Max", build("ReduceSum", counts, [2], keepdims=1), one)
        mean = build("Div", build("ReduceSum", sums, [2], keepdims=1), total)
        pooled = build("Sub", build("Div", sums, build("Max", counts, one)), mean)

        tokens = self._before(self.rows, self.spec.block_q, self.length)
        tokens = build.reshape(build("ReduceSum", build.cast(tokens, FLOAT), [1], keepdims=0), -1, 1)
        queries = build("ReduceSum", build.cast(self.queries, FLOAT), [1], keepdims=0)
        queries = build.reshape(queries, self.batch, self.heads, self.rows, self.dim)
        queries = build.reshape(build("Div", queries, tokens), self.batch, self.kv_heads, -1, self.dim)
        queries, pooled = self._routed(queries, choice.router_q), self._routed(pooled, choice.router_k)
        scores = build("MatMul", queries, build("Transpose", pooled, perm=[0, 1, 3, 2]))
        scores = build("Mul", scores, self._number(self.spec.scale, FLOAT))
        scores = build.reshape(scores, self.batch, self.heads, self.rows, self.columns)
        if self.mask_bias is not None:
            some = build("Greater", build("Transpose", counts, perm=[0, 1, 3, 2]), self._number(0, FLOAT))
            scores = build("Where", some, scores, self._number(-np.inf, FLOAT))
        return scores

    def _routed(self, pooled: ir.Value, router: ir.Value | None) -> ir.Value:
        """Pooled tokens times R^T (SLA2, arXiv 2602.12675)."""
        if router is None:
            return pooled
        return self.build("MatMul", pooled, self.build("Transpose", self.build.cast(router, FLOAT), perm=[1, 0]))

    def counts(self, blocks: Size, columns: Size, choice: Choice) -> tuple[Size, Size]:
        """How many of `blocks` free ones are critical and negligible, in a row of `columns`."""
        build = self.build
        negligible, critical_blocks = choice.negligible, choice.critical_blocks
        if isinstance(columns, int) and isinstance(blocks, int):
            known = min(critical_count(columns, choice.sparsity, critical_blocks or None), blocks) if blocks else 0
            return known, negligible_count(blocks, known, negligible)
        # The doubles that critical_count computes with, so that both round alike.
        critical: Size
        if critical_blocks:
            critical = build.minimum(critical_blocks, blocks)
        else:
            share = self._number(1.0 - choice.sparsity, DOUBLE)
            share = build("Mul", build.cast(build.as_value(columns), DOUBLE), share)
            share = build.cast(build("Floor", build("Add", share, self._number(1e-6, DOUBLE))), INT64)
            critical = build.minimum(build("Max", share, [1]), blocks)
        share = build("Mul", build.cast(build.as_value(blocks), DOUBLE), self._number(negligible, DOUBLE))
        skipped = build.minimum(build.cast(build("Floor", share), INT64), build.subtract(blocks, critical))
        return critical, skipped

    def _top(self, scores: ir.Value, count: Size, largest: bool) -> ir.Value:
        return self.build("TopK", scores, self.build.as_value(count), outputs=2, axis=-1, largest=int(largest))[1]

    def _marked(self, data: ir.Value, indices: ir.Value, value: float) -> ir.Value:
        """`data` (..., T_n) with a value at the indices (..., n)."""
        updates = self.build("Expand", self._number(value, FLOAT), self.build("Shape", indices))
        return self.build("ScatterElements", data, indices, updates, axis=-1)

    def uniform_slots(self, choice: Choice) -> tuple[ir.Value, ir.Value]:
        """Critical blocks (B H T_m, n_c) of each row, and ones (B, H, T_m, T_n) at the marginal blocks."""
        build, scores = self.build, self.scores(choice)
        critical, skipped = self.counts(self.columns, self.columns, choice)
        slots = self._top(scores, critical, largest=True)
        marginal = build("Expand", self._number(1, FLOAT), build("Shape", scores))
        if choice.negligible and not (isinstance(skipped, int) and skipped == 0):
            marginal = self._marked(marginal, self._top(scores, skipped, largest=False), 0)
        marginal = self._marked(marginal, slots, 0)  # critical wins where scores tie
        return build("Reshape", slots, build.shape(-1, critical)), marginal

    def pinned_classes(self, choice: Choice) -> tuple[ir.Value, Size]:
        """Block map (B, H, T_m, T_n) as floats, with pinned tokens, and the slots of a row that holds none."""
        build, scores = self.build, self.scores(choice)
        held = self.pinned(self.columns, self.spec.block_k, choice.pinned)
        free: Size = build("ReduceSum", build.cast(build("Not", held), INT64), [0], keepdims=1)
        if isinstance(self.length, int) and isinstance(self.columns, int):
            free = self.columns - pinned_first_last(self.length, self.spec.block_k, choice.pinned)[2]
        critical, skipped = self.counts(free, self.columns, choice)
        infinity = self._number(np.inf, FLOAT)
        classes = build("Expand", self._number(0, FLOAT), build("Shape", scores))
        if choice.negligible:
            lowest = self._top(build("Where", held, infinity, scores), skipped, largest=False)
            classes = self._marked(classes, lowest, -1)
        highest = self._top(build("Where", held, build("Neg", infinity), scores), critical, largest=True)
        classes = self._marked(classes, highest, 1)
        rows = build.reshape(self.pinned(self.rows, self.spec.block_q, choice.pinned), -1, 1)
        classes = build("Where", build("Or", rows, held), self._number(1, FLOAT), classes)
        return classes, build.subtract(self.columns, build.subtract(free, critical))

    def pinned(self, blocks: Size, block: int, pinned: tuple[int, int]) -> ir.Value:
        """Boolean (blocks,): the block holds a pinned token, see routing.pinned_blocks."""
        build = self.build
        index = build.arange(blocks)
        held = build("Less", index, num_blocks(pinned[0], block))
        if pinned[1]:
            ends = build("Mul", build("Add", index, 1), block)
            start = build.as_value(build.subtract(self.length, pinned[1]))
            held = build("Or", held, build("Greater", ends, start))
        return held

    def slots_of(self, classes: ir.Value, width: Size | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Slots (B H T_m, width) with the critical blocks first, how many (B H T_m) they are, and ones at the marginal
        blocks.

        Args:
            classes: block map (B, H, T_m, T_n).
            width: None for as many as the fullest row needs. Where a row has more, the first ones.
        """
        build = self.build
        critical = build.cast(build("Equal", classes, self._number(1, FLOAT)), FLOAT)
        counts = build.reshape(build("ReduceSum", build.cast(critical, INT64), [-1], keepdims=0), -1)
        if width is None:
            width = build("ReduceMax", counts, [0], keepdims=1)
        slots = build("Reshape", self._top(critical, width, largest=True), build.shape(-1, width))
        return slots, counts, build.cast(build("Equal", classes, self._number(0, FLOAT)), FLOAT)
