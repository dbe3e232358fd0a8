"""The verb: accelerate a model, and what goes with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sla_compile.config import SLAConfig
from sla_compile.module import ROUTERS, SparseLinearAttention
from sla_compile.passes.sites import Site, plain_name
from sla_compile.plan import Planned, Sizes, plan_module
from sla_compile.redirect import Redirection, attach, attach_root, detach, is_changed, is_ours
from sla_compile.report import Report

logger = logging.getLogger(__name__)

Model = TypeVar("Model")
LOST = "its redirect is gone: the module was replaced or its class changed after accelerate"

Patterns = str | Sequence[str] | Callable[[str, nn.Module | None], bool]


@dataclass
class Acceleration:
    """What the root of an accelerated model remembers."""

    origin: str
    title: str
    sites: list[Site]


def accelerate(
    model: Model,
    sparsity: float | None = None,
    *,
    config: SLAConfig | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    per_site: Mapping[str, SLAConfig | None] | None = None,
    allow_no_match: bool = False,
) -> Model:
    """Makes the long self-attentions of a model run as Sparse-Linear Attention (SLA, arXiv 2509.24006) or SLA2
    (``config=SLAConfig(method="sla2")``, arXiv 2602.12675).

    A module is changed in place and returned: same object, same class name, same parameters plus, for every chosen
    attention, ``<owner>.sla.proj_weight`` and ``<owner>.sla.proj_bias`` (D x D and D, zero), or for SLA2
    ``<owner>.sla.alpha_logit`` (H x 1) and the frozen ``router_q`` and ``router_k`` (D x D, identity); in the owner's
    dtype, like it trainable or frozen. Call it before ``torch.compile``, ``torch.export``, ``fully_shard`` or DDP.

    Args:
        model: an ``nn.Module``, ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``.
        sparsity: share of blocks that are not computed exactly; overrides the config's, which is 0.95 by default.
        config: everything else; see :class:`SLAConfig`.
        example_inputs: a tuple of positional or a dict of keyword arguments of the model's forward. With them every
            attention is found and decided exactly, by a run on fake tensors; without, by the model's structure. An
            ExportedProgram has its own.
        include: name patterns (``fnmatch``) or ``predicate(name, module)``; only these attentions are considered, and
            one whose structure does not tell whether it is self-attention is taken to be.
        exclude: likewise; these stay dense.
        per_site: a configuration for the attentions whose name matches a pattern (the first that does), None to leave
            them dense.
        allow_no_match: return the model unchanged, instead of raising, when no attention qualifies.

    Returns:
        The same module or graph module; for an ExportedProgram a new one.

    Raises:
        ValueError: nothing qualifies, a pattern matches nothing, or an attention cannot be decided; the model is then
            what it was.
        RuntimeError: the model is accelerated already, or wrapped in something that must come after.
        TypeError: `model` is none of the above.
    """
    base = config or SLAConfig()
    if not isinstance(base, SLAConfig):
        raise TypeError(f"config must be an SLAConfig, got {type(base).__name__}")
    if sparsity is not None:
        base = base.replace(sparsity=sparsity)
    choice = Choice(base, include, exclude, per_site)
    origin = f"accelerate({type(model).__name__}, sparsity={base.sparsity}) at {_caller()}"
    if isinstance(model, torch.export.ExportedProgram):
        from sla_compile.passes.exported import accelerate_exported

        program, _ = accelerate_exported(model, choice, allow_no_match=allow_no_match, check=choice.check_patterns)
        return cast(Model, program)
    if isinstance(model, torch.fx.GraphModule):
        from sla_compile.passes.rewrite import accelerate_graph

        accelerate_graph(
            model,
            choice,
            example_inputs=example_inputs,
            allow_no_match=allow_no_match,
            check=choice.check_patterns,
        )
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes an nn.Module, fx.GraphModule or ExportedProgram, got {type(model).__name__}; of a "
            'pipeline pass its transformer, and for a plain function use torch.compile(function, backend="sla")'
        )
    accelerate_module(model, choice, origin, example_inputs=example_inputs, allow_no_match=allow_no_match)
    return model


def accelerate_module(
    model: nn.Module,
    choice: Choice,
    origin: str,
    *,
    example_inputs: Any = None,
    allow_no_match: bool = False,
    sizes: Mapping[str, Sizes] | None = None,
) -> None:
    """:func:`accelerate` for a module, with `sizes` for what structure does not tell (from a saved file)."""
    _check_unwrapped(model)
    planned, sites = plan_module(model, choice, example_inputs, sizes)
    choice.check_patterns(sites)
    if not planned and not allow_no_match:
        raise ValueError(f"no attention of {type(model).__name__} qualifies:\n{_reasons(sites)}")
    _apply(model, planned)
    model.__dict__["_sla_acceleration"] = Acceleration(origin, type(model).__name__, sites)
    logger.info("%s: %d of %d attentions redirected", origin, len(planned), len(sites))


def report(model: Any) -> Report:
    """Every attention of an accelerated model or graph: rewritten, or dense and why.

    Shapes are those of `example_inputs`, or of the last eager run.

    Raises:
        ValueError: `model` was not accelerated.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        return _graph_report(model)
    model = unwrapped(model)
    state = _acceleration(model)
    modules = by_plain_name(model)
    sites = [_refreshed(site, modules.get(plain_name(site.name))) for site in state.sites]
    return Report(state.title, tuple(_unseen_told(sites)))


