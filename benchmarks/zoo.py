"""What happens to small transformers of diffusers: found, rewritten, equal, compiled, exported.

    python benchmarks/zoo.py [--output docs/zoo.md] [--json rows.json] [name ...]

The models are those of tests/zoo.py. Columns are explained below the table that it writes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an uninstalled checkout works

import sla_compile
from sla_compile import SLAConfig


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


zoo = _load("zoo", Path(__file__).parents[1] / "tests" / "zoo.py")
SPARSE = SLAConfig(sparsity=0.7, min_seq_len=zoo.MIN_SEQ_LEN)
EXACT = SPARSE.replace(critical_blocks=10**6)
ONE_GRAPH = [1, 1, 0]  # static at first, then dynamic, then nothing to do
LEGEND = """
Each model has two layers, two to four heads of dimension 6 to 32 and 130 to 400 tokens; CPU, float32, torch {torch},
diffusers {diffusers}. `min_seq_len` is {length}, so that prompts alone are too short;
`padding_masks=True` where the name says so.

* **rewritten**: attentions that become sparse-linear, of those found with `example_inputs`.
* **by structure**: whether `accelerate` without `example_inputs` rewrites the same attentions with the same output, to
  the bit; *idle* are those that got parameters too but whose calls then turned out not to qualify.
* **= dense**: largest difference from the dense model, of its largest output, when every block is critical; shows that
  the right query, key, value, mask and scale arrive.
* **gradients**: whether every added parameter gets one that is not zero, at sparsity 0.7.
* **compiled**: largest difference between eager and `torch.compile` (aot_eager), both at sparsity 0.7.
* **exported**: the same for `torch.export` (not strict).
* **graphs**: compiled for a first input, and anew for a second and a third, longer ones, with `dynamic=None`; 1, 1, 0
  is what a model does that is one graph. The dense model's are shown where it is otherwise.

`restore` gave back every model's outputs to the bit and its `state_dict` keys{restored}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all models without")
    parser.add_argument("--output", type=Path, help="Markdown file to write; without, it is printed")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    chosen = [name for name in zoo.ZOO if not options.names or any(part in name for part in options.names)]
    rows = []
    for name in chosen:
        start = time.perf_counter()
        rows.append(measure(name))
        print(f"{time.perf_counter() - start:6.1f} s  {name}", file=sys.stderr, flush=True)
    table = markdown(rows)
    if options.output:
        options.output.write_text(table)
    else:
        print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str) -> dict[str, Any]:
    """One row: every column for one model; the text of an exception where a step raises one."""
    inputs = zoo.inputs(name)
    dense = zoo.build(name)
    expected = run(dense, inputs)
    model, caught = accelerated(name, EXACT, inputs)
    row = {"name": name, "family": zoo.ZOO[name].family, **decisions(model)}
    exact, seen = _warned(lambda: run(model, inputs))
    row["warnings"] = sorted(caught | seen)
    row["exact"] = difference(exact, expected)
    keys = set(zoo.build(name).state_dict())
    sla_compile.restore(model)
    row["restored"] = difference(run(model, inputs), expected) == 0 and set(model.state_dict()) == keys

    model, _ = accelerated(name, SPARSE, inputs)
    eager = run(model, inputs)
    row["effect"] = difference(eager, expected)
    row["structure"] = _attempt(lambda: by_structure(name, model, inputs, eager))
    row["gradients"] = gradients(name, inputs)
    calls = [zoo.inputs(name, extra) for extra in range(3)]
    row["traced"], outputs = _attempt(lambda: compiled(model, calls, "aot_eager"), 2)
    row["compiled"] = (
        outputs
        if isinstance(outputs, str)
        else max(difference(output, run(model, call)) for output, call in zip(outputs, calls, strict=True))
    )
    if row["traced"] not in (ONE_GRAPH, [1, 0, 0]):  # otherwise the dense model's cannot be fewer
        row["dense_traced"], _ = _attempt(lambda: compiled(dense, calls, "eager"), 2)
    row["exported"] = _attempt(lambda: difference(exported(model, inputs), eager))
    if isinstance(row["exported"], str):
        row["dense_exported"] = _attempt(lambda: difference(exported(dense, inputs), expected))
    torch._dynamo.reset()
    gc.collect()
    return row


