"""The operator in standard ONNX operators, with the work and the memory of sparse attention.

NOTE [Chunks of rows]
A row is a block of queries of one head. A Loop takes some rows at a time, gathers the keys and values of their critical
blocks, and attends to these: what is gathered and the scores exist for a few rows only. All rows have as many slots for
critical blocks; with pinned tokens some of a row may be empty, and the pinned rows, which take all keys, have a Loop of
their own. With a given block map there are as many slots as the fullest row has critical blocks. (Slots whose number
differs from step to step would say it better, but TensorRT-RTX fails on them.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator

from sla_compile.export.onnx_builder import Builder, Size, known_size, shape_of
from sla_compile.kernels.routing import pinned_first_last
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec, critical_count, negligible_count, num_blocks

INT64, FLOAT, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL
_LOWEST = -1e30  # stands for -inf before a softmax: absorbs every score, and a row of it is no NaN


def translation(rows_per_step: int) -> Callable:
    """``sla_compile::sparse_linear_attention`` for a custom_translation_table of torch.onnx.export: a function that
    records nodes and returns output and log-sum-exp. They compute in float32 (float64 for float64 inputs), and route in
    float32.

    Args:
        rows_per_step: see NOTE [Chunks of rows].
    """

    # Without annotations: the exporter takes those for an ONNX signature, and warns of others.
    def sparse_linear_attention(
        query, key, value, proj_weight, proj_bias, router_q, router_k, alpha, key_padding_mask, block_map, scale,
        sparsity, negligible, critical_blocks, pinned_first, pinned_last, feature_map, linear, block_q, block_k,
        low_bit, impl_version,
    ):  # fmt: skip
        if alpha is not None or router_q is not None or router_k is not None or low_bit != "none":
            raise NotImplementedError(
                'SLA2 and low_bit have no ONNX form yet; export a model with method="sla" and low_bit=None'
            )
        spec = Spec(scale, feature_map, linear, block_q, block_k)
        recorder: Any = evaluator.default()  # the exporter's
        build = Builder(recorder.nodes, f"sla_{query.name}")
        call = _Call(build, spec, query, key, value, rows_per_step)
        call.mask(key_padding_mask)
        routing = (sparsity, negligible, critical_blocks, (pinned_first, pinned_last))
        return call.attention(block_map, routing, proj_weight, proj_bias)

    return sparse_linear_attention


class _Call:
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

    def attention(
        self, block_map: ir.Value | None, routing: tuple, weight: ir.Value | None, offset: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Output (B, H, L, D) and log-sum-exp (B, H, L), which has Loops of its own: nobody asks for it in inference,
        and then they are removed."""
        build, block = self.build, self.spec.block_q
        selected: ir.Value | None
        if block_map is not None:
            slots, counts, selected = self.slots_of(build.cast(block_map, FLOAT), None)
            output, logsumexp = (self.sparse(self.queries, slots, counts, self.rows, kind) for kind in (False, True))
        elif any(routing[3]):
            output, logsumexp, selected = self.pinned_sparse(routing)
        else:
            slots, selected = self.uniform_slots(routing)
            output, logsumexp = (self.sparse(self.queries, slots, None, self.rows, kind) for kind in (False, True))
        if self.spec.linear != "none":
            mean = self.linear_all() if self.spec.linear == "all" else self.linear_marginal(selected)
            assert weight is not None  # the operator was given one
            weight = build("Transpose", build.cast(weight, self.dtype), perm=[1, 0])
            output = build("Add", output, build("MatMul", mean, weight))
            if offset is not None:
                output = build("Add", output, build.cast(offset, self.dtype))
        tokens = build.multiply(self.rows, block)
        output = build.reshape(output, self.batch, self.heads, tokens, self.dim)
        logsumexp = build.reshape(logsumexp, self.batch, self.heads, tokens)
        if not (isinstance(self.length, int) and self.length % block == 0):
            end = build.as_value(self.length)
            output, logsumexp = (build("Slice", part, [0], end, [2]) for part in (output, logsumexp))
        return build.cast(output, self.result_type), logsumexp

    def scores(self) -> ir.Value:
        """Pooled scores (B, H, T_m, T_n), float32, -inf for a key block without a key that takes part."""
        build, block = self.build, self.spec.block_k
        keys = self.keys
        if self.bias is None:  # the length is known, and full blocks
            counts = build("Expand", self._number(block, FLOAT), build.shape(1, 1, self.columns, 1))
        else:
            valid = build("Greater", self.bias, self._number(-np.inf))
            if self.mask_bias is not None:
                by_batch = build.reshape(keys, self.batch, self.kv_heads, self.columns, block, self.dim)
                keep = build.reshape(valid, self.batch, 1, self.columns, block, 1)
                keys = build.reshape(build("Where", keep, by_batch, self._number(0)), -1, block, self.dim)
            counts = build("ReduceSum", build.cast(valid, FLOAT), [1], keepdims=0)
            counts = build.reshape(counts, -1, 1, self.columns, 1)
        one = self._number(1, FLOAT)
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
        scores = build("MatMul", queries, build("Transpose", pooled, perm=[0, 1, 3, 2]))
        scores = build("Mul", scores, self._number(self.spec.scale, FLOAT))
        scores = build.reshape(scores, self.batch, self.heads, self.rows, self.columns)
        if self.mask_bias is not None:
            some = build("Greater", build("Transpose", counts, perm=[0, 1, 3, 2]), self._number(0, FLOAT))
            scores = build("Where", some, scores, self._number(-np.inf, FLOAT))
        return scores

    def counts(self, blocks: Size, columns: Size, routing: tuple) -> tuple[Size, Size]:
        """How many of `blocks` free ones are critical and negligible, in a row of `columns`."""
        build = self.build
        sparsity, negligible, critical_blocks, _ = routing
        if isinstance(columns, int) and isinstance(blocks, int):
            known = min(critical_count(columns, sparsity, critical_blocks or None), blocks) if blocks else 0
            return known, negligible_count(blocks, known, negligible)
        # The doubles that critical_count computes with, so that both round alike.
        critical: Size
        if critical_blocks:
            critical = build.minimum(critical_blocks, blocks)
        else:
            share = build("Mul", build.cast(build.as_value(columns), DOUBLE), self._number(1.0 - sparsity, DOUBLE))
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

    def uniform_slots(self, routing: tuple) -> tuple[ir.Value, ir.Value | None]:
        """Critical blocks (B H T_m, n_c) of each row, and ones (B, H, T_m, T_n) at the marginal blocks."""
        build, scores = self.build, self.scores()
        critical, skipped = self.counts(self.columns, self.columns, routing)
        slots = self._top(scores, critical, largest=True)
        selected = None
        if self.spec.linear == "marginal":
            selected = build("Expand", self._number(1, FLOAT), build("Shape", scores))
            if routing[1] and not (isinstance(skipped, int) and skipped == 0):
                selected = self._marked(selected, self._top(scores, skipped, largest=False), 0)
            selected = self._marked(selected, slots, 0)  # critical wins where scores tie
        return build("Reshape", slots, build.shape(-1, critical)), selected

    def pinned_classes(self, routing: tuple) -> tuple[ir.Value, Size]:
        """Block map (B, H, T_m, T_n) as floats, with pinned tokens, and the slots of a row that holds none."""
        build, scores = self.build, self.scores()
        held = self.pinned(self.columns, self.spec.block_k, routing[3])
        free: Size = build("ReduceSum", build.cast(build("Not", held), INT64), [0], keepdims=1)
        if isinstance(self.length, int) and isinstance(self.columns, int):
            free = self.columns - pinned_first_last(self.length, self.spec.block_k, routing[3])[2]
        critical, skipped = self.counts(free, self.columns, routing)
        infinity = self._number(np.inf, FLOAT)
        classes = build("Expand", self._number(0, FLOAT), build("Shape", scores))
        if routing[1] and self.spec.linear == "marginal":
            lowest = self._top(build("Where", held, infinity, scores), skipped, largest=False)
            classes = self._marked(classes, lowest, -1)
        highest = self._top(build("Where", held, build("Neg", infinity), scores), critical, largest=True)
        classes = self._marked(classes, highest, 1)
        rows = build.reshape(self.pinned(self.rows, self.spec.block_q, routing[3]), -1, 1)
        classes = build("Where", build("Or", rows, held), self._number(1, FLOAT), classes)
        return classes, build.subtract(self.columns, build.subtract(free, critical))

    def pinned_sparse(self, routing: tuple) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Output and log-sum-exp as of :meth:`sparse`, and ones (B, H, T_m, T_n) at the marginal blocks."""
        build, block, pinned = self.build, self.spec.block_q, routing[3]
        classes, width = self.pinned_classes(routing)
        slots, counts, selected = self.slots_of(classes, width)
        every = build.reshape(build.arange(self.columns), 1, -1)

        # A number of rows that is the same for all lengths and holds all pinned ones.
        leading, trailing = num_blocks(pinned[0], block), num_blocks(pinned[1], block) + 1 if pinned[1] else 0
        index = build.arange(self.rows)
        if trailing:
            before_end = build.as_value(build.subtract(self.length, pinned[1]))
            start = build("Div", build("Max", before_end, [0]), [block])
            chosen = build.constant(np.arange(leading + trailing))
            after = build("Add", build("Sub", chosen, leading), start)
            chosen = build("Where", build.constant(np.arange(leading + trailing) < leading), chosen, after)
            after = build("Add", build("Sub", index, start), leading)
            position = build("Where", build("Less", index, leading), index, after)
        else:
            chosen, position = build.constant(np.arange(leading)), index
        chosen = build("Min", chosen, build.as_value(build.subtract(self.rows, 1)))
        position = build("Max", build("Min", position, leading + trailing - 1), 0)

        by_head = build.reshape(self.queries, -1, self.rows, block, self.dim)
        queries = build.reshape(build("Gather", by_head, chosen, axis=1), -1, block, self.dim)
        rows = build.multiply(build.multiply(self.batch, self.heads), leading + trailing)
        every = build("Expand", every, build.shape(rows, self.columns))
        held = build.reshape(self.pinned(self.rows, block, pinned), 1, -1, 1, 1)
        results = []
        for statistics, size in ((False, self.dim), (True, 1)):
            ordinary = self.sparse(self.queries, slots, counts, self.rows, statistics)
            exact = self.sparse(queries, every, None, leading + trailing, statistics, few=True)
            exact = build("Gather", build.reshape(exact, -1, leading + trailing, block, size), position, axis=1)
            result = build("Where", held, exact, build.reshape(ordinary, -1, self.rows, block, size))
            results.append(build.reshape(result, -1, block, size))
        return results[0], results[1], selected

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

    def sparse(
        self,
        queries: ir.Value,
        slots: ir.Value,
        counts: ir.Value | None,
        rows: Size,
        statistics: bool,
        few: bool = False,
    ) -> ir.Value:
        """Attention over the blocks in the slots: output (B H rows, b_q, D), or the log-sum-exp (B H rows, b_q, 1).

        Args:
            queries: (B H rows, b_q, D).
            slots: (B H rows, n), their key blocks, of which the first `counts` (B H rows) are taken.
            few: whether a step takes fewer rows, as they have many slots.
        """
        build, spec, dim = self.build, self.spec, self.dim
        chunk = max(self.rows_per_step // 4, 1) if few else self.rows_per_step
        total = build.multiply(build.multiply(self.batch, self.heads), rows)
        # The row's head among those of keys and values, as the position of its first key block.
        owner = build("Div", build.arange(total), build.as_value(build.multiply(rows, self.heads // self.kv_heads)))
        absolute = build("Add", slots, build.reshape(build("Mul", owner, build.as_value(self.columns)), -1, 1))
        padding = build.subtract(build.multiply(build.ceil_divide(total, chunk), chunk), total)
        width: Size = build("Shape", slots, start=1, end=2)

        def chunks(tensor: ir.Value, *shape: Size) -> ir.Value:
            return build.reshape(build.pad(tensor, 0, padding), -1, chunk, *shape)

        queries = build("Mul", queries, self._number(spec.scale))
        inputs = [chunks(queries, spec.block_q, dim), chunks(absolute, width)]
        if self.bias is not None:
            place = slots
            if self.mask_bias is not None:
                entry = build("Div", build.arange(total), build.as_value(build.multiply(rows, self.heads)))
                entry = build("Mul", entry, build.as_value(self.columns))
                place = build("Add", slots, build.reshape(entry, -1, 1))
            inputs.append(chunks(place, width))
        positions = None
        if counts is not None:
            inputs.append(chunks(counts, 1))
            positions = build.reshape(build.arange(width), 1, -1)

        def body(inside: Builder, queries: ir.Value, blocks: ir.Value, *others: ir.Value) -> ir.Value:
            rest = list(others)
            places = rest.pop(0) if self.bias is not None else None
            used = None
            if positions is not None:
                used = inside("Less", positions, rest.pop())
                used = inside("Where", used, self.inside(inside, 0), self.inside(inside, -np.inf))
                used = inside("Unsqueeze", used, [2])
            keys = inside.reshape(inside("Gather", self.keys, blocks), chunk, -1, dim)
            scores = inside("MatMul", queries, inside("Transpose", keys, perm=[0, 2, 1]))
            bias = None if places is None else inside("Gather", self.bias, places)
            if used is not None:
                bias = used if bias is None else inside("Add", bias, used)
                # Without a bias the slots' one is of width 1.
                bias = inside("Expand", bias, inside.shape(1, 1, spec.block_k)) if places is None else bias
            some = None
            if bias is not None:
                bias = inside.reshape(bias, chunk, 1, -1)
                if self.mask_bias is not None:
                    largest = inside("ReduceMax", bias, [2], keepdims=1)
                    some = inside("Greater", largest, self.inside(inside, -np.inf))
                scores = inside("Add", scores, inside("Max", bias, self.inside(inside, _LOWEST)))
            if statistics:
                above = inside("ReduceMax", scores, [2], keepdims=1)
                total = inside("ReduceSum", inside("Exp", inside("Sub", scores, above)), [2], keepdims=1)
                result = inside("Add", above, inside("Log", total))
            else:
                values = inside.reshape(inside("Gather", self.values, blocks), chunk, -1, dim)
                result = inside("MatMul", inside("Softmax", scores, axis=-1), values)
            if some is not None:
                result = inside("Where", some, result, self.inside(inside, -np.inf if statistics else 0))
            return result

        result = build.for_each("statistics" if statistics else "rows", body, inputs, self.dtype)
        result = build.reshape(result, -1, spec.block_q, 1 if statistics else dim)
        if isinstance(padding, int) and padding == 0:
            return result
        return build("Slice", result, [0], build.as_value(total), [0])

    def inside(self, builder: Builder, value: float) -> ir.Value:
        """A number as a constant of a subgraph."""
        return builder.number(value, self.dtype)

    def feature(self, build: Builder, tokens: ir.Value) -> ir.Value:
        """The feature map, as in reference.feature."""
        if self.spec.feature_map == "softmax":
            return build("Softmax", tokens, axis=-1)
        if self.spec.feature_map == "relu":
            return build("Relu", tokens)
        # elu(x) + 1 without Elu, which TensorRT-RTX takes for a node of two inputs inside of a Loop
        zero = self.inside(build, 0)
        return build("Add", build("Exp", build("Min", tokens, zero)), build("Relu", tokens))

    def weighted_values(self, build: Builder, values: ir.Value, bias: ir.Value | None) -> ir.Value:
        """(..., T_n, b_k, D + 1): values and a one, whose product is the denominator, by the weight of the key."""
        one = build("Expand", self.inside(build, 1), build.shape(1))
        ones = build("Expand", one, build("Concat", build("Shape", values, start=0, end=-1), [1], axis=0))
        values = build("Concat", values, ones, axis=-1)
        return values if bias is None else build("Mul", values, build("Unsqueeze", build("Exp", bias), [-1]))

    def quotient(self, build: Builder, product: ir.Value) -> ir.Value:
        """The first D columns over the last one, 0 where that is next to nothing."""
        numerator, denominator = build("Split", product, [self.dim, 1], outputs=2, axis=-1)
        if self.spec.epsilon:
            denominator = build("Add", denominator, self.inside(build, self.spec.epsilon))
        defined = build("Greater", denominator, self.inside(build, MIN_DENOMINATOR))
        ratio = build("Div", numerator, build("Where", defined, denominator, self.inside(build, 1)))
        return build("Where", defined, ratio, self.inside(build, 0))

    def linear_all(self) -> ir.Value:
        """Linear attention over all keys: (B H T_m, b_q, D)."""
        build, group = self.build, self.heads // self.kv_heads
        shape = (self.batch, self.kv_heads, self.columns, self.spec.block_k)
        bias = self.bias
        if self.mask_bias is not None:
            bias = build.reshape(self.mask_bias, self.batch, 1, self.columns, self.spec.block_k)
        values = self.weighted_values(build, build.reshape(self.values, *shape, self.dim), bias)
        tokens = build.multiply(self.columns, self.spec.block_k)
        values = build.reshape(values, self.batch, self.kv_heads, tokens, self.dim + 1)
        keys = build.reshape(self.feature(build, self.keys), self.batch, self.kv_heads, tokens, self.dim)
        sums = build("MatMul", build("Transpose", keys, perm=[0, 1, 3, 2]), values)
        tokens = build.multiply(self.rows, group * self.spec.block_q)
        queries = build.reshape(self.feature(build, self.queries), self.batch, self.kv_heads, tokens, self.dim)
        mean = self.quotient(build, build("MatMul", queries, sums))
        return build.reshape(mean, -1, self.spec.block_q, self.dim)

    def linear_marginal(self, selected: ir.Value | None) -> ir.Value:
        """Linear attention over the marginal blocks, one head of keys at a time: (B H T_m, b_q, D)."""
        build, dim, block_q, block_k = self.build, self.dim, self.spec.block_q, self.spec.block_k
        heads = build.multiply(self.batch, self.kv_heads)
        rows = build.multiply(self.rows, self.heads // self.kv_heads)
        assert selected is not None  # only linear="marginal" comes here
        if self.dtype != FLOAT:
            selected = build.cast(selected, self.dtype)
        inputs = [
            build.reshape(self.queries, heads, rows, block_q, dim),
            build.reshape(self.keys, heads, self.columns, block_k, dim),
            build.reshape(self.values, heads, self.columns, block_k, dim),
            build.reshape(selected, heads, rows, self.columns),
        ]
        if self.mask_bias is not None:
            bias = build.reshape(self.mask_bias, self.batch, 1, self.columns, block_k)
            bias = build("Expand", bias, build.shape(self.batch, self.kv_heads, self.columns, block_k))
            inputs.append(build.reshape(bias, heads, self.columns, block_k))

        def body(inside: Builder, *entry: ir.Value) -> ir.Value:
            queries, keys, values, marks, *bias = entry
            weighted = self.weighted_values(inside, values, bias[0] if bias else self.bias)
            features = inside("Transpose", self.feature(inside, keys), perm=[0, 2, 1])
            sums = inside.reshape(inside("MatMul", features, weighted), -1, dim * (dim + 1))
            sums = inside.reshape(inside("MatMul", marks, sums), -1, dim, dim + 1)
            product = inside("MatMul", self.feature(inside, queries), sums)
            return self.quotient(inside, product)

        mean = build.for_each("linear", body, inputs, self.dtype)
        return build.reshape(mean, -1, block_q, dim)