def parameters(model: Any, stage: int | None = None) -> list[nn.Parameter]:
    """Parameters to give to an optimizer: those that :func:`accelerate` added, or those of a stage of SLA2's training.

    Nothing is frozen or unfrozen by this. The added parameters are frozen where the owner's own are: then
    ``requires_grad_(True)`` comes first. SLA2's routers are frozen always, as no gradient reaches them through the hard
    choice of blocks; calibrate trains them, and a loop of your own for stage 1 unfreezes them.

    Args:
        stage: None for all added parameters, routers included.
            1 for SLA2's routers and alpha, which learn to imitate full attention while the model stays as it is.
            2 for fine-tuning, of SLA too: the added parameters without the routers, then the model's own that are
            trainable.

    Raises:
        ValueError: another stage, or stage 1 of a model without SLA2.
    """
    if stage not in (None, 1, 2):
        raise ValueError(f"stage must be None, 1 or 2, got {stage!r}")
    added = _added_parameters(model)
    routers = [p for name, p in added.items() if name.rpartition(".")[2] in ROUTERS]
    if stage is None:
        return list(added.values())
    if stage == 1:
        if not routers:
            raise ValueError('stage 1 trains the routers and alpha of SLA2, and this model has none (method="sla2")')
        return [p for name, p in added.items() if name.rpartition(".")[2] in (*ROUTERS, "alpha_logit")]
    known = {id(p) for p in added.values()}
    tuned = [p for name, p in added.items() if name.rpartition(".")[2] not in ROUTERS]
    return tuned + [p for p in model.parameters() if p.requires_grad and id(p) not in known]


