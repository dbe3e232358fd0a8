"""What each kernel of a call has to do at least, from shapes alone, and how long that takes at measured ceilings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an uninstalled checkout works

from sla_compile.bench import Shape
from sla_compile.config import SLAConfig
from sla_compile.kernels.spec import critical_count, num_blocks


@dataclass(frozen=True)
class Ceilings:
    """Operations a second of a large matrix product; bytes a second of copies in device memory and in the cache."""

    operations: float
    memory: float
    cache: float


@dataclass(frozen=True)
class Work:
    """Operations, bytes of device memory if everything moves once, and bytes that tiles are read again in the cache."""

    operations: float
    memory: float
    cache: float = 0.0

    def milliseconds(self, ceilings: Ceilings) -> float:
        """The longest of the three, which overlap."""
        seconds = (self.operations / ceilings.operations, self.memory / ceilings.memory, self.cache / ceilings.cache)
        return 1e3 * max(seconds)


def kernel_work(shape: Shape, config: SLAConfig, *, backward: bool) -> dict[str, Work]:
    """The work of every Triton kernel of a forward or a backward, by the name that a profiler shows.

    For linear="marginal" and as many key-value heads as heads. A backward builds the states once more. "sums of states"
    is the product with the marginal mask, which is torch's for bfloat16. Of 8-bit operations two count as one.
    """
    heads, dim, item = shape.batch * shape.heads, shape.dim, shape.dtype.itemsize
    rows, columns = num_blocks(shape.length, config.block_q), num_blocks(shape.length, config.block_k)
    blocks = heads * rows * critical_count(columns, config.sparsity, config.critical_blocks)
    tokens = heads * shape.length * dim * item  # bytes of a tensor of tokens
    product = 2 * heads * shape.length * dim**2  # a matrix with every token
    scores = 2 * blocks * config.block_q * config.block_k * dim  # one product over the critical blocks
    state = dim * (dim + 1) * (2 if shape.dtype == torch.bfloat16 else 4)
    of_rows, of_columns = heads * rows * state, heads * columns * state
    projected, kept = config.has_projection, tokens * (1 if shape.dtype == torch.bfloat16 else 4 // item)
    lists = heads * rows * columns + 4 * blocks  # bytes of the map and its entries
    pool = Work(0, 2 * tokens)
    select = Work(0, 5 * heads * rows * columns)  # scores, and a byte of the map
    keys_again = 2 * blocks * config.block_k * dim * item
    sums = Work(2 * heads * rows * columns * dim * (dim + 1), of_rows + of_columns)
    if not backward:
        low = {None: 0, "int8": 1, "fp8": 2}[config.low_bit]  # operands of 8 bits: keys, and values
        read = keys_again - low * (item - 1) * blocks * config.block_k * dim
        work = {
            "pool_kernel": pool,
            "select_kernel": select,
            "block_lists_kernel": Work(0, lists),
            "summaries_kernel": Work((1 + projected) * product, 2 * tokens + of_columns),
            "sums of states": sums,
            "forward_kernel": Work((2 - low / 2) * scores + product, 4 * tokens + of_rows, read + of_rows),
        }
        if low:
            work["quantize_kernel"] = Work(0, low * (item + 1) * tokens / item)
        return work
    work = {
        "pool_kernel": pool,
        "select_kernel": select,
        "block_lists_kernel": Work(0, 2 * lists),
        "summaries_kernel": Work((1 + projected) * product, 2 * tokens + of_columns),
        "sums of states": Work(2 * sums.operations, 2 * sums.memory),
        "query_linear_kernel": Work(2 * product, 4 * tokens + 2 * of_rows),
        "key_linear_kernel": Work(2 * (1 + projected) * product, 4 * tokens + of_columns + projected * kept),
        "query_gradient_kernel": Work(3 * scores, 6 * tokens, keys_again),
        "key_gradient_kernel": Work(4 * scores, 8 * tokens, 2 * blocks * config.block_q * dim * item),
    }
    if projected:
        work["projection_gradient_kernel"] = Work(product, tokens + kept)
    return work
