"""What accelerate will do to a module, decided before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sla_compile.config import MAX_HEAD_DIM, SLAConfig
from sla_compile.discovery import AttentionCall, discover
from sla_compile.kernels.spec import num_blocks
from sla_compile.module import SparseLinearAttention
from sla_compile.passes.eligibility import why_dense
from sla_compile.passes.sites import Call, Site
from sla_compile.redirect import CHILD, Redirection, second_attended
from sla_compile.structure import BYPASSED, Owner, find_owners

CROSS = "cross-attention: keys and values stem from a second sequence"
_PARAMETER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Choice(Protocol):
    """The user's wishes: a configuration or a reason to stay dense, by name."""

    def __call__(self, name: str, module: nn.Module | None = None) -> SLAConfig | str: ...

    def names(self, name: str, module: nn.Module | None = None) -> bool: ...


@dataclass(frozen=True)
class Planned:
    """One owner to change; without `sla` it is shielded from a redirected ancestor only."""

    module: nn.Module
    redirection: Redirection
    sla: SparseLinearAttention | None


@dataclass(frozen=True)
class Sizes:
    """What the shapes of an owner's parameters follow from: D, H, and query blocks, where they are known or matter."""

    head_dim: int | None = None
    heads: int | None = None
    query_blocks: int | None = None


@dataclass(frozen=True)
class Decision:
    """What becomes of one owner: the configuration it is redirected with, or None where it stays dense.

    `second` is name and position of the forward argument that makes a call cross-attention, if there is one.
    """

    name: str
    config: SLAConfig | None
    site: Site
    sizes: Sizes = Sizes()
    second: tuple[str, int | None] | None = None


def plan_module(
    model: nn.Module, choice: Choice, example_inputs: Any, sizes: Mapping[str, Sizes] | None = None
) -> tuple[list[Planned], list[Site]]:
    """The owners to redirect and a row for every attention found.

    Args:
        sizes: of owners by name, for what structure does not tell.

    Raises:
        ValueError: an attention cannot be decided, or an owner already has a child of our name.
    """
    owners = find_owners(model)
    if example_inputs is None:
        decided = _decide_by_structure(owners, choice, sizes or {})
    else:
        decided = _decide_by_calls(model, discover(model, example_inputs), owners, choice)
    chosen = {decision.name for decision in decided if decision.config is not None}
    modules = dict(model.named_modules())
    planned = []
    for decision in decided:
        name, module = decision.name, modules[decision.name]
        nested = any(name != other and _encloses(other, name) for other in chosen)
        if decision.config is not None:
            sla = _new_parameters(name, module, decision.config, decision.sizes)
            redirection = Redirection(name, decision.second, nested, isinstance(module, nn.MultiheadAttention))
            planned.append(Planned(module, redirection, sla))
        elif nested:
            planned.append(Planned(module, Redirection(name, None, True, False, decision.site.reason), None))
    return planned, [decision.site for decision in decided]


def _decide_by_structure(owners: Sequence[Owner], choice: Choice, known: Mapping[str, Sizes]) -> list[Decision]:
    decided: list[Decision] = []
    unknown: list[tuple[str, str]] = []
    for owner in owners:
        wish = choice(owner.name, owner.module)
        rest = known.get(owner.name, Sizes())
        sizes = Sizes(owner.head_dim or rest.head_dim, owner.heads or rest.heads, rest.query_blocks)
        site = Site(owner.name, False, head_dim=sizes.head_dim)
        if isinstance(wish, str):
            decided.append(Decision(owner.name, None, site.replace(reason=wish)))
        elif owner.verdict == "dense":
            decided.append(Decision(owner.name, None, site.replace(reason=owner.why)))
        elif sizes.head_dim is None:
            unknown.append((owner.name, f"its head dimension is not declared ({type(owner.module).__name__})"))
        elif sizes.head_dim > MAX_HEAD_DIM:
            decided.append(Decision(owner.name, None, site.replace(reason=f"head dimension over {MAX_HEAD_DIM}")))
        elif owner.verdict == "unknown" and not choice.names(owner.name, owner.module):
            unknown.append((owner.name, owner.why))
        elif wish.has_alpha and sizes.heads is None:
            unknown.append((owner.name, f"its number of heads is not declared ({type(owner.module).__name__})"))
        elif wish.has_alpha and wish.alpha_per == "block" and sizes.query_blocks is None:
            unknown.append((owner.name, 'alpha_per="block" is bound to one length, which structure does not tell'))
        else:
            site = site.replace(rewritten=True, config=wish.fingerprint())
            decided.append(Decision(owner.name, wish, site, sizes, _second_argument(owner)))
    if unknown:
        lines = "\n".join(f"  {name}: {why}" for name, why in unknown[:8])
        more = f"\n  and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise ValueError(
            f"structure does not decide these attentions:\n{lines}{more}\n"
            "pass example_inputs (a tuple or dict of the forward's arguments, fake or real) to decide them by a run on "
            "fake tensors, or name them in include or exclude"
        )
    return decided


