"""What accelerate would do to a model, or what became of one it was applied to, without changing it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sla_compile.api import LOST, Acceleration, Choice, Patterns, by_plain_name
from sla_compile.config import SLAConfig
from sla_compile.discovery import AttentionCall, _Observer, _scopes, run_on_fakes
from sla_compile.module import SparseLinearAttention
from sla_compile.passes import rewrite
from sla_compile.passes.eligibility import why_dense
from sla_compile.passes.find import find_attention
from sla_compile.passes.rewrite import Decision
from sla_compile.passes.sites import Site, partly_dense, plain_name
from sla_compile.plan import plan_module
from sla_compile.redirect import CHILD, Redirection, is_changed
from sla_compile.report import Report

UNSEEN = (
    "ran without calling scaled_dot_product_attention, or did not run: another attention backend or processor, a "
    "cached result, or a forward that does not use it with these inputs"
)
NOT_FOUND = "not found when the model was accelerated: pass example_inputs to accelerate"


@dataclass(frozen=True)
class Examination:
    """What was found.

    Args:
        report: a row for every attention, as after :func:`sla_compile.accelerate`.
        configs: the configurations that rows name by their fingerprint, as far as they are known.
        accelerated: whether the model was accelerated before.
        silent: attentions that should have been rewritten and are not, each with what is known.
    """

    report: Report
    configs: dict[str, SLAConfig]
    accelerated: bool = False
    silent: tuple[str, ...] = ()


def examine(
    model: Any,
    example_inputs: Any = None,
    *,
    sparsity: float | None = None,
    config: SLAConfig | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    per_site: Mapping[str, SLAConfig | None] | None = None,
) -> Examination:
    """Decides every attention of `model` as :func:`sla_compile.accelerate` would, and changes nothing.

    A model that is accelerated already is verified instead: with example_inputs by a run on fake tensors, which shows
    what each attention really calls; without, that its owners are still redirected.

    Args:
        model: an ``nn.Module``, ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``; on the meta device, too.
        example_inputs: as for accelerate; tensors move to the meta device where the model is there.
        sparsity, config, include, exclude, per_site: as for accelerate, for a model that is not accelerated.

    Raises:
        ValueError, TypeError: as accelerate does, or these arguments for a model that is accelerated.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    base = config or SLAConfig()
    if not isinstance(base, SLAConfig):
        raise TypeError(f"config must be an SLAConfig, got {type(base).__name__}")
    choice = Choice(base if sparsity is None else base.replace(sparsity=sparsity), include, exclude, per_site)
    wishes = {"sparsity": sparsity, "config": config, "include": include, "exclude": exclude, "per_site": per_site}
    given = [name for name, value in wishes.items() if value is not None]
    if isinstance(model, (torch.fx.GraphModule, torch.export.ExportedProgram)):
        return _examine_graph(model, choice, example_inputs, given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, fx.GraphModule or ExportedProgram, got {type(model).__name__}")
    example_inputs = _on_meta_with(model, example_inputs)
    if accelerated_roots(model):
        _check_no_wishes(model, given)
        return _verify(model, example_inputs)
    planned, sites = plan_module(model, choice, example_inputs)
    choice.check_patterns(sites)
    configs = {item.sla.config.fingerprint(): item.sla.config for item in planned if item.sla is not None}
    return Examination(Report(type(model).__name__, tuple(sites)), configs)


def accelerated_roots(model: nn.Module) -> dict[str, Acceleration]:
    """What :func:`sla_compile.accelerate` left behind in the model, or in modules that it wraps, by their path."""
    return {
        name: module.__dict__["_sla_acceleration"]
        for name, module in model.named_modules()
        if "_sla_acceleration" in module.__dict__
    }


def _check_no_wishes(model: Any, given: list[str]) -> None:
    if given:
        raise ValueError(
            f"this {type(model).__name__} is accelerated already: {', '.join(given)} would say how to accelerate it; "
            "leave them out to check what is there"
        )


def _on_meta_with(model: nn.Module, example_inputs: Any) -> Any:
    """Example inputs on the meta device if all of the model is there: on another they could not meet."""
    parameters = list(model.parameters())
    if example_inputs is None or not parameters or not all(parameter.is_meta for parameter in parameters):
        return example_inputs
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example_inputs)


