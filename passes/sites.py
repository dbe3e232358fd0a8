"""One row of a report: an attention of a model or a graph, and what was decided for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One attention.

    Args:
        name: path of the owner in the model, or of the node in the graph where the owner is unknown.
        rewritten: whether it runs as sparse-linear attention.
        reason: why it stays dense, empty if rewritten.
        shape: query shape as text, symbols included; empty where it is not known without running.
        keys: number of keys as text, likewise.
        head_dim: D, if known.
        kind: how attention is written there, e.g. ``"scaled_dot_product_attention"`` or ``"softmax(q k^T) v"``.
        config: fingerprint of the configuration it was rewritten with, empty if dense.
        calls: calls seen in one forward, if known.
    """

    name: str
    rewritten: bool
    reason: str = ""
    shape: str = ""
    keys: str = ""
    head_dim: int | None = None
    kind: str = "scaled_dot_product_attention"
    config: str = ""
    calls: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can carry."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Site:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
