"""The launcher of the Triton kernels: checks, allocation, grids, launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from sla_compile.kernels import autotune
from sla_compile.kernels.backward import key_gradient_kernel, query_gradient_kernel
from sla_compile.kernels.block_lists import block_lists_kernel
from sla_compile.kernels.forward import forward_kernel
from sla_compile.kernels.layout import addressing, padded_dims, stride_of, strides_of, transposed_empty
from sla_compile.kernels.linear_backward import key_linear_kernel, projection_gradient_kernel, query_linear_kernel
from sla_compile.kernels.low_bit import quantize_kernel
from sla_compile.kernels.pooling import pool_kernel
from sla_compile.kernels.quantize import LOW_BIT, channel_scales
from sla_compile.kernels.selection import select_kernel
from sla_compile.kernels.smoothing import token_mean
from sla_compile.kernels.spec import MIN_ALPHA, MIN_DENOMINATOR, Spec, num_blocks
from sla_compile.kernels.summaries import block_sums_kernel, state_size, summaries_kernel
from sla_compile.kernels.symbolic import largest, padded_to
from sla_compile.kernels.tuning import Plan, plan, target_of

# Bound on what a call allocates besides its results: heads are processed in chunks that stay below it.
TRANSIENT_BYTES = 3 << 26
# With linear="all" the states are summed in two steps: this many partial sums of a head, then one.
PARTIAL_SUMS = 64
# The projection's gradient is summed in two steps: over this many tokens of a head, then over all.
PROJECTION_TOKENS = 2048

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse-linear attention over a block map (SLA, arXiv 2509.24006, algorithm 1); see reference_attention.

    With alpha it is SLA2's (arXiv 2602.12675): alpha O_s + (1 - alpha) O_l, without a projection.

    Args:
        query: (B, H, L, D) float16, bfloat16 or float32; key, value: (B, H_kv, L, D), same dtype; any strides.
        block_map: int8 (B, H, T_m, T_n) in {1, 0, -1}.
        proj_weight: (D, D), proj_bias: (D), any floating dtype.
        key_bias: float32 (B, L), at most 0.
        alpha: float32 (B, H, T_m), any strides; 1 for a query block without a marginal block.
        key_mean: float32 (B, H_kv, D), any strides; subtracted from the keys before the feature map.
        spec: with low_bit the sparse branch multiplies 8-bit operands (quantize.py).

    Returns:
        output (B, H, L, D) in query's dtype, with the strides of a transposed (B, L, H, D) tensor, and the natural
        log-sum-exp of the critical scores, float32 (B, H, L).
    """
    call = _call(query, key, value, block_map, spec, proj_weight, proj_bias, key_bias, alpha, key_mean)
    output = transposed_empty(query)
    logsumexp = call.empty(*query.shape[:3])
    smoothing = value_scales = None
    if spec.low_bit != "none":
        smoothing = token_mean(key, key_bias) if key_mean is None else key_mean
        value_scales = channel_scales(value, key_bias).contiguous() if spec.low_bit == "fp8" else None
    with torch.cuda.device_of(query):
        for chunk in call.chunks(backward=False):
            chunk.run_forward(output, logsumexp, smoothing, value_scales)
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to query, key, value, proj_weight, proj_bias and alpha (SLA, arXiv 2509.24006, algorithm 2).

    Deterministic: no atomics. Takes forward's arguments and results, and the output's gradient with any strides; the
    gradients to the parameters are None where there is no such parameter or no linear branch. The key's is that with
    key_mean held constant; alpha's is float32 (B, H, T_m).

    NOTE [Alpha]: SLA2's sparse branch has the gradients dV = (alpha P)^T dO and dS = alpha P (dP - delta_s) with
    delta_s = <dO, O_s>. As alpha P = exp(S - (logsumexp - log alpha)), the kernels of SLA's sparse branch give them,
    handed that log-sum-exp.
    """
    call = _call(query, key, value, block_map, spec, proj_weight, proj_bias, key_bias, alpha, key_mean)
    grad_alpha = None
    if alpha is not None:
        grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    grads = transposed_empty(query), transposed_empty(key), transposed_empty(value)
    smoothing = None
    if spec.low_bit != "none":
        smoothing = token_mean(key, key_bias) if key_mean is None else key_mean
    grad_weight = grad_bias = None
    if proj_weight is not None and spec.linear != "none":
        grad_weight = query.new_zeros(proj_weight.shape, dtype=torch.float32)
    with torch.cuda.device_of(query):
        for chunk in call.chunks(backward=True):
            grad_weights = chunk.run_backward(grad_output, output, logsumexp, *grads, grad_alpha, smoothing)
            if grad_weight is not None and grad_weights is not None:
                grad_weight += grad_weights.sum((0, 1))
        if call.proj_bias is not None:
            grad_bias = grad_output.sum((0, 1, 2), dtype=torch.float32).to(call.proj_bias.dtype)
    if grad_weight is not None and proj_weight is not None:
        grad_weight = grad_weight.to(proj_weight.dtype)
    return *grads, grad_weight, grad_bias, grad_alpha


def pool_blocks(tokens: Tensor, block: int, key_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """:func:`sla_compile.kernels.routing.pool_blocks` in one launch."""
    batch, heads, length, dim = tokens.shape
    blocks = num_blocks(length, block)
    means = tokens.new_empty(batch, heads, blocks, dim, dtype=torch.float32)
    counts = None if key_bias is None else tokens.new_empty(batch, heads, blocks, 1, dtype=torch.float32)
    with torch.cuda.device_of(tokens):
        launch(
            pool_kernel,
            batch * heads * blocks,
            tokens_ptr=tokens, key_bias_ptr=key_bias, means_ptr=means, counts_ptr=counts,
            **strides_of("tokens", tokens), **strides_of("bias", key_bias, "batch", "token"), heads=heads,
            length=length, blocks=blocks, HEAD_DIM=dim, DIMS=padded_dims(dim), BLOCK=block, **addressing(tokens),
        )  # fmt: skip
    return means, counts


def select_blocks(scores: Tensor, critical: int, skipped: int, leading: int, trailing: int) -> Tensor:
    """:func:`sla_compile.kernels.routing.select_blocks` in one launch; of equal scores the first is the highest."""
    scores = scores.contiguous()
    columns = scores.shape[-1]
    block_map = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    with torch.cuda.device_of(scores):
        launch(
            select_kernel,
            block_map.numel() // columns,
            scores_ptr=scores, map_ptr=block_map, columns=columns, critical=critical,
            kept=max(0, trailing - leading) - skipped, leading=leading, trailing=trailing,
            COLS=triton.next_power_of_2(columns),
            # One warp needs no barriers; it holds a row in registers.
            num_warps=1 if columns <= 2048 else 4 if columns <= 8192 else 16,
        )  # fmt: skip
    return block_map


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launches `programs` programs of a kernel; where a compiler traces, it gets the launch and sees the kernel."""
    if torch.compiler.is_compiling():
        torch.library.wrap_triton(kernel)[(programs,)](**arguments)
    elif autotune.asked():
        autotune.launch(kernel, programs, arguments)
    else:
        kernel[(programs,)](**arguments)


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, and a chunk of its heads: key-value heads `start` .. `start + units` of all B * H_kv."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_map: Tensor
    spec: Spec
    proj_weight: Tensor | None
    proj_bias: Tensor | None
    key_bias: Tensor | None
    alpha: Tensor | None
    key_mean: Tensor | None
    plan: Plan
    start: int
    units: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def low_bit_dims(self) -> int:
        """Columns of an 8-bit tile: a matrix product of them takes at least 32."""
        return max(32, padded_dims(self.head_dim))

    @property
    def state_dtype(self) -> torch.dtype:
        """NOTE [Precision of states]."""
        return torch.bfloat16 if self.query.dtype == torch.bfloat16 else torch.float32

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def chunks(self, *, backward: bool) -> Iterator[_Call]:
        """The call in pieces whose transient tensors take at most TRANSIENT_BYTES, or one head if that takes more.

        Under a symbolic length the pieces are those of the largest one.
        """
        rows, columns = map(largest, self.block_map.shape[2:])
        lists = self.group * rows * columns * (2 if backward else 1)
        states = 0
        if self.spec.linear != "none":
            states = columns + self.group * rows if self.spec.linear == "marginal" else PARTIAL_SUMS + 1
            if backward:
                states += self.group * rows * (self.spec.block_q // self.plan.query_linear.tile_q)
        # Four bytes an entry of a list, two an element of the marginal mask.
        transient = 6 * lists + self.state_dtype.itemsize * states * state_size(self.head_dim)
        if self.spec.low_bit != "none" and not backward:
            transient += 2 * columns * self.spec.block_k * self.low_bit_dims
        step = max(1, TRANSIENT_BYTES // max(1, transient))
        if isinstance(self.units, torch.SymInt):
            if largest(self.units) > step:
                raise NotImplementedError(
                    f"a dynamic batch is one piece of work, of at most {step} heads at the largest length: bound the "
                    "dimensions of batch and length (torch.export.Dim(..., max=...)), or export a static batch"
                )
            yield self
            return
        if self.units:
            step = num_blocks(self.units, num_blocks(self.units, step))  # as many pieces, but of one size
        for start in range(0, self.units, step):
            yield replace(self, start=start, units=min(step, self.units - start))

    def run_forward(
        self, output: Tensor, logsumexp: Tensor, smoothing: Tensor | None, value_scales: Tensor | None
    ) -> None:
        """Fills this chunk's part of the results."""
        entries, counts = self.lists(columns=False)
        chosen = self.plan.forward
        common = self.common()
        low_key = key_scales = low_value = None
        if smoothing is not None:
            low_key, key_scales, low_value = self.quantized(smoothing, value_scales)
            common["DIMS"] = self.low_bit_dims
        launch(
            forward_kernel,
            self.units * self.group * self.block_map.shape[2] * (self.spec.block_q // chosen.tile_q),
            query_ptr=self.query, key_ptr=self.key, value_ptr=self.value, proj_bias_ptr=self.proj_bias,
            alpha_ptr=self.alpha, key_mean_ptr=smoothing, value_scales_ptr=value_scales, low_key_ptr=low_key,
            key_scales_ptr=key_scales, low_value_ptr=low_value, sums_ptr=self.linear_sums(), entries_ptr=entries,
            counts_ptr=counts, output_ptr=output, logsumexp_ptr=logsumexp,
            **strides_of("query", self.query), **strides_of("key", self.key), **strides_of("value", self.value),
            **strides_of("output", output), stride_proj_bias=stride_of(self.proj_bias, 0), **self.alpha_strides(),
            **strides_of("mean", smoothing, "batch", "head", "dim"), LOW_BIT=self.spec.low_bit,
            epsilon=self.spec.epsilon, head_start=self.start * self.group,
            STATE=state_size(self.head_dim), FEATURE_MAP=self.spec.feature_map, MIN_DENOMINATOR=MIN_DENOMINATOR,
            **addressing(self.query, self.key, self.value, output), SLICE=chosen.slice,
            LATE_VALUES=chosen.late_values, **common, **chosen.tiles,
        )  # fmt: skip

    def quantized(self, smoothing: Tensor, value_scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys (units, T_n, block_k, DIMS), their scales (units, T_n), values (units, T_n, DIMS, block_k) for "fp8"."""
        columns, block, dims = self.block_map.shape[3], self.spec.block_k, self.low_bit_dims
        low_key = self.empty(self.units, columns, block, dims, dtype=torch.int8)
        key_scales = self.empty(self.units, columns)
        low_value = None
        if value_scales is not None:
            low_value = self.empty(self.units, columns, dims, block, dtype=torch.float8_e4m3fn)
        launch(
            quantize_kernel,
            self.units * columns,
            key_ptr=self.key, value_ptr=self.value, key_bias_ptr=self.key_bias, key_mean_ptr=smoothing,
            value_scales_ptr=value_scales, low_key_ptr=low_key, key_scales_ptr=key_scales, low_value_ptr=low_value,
            **strides_of("key", self.key), **strides_of("value", self.value),
            **strides_of("bias", self.key_bias, "batch", "token"),
            **strides_of("mean", smoothing, "batch", "head", "dim"),
            head_start=self.start, heads=self.key.shape[1], length=self.key.shape[2], key_blocks=columns,
            HEAD_DIM=self.head_dim, DIMS=dims, BLOCK_K=block, **addressing(self.key, self.value), num_warps=8,
        )  # fmt: skip
        return low_key, key_scales, low_value

    def run_backward(
        self,
        grad_output: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        grad_alpha: Tensor | None,
        smoothing: Tensor | None,
    ) -> Tensor | None:
        """Fills this chunk's part of the gradients; returns what sums to the projection's over dimensions 0 and 1."""
        linear = self.spec.linear != "none"
        rows, columns = self.block_map.shape[2:]
        heads, state = self.units * self.group, state_size(self.head_dim)
        tensors = self.query, self.key, self.value, output, grad_output, grad_query, grad_key, grad_value
        addresses = addressing(*tensors)
        shared = dict(grad_output_ptr=grad_output, query_ptr=self.query, **strides_of("grad", grad_output),
                      **strides_of("query", self.query), **addresses)  # fmt: skip
        of_keys = dict(key_ptr=self.key, value_ptr=self.value, grad_key_ptr=grad_key, grad_value_ptr=grad_value,
                       **strides_of("key", self.key), **strides_of("value", self.value),
                       **strides_of("gk", grad_key), **strides_of("gv", grad_value))  # fmt: skip

        chosen = self.plan.query_linear
        tiles = rows * (self.spec.block_q // chosen.tile_q)
        # Whole blocks of rows: the loops over critical blocks read these without a mask.
        delta, logsumexp_log2 = (self.empty(heads, rows * self.spec.block_q) for _ in range(2))
        grad_states = self.empty(heads, tiles, state, dtype=self.state_dtype) if linear else None
        grad_shares = None if grad_alpha is None else self.empty(heads, rows, self.spec.block_q)
        launch(
            query_linear_kernel,
            heads * tiles,
            proj_bias_ptr=self.proj_bias, alpha_ptr=self.alpha, output_ptr=output, logsumexp_ptr=logsumexp,
            sums_ptr=self.linear_sums(), grad_query_ptr=grad_query, grad_states_ptr=grad_states,
            grad_alpha_ptr=grad_shares, delta_ptr=delta, logsumexp_log2_ptr=logsumexp_log2, **shared,
            **strides_of("output", output), **strides_of("gq", grad_query), **self.alpha_strides(),
            stride_proj_bias=stride_of(self.proj_bias, 0), epsilon=self.spec.epsilon,
            head_start=self.start * self.group, heads=self.query.shape[1], group=self.group,
            length=self.query.shape[2], query_blocks=rows, HEAD_DIM=self.head_dim, STATE=state,
            DIMS=padded_dims(self.head_dim), BLOCK_Q=self.spec.block_q, TILE_Q=chosen.tile_q, SLICE=chosen.slice,
            FEATURE_MAP=self.spec.feature_map, LINEAR=self.spec.linear, MIN_DENOMINATOR=MIN_DENOMINATOR,
            MIN_ALPHA=MIN_ALPHA, PRECISION=self.plan.precision, **chosen.options,
        )  # fmt: skip
        if grad_alpha is not None and grad_shares is not None:
            start = self.start * self.group
            grad_alpha.view(-1, rows)[start : start + heads] = grad_shares.sum(2)

        grad_weights = grad_projected = None
        if grad_states is not None:
            grad_sums = self.linear_grad_sums(grad_states)
            del grad_states
            chosen = self.plan.key_linear
            tiles = columns * (self.spec.block_k // chosen.tile_k)
            if self.proj_weight is not None:
                grad_projected = self.empty(self.units, *self.key.shape[2:], dtype=self.state_dtype)
            launch(
                key_linear_kernel,
                self.units * tiles,
                weight_ptr=self.proj_weight, key_bias_ptr=self.key_bias, key_mean_ptr=self.key_mean,
                grad_sums_ptr=grad_sums, grad_projected_ptr=grad_projected, **of_keys,
                **strides_of("weight", self.proj_weight, "out", "in"),
                **strides_of("bias", self.key_bias, "batch", "token"),
                **strides_of("mean", self.key_mean, "batch", "head", "dim"), head_start=self.start,
                heads=self.key.shape[1],
                length=self.key.shape[2], key_blocks=columns, HEAD_DIM=self.head_dim, STATE=state,
                DIMS=padded_dims(self.head_dim), BLOCK_K=self.spec.block_k, TILE_K=chosen.tile_k, SLICE=chosen.slice,
                FEATURE_MAP=self.spec.feature_map, LINEAR=self.spec.linear, PRECISION=self.plan.precision,
                **addresses, **chosen.options,
            )  # fmt: skip
            del grad_sums
            if grad_projected is not None:
                grad_weights = self.projection_gradient(grad_projected)
                del grad_projected

        # What the linear branch wrote is added to by the kernels that follow.
        chosen = self.plan.query_gradient
        entries, counts = self.lists(columns=False)
        launch(
            query_gradient_kernel,
            heads * rows * (self.spec.block_q // chosen.tile_q),
            key_ptr=self.key, value_ptr=self.value, key_mean_ptr=smoothing, logsumexp_log2_ptr=logsumexp_log2,
            entries_ptr=entries, counts_ptr=counts, grad_query_ptr=grad_query, delta_ptr=delta, **shared,
            **strides_of("key", self.key), **strides_of("value", self.value), **strides_of("gq", grad_query),
            **strides_of("mean", smoothing, "batch", "head", "dim"), head_start=self.start * self.group,
            **self.common(), **chosen.tiles,
        )  # fmt: skip
        chosen = self.plan.key_gradient
        entries, counts = self.lists(columns=True)
        launch(
            key_gradient_kernel,
            self.units * columns * (self.spec.block_k // chosen.tile_k),
            logsumexp_log2_ptr=logsumexp_log2, delta_ptr=delta, entries_ptr=entries, counts_ptr=counts, **shared,
            **of_keys, head_start=self.start, **self.common(), **chosen.tiles,
        )  # fmt: skip
        return grad_weights

    def projection_gradient(self, grad_projected: Tensor) -> Tensor:
        """Parts of the gradient to the projection, float32 (units, parts, D, D), from that to the projected values."""
        parts = num_blocks(self.key.shape[2], PROJECTION_TOKENS)
        grad_weights = self.empty(self.units, parts, self.head_dim, self.head_dim)
        chosen = self.plan.summaries  # of the same products
        launch(
            projection_gradient_kernel,
            self.units * parts * num_blocks(self.head_dim, chosen.slice),
            value_ptr=self.value, grad_projected_ptr=grad_projected, grad_weights_ptr=grad_weights,
            **strides_of("value", self.value), head_start=self.start, heads=self.key.shape[1],
            length=self.key.shape[2], parts=parts, part_tokens=PROJECTION_TOKENS, HEAD_DIM=self.head_dim,
            DIMS=padded_dims(self.head_dim), PRECISION=self.plan.precision, **addressing(self.value),
            SLICE=chosen.slice, TILE_K=chosen.tile_k, **chosen.options,
        )  # fmt: skip
        return grad_weights

    def alpha_strides(self) -> dict[str, int]:
        return strides_of("alpha", self.alpha, "batch", "head", "block")

    def common(self) -> dict[str, Any]:
        """Arguments of the kernels that walk the block lists."""
        return dict(
            key_bias_ptr=self.key_bias, **strides_of("bias", self.key_bias, "batch", "token"),
            scale=self.spec.scale, heads=self.query.shape[1], group=self.group, length=self.query.shape[2],
            query_blocks=self.block_map.shape[2], key_blocks=self.block_map.shape[3],
            HEAD_DIM=self.head_dim, DIMS=padded_dims(self.head_dim), BLOCK_Q=self.spec.block_q,
            BLOCK_K=self.spec.block_k, LINEAR=self.spec.linear, PRECISION=self.plan.precision,
        )  # fmt: skip

    def lists(self, *, columns: bool) -> tuple[Tensor, Tensor]:
        """The critical key blocks of each query block, or with `columns` the critical query blocks of each key block.

        Returns:
            int32 entries (heads, lists, capacity), ascending and undefined past counts (heads, lists). Every list has
            room for the longest one possible, so that no size depends on the map's values.
        """
        heads, (lists, length) = self.units * self.group, self.block_map.shape[2:]
        strides = strides_of("", self.block_map, "batch", "head", "list", "entry")
        lanes, step = 4, 256
        if columns:
            lists, length = length, lists
            strides["stride_list"], strides["stride_entry"] = strides["stride_entry"], strides["stride_list"]
            lanes, step = 32, 32
        entries = self.empty(heads, lists, length, dtype=torch.int32)
        counts = self.empty(heads, lists, dtype=torch.int32)
        launch(
            block_lists_kernel,
            heads * num_blocks(lists, lanes),
            map_ptr=self.block_map, entries_ptr=entries, counts_ptr=counts, **strides,
            head_start=self.start * self.group, heads=self.query.shape[1], lists=lists, length=length,
            LISTS=lanes, STEP=step,
        )  # fmt: skip
        return entries, counts

    def linear_sums(self) -> Tensor | None:
        """States (NOTE [State]) that a query block reads: (query heads, T_m, state), or (units, 1, state) for "all"."""
        if self.spec.linear == "none":
            return None
        rows, columns = self.block_map.shape[2:]
        slots, slot_blocks = columns, 1
        if self.spec.linear == "all":
            most = largest(columns)
            slots = num_blocks(most, num_blocks(most, PARTIAL_SUMS))
            slot_blocks = num_blocks(columns, slots)
        states = self.empty(self.units, slots, state_size(self.head_dim), dtype=self.state_dtype)
        chosen = self.plan.summaries
        launch(
            summaries_kernel,
            self.units * slots * num_blocks(self.head_dim, chosen.slice),
            key_ptr=self.key, value_ptr=self.value, weight_ptr=self.proj_weight, key_bias_ptr=self.key_bias,
            key_mean_ptr=self.key_mean, states_ptr=states, **strides_of("key", self.key),
            **strides_of("value", self.value), **strides_of("weight", self.proj_weight, "out", "in"),
            **strides_of("bias", self.key_bias, "batch", "token"),
            **strides_of("mean", self.key_mean, "batch", "head", "dim"),
            head_start=self.start, heads=self.key.shape[1], length=self.key.shape[2], slots=slots,
            slot_tokens=slot_blocks * self.spec.block_k, HEAD_DIM=self.head_dim, STATE=state_size(self.head_dim),
            DIMS=padded_dims(self.head_dim), FEATURE_MAP=self.spec.feature_map, PRECISION=self.plan.precision,
            **addressing(self.key, self.value), SLICE=chosen.slice, TILE_K=chosen.tile_k, **chosen.options,
        )  # fmt: skip
        if self.spec.linear == "all":
            return states.sum(1, keepdim=True)
        return self.block_sums(states, rows, columns, 1, columns=False)

    def linear_grad_sums(self, grad_states: Tensor) -> Tensor:
        """Gradients to the states of key blocks, (units, T_n, state), or (units, 1, state) for "all"."""
        if self.spec.linear == "all":
            return grad_states.view(self.units, -1, grad_states.shape[2]).sum(1, keepdim=True)
        parts = self.spec.block_q // self.plan.query_linear.tile_q
        return self.block_sums(grad_states, self.block_map.shape[3], grad_states.shape[1], parts, columns=True)

    def block_sums(self, states: Tensor, rows: int, terms: int, terms_per_block: int, *, columns: bool) -> Tensor:
        """Sums of states over the marginal blocks of each row of the map, or with `columns` of each column.

        A matrix product with the marginal mask. In bfloat16 torch's is the fastest there is (and rounds partial sums
        where torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction lets it); in float32 it would not run
        on tensor cores.
        """
        members, shared = (self.group, 1) if columns else (1, self.group)
        heads = self.units if columns else self.units * self.group
        if states.dtype == torch.bfloat16:
            marginal = self.marginal_mask(terms_per_block if columns else 1)
            if columns:
                marginal = marginal.mT
            sums = torch.bmm(marginal, states.view(self.units, members * terms, states.shape[2]))
            return sums.view(heads, rows, states.shape[2])
        strides = strides_of("", self.block_map, "batch", "head", "row", "term")
        if columns:
            strides["stride_row"], strides["stride_term"] = strides["stride_term"], strides["stride_row"]
        sums = self.empty(heads, rows, states.shape[2], dtype=self.state_dtype)
        chosen = self.plan.block_sums
        launch(
            block_sums_kernel,
            heads * num_blocks(rows, chosen.tile_q) * num_blocks(states.shape[2], chosen.slice),
            map_ptr=self.block_map, states_ptr=states, sums_ptr=sums, **strides, head_start=self.start * self.group,
            heads=self.query.shape[1], members=members, shared=shared, rows=rows, terms=terms, STATE=states.shape[2],
            TERMS_PER_BLOCK=terms_per_block, TILE_ROWS=chosen.tile_q, TILE_TERMS=chosen.tile_k,
            TILE_COLS=chosen.slice, PRECISION=self.plan.precision, **chosen.options,
        )  # fmt: skip
        return sums

    def marginal_mask(self, repeats: int) -> Tensor:
        """bfloat16 (units, group * T_m * repeats, T_n): 1 where a block is marginal, each row `repeats` times."""
        rows, columns = self.block_map.shape[2:]
        classes = self.block_map.flatten(0, 1)[self.start * self.group :][: self.units * self.group]
        # Rows are a multiple of 16 bytes apart: what the product reads at full width.
        padded = self.empty(self.units, self.group * rows, repeats, padded_to(columns, 8), dtype=torch.bfloat16)
        mask = padded[..., :columns]
        mask.copy_((classes == 0).reshape(self.units, self.group * rows, 1, columns).expand_as(mask))
        return padded.flatten(1, 2)[..., :columns]


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: Tensor,
    spec: Spec,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    key_bias: Tensor | None,
    alpha: Tensor | None,
    key_mean: Tensor | None,
) -> _Call:
    batch, heads, length, dim = query.shape
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(
            f"query, key and value must share one dtype of {DTYPES}, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    expected = batch, heads, num_blocks(length, spec.block_q), num_blocks(length, spec.block_k)
    if block_map.shape != expected or block_map.dtype != torch.int8:
        raise ValueError(f"block_map must be int8 {expected}, got {block_map.dtype} {tuple(block_map.shape)}")
    if spec.linear == "none":
        proj_weight = proj_bias = None
    if alpha is not None:
        if spec.linear == "none" or proj_weight is not None or proj_bias is not None:
            raise ValueError(f'alpha goes with a linear branch and without a projection, got linear="{spec.linear}"')
        if alpha.shape != expected[:3] or alpha.dtype != torch.float32:
            raise ValueError(f"alpha must be float32 {expected[:3]}, got {alpha.dtype} {tuple(alpha.shape)}")
    elif spec.linear != "none" and proj_weight is None:
        raise ValueError(f'linear="{spec.linear}" needs proj_weight or alpha')
    mean_shape = batch, key.shape[1], dim
    if key_mean is not None and (key_mean.shape != mean_shape or key_mean.dtype != torch.float32):
        raise ValueError(f"key_mean must be float32 {mean_shape}, got {key_mean.dtype} {tuple(key_mean.shape)}")
    target = target_of(query.device)
    if spec.low_bit not in LOW_BIT:
        raise ValueError(f'low_bit must be one of {LOW_BIT}, got "{spec.low_bit}"')
    if spec.low_bit == "fp8" and not target.fp8:
        raise NotImplementedError(
            f'low_bit="fp8" needs E4M3 matrix products (compute capability 8.9 or later), {target.name} has none: '
            'use low_bit="int8"'
        )
    if spec.low_bit == "int8" and not target.int8:
        raise NotImplementedError(
            f'low_bit="int8" needs int8 matrix products (compute capability 8.0 or later, gfx942), {target.name} is '
            'not known to have them: use low_bit="none"'
        )
    chosen = plan(padded_dims(dim), query.element_size(), spec.block_q, spec.block_k, target, spec.low_bit)
    units = batch * key.shape[1] if largest(query.numel()) else 0
    return _Call(
        query, key, value, block_map, spec, proj_weight, proj_bias, key_bias, alpha, key_mean, chosen, 0, units
    )