# ---- models that are accelerated -------------------------------------------------------------------------------------


@dataclass
class Calls:
    """Attention calls of one owner in one forward: those of the op, and dense ones with the reason."""

    redirected: list[AttentionCall] = field(default_factory=list)
    dense: list[AttentionCall] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def _verify(model: nn.Module, example_inputs: Any) -> Examination:
    modules = by_plain_name(model)
    sites = [
        site.replace(name=_join(root, site.name))
        for root, state in accelerated_roots(model).items()
        for site in state.sites
    ]
    configs = {m.config.fingerprint(): m.config for m in modules.values() if isinstance(m, SparseLinearAttention)}
    calls = None
    if example_inputs is not None:
        calls = {plain_name(name): made for name, made in watch(model, example_inputs).items()}
    rows, silent = [], []
    for site in sites:
        name = plain_name(site.name)
        module = modules.get(name)
        if site.rewritten and (module is None or not is_changed(module) or CHILD not in module._modules):
            rows.append(site.replace(rewritten=False, reason=LOST, config=""))
            silent.append(f"{site.name or 'the model itself'}: {LOST}")
        elif calls is None:
            rows.append(site)
        else:
            rows.append(_seen(site, calls.pop(name, Calls())))
            if rows[-1].reason == UNSEEN:
                silent.append(f"{site.name or 'the model itself'}: {UNSEEN}")
    for name, made in (calls or {}).items():
        rows.append(_unlisted(name, made, list(configs.values())))
        if rows[-1].reason == NOT_FOUND:
            silent.append(f"{name or 'the model itself'} {rows[-1].shape}: {NOT_FOUND}")
    return Examination(Report(type(model).__name__, tuple(rows)), configs, True, tuple(silent))


def _seen(site: Site, made: Calls) -> Site:
    """The row of an attention as the run showed it."""
    shown = made.redirected or made.dense
    if shown:
        call = max(shown, key=lambda call: call.query.shape[-2])
        query = tuple(call.query.shape)
        number = len(made.redirected) + len(made.dense)
        site = site.replace(shape=str(query), keys=str(call.key.shape[-2]), head_dim=query[-1], calls=number)
    if not site.rewritten:
        return site
    if made.redirected:
        return site.replace(reason=partly_dense(made.reasons, site.calls or 0))
    return site.replace(rewritten=False, reason=made.reasons[-1] if made.reasons else UNSEEN, config="")


def _unlisted(name: str, made: Calls, configs: list[SLAConfig]) -> Site:
    """The row of an attention that accelerate did not see."""
    call = max(made.dense + made.redirected, key=lambda call: call.query.shape[-2])
    operands = (call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal, call.enable_gqa)
    reasons = [why_dense(*operands, config) for config in configs]
    reason = NOT_FOUND if None in reasons else str(reasons[0])
    if reason == NOT_FOUND and not call.is_self:
        reason = "cross-attention: keys and values stem from a second sequence"
    query = tuple(call.query.shape)
    return Site(name, False, reason, str(query), str(call.key.shape[-2]), query[-1], calls=len(made.dense))


def watch(model: nn.Module, example_inputs: Any, *, training: bool = False) -> dict[str, Calls]:
    """What every attention of an accelerated model calls in one forward, by owner.

    The run happens on a copy with fake tensors, like that of :func:`sla_compile.discovery.discover`; a model that reads
    tensor values runs itself instead, without gradients.

    Args:
        training: keep the modules' training mode, instead of evaluation mode.
    """
    return run_on_fakes(model, example_inputs, _watched, training=training)


