"""One row of a report: an attention of a model or a graph, and what was decided for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WRAPPERS = frozenset("_orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module".split())
"""Under which torch.compile, checkpoint_wrapper and FSDP keep a module that they wrap."""


def plain_name(name: str) -> str:
    """A module's path as it is where nothing is wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Site:
    """One attention.

    Args:
        name: path of the owner in the model, or of the node in the graph where the owner is unknown.
        rewritten: whether it runs as sparse-linear attention.
        reason: why it stays dense; if rewritten, why some of its calls do, or that it was not called; else empty.
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

    def of_calls(self, calls: Sequence[Call]) -> Site:
        """A copy that tells of the calls of one forward; it shows the longest, of the redirected ones if there are."""
        shown = max(calls, key=lambda call: (call.reason is None, call.query[-2]))
        rewritten, dense = shown.reason is None, [call.reason for call in calls if call.reason is not None]
        return self.replace(
            rewritten=rewritten,
            reason=partly_dense(dense, len(calls)) if rewritten else shown.reason,
            shape=str(shown.query),
            keys=str(shown.keys),
            calls=len(calls),
        )


@dataclass(frozen=True)
class Call:
    """One call of attention: shape of the query, number of keys, and why it stays dense, or None."""

    query: tuple[int, ...]
    keys: int
    reason: str | None


def partly_dense(reasons: Sequence[str], calls: int) -> str:
    """What a row says of the calls that stay dense beside others; an empty string where none does."""
    if not reasons:
        return ""
    stay = "stays" if len(reasons) == 1 else "stay"
    return f"{len(reasons)} of {calls} calls {stay} dense: {'; '.join(dict.fromkeys(reasons))}"
