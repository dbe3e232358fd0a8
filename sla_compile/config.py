"""What the user can choose: one frozen, validated, serialisable object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

METHODS = ("sla", "sla2")
FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("marginal", "all", "none")
BLOCK_Q_SIZES = (64, 128)
BLOCK_K_SIZES = (64,)
ALPHA_SHARING = ("head", "block")
LOW_BIT = (None, "int8", "fp8")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class SLAConfig:
    """How an attention is split into critical, marginal and negligible blocks, and what becomes of each.

    Args:
        sparsity: share of key blocks, in (0, 1), that is *not* computed exactly; 0.95 keeps 5 % of the blocks
            of every query block (SLA, arXiv 2509.24006, section 4: ``k_h = 1 - sparsity``).
        negligible: share of key blocks, in [0, 1), that is skipped altogether (``k_l``). ``None`` is the method's own:
            10 % for SLA, as in the paper, and none for SLA2, which has no such class.
        method: ``"sla"``, ``O_s + O_l W^T + b``, or ``"sla2"`` (arXiv 2602.12675), ``alpha O_s + (1 - alpha) O_l`` over
            keys without their mean, with a router's choice of blocks.
        feature_map: feature map of the linear branch, over the head dimension: ``"softmax"`` (the paper's),
            ``"elu"`` (elu(x) + 1) or ``"relu"``.
        linear: which keys the linear branch sums: ``"marginal"`` blocks (the paper), ``"all"`` keys (public
            checkpoints of the authors), or ``"none"``, block-sparse attention without a linear branch, which needs
            no training and has no parameters (SLA only).
        block_q: tokens of a query block, 64 or 128.
        block_k: tokens of a key block, 64.
        critical_blocks: number of critical blocks of a row, instead of ``sparsity``; ``None`` derives it from the
            length as ``max(1, floor((1 - sparsity) * num_key_blocks + 1e-6))``.
        pinned: tokens at the (start, end) of the sequence that stay exact: every query attends to their blocks and
            their queries attend to everything. For joint text and video sequences. An int means the start.
        min_seq_len: shorter sequences, in tokens, stay dense.
        padding_masks: whether a mask that is written out for each query, (batch, 1 or heads, L, L), which stays dense
            otherwise, is taken for a key-padding mask. Every call asserts that all queries have the same keys or none:
            the output of those is zero. It reads the mask three times in every call. ONNX has no assertions.
        alpha_per: what shares an alpha of SLA2: a whole ``"head"``, which fits every length, or a head's query
            ``"block"`` (the paper), which binds the parameters to one length.
        low_bit: precision of the sparse branch's forward: ``None`` (as the inputs), ``"int8"`` or ``"fp8"``.

    Raises:
        ValueError: a value is outside its range or not one of the names above.
        TypeError: a value has the wrong type.
    """

    sparsity: float = 0.95
    negligible: float = None  # type: ignore[assignment]  # a number from __post_init__ on
    method: str = "sla"
    feature_map: str = "softmax"
    linear: str = "marginal"
    block_q: int = 64
    block_k: int = 64
    critical_blocks: int | None = None
    pinned: tuple[int, int] = (0, 0)
    min_seq_len: int = 4096
    padding_masks: bool = False
    alpha_per: str = "head"
    low_bit: str | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        if self.negligible is None:
            object.__setattr__(self, "negligible", 0.0 if self.has_alpha else 0.10)
        _check_share("sparsity", self.sparsity, low_open=True)
        _check_share("negligible", self.negligible, low_open=False)
        if self.negligible > self.sparsity:
            raise ValueError(
                f"negligible={self.negligible} exceeds sparsity={self.sparsity}: the skipped blocks are part of the "
                "sparse ones; lower negligible or raise sparsity"
            )
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _check_choice("linear", self.linear, LINEAR_SCOPES)
        _check_choice("alpha_per", self.alpha_per, ALPHA_SHARING)
        self._check_method()
        _check_choice("block_q", self.block_q, BLOCK_Q_SIZES)
        _check_choice("block_k", self.block_k, BLOCK_K_SIZES)
        if self.critical_blocks is not None:
            _check_count("critical_blocks", self.critical_blocks, minimum=1)
        _check_choice("low_bit", self.low_bit, LOW_BIT)
        _check_count("min_seq_len", self.min_seq_len, minimum=1)
        if not isinstance(self.padding_masks, bool):
            raise TypeError(f"padding_masks must be True or False, got {self.padding_masks!r}")
        pinned = (self.pinned, 0) if isinstance(self.pinned, int) else self.pinned
        if not isinstance(pinned, (tuple, list)) or len(pinned) != 2:
            raise TypeError(f"pinned must be an int or a (start, end) pair of token counts, got {self.pinned!r}")
        for count in pinned:
            _check_count("pinned", count, minimum=0)
        object.__setattr__(self, "pinned", tuple(pinned))
        object.__setattr__(self, "sparsity", float(self.sparsity))
        object.__setattr__(self, "negligible", float(self.negligible))

    def _check_method(self) -> None:
        """Raises ValueError for what the other method has."""
        if not self.has_alpha:
            if self.alpha_per != "head":
                raise ValueError(f'alpha_per="{self.alpha_per}" is for method="sla2": SLA has no alpha')
            return
        if self.negligible:
            raise ValueError(
                f'negligible={self.negligible} is for method="sla": SLA2\'s linear branch sums all blocks that are not '
                "critical; leave negligible out"
            )
        if self.linear == "none":
            raise ValueError(
                'linear="none" leaves alpha nothing to weigh; use method="sla" with linear="none" for block-sparse '
                'attention alone, or linear="marginal" for SLA2'
            )

    @property
    def has_alpha(self) -> bool:
        """Whether it is SLA2, which has alpha and a router and no projection."""
        return self.method == "sla2"

    @property
    def has_projection(self) -> bool:
        """Whether a call needs the learnable projection of SLA's linear branch."""
        return self.linear != "none" and not self.has_alpha

    @property
    def has_parameters(self) -> bool:
        """Whether an attention gets parameters at all."""
        return self.has_alpha or self.has_projection

    def replace(self, **changes: Any) -> SLAConfig:
        """A copy with some fields changed, validated anew. Another `method` comes with its own defaults."""
        if changes.get("method", self.method) != self.method:
            changes = {"negligible": None, "alpha_per": "head", **changes}
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
