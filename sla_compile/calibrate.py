"""Stage 1 of SLA2: routers and alphas trained against full attention, before the model itself is fine-tuned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sla_compile.api import _acceleration, dense
from sla_compile.calibration_report import CalibratedSite, Calibration
from sla_compile.discovery import arguments, uncompiled
from sla_compile.functional import why_alpha_does_not_fit
from sla_compile.module import SparseLinearAttention
from sla_compile.redirect import CHILD
from sla_compile.router_training import ALPHA_RANGE, Router, SiteSamples, TrainingOptions, errors, mass_start, train
from sla_compile.samples import Observer, SampleStore, read_json, readable, write_json

_FORMAT = 1


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsities: Sequence[float] | None = None,
    samples: int = 8,
    steps: int = 200,
    learning_rate: float = 1e-3,
    tau: float = 0.1,
    query_blocks: int = 16,
    folder: str | os.PathLike[str] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Calibration:
    """Trains the routers and alphas of an SLA2 model by the mean squared error against full attention (SLA2, arXiv
    2602.12675, stage 1). Fine-tuning the model with its own loss, stage 2, is what follows.

    The model runs densely over the batches, without gradients and in evaluation mode, while queries, keys and values
    of its accelerated attentions are collected. Then each attention is trained by itself, with SoftTop-k's fractional
    choice of blocks; its alpha starts as the mass that full attention puts on the chosen blocks, and ends where the
    error with the hard choice is least, which has a closed form.
    Nothing changes but the values of ``<owner>.sla.router_q``, ``router_k`` and ``alpha_logit``, all at once at the
    end. The state of torch's random numbers is the same as before.

    Args:
        model: accelerated with ``SLAConfig(method="sla2")``, not compiled or sharded yet.
        batches: inputs of the model on its device: tuples of positional or dicts of keyword arguments, or a tensor.
            Several noise levels and contents, as in use.
        sparsities: train one router for all of these, each with an alpha of its own; by default each attention's own,
            which is always among them and whose alpha the model gets. The others' are in the report.
        samples: how many calls of each attention are kept, a batch of several entries counting several times, drawn
            evenly from all. A quarter of them, at least one of two, is held out to measure the errors.
        steps: training steps of each attention.
        learning_rate: of the routers; alpha's is ten times as much.
        tau: temperature of SoftTop-k, on the scaled scores of pooled queries and keys.
        query_blocks: how many query blocks are looked at in a step; time and memory are proportional to it.
        folder: keep samples, and results of each attention, there. In memory they take ``3 B H L D`` numbers each. An
            interrupted run with the same arguments goes on where it stopped; the batches must come in the same order.
        forward: runs the model on a batch, ``forward(model, batch)``, where that is more than a call: a sampler, say.
        progress: show a progress bar on stderr.
        seed: of what is kept and of the training's order.

    Returns:
        The error of each attention before and after; ``print`` shows a table.

    Raises:
        ValueError: the model is not accelerated with SLA2, there are no batches, an attention never ran or met NaN
            or infinity, an argument is out of range, or the folder is another run's or has a file that cannot be read.
        TypeError: `model`, a batch or `sparsities` is none of the above.
    """
    modules = _modules(model)
    options = TrainingOptions(steps, learning_rate, tau, query_blocks, seed)
    densities = {name: _densities(name, module, sparsities) for name, module in modules.items()}
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    path = None if folder is None else Path(folder)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        _check_folder(path, _description(model, modules, densities, samples, seed), asdict(options))
    store = SampleStore(list(modules), samples, seed, path)
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        _collect(model, modules, batches, forward, store, bar)
        rows: list[CalibratedSite] = []
        trained: dict[str, Router] = {}
        task = bar.add_task("training", total=len(modules) * steps)
        for index, (name, module) in enumerate(modules.items()):
            bar.update(task, description=f"training {name or type(model).__name__}", completed=index * steps)
            result = None if path is None else _read_result(_result_file(path, index))
            if result is None:
                result = _train_site(name, module, store, densities[name], options, lambda: bar.advance(task))
                if path is not None:
                    _write_result(_result_file(path, index), *result)
            trained[name] = result[0]
            rows.extend(result[1])
    for name, module in modules.items():
        _assign(module, trained[name])
    return Calibration(type(model).__name__, tuple(rows))


def _modules(model: Any) -> dict[str, SparseLinearAttention]:
    """The SLA2 attentions by their owners' names."""
    if isinstance(model, (torch.fx.GraphModule, torch.export.ExportedProgram)):
        raise TypeError("calibrate takes a module, not a graph of it: calibrate first, then trace or export")
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate takes an nn.Module that was accelerated, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled; calibrate before torch.compile")
    _acceleration(model)
    found = {
        name.removesuffix(CHILD).removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinearAttention)
    }
    modules = {name: module for name, module in found.items() if module.config.method == "sla2"}
    if not modules:
        raise ValueError(
            f"{len(found)} attentions of this {type(model).__name__} are accelerated, none with SLA2: only its routers "
            'and alphas are calibrated; accelerate with config=SLAConfig(method="sla2")'
        )
    for name, module in modules.items():
        for parameter in module.parameters():
            if parameter.is_meta:
                raise ValueError(f"{name}: its parameters are on the meta device and have no values to calibrate")
            if type(parameter.data).__name__ == "DTensor":
                raise ValueError(f"{name}: its parameters are sharded; calibrate before fully_shard")
    return modules


