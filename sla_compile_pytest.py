"""The pytest plugin: the fixture ``sla_snapshot`` and the option ``--sla-update-snapshots``.

It stands beside the package and not in it, because every run of pytest loads it and loading the package loads torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = "__sla_snapshots__"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--sla-update-snapshots``."""
    parser.getgroup("sla_compile").addoption(
        "--sla-update-snapshots", action="store_true", help="write the snapshots of sla_snapshot instead of comparing"
    )


@pytest.fixture
def sla_snapshot(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``sla_snapshot(model, example_inputs, **options)``: assert_rewritten against a snapshot of this test.

    The file is ``__sla_snapshots__/<test file>/<test>.json`` beside the test file; ``name="..."`` tells several of one
    test apart.
    """
    update = request.config.getoption("--sla-update-snapshots")
    test = request.node.nodeid.partition("::")[2]  # with its class

    def compare(model: Any, example_inputs: Any = None, *, name: str = "", **options: Any) -> Any:
        from sla_compile.testing import assert_rewritten

        __tracebackhide__ = True
        file = "".join(f"{_plain(part)}." for part in (test, name) if part) + "json"
        path = Path(request.path).parent / FOLDER / Path(request.path).stem / file
        return assert_rewritten(model, example_inputs, snapshot=path, update=update, **options)

    return compare


def _plain(name: str) -> str:
    """Without what a file's name had better not hold."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")
