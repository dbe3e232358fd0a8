"""The low-bit forward of the sparse branch on the CPU: the operands of quantize.py, multiplied as float32 numbers.

Slower than 16 bit, with the numbers of a GPU: products of 8-bit integers are exact in float32, their sums over a head
dimension too, and products of E4M3 numbers. It is there for quantisation-aware training and tests without a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocks import Workspace, gather
from sla_compile.kernels.quantize import (
    FP8_MAX,
    quantize_blocks,
    quantize_channels,
    quantize_probabilities,
)
from sla_compile.kernels.smoothing import token_mean
from sla_compile.kernels.spec import Spec, num_blocks


class LowBitHead:
    """The quantised operands of one key-value head.

    Args:
        key, value: (L, D); key_bias: (L,) or None.
        key_mean: (D,), SLA2's, or None for the mean of the keys that take part.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        key_mean: Tensor | None,
        spec: Spec,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.dtype, self.value_dtype = spec, dtype, value.dtype
        key, value = key[None, None], value[None, None]
        key_bias = None if key_bias is None else key_bias[None]
        mean = token_mean(key, key_bias) if key_mean is None else key_mean[None, None]
        self.mean = mean[0, 0].to(dtype)
        low_key, scales = quantize_blocks(key, spec.block_k, mean=mean, key_bias=key_bias)
        self.keys, self.key_scales = self._blocks(low_key, spec.block_k), scales[0, 0].to(dtype)
        self.value_scales: Tensor | None = None
        if spec.low_bit == "fp8":
            value, scales = quantize_channels(value, key_bias=key_bias)
            self.value_scales = scales[0, 0].to(dtype)
        self.values = self._blocks(value, spec.block_k)

    def _blocks(self, tokens: Tensor, block: int) -> Tensor:
        length, dim = tokens.shape[2:]
        padded = torch.zeros(num_blocks(length, block) * block, dim, dtype=self.dtype)
        padded[:length] = tokens[0, 0]
        return padded.view(-1, block, dim)

    def start(self, query: Tensor) -> None:
        """Takes up a query head (L, D)."""
        low_query, scales = quantize_blocks(query[None, None], self.spec.block_q)
        self.queries = self._blocks(low_query, self.spec.block_q)
        self.query_scales = scales[0, 0].to(self.dtype) * self.spec.scale
        # From the frame of smoothed keys back to that of the keys, see NOTE [Frame] in quantize.py.
        self.offset = self._blocks(query[None, None], self.spec.block_q) @ self.mean[:, None] * self.spec.scale

    def attend(
        self, rows: Tensor, columns: Tensor, mask: Tensor | None, alpha: Tensor | None, added: Tensor, space: Workspace
    ) -> Tensor:
        """Adds alpha O_s of some query blocks to `added` (n, b_q, D); returns its log-sum-exp (n, b_q, 1).

        Args:
            rows: (n,), which query blocks; columns: (n, count), their critical key blocks; mask: (n, 1, span).
        """
        block_k, dim = self.keys.shape[1:]
        number, count = columns.shape
        buffer = space("gathered", number, count * block_k, dim)
        scores = torch.bmm(self.queries[rows], gather(self.keys, columns, buffer).transpose(1, 2))
        scores *= self.query_scales[rows, None, None]
        scores *= self.key_scales[columns].repeat_interleave(block_k, 1).unsqueeze(1)
        if mask is not None:
            scores += mask
        scores /= math.log(2)
        maximum = scores.amax(-1, keepdim=True)
        reference = maximum.ceil() if self.spec.low_bit == "fp8" else maximum
        scores -= reference.masked_fill(maximum == -torch.inf, 0)
        total = scores.exp2().sum(-1, keepdim=True)
        values = gather(self.values, columns, buffer)
        if self.value_scales is None:
            product = torch.bmm(scores.exp2().to(self.value_dtype).to(self.dtype), values)
        else:
            product = torch.bmm(quantize_probabilities(scores).to(self.dtype), values) * (self.value_scales / FP8_MAX)
        product /= total.where(total > 0, 1)
        added += product if alpha is None else alpha * product
        return (reference + total.log2()) * math.log(2) + self.offset[rows]