def _added_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that accelerate added, by name; one that several owners share appears once."""
    if isinstance(model, (torch.fx.GraphModule, torch.export.ExportedProgram)):  # whose modules may be gone
        from sla_compile.passes.rewrite import added_parameters

        return added_parameters(model)
    modules = added_modules(model)
    return {f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.named_parameters()}


def added_modules(model: nn.Module) -> dict[str, SparseLinearAttention]:
    """What accelerate added, by the name under which its owner has it; where peft trains a copy of it, with
    ``modules_to_save=["sla"]``, the one that runs."""
    found: dict[str, SparseLinearAttention] = {}
    idle: set[Any] = set()
    for name, module in model.named_modules():
        wrapped: Any = module._modules
        if isinstance(wrapped.get("original_module"), SparseLinearAttention):
            copies = wrapped["modules_to_save"]._modules
            active = () if module.disable_adapters else module.active_adapters
            found[name] = next((copies[each] for each in active if each in copies), wrapped["original_module"])
            idle |= {wrapped["original_module"], *copies.values()}
        elif isinstance(module, SparseLinearAttention) and module not in idle:
            found[name] = module
    return found


def restore(model: nn.Module) -> nn.Module:
    """Takes everything back: classes, parameters, attention backends. Returns the same module.

    Raises:
        ValueError: `model` was not accelerated.
        TypeError: it is a graph.
        RuntimeError: something changed a class after accelerate, as fully_shard does; nothing is taken back then.
    """
    _acceleration(model)
    changed = {name: module for name, module in model.named_modules() if is_changed(module)}
    for name, module in changed.items():
        if not is_ours(type(module)):
            raise RuntimeError(
                f"the class of {name or 'the model'} was changed after accelerate, to {type(module).__name__}, and "
                "restore would take that back, too; restore before fully_shard and the like"
            )
    for module in changed.values():
        detach(module)
    del model.__dict__["_sla_acceleration"]
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Exact attention inside the ``with`` block, for dense first steps of a sampler or for comparison.

    A compiled model compiles once for each of the two. It holds for the model, in whichever thread that runs.

    Raises:
        ValueError: `model` was not accelerated.
        TypeError: it is a graph.
    """
    _acceleration(unwrapped(model))
    modules = [module for module in model.modules() if isinstance(module, SparseLinearAttention)]
    before = [module.dense for module in modules]
    for module in modules:
        module.dense = True
    try:
        yield model
    finally:
        for module, value in zip(modules, before, strict=True):
            module.dense = value


class Choice:
    """Which configuration an attention gets, by name: ``choice(name, module)``."""

    def __init__(
        self,
        base: SLAConfig,
        include: Patterns | None,
        exclude: Patterns | None,
        per_site: Mapping[str, SLAConfig | None] | None,
    ) -> None:
        for value in (per_site or {}).values():
            if value is not None and not isinstance(value, SLAConfig):
                raise TypeError(f"per_site maps patterns to an SLAConfig or None, got {type(value).__name__}")
        self.base = base
        self.include = include
        self.exclude = exclude
        self.per_site = dict(per_site or {})

    def __call__(self, name: str, module: nn.Module | None = None) -> SLAConfig | str:
        """The configuration, or the reason why the user wants it dense."""
        if self.include is not None and not _matches(self.include, name, module):
            return "not among include"
        if self.exclude is not None and _matches(self.exclude, name, module):
            return "excluded"
        for pattern, config in self.per_site.items():
            if fnmatchcase(name, pattern):
                return config or f"per_site[{pattern!r}] is None"
        return self.base

    def names(self, name: str, module: nn.Module | None = None) -> bool:
        """Whether the user asked for this attention by name."""
        if self.include is not None and _matches(self.include, name, module):
            return True
        return any(fnmatchcase(name, pattern) for pattern, config in self.per_site.items() if config)

    def check_patterns(self, sites: Sequence[Site]) -> None:
        """Raises ValueError for a pattern that matches no attention: it would do nothing, silently."""
        for label, patterns in (
            ("include", self.include),
            ("exclude", self.exclude),
            ("per_site", list(self.per_site)),
        ):
            if patterns is None or callable(patterns):
                continue
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                if not any(fnmatchcase(site.name, pattern) for site in sites):
                    names = ", ".join(dict.fromkeys(site.name for site in sites)) or "none"
                    raise ValueError(f"{label} pattern {pattern!r} matches no attention; found: {names}")


def _matches(patterns: Patterns, name: str, module: nn.Module | None) -> bool:
    if callable(patterns):
        return bool(patterns(name, module))
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _check_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        state = module.__dict__.get("_sla_acceleration")
        if state is not None:
            where = f"its submodule {name}" if name else "this model"
            raise RuntimeError(f"{where} is accelerated already, by {state.origin}; sla_compile.restore undoes it")
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(
                f"{name or 'the model'} is a ScriptModule, whose graph is fixed; accelerate before scripting"
            )
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise RuntimeError(f"accelerate the module inside {kind} before wrapping it: it gets new parameters")
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise RuntimeError(f"{name or 'the model'} is sharded already; call accelerate before fully_shard")
        if hasattr(module, "_orig_mod") and kind == "OptimizedModule":
            raise RuntimeError(f"{name or 'the model'} is compiled already; call accelerate before torch.compile")


