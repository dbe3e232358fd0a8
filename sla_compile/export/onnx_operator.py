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

from sla_compile.export.onnx_blocks import FLOAT
from sla_compile.export.onnx_builder import Builder, Size
from sla_compile.export.onnx_routing import Choice, Routing
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec, num_blocks

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
        if low_bit != "none":
            raise NotImplementedError(f'low_bit="{low_bit}" has kernels only; accelerate with low_bit=None for ONNX')
        spec = Spec(scale, feature_map, linear, block_q, block_k)
        recorder: Any = evaluator.default()  # the exporter's
        build = Builder(recorder.nodes, f"sla_{query.name}")
        call = Attention(build, spec, query, key, value, rows_per_step)
        call.mask(key_padding_mask)
        call.weight, call.offset, call.alpha = proj_weight, proj_bias, alpha
        pinned = (pinned_first, pinned_last)
        return call.attention(block_map, Choice(sparsity, negligible, critical_blocks, pinned, router_q, router_k))

    return sparse_linear_attention


class Attention(Routing):
    """Both branches over the blocks that routing chose, and their sum.

    weight (D, D), offset (D): SLA's projection; alpha (H, 1) or (H, T_m): SLA2's.
    """

    weight: ir.Value | None = None
    offset: ir.Value | None = None
    alpha: ir.Value | None = None

    def attention(self, block_map: ir.Value | None, choice: Choice) -> tuple[ir.Value, ir.Value]:
        """Output (B, H, L, D) and log-sum-exp (B, H, L).

        The exporter removes what nobody asks for: in inference the Loops of the log-sum-exp, and what only another
        linear branch would need.
        """
        build, block = self.build, self.spec.block_q
        if block_map is not None:
            slots, counts, marginal = self.slots_of(build.cast(block_map, FLOAT), None)
            output, logsumexp = (self.sparse(self.queries, slots, counts, self.rows, kind) for kind in (False, True))
        elif any(choice.pinned):
            output, logsumexp, marginal = self.pinned_sparse(choice)
        else:
            slots, marginal = self.uniform_slots(choice)
            output, logsumexp = (self.sparse(self.queries, slots, None, self.rows, kind) for kind in (False, True))
        if self.spec.linear != "none":
            mean = self.linear_all() if self.spec.linear == "all" else self.linear_marginal(marginal)
            if self.alpha is None:
                output = self.projected(output, mean)
            else:
                output = self.blended(output, mean, marginal, self.alpha)
        tokens = build.multiply(self.rows, block)
        output = build.reshape(output, self.batch, self.heads, tokens, self.dim)
        logsumexp = build.reshape(logsumexp, self.batch, self.heads, tokens)
        if not (isinstance(self.length, int) and self.length % block == 0):
            end = build.as_value(self.length)
            output, logsumexp = (build("Slice", part, [0], end, [2]) for part in (output, logsumexp))
        return build.cast(output, self.result_type), logsumexp

    def pinned_sparse(self, choice: Choice) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Output and log-sum-exp as of :meth:`sparse`, and ones (B, H, T_m, T_n) at the marginal blocks."""
        build, block, pinned = self.build, self.spec.block_q, choice.pinned
        classes, width = self.pinned_classes(choice)
        slots, counts, marginal = self.slots_of(classes, width)
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
        return results[0], results[1], marginal

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

    def projected(self, output: ir.Value, mean: ir.Value) -> ir.Value:
        """``O_s + O_l W^T + b``."""
        build = self.build
        assert self.weight is not None  # the operator was given one
        weight = build("Transpose", build.cast(self.weight, self.dtype), perm=[1, 0])
        output = build("Add", output, build("MatMul", mean, weight))
        return output if self.offset is None else build("Add", output, build.cast(self.offset, self.dtype))

    def blended(self, output: ir.Value, mean: ir.Value, marginal: ir.Value, alpha: ir.Value) -> ir.Value:
        """``alpha O_s + (1 - alpha) O_l``, with 1 for alpha in rows without a marginal block that takes part."""
        build, one = self.build, self._number(1)
        if self.mask_bias is not None:
            some = build("Greater", self.valid_keys[1], self._number(0, FLOAT))
            some = build("Transpose", build.cast(some, FLOAT), perm=[0, 1, 3, 2])
            marginal = build("Mul", marginal, some)
        some = build("Greater", build("ReduceMax", marginal, [-1], keepdims=1), self._number(0, FLOAT))
        alpha = build.reshape(build.cast(alpha, self.dtype), 1, self.heads, -1, 1)
        share = build.reshape(build("Where", some, alpha, one), -1, 1, 1)
        return build("Add", build("Mul", share, output), build("Mul", build("Sub", one, share), mean))

    def linear_keys(self) -> ir.Value:
        return self.keys if self.alpha is None else self.smooth_keys

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
        keys = build.reshape(self.feature(build, self.linear_keys()), self.batch, self.kv_heads, tokens, self.dim)
        sums = build("MatMul", build("Transpose", keys, perm=[0, 1, 3, 2]), values)
        tokens = build.multiply(self.rows, group * self.spec.block_q)
        queries = build.reshape(self.feature(build, self.queries), self.batch, self.kv_heads, tokens, self.dim)
        mean = self.quotient(build, build("MatMul", queries, sums))
        return build.reshape(mean, -1, self.spec.block_q, self.dim)

    def linear_marginal(self, marginal: ir.Value) -> ir.Value:
        """Linear attention over the marginal blocks, one head of keys at a time: (B H T_m, b_q, D)."""
        build, dim, block_q, block_k = self.build, self.dim, self.spec.block_q, self.spec.block_k
        heads = build.multiply(self.batch, self.kv_heads)
        rows = build.multiply(self.rows, self.heads // self.kv_heads)
        if self.dtype != FLOAT:
            marginal = build.cast(marginal, self.dtype)
        inputs = [
            build.reshape(self.queries, heads, rows, block_q, dim),
            build.reshape(self.linear_keys(), heads, self.columns, block_k, dim),
            build.reshape(self.values, heads, self.columns, block_k, dim),
            build.reshape(marginal, heads, rows, self.columns),
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
