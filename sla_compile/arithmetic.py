"""Floating-point operations of attention, dense and sparse-linear, as the formulas count them.

Products alone are counted, two operations a multiply-add; softmax, feature maps and pooling are left out.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass

from sla_compile.config import SLAConfig
from sla_compile.kernels.routing import pinned_first_last
from sla_compile.kernels.spec import critical_count, num_blocks
from sla_compile.passes.sites import Site

BACKWARD_PRODUCTS = 2.5  # over those of the forward: five products where it has two


@dataclass(frozen=True)
class Operations:
    """Of one call, or a sum of calls.

    Args:
        before: of dense attention.
        exact: what is still computed exactly: the critical blocks, or all of an attention that stays dense.
        linear: of the linear branch and its projection.
        routing: of the scores of blocks.
    """

    before: float = 0.0
    exact: float = 0.0
    linear: float = 0.0
    routing: float = 0.0

    @property
    def after(self) -> float:
        return self.exact + self.linear + self.routing

    def __add__(self, other: Operations) -> Operations:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Operations(*(one + another for one, another in zip(mine, others, strict=True)))

    def to_dict(self) -> dict[str, float]:
        """Plain values that JSON can carry."""
        return {**dataclasses.asdict(self), "after": self.after}


def operations(site: Site, config: SLAConfig | None) -> Operations | None:
    """Operations of the call that a report's row shows; None where its shape or configuration is not known."""
    try:
        shape, keys = ast.literal_eval(site.shape), int(site.keys)
    except (SyntaxError, ValueError):
        return None
    if not isinstance(shape, tuple) or len(shape) < 3 or not all(isinstance(size, int) for size in shape):
        return None
    if config is None and site.rewritten:
        return None
    return attention_operations(shape, keys, config)


def attention_operations(shape: tuple[int, ...], keys: int, config: SLAConfig | None) -> Operations:
    """Operations of an attention of queries (..., heads, L, D) to `keys` keys, dense without a configuration.

    Dense: ``4 L_q L_k D`` a head. Sparse-linear (SLA, arXiv 2509.24006): the share of critical blocks of it; for the
    linear branch ``2 L D^2`` each for the block summaries, for reading them and for the projection, which SLA2 (arXiv
    2602.12675) has not, and ``2 T_m T_n D^2`` for their sums over the marginal blocks; ``2 T_m T_n D`` for the scores
    of blocks.
    """
    *leading, length, dim = shape
    heads = 1
    for size in leading:
        heads *= size
    before = 4.0 * heads * length * keys * dim
    if config is None:
        return Operations(before, before)
    rows, columns = num_blocks(length, config.block_q), num_blocks(length, config.block_k)
    exact = before * critical_share(length, config)
    routing = 2.0 * heads * rows * columns * dim
    if config.linear == "none":
        return Operations(before, exact, 0.0, routing)
    linear = (2 if config.method == "sla2" else 3) * 2.0 * heads * length * dim**2
    if config.linear == "marginal":
        linear += 2.0 * heads * rows * columns * dim**2
    return Operations(before, exact, linear, routing)


def critical_share(length: int, config: SLAConfig) -> float:
    """Share of the blocks that routing makes critical, pinned ones among them."""
    columns = num_blocks(length, config.block_k)
    pinned = pinned_first_last(length, config.block_k, config.pinned)[2]
    critical = pinned + min(critical_count(columns, config.sparsity, config.critical_blocks), columns - pinned)
    rows = num_blocks(length, config.block_q)
    pinned_rows = pinned_first_last(length, config.block_q, config.pinned)[2]
    return (pinned_rows * columns + (rows - pinned_rows) * critical) / (rows * columns)


def readable(number: float) -> str:
    """``3.1 TFLOP``, with three digits at most."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if number < 999.5 or unit == "PFLOP":
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError  # the last unit returns
