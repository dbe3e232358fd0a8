"""What the user can choose: one frozen, validated, serialisable object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

METHODS = ("sla",)
FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("marginal", "all", "none")
BLOCK_Q_SIZES = (64, 128)
BLOCK_K_SIZES = (64,)
LOW_BIT = (None, "int8", "fp8")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class SLAConfig:
    """How an attention is split into critical, marginal and negligible blocks, and what becomes of each.

    Args:
        sparsity: share of key blocks, in (0, 1), that is *not* computed exactly; 0.95 keeps 5 % of the blocks
            of every query block (SLA, arXiv 2509.24006, section 4: ``k_h = 1 - sparsity``).
        negligible: share of key blocks, in [0, 1), that is skipped altogether (``k_l``); the paper's 10 %.
        method: ``"sla"``.
        feature_map: feature map of the linear branch, over the head dimension: ``"softmax"`` (the paper's),
            ``"elu"`` (elu(x) + 1) or ``"relu"``.
        linear: which keys the linear branch sums: ``"marginal"`` blocks (the paper), ``"all"`` keys (public
            checkpoints of the authors), or ``"none"``, block-sparse attention without a linear branch, which needs
            no training and has no parameters.
        block_q: tokens of a query block, 64 or 128.
        block_k: tokens of a key block, 64.
        critical_blocks: number of critical blocks of a row, instead of ``sparsity``; ``None`` derives it from the
            length as ``max(1, floor((1 - sparsity) * num_key_blocks + 1e-6))``.
        pinned: tokens at the (start, end) of the sequence that stay exact: every query attends to their blocks and
            their queries attend to everything. For joint text and video sequences. An int means the start.
        min_seq_len: shorter sequences, in tokens, stay dense.
        low_bit: precision of the sparse branch's forward: ``None`` (as the inputs), ``"int8"`` or ``"fp8"``.

    Raises:
        ValueError: a value is outside its range or not one of the names above.
        TypeError: a value has the wrong type.
    """

    sparsity: float = 0.95
    negligible: float = 0.10
    method: str = "sla"
    feature_map: str = "softmax"
    linear: str = "marginal"
    block_q: int = 64
    block_k: int = 64
    critical_blocks: int | None = None
    pinned: tuple[int, int] = (0, 0)
    min_seq_len: int = 4096
    low_bit: str | None = None

    def __post_init__(self) -> None:
        _check_share("sparsity", self.sparsity, low_open=True)
        _check_share("negligible", self.negligible, low_open=False)
        if self.negligible > self.sparsity:
            raise ValueError(
                f"negligible={self.negligible} exceeds sparsity={self.sparsity}: the skipped blocks are part of the "
                "sparse ones; lower negligible or raise sparsity"
            )
        _check_choice("method", self.method, METHODS)
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _check_choice("linear", self.linear, LINEAR_SCOPES)
        _check_choice("block_q", self.block_q, BLOCK_Q_SIZES)
        _check_choice("block_k", self.block_k, BLOCK_K_SIZES)
        if self.critical_blocks is not None:
            _check_count("critical_blocks", self.critical_blocks, minimum=1)
        _check_choice("low_bit", self.low_bit, LOW_BIT)
        _check_count("min_seq_len", self.min_seq_len, minimum=1)
        pinned = (self.pinned, 0) if isinstance(self.pinned, int) else self.pinned
        if not isinstance(pinned, (tuple, list)) or len(pinned) != 2:
            raise TypeError(f"pinned must be an int or a (start, end) pair of token counts, got {self.pinned!r}")
        for count in pinned:
            _check_count("pinned", count, minimum=0)
        object.__setattr__(self, "pinned", tuple(pinned))
        object.__setattr__(self, "sparsity", float(self.sparsity))
        object.__setattr__(self, "negligible", float(self.negligible))

    @property
    def has_projection(self) -> bool:
        """Whether a call needs the learnable projection of the linear branch."""
        return self.linear != "none"

    def replace(self, **changes: Any) -> SLAConfig:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can carry."""
        values = dataclasses.asdict(self)
        values["pinned"] = list(self.pinned)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SLAConfig:
        """The inverse of :meth:`to_dict`; unknown fields are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown SLAConfig fields {unknown}; known are {sorted(known)}")
        values = dict(values)
        if isinstance(values.get("pinned"), list):
            values["pinned"] = tuple(values["pinned"])
        return cls(**values)

    def fingerprint(self) -> str:
        """Stable hexadecimal digest of all fields, for cache keys and saved files."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _check_share(name: str, value: Any, *, low_open: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    above = value > 0 if low_open else value >= 0
    if not (math.isfinite(value) and above and value < 1):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}0, 1), got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_count(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
