"""``sla-compile inspect`` and ``sla-compile check``: what becomes of a model's attentions, and if it still does."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import sys
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn
from torch.utils._pytree import tree_leaves

from sla_compile.arithmetic import Operations, operations, readable
from sla_compile.block_maps import block_maps, pick
from sla_compile.config import SLAConfig
from sla_compile.examine import Examination, examine
from sla_compile.page import render
from sla_compile.snapshot import write
from sla_compile.testing import check
from sla_compile.usage import Subcommands, UsageError


def add_inspect_parser(commands: Subcommands) -> None:
    """``sla-compile inspect``: a table, JSON or a page about a model's attentions."""
    parser = commands.add_parser(
        "inspect",
        help="say what becomes of every attention of a model",
        description="Builds a model and says of each attention whether it would become sparse-linear attention and why "
        "not, or, where the model is accelerated already, whether it did. Changes nothing.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a self-contained page, with pictures")
    parser.add_argument(
        "--maps",
        type=_count,
        default=4,
        metavar="N",
        help="attentions whose block maps the page shows; they take one run of the model (default: 4; 0 for none)",
    )
    parser.set_defaults(run=run_inspect, prog=parser.prog)


def add_check_parser(commands: Subcommands) -> None:
    """``sla-compile check``: the decisions against a snapshot."""
    parser = commands.add_parser(
        "check",
        help="compare what becomes of a model's attentions with a snapshot",
        description="Exits with 0 if every attention is decided as the snapshot has it, 1 if not, 2 for a mistake.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--snapshot", type=Path, help="the file to compare with, or to write")
    parser.add_argument("--update", action="store_true", help="write the snapshot instead of comparing with it")
    parser.add_argument(
        "--expect",
        action="append",
        metavar="N|PATTERN",
        help="number of rewritten attentions, or a pattern of their names; several patterns by several options",
    )
    parser.set_defaults(run=run_check, prog=parser.prog)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("build", help="function that returns the model, as my.module:build or path/to/file.py:build")
    parser.add_argument("--inputs", help="function that returns its example inputs, a tuple or dict; exact decisions")
    parser.add_argument("--sparsity", type=float, help="share of blocks not computed exactly (default: 0.95)")
    parser.add_argument("--min-seq-len", type=int, help="shorter sequences stay dense (default: 4096)")
    parser.add_argument("--config", type=Path, help="JSON file of SLAConfig fields; the two options above override it")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="only attentions whose name matches")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="attentions that stay dense")
    parser.add_argument("--meta", action="store_true", help="build on the meta device, without memory for weights")