def _watched(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Calls]:
    owners = {name for name, module in model.named_modules() if "_sla_redirection" in module.__dict__}
    found: dict[str, Calls] = {}
    with _recorded(model) as reasons, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sla_compile: .* ran without calling", UserWarning)  # told by the result
        with torch.no_grad(), _Watcher() as watcher, _scopes(model, watcher):
            model(*args, **kwargs)
    for call in watcher.redirected:
        found.setdefault(owner_of(call.owner, owners), Calls()).redirected.append(call)
    for call in watcher.calls:
        found.setdefault(owner_of(call.owner, owners), Calls()).dense.append(call)
    for name, told in reasons.items():
        found.setdefault(name, Calls()).reasons += told
    return {name: made for name, made in found.items() if made.redirected or made.dense}


def owner_of(path: str, owners: set[str]) -> str:
    """The nearest of `owners` at or above `path`; `path` itself where there is none."""
    parts = path.split(".") if path else []
    above = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return next((name for name in above if name in owners), path)


class _Watcher(_Observer):
    """Tells calls of the op from dense ones; redirected calls never reach it as scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.redirected: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.sla_compile.sparse_linear_attention:
            query, key, value = args[:3]
            self.redirected.append(AttentionCall(self.scopes[-1][0], query, key, value, None, 0.0, False, False, True))
        elif func is torch.ops.aten.scaled_dot_product_attention:  # what an owner inside of another one calls
            self.note(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[str]]]:
    """Why calls of redirected owners stay dense inside, by path: a Redirection itself keeps the last forward only."""
    reasons: dict[str, list[str]] = {}
    kept = {name: m for name, m in model.named_modules() if "_sla_redirection" in m.__dict__}
    before = {name: module._sla_redirection for name, module in kept.items()}
    for name, module in kept.items():
        module._sla_redirection = _Recorder(before[name], reasons.setdefault(name, []))
    try:
        yield reasons
    finally:
        for name, module in kept.items():
            module._sla_redirection = before[name]


class _Recorder(Redirection):
    """A Redirection that keeps the reasons of all its dense calls."""

    reasons: list[str]

    def __init__(self, redirection: Redirection, reasons: list[str]) -> None:
        self.reasons = reasons
        kept = {name: getattr(redirection, name) for name in redirection.__dataclass_fields__}
        super().__init__(**{**kept, "seen": ()})

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "seen" and value and value[-1].reason:  # one call more
            self.reasons.append(value[-1].reason)


def _join(root: str, name: str) -> str:
    return ".".join(part for part in (root, name) if part)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _examine_graph(model: Any, choice: Choice, example_inputs: Any, given: list[str]) -> Examination:
    exported = isinstance(model, torch.export.ExportedProgram)
    graph_module = model.graph_module if exported else model
    title = type(model).__name__
    recorded = rewrite.recorded(model)
    if recorded is not None:
        _check_no_wishes(model, given)
        sites, configs = recorded
        if rewrite.META_KEY not in graph_module.meta:  # captured from an accelerated model: its dense ones are there
            found = (Decision(match, None, "dense when it was captured") for match in find_attention(graph_module))
            sites += [rewrite.site(decision) for decision in found]
        return Examination(Report(title, tuple(sites)), configs, True)
    constants = None
    if exported:
        specs = model.graph_signature.input_specs
        constants = {spec.arg.name for spec in specs if spec.kind.name != "USER_INPUT" and hasattr(spec.arg, "name")}
        example_inputs = None  # a program has the shapes that it was exported with
    decisions = rewrite.decide(graph_module, choice, example_inputs=example_inputs, constants=constants)
    sites = [rewrite.site(decision) for decision in decisions]
    choice.check_patterns(sites)
    configs = {decision.config.fingerprint(): decision.config for decision in decisions if decision.config is not None}
    return Examination(Report(title, tuple(sites)), configs)
