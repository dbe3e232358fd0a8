"""What became of every attention of a model or graph."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sla_compile.passes.sites import Site


@dataclass(frozen=True)
class Report:
    """Every attention that was found, in the model's order; ``str()`` of it is a table.

    Args:
        title: what was accelerated.
        rows: one :class:`Site` an attention.
    """

    title: str
    rows: tuple[Site, ...]

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """Those that run as sparse-linear attention."""
        return tuple(row for row in self.rows if row.rewritten)

    @property
    def dense(self) -> tuple[Site, ...]:
        """Those that stay dense, each with its reason."""
        return tuple(row for row in self.rows if not row.rewritten)

    def __iter__(self) -> Iterator[Site]:
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
        table = Table(title=f"{escape(self.title)}: {len(self.rewritten)} of {len(self.rows)} attentions rewritten")
        for column in ("attention", "query", "keys", "head dim", "becomes", "why"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            dim = "" if row.head_dim is None else str(row.head_dim)
            became = "[green]sparse-linear[/green]" if row.rewritten else "[yellow]dense[/yellow]"
            name, reason = escape(row.name or "(the model itself)"), escape(row.reason)
            table.add_row(name, row.shape, row.keys, dim, became, reason)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, no_color=True).print(self)
        return text.getvalue()
