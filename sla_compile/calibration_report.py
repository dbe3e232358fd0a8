"""What stage 1 of SLA2 did to each attention."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class CalibratedSite:
    """One attention at one sparsity; errors are ``sum |O - O_full|^2 / sum |O_full|^2`` with the hard choice of blocks.

    Args:
        name: the attention's.
        sparsity: the share of blocks that was not computed exactly.
        samples: how many were trained on; held_out: on how many others the errors are measured, 0 if on the same.
        before: error with the parameters that the model came with.
        start: with those and alpha as the measured mass on the chosen blocks.
        after: with what was trained.
        alpha: the trained alpha of each head, the mean over query blocks where these have their own.
    """

    name: str
    sparsity: float
    samples: int
    held_out: int
    before: float
    start: float
    after: float
    alpha: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can carry."""
        return {**dataclasses.asdict(self), "alpha": list(self.alpha)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibratedSite:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "alpha": tuple(values["alpha"])})


@dataclass(frozen=True)
class Calibration:
    """Every attention that was calibrated, in the model's order; ``str()`` of it is a table.

    Args:
        title: the model.
        rows: one :class:`CalibratedSite` for each attention and sparsity.
    """

    title: str
    rows: tuple[CalibratedSite, ...]

    def __iter__(self) -> Iterator[CalibratedSite]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can carry."""
        return {"title": self.title, "sites": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        """The report as JSON, indented, with a final newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __rich__(self) -> Table:
        table = Table(title=f"{escape(self.title)}: relative squared error against full attention")
        for column in ("attention", "sparsity", "samples", "before", "mass as alpha", "after", "alpha"):
            table.add_column(column, overflow="fold", justify="left" if column == "attention" else "right")
        for row in self.rows:
            samples = f"{row.samples} + {row.held_out}" if row.held_out else str(row.samples)
            alpha = f"{min(row.alpha):.2f} to {max(row.alpha):.2f}"
            numbers = (f"{value:.4f}" for value in (row.before, row.start, row.after))
            table.add_row(escape(row.name or "(the model itself)"), f"{row.sparsity:g}", samples, *numbers, alpha)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, no_color=True).print(self)
        return text.getvalue()