def _decide_by_calls(
    model: nn.Module, calls: Sequence[AttentionCall], owners: Sequence[Owner], choice: Choice
) -> list[Decision]:
    modules = dict(model.named_modules())
    seconds = {owner.name: _second_argument(owner) for owner in owners}
    bypassed = {owner.name for owner in owners if owner.why == BYPASSED}  # by what the run's own hooks switch off
    by_owner: dict[str, list[AttentionCall]] = {}
    for call in calls:
        by_owner.setdefault(call.owner, []).append(call)
    decided: list[Decision] = []
    for name, made in by_owner.items():
        wish = choice(name, modules[name])
        reasons = [wish if isinstance(wish, str) else _why_dense(call, wish) for call in made]
        qualifying = [call for call, reason in zip(made, reasons, strict=True) if reason is None]
        second = seconds.get(name)
        if any(second_attended(second, call.query, *call.given) for call in qualifying):
            second = None  # the run knows better: it takes part in self-attention
        conflict = "" if isinstance(wish, str) else BYPASSED if name in bypassed else _conflict(qualifying, wish)
        if qualifying and any(
            reason == CROSS and not second_attended(second, call.query, *call.given)
            for call, reason in zip(made, reasons, strict=True)
        ):
            conflict = "some of its calls attend to another sequence of its length, and nothing tells them apart later"
        if conflict:
            reasons = [conflict] * len(made)
        told = [Call(tuple(c.query.shape), c.key.shape[-2], why) for c, why in zip(made, reasons, strict=True)]
        site = Site(name, False).of_calls(told)
        config = wish if isinstance(wish, SLAConfig) and site.rewritten else None
        call = max(qualifying if config else made, key=lambda call: call.query.shape[-2])
        site = site.replace(head_dim=call.query.shape[-1], config=config.fingerprint() if config else "")
        decided.append(Decision(name, config, site, _sizes(call, config) if config else Sizes(), second))
    for owner in owners:
        if owner.name not in by_owner:
            reason = "made no call of scaled_dot_product_attention with these example_inputs"
            decided.append(Decision(owner.name, None, Site(owner.name, False, reason, head_dim=owner.head_dim)))
    return decided


def _conflict(calls: Sequence[AttentionCall], config: SLAConfig) -> str:
    """Why the calls of one owner cannot share its parameters, or an empty string."""
    sizes = [_sizes(call, config) for call in calls]
    dims = {each.head_dim for each in sizes}
    if len(dims) > 1:
        return f"calls with different head dimensions {sorted(dims)}"  # type: ignore[type-var]
    if config.has_alpha and len({each.heads for each in sizes}) > 1:
        return "calls with different numbers of heads, which one alpha cannot serve"
    if config.alpha_per == "block" and len({each.query_blocks for each in sizes}) > 1:
        return 'calls of different lengths, and alpha_per="block" is bound to one'
    return ""


def _sizes(call: AttentionCall, config: SLAConfig) -> Sizes:
    shape = call.query.shape
    return Sizes(shape[-1], shape[1] if len(shape) == 4 else 1, num_blocks(shape[-2], config.block_q))


def _why_dense(call: AttentionCall, config: SLAConfig) -> str | None:
    reason = why_dense(
        call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal, call.enable_gqa, config
    )
    return reason or (None if call.is_self else CROSS)


def _encloses(outer: str, inner: str) -> bool:
    return outer == "" or inner.startswith(outer + ".")


def _second_argument(owner: Owner) -> tuple[str, int | None] | None:
    """Name and position of the second sequence in the owner's forward, unless both attend jointly."""
    if owner.second is None or owner.joint:
        return None
    names = [
        parameter.name
        for parameter in inspect.signature(owner.module.forward).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return owner.second, names.index(owner.second) if owner.second in names else None


def _new_parameters(name: str, module: nn.Module, config: SLAConfig, sizes: Sizes) -> SparseLinearAttention:
    """Fresh parameters on the owner's device, in its dtype, trainable where any of its own are.

    The dtype follows the owner's, then and under ``.to()``, because one parameter group of FSDP takes a single dtype;
    the kernels compute the projection in float32 all the same.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"{name} already has an attribute named {CHILD!r}, which would hold the new parameters")
    all_own = list(module.parameters())
    own = [p for p in all_own if p.dtype in _PARAMETER_DTYPES]
    device = (own or all_own)[0].device if all_own else None  # of quantized weights, too, which have no dtype for ours
    hook: Any = getattr(module, "_hf_hook", None) or next(
        (child._hf_hook for child in module.modules() if hasattr(child, "_hf_hook")), None
    )
    if device is not None and device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        device = torch.device(hook.execution_device)  # offloaded: the weights are elsewhere, ours are small
    assert sizes.head_dim is not None  # an attention is not chosen without
    sla = SparseLinearAttention(
        config,
        sizes.head_dim,
        num_heads=sizes.heads,
        query_blocks=sizes.query_blocks,
        device=device,
        dtype=own[0].dtype if own else None,
    )
    sla.set_trainable(not own or any(p.requires_grad for p in own))
    return sla.train(module.training)