def _densities(name: str, module: SparseLinearAttention, sparsities: Sequence[float] | None) -> tuple[float, ...]:
    """The attention's own sparsity, then the others asked for."""
    if sparsities is None:
        return (module.config.sparsity,)
    if isinstance(sparsities, (int, float)):
        raise TypeError(f"sparsities must be a sequence of numbers, got {sparsities}; pass [{sparsities}]")
    if module.config.critical_blocks is not None:
        raise ValueError(
            f"{name}: critical_blocks={module.config.critical_blocks} stands in place of a sparsity; leave sparsities "
            "out"
        )
    for sparsity in sparsities:
        module.config.replace(sparsity=sparsity)  # validates it
    return tuple(dict.fromkeys((module.config.sparsity, *map(float, sparsities))))


def _collect(
    model: nn.Module,
    modules: dict[str, SparseLinearAttention],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    store: SampleStore,
    bar: Progress,
) -> None:
    """Fills the store, or goes on filling it."""
    state = None if store.folder is None else read_json(store.folder / "collected.json")
    done = 0
    if state is not None:
        store.seen.update(state["seen"])
        done = state["batches"]
        if state["complete"]:
            return
    owners = dict(model.named_modules())
    observers = {name: Observer(name, store, _why_unfit(module)) for name, module in modules.items()}
    task = bar.add_task("collecting", total=len(batches) if isinstance(batches, Sized) else None)
    number = 0
    with _undisturbed(model):
        for name, observer in observers.items():
            owners[name]._sla_redirection.observer = observer
        try:
            for number, batch in enumerate(batches, 1):
                if number > done:
                    if forward is None:
                        args, kwargs = arguments(batch)
                        model(*args, **kwargs)
                    else:
                        forward(model, batch)
                    _note(store, number, complete=False)
                bar.advance(task)
        finally:
            for name in observers:
                owners[name]._sla_redirection.observer = None
    if number == 0:
        raise ValueError("there are no batches: pass some inputs of the model, as many noise levels as possible")
    for name, observer in observers.items():
        if not store.count(name):
            raise ValueError(
                f"{name or 'the model itself'} never ran as it would when accelerated: {observer.reason}; pass batches "
                "that reach it, or leave it out of accelerate"
            )
    _note(store, number, complete=True)
    bar.remove_task(task)


def _why_unfit(module: SparseLinearAttention) -> Callable[[torch.Tensor], str | None]:
    logit = _parameters(module)[2]
    return lambda query: why_alpha_does_not_fit(logit, query, module.config)


def _parameters(module: SparseLinearAttention) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """The routers and alpha's logit."""
    named = dict(module.named_parameters())
    return named["router_q"], named["router_k"], named["alpha_logit"]


def _note(store: SampleStore, batches: int, complete: bool) -> None:
    if store.folder is not None:
        write_json(store.folder / "collected.json", dict(seen=store.seen, batches=batches, complete=complete))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Dense, in evaluation mode, without gradients, uncompiled; then all is as it was, random numbers included."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(device.index for device in devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(dense(model))
        stack.enter_context(uncompiled())
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _train_site(
    name: str,
    module: SparseLinearAttention,
    store: SampleStore,
    sparsities: tuple[float, ...],
    options: TrainingOptions,
    advance: Callable[[], None],
) -> tuple[Router, list[CalibratedSite]]:
    router_q, router_k, alpha_logit = _parameters(module)
    device = router_q.device
    samples = SiteSamples(lambda number: store.get(name, number), store.count(name), module.config, sparsities, device)
    given = alpha_logit.detach().float().sigmoid()
    before = Router(router_q.detach(), router_k.detach(), (given,) * len(sparsities))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        start = mass_start(samples, before)
        after = _rounded(train(samples, start, options, advance), module)
        measured = [errors(samples, router, samples.held_out) for router in (before, start, after)]
    held_out = len(samples.held_out) if samples.held_out != samples.training else 0
    rows = []
    for index, sparsity in enumerate(sparsities):
        one, two, three = (found[index] for found in measured)
        heads = tuple(after.alphas[index].mean(1).tolist())
        rows.append(CalibratedSite(name, sparsity, len(samples.training), held_out, one, two, three, heads))
    return after, rows