def _apply(model: nn.Module, planned: Sequence[Planned]) -> None:
    """Attaches all that was planned, or nothing."""
    done: list[nn.Module] = []
    try:
        for item in planned:
            done.append(item.module)
            attach(item.module, item.redirection, item.sla)
        if planned:
            done.append(model)
            attach_root(model)
    except BaseException:
        for module in {id(module): module for module in done if is_changed(module)}.values():
            detach(module)
        raise


def _acceleration(model: nn.Module) -> Acceleration:
    if isinstance(model, (torch.fx.GraphModule, torch.export.ExportedProgram)):
        raise TypeError(
            f"this {type(model).__name__} is a graph, which accelerate rewrites for good: keep a copy from before it, "
            "or accelerate the module that the graph was captured from"
        )
    state = model.__dict__.get("_sla_acceleration") if isinstance(model, nn.Module) else None
    if state is None:
        inner = unwrapped(model)
        hint = "" if inner is model else f", but the {type(inner).__name__} inside of it was: pass that"
        raise ValueError(f"this {type(model).__name__} was not accelerated by sla_compile.accelerate{hint}")
    return state


def unwrapped(model: Any) -> Any:
    """The accelerated module inside of the wrappers of torch.compile, DDP, AveragedModel and peft, whose prefixes its
    names do without; `model` itself where there is none."""
    inner = model
    while isinstance(inner, nn.Module) and "_sla_acceleration" not in inner.__dict__:
        base: Any = getattr(inner, "get_base_model", None)
        if base is not None:
            inner = base()
        elif set(inner._modules) in ({"_orig_mod"}, {"module"}):
            inner = next(iter(inner._modules.values()))
        else:
            return model
    return inner


def by_plain_name(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by :func:`plain_name`, under which what is wrapped stands for its wrapper."""
    return {plain_name(name): module for name, module in model.named_modules()}


def _refreshed(site: Site, module: nn.Module | None) -> Site:
    """The site with what the last eager forward called, where there was one, or that its module is another now."""
    if module is not None and not is_changed(module):
        module = getattr(module, "base_layer", module)  # peft wraps an nn.MultiheadAttention
    redirection: Redirection | None = getattr(module, "_sla_redirection", None)
    if site.rewritten and redirection is None:
        return site.replace(rewritten=False, reason=LOST, config="")
    if redirection is None or not redirection.seen or not site.rewritten:
        return site
    return site.of_calls(redirection.seen)


def _unseen_told(sites: Sequence[Site]) -> Iterator[Site]:
    """The sites; of those that no eager run has called, though it called others, they say so: structure may have taken
    a module for an attention that nobody calls."""
    ran = any(site.rewritten and site.calls for site in sites)
    for site in sites:
        unseen = ran and site.rewritten and not site.shape
        yield site.replace(reason="not called by an eager run so far, which called others") if unseen else site


def _graph_report(model: Any) -> Report:
    from sla_compile.passes.rewrite import recorded_sites

    sites = recorded_sites(model)
    if sites is None:
        raise ValueError(f"this {type(model).__name__} was not accelerated by sla_compile.accelerate")
    return Report(type(model).__name__, tuple(sites))


def _reasons(sites: Sequence[Site]) -> str:
    if not sites:
        return (
            "  none was found by structure; pass example_inputs to find them by running it on fake tensors, or "
            'torch.compile(model, backend="sla")'
        )
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.reason, []).append(site)
    return "\n".join(
        f"  {found[0].name or 'the model itself'} {found[0].shape}"
        + f" and {len(found) - 1} more" * (len(found) > 1)
        + f": {reason}"
        for reason, found in groups.items()
    )


def _caller() -> str:
    """File and line of the first frame outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "sla_compile":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