def run_inspect(given: argparse.Namespace) -> int:
    """0, or 1 where an accelerated model is silently dense."""
    if given.html is not None and not given.html.parent.is_dir():
        raise UsageError(f"--html {given.html}: the folder {given.html.parent} does not exist")
    aside = redirect_stdout(sys.stderr) if given.json else nullcontext()  # what the user's code prints is no JSON
    with aside:
        model, example_inputs, examination = _examined(given)
    if given.json:
        json.dump(_as_json(examination), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        console = Console() if sys.stdout.isatty() else Console(width=140)  # a log has room for whole names
        console.print(examination.report)
        total = _total(examination)
        if total.before:
            saved = 1 - total.after / total.before
            text = f"{readable(total.before)} dense, {readable(total.after)} now, {saved:.1%} saved"
            console.print(f"products of these attentions: {text}", highlight=False)
        for told in examination.silent:
            console.print(f"[red]silently dense:[/red] {escape(told)}", highlight=False)
    if given.html is not None:
        with aside:
            maps, without = _maps(given, model, example_inputs, examination)
        try:
            write(given.html, render(examination, model, maps, without))
        except OSError as error:
            raise UsageError(f"--html {given.html}: {error.strerror}") from None
    return 1 if examination.silent else 0


def run_check(given: argparse.Namespace) -> int:
    """0 if all is as expected, 1 if not."""
    if given.update and given.snapshot is None:
        raise UsageError("--update writes a snapshot: say where with --snapshot")
    _, _, examination = _examined(given)
    try:
        check(examination, expect=_expectation(given.expect), snapshot=given.snapshot, update=given.update)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--snapshot {given.snapshot}: {error.strerror}") from None
    except AssertionError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    report = examination.report
    where = f", {'written to' if given.update else 'as in'} {given.snapshot}" if given.snapshot else ""
    sys.stdout.write(f"{report.title}: {len(report.rewritten)} of {len(report)} attentions rewritten{where}\n")
    return 0


def _examined(given: argparse.Namespace) -> tuple[Any, Any, Examination]:
    config = _config(given)
    folder = str(Path.cwd())
    if folder not in sys.path:  # the console script does not look there, python -m does
        sys.path.insert(0, folder)
    with torch.device("meta") if given.meta else nullcontext():
        model = _called("build", given.build)
        example_inputs = _called("--inputs", given.inputs) if given.inputs else None
    if not isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        raise UsageError(
            f"{given.build} returned a {type(model).__name__}, expected a torch.nn.Module or an exported program"
        )
    try:
        examination = examine(model, example_inputs, config=config, include=given.include, exclude=given.exclude)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{given.build}: {error}") from None
    if not examination.report:
        hint = "" if given.inputs else "; with --inputs they are found by a run on fake tensors"
        raise UsageError(f"{given.build}: no attention was found in this {type(model).__name__}{hint}")
    return model, example_inputs, examination


def _config(given: argparse.Namespace) -> SLAConfig | None:
    """The configuration asked for; None where nothing was, which suits a model that is accelerated."""
    options = {"sparsity": given.sparsity, "min_seq_len": given.min_seq_len}
    changes = {name: value for name, value in options.items() if value is not None}
    if given.config is None and not changes:
        return None
    values: Any = {}
    if given.config is not None:
        try:
            values = json.loads(given.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {given.config}: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"--config {given.config} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UsageError(f"--config {given.config} must hold one object with fields of SLAConfig, got {values!r}")
    try:
        return SLAConfig.from_dict({**values, **changes})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def _called(what: str, spec: str) -> Any:
    """What the function named by `spec` returns; a value that is no function is taken as it is."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{what} {spec!r}: expected my.module:function or path/to/file.py:function")
    try:
        value: Any = _module(place)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        lone = place.endswith(".py") and "no known parent package" in str(error)
        hint = "; name a file of a package by its module, as my.module:function" if lone else ""
        raise UsageError(f"{what} {spec}: importing {place} failed: {_told(error)}{hint}") from None
    for part in name.split("."):
        if not hasattr(value, part):
            raise UsageError(f"{what} {spec}: {place} has no {name}")
        value = getattr(value, part)
    if not callable(value) or isinstance(value, nn.Module):
        return value
    try:
        return value()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} {spec} failed: {_told(error)}") from None


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"there is no file {place}")
    path = path.resolve()
    name = f"sla_compile_inspected_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:  # the same file for build and inputs
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{place} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _told(error: BaseException) -> str:
    """Kind, text and place of an error of the user's code, without the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename] or frames
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _expectation(expected: list[str] | None) -> int | list[str] | None:
    return int(expected[0]) if expected and len(expected) == 1 and expected[0].isdigit() else expected


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _total(examination: Examination) -> Operations:
    counts = (operations(site, examination.configs.get(site.config)) for site in examination.report)
    return sum((count for count in counts if count is not None), Operations())


def _as_json(examination: Examination) -> dict[str, Any]:
    attentions = []
    for site in examination.report:
        count = operations(site, examination.configs.get(site.config))
        attentions.append({**site.to_dict(), "operations": None if count is None else count.to_dict()})
    return {
        "model": examination.report.title,
        "accelerated": examination.accelerated,
        "silently_dense": list(examination.silent),
        "operations": _total(examination).to_dict(),
        "configurations": {name: config.to_dict() for name, config in examination.configs.items()},
        "attentions": attentions,
    }


def _maps(given: argparse.Namespace, model: Any, example_inputs: Any, examination: Examination) -> tuple[dict, str]:
    """Block maps for the page, or the reason why there are none."""
    rewritten = {site.name: examination.configs[site.config] for site in examination.report.rewritten if site.config}
    if not given.maps or not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        return {}, ""
    if example_inputs is None:
        return {}, "Routing takes the queries and keys of a run: give example inputs with --inputs."
    tensors = [leaf for leaf in (*model.parameters(), *tree_leaves(example_inputs)) if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return {}, "Routing takes the queries and keys of a run, which a model on the meta device does not have."
    if not rewritten:
        return {}, "No attention is rewritten."
    try:
        maps = block_maps(model, example_inputs, {name: rewritten[name] for name in pick(list(rewritten), given.maps)})
    except Exception as error:
        raise UsageError(f"{given.build} does not run with {given.inputs}: {_told(error)}") from None
    return maps, "The chosen attentions made no call whose queries and keys can be seen."
