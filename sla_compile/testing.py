"""Checks for continuous integration: what is rewritten, what is captured, and how exact a result is.

from sla_compile.testing import assert_rewritten

with torch.device("meta"):  # no weights: a 14B model is checked in seconds
    model = WanTransformer3DModel(**config)
assert_rewritten(model, inputs, expect="blocks.*.attn1", snapshot="tests/wan.json")
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile import snapshot as snapshots
from sla_compile.api import Patterns
from sla_compile.capture import check_capture
from sla_compile.config import SLAConfig
from sla_compile.examine import Examination, examine
from sla_compile.functional import route
from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.reference import reference_attention
from sla_compile.kernels.smoothing import has_complement, token_mean
from sla_compile.kernels.spec import Spec
from sla_compile.ops import default_scale
from sla_compile.passes.sites import Site
from sla_compile.report import Report

__all__ = ["assert_accurate", "assert_captured", "assert_rewritten", "error_over_budget", "reference"]

Expectation = int | str | Sequence[str] | Callable[[Report], bool]


def assert_rewritten(
    model: Any,
    example_inputs: Any = None,
    *,
    expect: Expectation | None = None,
    snapshot: str | os.PathLike[str] | None = None,
    update: bool = False,
    sparsity: float | None = None,
    config: SLAConfig | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    per_site: Mapping[str, SLAConfig | None] | None = None,
) -> Report:
    """Asserts which attentions of a model become sparse-linear attention, without running or changing it.

    A model that is not accelerated is planned as :func:`sla_compile.accelerate` would. One that is must do what was
    promised: with example_inputs, a run of a copy on fake tensors shows that every chosen attention really calls the
    op. Both work on the meta device.

    Args:
        model: an ``nn.Module``, ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``.
        example_inputs: a tuple or dict of the forward's arguments; without them the structure decides, and a model that
            is accelerated is not run.
        expect: how many attentions are rewritten; or names and patterns (``fnmatch``), which must be exactly those
            rewritten; or a predicate on the :class:`sla_compile.Report`. By default at least one.
        snapshot: a file to compare every decision with; see :mod:`sla_compile.snapshot`.
        update: write the snapshot instead of comparing with it.
        sparsity, config, include, exclude, per_site: as for accelerate, for a model that is not accelerated.

    Returns:
        The report, with the shapes that these inputs lead to.

    Raises:
        AssertionError: it is otherwise; the text says which attentions and why.
        ValueError, TypeError: arguments that accelerate would refuse too, or a file that is no snapshot of this model.
    """
    examination = examine(
        model, example_inputs, sparsity=sparsity, config=config, include=include, exclude=exclude, per_site=per_site
    )
    check(examination, expect=expect, snapshot=snapshot, update=update)
    return examination.report


def check(
    examination: Examination,
    *,
    expect: Expectation | None = None,
    snapshot: str | os.PathLike[str] | None = None,
    update: bool = False,
) -> None:
    """The checks of :func:`assert_rewritten` on what was found already."""
    if examination.silent:
        raise AssertionError(f"{examination.report.title} is silently dense:\n  " + "\n  ".join(examination.silent))
    _check_expected(examination.report, expect, needed=snapshot is None)
    if snapshot is not None:
        snapshots.compare(snapshot, examination, update=update)


def _check_expected(report: Report, expect: Expectation | None, needed: bool) -> None:
    rewritten = report.rewritten
    if expect is None:
        if needed and not rewritten:
            raise AssertionError(f"no attention of {report.title} is rewritten\n{listing(report.rows)}")
    elif isinstance(expect, bool):
        raise TypeError("expect is a number, names or patterns, or a predicate on the report; got a bool")
    elif isinstance(expect, int):
        if len(rewritten) != expect:
            told = f"expected {expect} rewritten attentions, found {len(rewritten)}"
            raise AssertionError(f"{report.title}: {told}\n{listing(report.rows)}")
    elif callable(expect):
        if not expect(report):
            raise AssertionError(f"{report.title}: its report does not satisfy {expect!r}\n{listing(report.rows)}")
    else:
        _check_names(report, [expect] if isinstance(expect, str) else list(expect))


def _check_names(report: Report, patterns: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in report):
            raise AssertionError(f"{report.title} has no attention {pattern!r}\n{listing(report.rows)}")
    wanted = [any(fnmatchcase(row.name, pattern) for pattern in patterns) for row in report]
    missing = [row for row, want in zip(report, wanted, strict=True) if want and not row.rewritten]
    extra = [row for row, want in zip(report, wanted, strict=True) if not want and row.rewritten]
    if missing or extra:
        told = [f"expected to be rewritten, but dense:\n{listing(missing)}"] if missing else []
        told += [f"rewritten, but not expected:\n{listing(extra)}"] if extra else []
        raise AssertionError(f"{report.title}: " + "\n".join(told))


def listing(rows: Sequence[Site]) -> str:
    """Attentions by what became of them, one line for all that share it."""
    if not rows:
        return "  no attention was found; with example_inputs they are found by a run on fake tensors"
    groups: dict[tuple, list[Site]] = {}
    for row in rows:
        groups.setdefault((row.rewritten, row.reason, row.shape, row.keys), []).append(row)
    lines = []
    for (rewritten, reason, shape, keys), found in groups.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        sizes = f" {shape} on {keys} keys" if shape else ""
        became = "rewritten" if rewritten else f"dense, {reason}"
        lines.append(f"  {found[0].name or 'the model itself'}{more}{sizes}: {became}")
    return "\n".join(lines)


def assert_captured(
    model: nn.Module, inputs_list: Sequence[Any], *, fullgraph: bool = True, dynamic: bool | None = None
) -> None:
    """Asserts that Dynamo captures an accelerated model as what it is in eager mode.

    For each of the inputs, the captured graph calls the op as often, for the same owners, as the eager model does in a
    run on fake tensors, and holds no other dense attention of an accelerated owner. With `fullgraph` there is no graph
    break. One graph serves all inputs; with ``dynamic=None`` there may be a second one, in which sizes that differ are
    dynamic; with ``dynamic=False`` each shape has its own. Nothing is captured when the inputs come a second time.

    Graphs are captured and run without a compiler behind. On the meta device this takes neither memory nor arithmetic;
    otherwise the model runs twice for each of the inputs, in its present training and gradient mode. Everything that
    Dynamo had compiled in this process is dropped (``torch._dynamo.reset()``) and compiles again when it is needed.

    Args:
        model: accelerated, compiled or not.
        inputs_list: several example inputs, each a tuple or dict of the forward's arguments.
        fullgraph, dynamic: as of ``torch.compile``.

    Raises:
        AssertionError: it is otherwise.
        ValueError, TypeError: the model is not accelerated, or does not run with these inputs.
    """
    check_capture(model, inputs_list, fullgraph=fullgraph, dynamic=dynamic)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SLAConfig,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    router_q: Tensor | None = None,
    router_k: Tensor | None = None,
    alpha: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    block_map: Tensor | None = None,
) -> Tensor:
    """The formula of :func:`sla_compile.sparse_linear_attention`, dense and differentiable, in float64.

    Arguments as there; blocks are routed from the query and key as given. It holds L x L numbers a head.

    Returns:
        (B, H, L, D), float64.
    """
    if block_map is None:
        block_map = route(
            query, key, config=config, router_q=router_q, router_k=router_k, key_padding_mask=key_padding_mask,
            scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    scale = default_scale(scale, query.shape[-1])
    spec = Spec(scale, config.feature_map, config.linear, config.block_q, config.block_k)
    bias = key_bias(key_padding_mask, query.shape[0], query.shape[2])
    weight, shift = (None if tensor is None else tensor.double() for tensor in (proj_weight, proj_bias))
    query, key, value = query.double(), key.double(), value.double()
    share = mean = None
    if alpha is not None:
        share = torch.where(has_complement(block_map, bias, config.block_k), alpha.double(), 1)
        mean = token_mean(key, bias)
    return reference_attention(
        query, key, value, block_map, spec, proj_weight=weight, proj_bias=shift, key_bias=bias, alpha=share,
        key_mean=mean,
    )[0]  # fmt: skip


def error_over_budget(result: Tensor, exact: Tensor, eager: Tensor, *, tokens: int, scale: float = 0.0) -> float:
    """Largest error of `result` against `exact`, over what its dtype excuses; at most 1 is as good as can be asked.

    The budget is twice the error of `eager`, the plain formula evaluated in the dtype of `result`, and, relative to the
    largest element, one rounding to that dtype and a random walk of float32 roundings over the tokens:
    ``2 max|eager - exact| + (eps + sqrt(tokens) eps32) max(scale, max|exact|)``.

    Args:
        result: what is tested; exact: float64; eager: in the dtype of `result`; all of one shape.
        tokens: length of the sums behind an element.
        scale: size of the terms that cancel in an element, where that is more than the largest element.

    Returns:
        The ratio; NaN where shapes differ or `result` is not finite.
    """
    if result.shape != exact.shape or not result.isfinite().all():
        return math.nan
    eps, eps32 = torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps
    result, exact, eager = (tensor.detach().cpu().double() for tensor in (result, exact, eager))
    error = (result - exact).abs().max().item()
    # Where the low-precision evaluation overflowed it says nothing.
    excused = 2 * (eager - exact).abs().nan_to_num(0, posinf=0).max().item()
    budget = excused + (eps + math.sqrt(tokens) * eps32) * max(scale, exact.abs().max().item())
    return error / budget if error else 0.0


def assert_accurate(result: Tensor, exact: Tensor, eager: Tensor, *, tokens: int, scale: float = 0.0) -> None:
    """Asserts that :func:`error_over_budget` is at most 1."""
    ratio = error_over_budget(result, exact, eager, tokens=tokens, scale=scale)
    if not ratio <= 1:  # NaN fails
        raise AssertionError(
            f"{result.dtype} result of shape {tuple(result.shape)} is off by {ratio:.3g} times what its dtype excuses"
            if ratio == ratio
            else f"result of shape {tuple(result.shape)} is not finite, or not of shape {tuple(exact.shape)}"
        )