def accelerated(name: str, config: SLAConfig, inputs: dict | None) -> tuple[nn.Module, set[str]]:
    """The accelerated model, with a projection that is not zero, and the warnings on the way."""
    config = zoo.chosen(name, config)
    model, caught = _warned(
        lambda: sla_compile.accelerate(zoo.build(name), config=config, example_inputs=inputs, allow_no_match=True)
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sla.proj_weight"):
                torch.manual_seed(len(key))
                parameter.normal_(std=0.2)
    return model, caught


def run(model: Callable, inputs: dict) -> list[Tensor]:
    with torch.no_grad():
        return zoo.outputs(model(**inputs))


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("nan")
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


def decisions(model: nn.Module) -> dict[str, Any]:
    report = sla_compile.report(model)
    return {
        "found": len(report),
        "rewritten": len(report.rewritten),
        "dense": dict(Counter(site.reason for site in report.dense)),
    }


def by_structure(name: str, model: nn.Module, inputs: dict, expected: list[Tensor]) -> str:
    """How the decision without example inputs compares, after one run."""
    other, _ = accelerated(name, SPARSE, None)
    output = run(other, inputs)
    wanted, got = ({site.name for site in sla_compile.report(m).rewritten} for m in (model, other))
    owners = sum(1 for key in other.state_dict() if key.endswith("sla.proj_weight"))
    idle = f", {owners - len(got)} idle" if owners > len(got) else ""
    if wanted != got:
        return f"no: {len(wanted - got)} missing, {len(got - wanted)} more{idle}"
    error = difference(output, expected)
    return f"yes{idle}" if error == 0 else f"no: output differs by {error:.1e}"


def gradients(name: str, inputs: dict) -> str:
    model, _ = accelerated(name, SPARSE, inputs)
    added = sla_compile.parameters(model)
    if not added:
        return ""
    torch.stack([out.square().mean() for out in zoo.outputs(model.train()(**inputs))]).sum().backward()
    names = {id(p): key.rpartition(".")[2] for key, p in model.named_parameters()}
    missing = [names[id(p)] for p in added if p.grad is None]
    zero = [names[id(p)] for p in added if p.grad is not None and not p.grad.any()]
    parts = [f"none: {dict(Counter(missing))}"] * bool(missing) + [f"zero: {dict(Counter(zero))}"] * bool(zero)
    return "; ".join(parts) or "yes"


def compiled(model: nn.Module, calls: list[dict], backend: str) -> tuple[list[int], list]:
    """Graphs of each call that the calls before it had not made, and the outputs."""
    torch._dynamo.reset()
    counters.clear()
    function = torch.compile(model, backend=backend)
    outputs, graphs = [], [0]
    for call in calls:
        outputs.append(run(function, call))
        graphs.append(counters["stats"]["unique_graphs"])
    return [after - before for before, after in itertools.pairwise(graphs)], outputs


def exported(model: nn.Module, inputs: dict) -> list[Tensor]:
    torch._dynamo.reset()
    program = torch.export.export(model, (), inputs, strict=False)
    return run(program.module(), inputs)


def _attempt(step: Callable[[], Any], results: int = 1) -> Any:
    """What the step returns, or the text of its exception as every result."""
    try:
        return step()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:200]}"
        return text if results == 1 else (text,) * results


def _warned(step: Callable[[], Any]) -> tuple[Any, set[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = step()
    return result, {str(w.message) for w in caught if "sla_compile" in str(w.message)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, by family, with a legend and the errors in full below it."""
    reasons = sorted({reason for row in rows for reason in row["dense"]})
    mark = {reason: chr(ord("a") + index) for index, reason in enumerate(reasons)}
    heads = ("model", "rewritten", "dense, why", "by structure", "= dense", "gradients", "compiled", "exported",
             "graphs")  # fmt: skip
    lines = ["# Transformers of diffusers", "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    for family in dict.fromkeys(row["family"] for row in rows):
        lines.append(f"| **{family}** |" + " |" * (len(heads) - 1))
        for row in (row for row in rows if row["family"] == family):
            lines.append("| " + " | ".join(_cells(row, mark, note)) + " |")
    failed = [row["name"] for row in rows if not row["restored"]]
    legend = LEGEND.format(torch=torch.__version__, diffusers=diffusers.__version__, length=zoo.MIN_SEQ_LEN,
                           restored=f", except {', '.join(failed)}" if failed else "")  # fmt: skip
    lines += ["", "Why an attention stays dense:", "", *(f"* {letter}: {reason}" for reason, letter in mark.items())]
    if notes:
        lines += ["", "Notes:", "", *(f"{number}. {text}" for number, text in enumerate(notes, 1))]
    return "\n".join(lines) + "\n" + legend


def _cells(row: dict[str, Any], mark: dict[str, str], note: Callable[[str], str]) -> list[str]:
    class_name, _, variant = row["name"].partition(" ")
    name = class_name.removesuffix("Model").removesuffix("2D").removesuffix("3D").removesuffix("Transformer")
    structure = row["structure"]
    if structure.partition(":")[0].endswith("Error"):
        structure = "error " + note(structure)
    exported = row["exported"]
    if isinstance(exported, str):
        fails = isinstance(row["dense_exported"], str)
        exported = ("dense fails too " if fails else "**fails** ") + note(exported)
    else:
        exported = _number(exported)
    graphs = _graphs(row["traced"], note)
    if "dense_traced" in row:
        graphs += f"; dense {_graphs(row['dense_traced'], note)}"
    warned = "".join(" " + note(text) for text in row["warnings"])
    return [
        f"{name} {variant}".strip() + warned,
        f"{row['rewritten']} of {row['found']}",
        ", ".join(f"{count} {mark[reason]}" for reason, count in row["dense"].items()),
        structure,
        _number(row["exact"]) if row["rewritten"] else "",
        row["gradients"],
        _number(row["compiled"]) if not isinstance(row["compiled"], str) else note(row["compiled"]),
        exported,
        graphs,
    ]


def _graphs(traced: list[int] | str, note: Callable[[str], str]) -> str:
    return note(traced) if isinstance(traced, str) else ", ".join(map(str, traced))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


if __name__ == "__main__":
    main()
