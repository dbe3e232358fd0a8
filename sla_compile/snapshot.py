"""Decisions about a model's attentions as a small text file to keep under version control.

    {
      "sla_compile": 1,
      "model": "WanTransformer3DModel",
      "configurations": {
        "A": {"sparsity": 0.95, "negligible": 0.1, ...}
      },
      "attentions": [
        {"name": "blocks.0.attn1", "query": "(1, 12, 32760, 128)", "keys": "32760", "becomes": "sparse-linear A"},
        {"name": "blocks.0.attn2", "query": "(1, 12, 32760, 128)", "keys": "512", "becomes": "dense", "why": "..."}
      ]
    }

One line an attention and one a configuration, so that a diff shows what changed and nothing else.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sla_compile.examine import Examination

FORMAT = 1
_KEY = "sla_compile"


def render(examination: Examination) -> str:
    """The text of a snapshot."""
    names: dict[str, str] = {}
    attentions = []
    for site in examination.report:
        row: dict[str, Any] = {"name": site.name}
        if site.shape:
            row |= {"query": site.shape, "keys": site.keys}
        elif site.head_dim is not None:
            row["head_dim"] = site.head_dim
        if (site.calls or 1) > 1:
            row["calls"] = site.calls
        if site.rewritten:
            if site.config in examination.configs:
                names.setdefault(site.config, label(len(names)))
            row["becomes"] = f"sparse-linear {names.get(site.config, site.config)}"
        else:
            row["becomes"] = "dense"
        if site.reason or not site.rewritten:
            row["why"] = site.reason
        attentions.append(json.dumps(row, ensure_ascii=False))
    configurations = [
        f"{json.dumps(letter)}: {json.dumps(examination.configs[fingerprint].to_dict())}"
        for fingerprint, letter in names.items()
    ]
    return (
        f'{{\n  "{_KEY}": {FORMAT},\n  "model": {json.dumps(examination.report.title)},\n'
        f'  "configurations": {_lines("{}", configurations)},\n  "attentions": {_lines("[]", attentions)}\n}}\n'
    )


def label(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letters = chr(ord("A") + number % 26)
    return letters if number < 26 else label(number // 26 - 1) + letters


def _lines(brackets: str, items: list[str]) -> str:
    if not items:
        return brackets
    return brackets[0] + "\n    " + ",\n    ".join(items) + "\n  " + brackets[1]


def compare(path: str | os.PathLike[str], examination: Examination, *, update: bool = False) -> None:
    """Compares with the snapshot at `path`, or with `update` writes it.

    Without `update`, a file that is not there is written, except under continuous integration (the environment variable
    ``CI`` is set), and the comparison fails all the same: nobody has looked at it yet.

    Raises:
        AssertionError: there is no such file, or it differs; the text holds a unified diff.
        ValueError: the file is no snapshot, of another format version, or of another model.
    """
    path, text = Path(path), render(examination)
    how = "update it: sla-compile check --update, pytest --sla-update-snapshots or assert_rewritten(..., update=True)"
    try:
        kept = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if update:
            write(path, text)
            return
        if in_ci():
            raise AssertionError(
                f"there is no snapshot {path}, and none is written under CI: write it on your machine and commit it"
            ) from None
        write(path, text)
        raise AssertionError(f"there was no snapshot {path}: written now; look at it and commit it") from None
    _check_header(path, kept, examination.report.title, update, how)
    if kept == text:
        return
    if update:
        write(path, text)
        return
    diff = "".join(
        difflib.unified_diff(kept.splitlines(True), text.splitlines(True), f"{path} (kept)", "this model (now)", n=1)
    )
    raise AssertionError(f"{examination.report.title} differs from its snapshot; if that is meant, {how}\n\n{diff}")


def _check_header(path: Path, kept: str, model: str, update: bool, how: str) -> None:
    """Nothing that is not a snapshot of this model is overwritten, not even when updating: the path may be wrong."""
    try:
        header = json.loads(kept)
        version, title = header[_KEY], header["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a snapshot of sla_compile ({error}); delete it to have one written") from None
    if title != model:
        raise ValueError(f"{path} is the snapshot of a {title}, not of a {model}; delete it if that is meant")
    if version != FORMAT and not update:
        raise ValueError(f"{path} has format {version}, this version of sla_compile writes format {FORMAT}; {how}")


def write(path: Path, text: str) -> None:
    """Writes the file whole or not at all, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        written.write_text(text, encoding="utf-8", newline="\n")
        os.replace(written, path)


def in_ci() -> bool:
    """Whether this is a run of continuous integration, which must not make up what it is to compare with."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