def _rounded(router: Router, module: SparseLinearAttention) -> Router:
    """The values as the module's parameters will hold them."""
    dtypes = [parameter.dtype for parameter in _parameters(module)]
    alphas = (torch.logit(alpha).to(dtypes[2]).float().sigmoid() for alpha in router.alphas)
    query, key = router.router_q.to(dtypes[0]).float(), router.router_k.to(dtypes[1]).float()
    return Router(query, key, tuple(alpha.clamp(*ALPHA_RANGE) for alpha in alphas))


@torch.no_grad()
def _assign(module: SparseLinearAttention, router: Router) -> None:
    values = (router.router_q, router.router_k, torch.logit(router.alphas[0]))
    for parameter, value in zip(_parameters(module), values, strict=True):
        parameter.copy_(value)


def _description(
    model: nn.Module,
    modules: dict[str, SparseLinearAttention],
    densities: dict[str, tuple[float, ...]],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """What must be the same for a run to go on in a folder."""
    sites = {
        name: dict(head_dim=m.head_dim, config=m.config.to_dict(), sparsities=list(densities[name]))
        for name, m in modules.items()
    }
    weights = _weights_digest(model, modules)
    return dict(format=_FORMAT, model=type(model).__name__, weights=weights, sites=sites, samples=samples, seed=seed)


def _weights_digest(model: nn.Module, modules: dict[str, SparseLinearAttention]) -> str:
    """A digest of the names and shapes of the model's own parameters, and of some values of each."""
    added = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in added:
            values = parameter.detach().flatten()
            some = values[:: max(1, values.numel() // 16)][:16].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {some.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def _check_folder(folder: Path, description: dict[str, Any], options: dict[str, Any]) -> None:
    """Makes the folder this run's.

    Raises:
        ValueError: it holds another run, whose samples or results would be taken for this one's.
    """
    file = folder / "calibration.json"
    known = read_json(file)
    description = json.loads(json.dumps(description))
    if known is not None:
        for key, value in description.items():
            if known["run"].get(key) != value:
                raise ValueError(
                    f"{folder} holds another calibration: its {key} is {_short(known['run'].get(key))}, here it is "
                    f"{_short(value)}; give another folder, or delete this one"
                )
        results = sorted(path.name for path in folder.glob("result*.safetensors"))
        if results and known["options"] != options:
            changed = {key: (known["options"].get(key), value) for key, value in options.items()}
            told = ", ".join(f"{key}={old!r}, here {new!r}" for key, (old, new) in changed.items() if old != new)
            raise ValueError(
                f"{folder} holds results trained with {told}; delete its result*.safetensors to train anew on the "
                "samples that are collected there, or give another folder"
            )
    write_json(file, dict(run=description, options=options))


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:200] + " …"


def _result_file(folder: Path, index: int) -> Path:
    return folder / f"result{index:03d}.safetensors"


def _write_result(path: Path, router: Router, rows: list[CalibratedSite]) -> None:
    tensors = {"router_q": router.router_q, "router_k": router.router_k}
    tensors |= {f"alpha{i}": alpha for i, alpha in enumerate(router.alphas)}
    part = path.with_suffix(".part")
    told = json.dumps([row.to_dict() for row in rows])
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, {"rows": told})
    os.replace(part, path)


def _read_result(path: Path) -> tuple[Router, list[CalibratedSite]] | None:
    if not path.exists():
        return None
    with readable(path, "delete it to train this attention anew"), safe_open(path, framework="pt") as file:
        rows = [CalibratedSite.from_dict(row) for row in json.loads(file.metadata()["rows"])]
        alphas = tuple(file.get_tensor(f"alpha{i}") for i in range(len(rows)))
        return Router(file.get_tensor("router_q"), file.get_tensor("router_k"), alphas), rows
