"""The Dynamo backend ``"sla"``: sparse-linear attention for models that nobody accelerated.

    torch.compile(model, backend="sla", options={"sparsity": 0.95, "inner": "inductor"})

It rewrites Dynamo's graph and hands it to an inner backend. There is no place for parameters to train in a compiled
graph (a regional compilation would share them between blocks), so ``linear="none"``, which has none, is the only
linear branch it takes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.backends.registry import list_backends, lookup_backend, register_backend
from torch.fx.graph_module import GraphModule

from sla_compile.config import SLAConfig
from sla_compile.passes import rewrite
from sla_compile.passes.edit import Edits
from sla_compile.passes.sites import Site

log = logging.getLogger(__name__)

_FIELDS = frozenset(field.name for field in dataclasses.fields(SLAConfig))
_reports: deque[list[Site]] = deque(maxlen=256)
_lock = threading.Lock()


def sla(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a Dynamo graph with its attentions rewritten.

    Args:
        options: fields of SLAConfig (``linear`` is "none" unless given), or ``config``, a whole SLAConfig; ``inner``, a
            backend's name or function, default "inductor"; ``on_report``, called with the sites of every graph;
            anything else goes to the inner backend as its options.
        mode: as of torch.compile, for Inductor.

    Raises:
        ValueError: options that make no valid configuration, or one that needs parameters.
    """
    config, inner, on_report, rest = _split(options or {})
    sites = _rewrite(graph_module, config)
    with _lock:
        _reports.append(sites)
    if on_report is not None:
        on_report(sites)
    return _compile(inner, graph_module, example_inputs, rest, mode)


def reports() -> list[list[Site]]:
    """What the backend decided: the sites of every graph it compiled in this process, oldest first, at most 256 graphs.

    Dynamo calls a backend for every graph it captures; hits of Inductor's caches come after that and do not hide a
    report. A graph that Dynamo does not capture again is not reported again.
    """
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forgets the reports."""
    with _lock:
        _reports.clear()


def register() -> None:
    """Makes ``torch.compile(..., backend="sla")`` work in a checkout; of an installed package the entry point does."""
    if "sla" not in list_backends(exclude_tags=()):
        register_backend(sla, name="sla")


def _split(options: Mapping[str, Any]) -> tuple[SLAConfig, Any, Callable[[list[Site]], Any] | None, dict[str, Any]]:
    """The configuration, the inner backend, the callback and the inner backend's options."""
    rest = dict(options)
    inner = rest.pop("inner", "inductor")
    on_report = rest.pop("on_report", None)
    fields = {name: rest.pop(name) for name in sorted(_FIELDS & rest.keys())}
    config = rest.pop("config", None)
    if config is None:
        config = SLAConfig(**fields if fields.get("method", "sla") != "sla" else {"linear": "none", **fields})
    elif fields:
        raise ValueError(f'options has "config" and {sorted(fields)}; give one or the other')
    if not isinstance(config, SLAConfig):
        raise TypeError(f"options['config'] must be an SLAConfig, got {type(config).__name__}")
    if config.has_parameters:
        what = (
            'method="sla2" has alpha and a router' if config.has_alpha else f'linear="{config.linear}" has a projection'
        )
        raise ValueError(
            f'the backend "sla" adds no parameters, but {what} to train; use method="sla" with linear="none", or '
            "sla_compile.accelerate(model) before torch.compile"
        )
    return config, inner, on_report, rest


def _rewrite(graph_module: GraphModule, config: SLAConfig) -> list[Site]:
    if rewrite.has_op(graph_module):
        log.info("the model was accelerated already; its graph is compiled as it is")
        return []
    decisions = rewrite.decide(graph_module, lambda name: config, may_guard=True)
    edits = Edits(rewrite.ModuleParameters(graph_module, {}))
    edits.rewrite((decision.match, decision.config) for decision in decisions if decision.config is not None)
    edits.commit()
    sites = [rewrite.site(decision) for decision in decisions]
    for site in sites:
        if site.rewritten:
            log.info("%s %s is sparse-linear attention", site.name, site.shape)
        else:
            log.info("%s %s stays dense: %s", site.name, site.shape, site.reason)
    return sites


def _compile(
    inner: Any, graph_module: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any], mode: str | None
) -> Callable[..., Any]:
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **options}
        compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=patches or None)
        return compiled
    keywords: dict[str, Any] = {"options": options} if options else {}
    if mode:
        keywords["mode"] = mode
    backend: Any = lookup_backend(inner)
    return backend(graph_module, list(example_inputs), **keywords)
