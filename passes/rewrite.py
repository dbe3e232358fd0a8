"""Rewrites the attentions of a captured graph to sparse-linear attention, in place and all or nothing.

out = F.scaled_dot_product_attention(q, k, v)
    becomes, with SLA's parameters (with SLA2's there are other ones, and a sigmoid)
weight, bias = self.blocks.0.attn1.sla.proj_weight, self.blocks.0.attn1.sla.proj_bias
out = torch.ops.sla_compile.sparse_linear_attention.default(q, k, v, weight, bias, None, ...)[0]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.graph_module import GraphModule

from sla_compile.config import SLAConfig
from sla_compile.kernels.spec import num_blocks
from sla_compile.module import NAMES, SparseLinearAttention
from sla_compile.passes.edit import Edits, can_pass_operands
from sla_compile.passes.eligibility import DTYPES, is_key_padding_mask, why_dense
from sla_compile.passes.find import Match, find_attention, owner
from sla_compile.passes.layout import Operand
from sla_compile.passes.nodes import VIEWS, hint, same
from sla_compile.passes.scopes import Scope, scopes
from sla_compile.passes.shapes import propagate
from sla_compile.passes.sites import Site

Choose = Callable[[str], "SLAConfig | str"]
META_KEY = "sla_compile"


@dataclass(frozen=True)
class Decision:
    """What becomes of one match: the configuration it is rewritten with, or the reason why it stays dense."""

    match: Match
    config: SLAConfig | None
    reason: str = ""


def accelerate_graph(
    graph_module: GraphModule,
    choose: Choose,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    allow_no_match: bool = False,
    check: Callable[[list[Site]], None] | None = None,
) -> list[Site]:
    """Rewrites the attentions of `graph_module` in place and adds their parameters to it.

    Args:
        graph_module: from Dynamo, symbolic_trace, make_fx or an exported program's ``module()``.
        choose: from an owner's name to its configuration, or to the reason why it is left dense.
        example_inputs: what the graph is called with, for graphs that carry no shapes (symbolic_trace): a tuple, or a
            mapping from input names. The example decides what qualifies; the rewritten graph takes other lengths too.
        allow_no_match: whether it is fine that nothing qualifies.
        check: sees the sites before anything is changed, and may raise.

    Returns:
        every attention of the graph, with the reason where it stays dense.

    Raises:
        ValueError: no shapes, or nothing qualifies; the graph is then as it was.
        RuntimeError: accelerated before.
    """
    check_fresh(graph_module)
    decisions = decide(graph_module, choose, example_inputs=example_inputs)
    sites = [site(decision) for decision in decisions]
    if check is not None:
        check(sites)
    check_found(sites, allow_no_match)
    modules: dict[str, SparseLinearAttention] = {}
    edits = Edits(ModuleParameters(graph_module, modules))
    edits.rewrite((d.match, d.config) for d in decisions if d.config is not None)
    if edits:
        for path, module in modules.items():
            _unshare(graph_module, path.rpartition(".")[0])
            graph_module.add_submodule(path, module)
        edits.commit()
    graph_module.meta[META_KEY] = record(decisions)
    return sites


def decide(
    graph_module: GraphModule,
    choose: Choose,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    constants: set[str] | None = None,
    may_guard: bool = False,
) -> list[Decision]:
    """What becomes of every attention of the graph; changes nothing.

    Args:
        constants: see find_attention.
        may_guard: whether a decision about a symbolic length may install a guard, as in a Dynamo backend, where the
            guard makes other lengths recompile. Otherwise sizes must be equal as symbols, and `min_seq_len` is compared
            with the length that was traced.
    """
    values = None if example_inputs is None else propagate(graph_module, example_inputs)
    matches = find_attention(graph_module, values=values, constants=constants)
    first: dict[str, tuple] = {}
    decisions = []
    for match in matches:
        chosen = choose(match.name)
        config = chosen if isinstance(chosen, SLAConfig) else None
        reason = chosen if isinstance(chosen, str) else match.refusal or _why_dense(match, chosen, may_guard)
        if not reason and config is not None and config.has_parameters:
            reason = can_pass_operands(match.scope) or _why_not_shared(match, config, first)
        decisions.append(Decision(match, None if reason else config, reason))
    return decisions


def _why_not_shared(match: Match, config: SLAConfig, first: dict[str, tuple]) -> str:
    """Why the parameters of the owner's first call, whose sizes are noted in `first`, are not for this one."""
    heads, length, dim = _heads(match.query), match.query.shape[-2], match.query.shape[-1]
    if config.has_alpha and not isinstance(heads, int):
        return "its number of heads is symbolic, and SLA2 has an alpha for each"
    if config.alpha_per == "block" and not isinstance(length, int):
        return 'its length is dynamic, and alpha_per="block" is bound to one length'
    first_heads, first_length, first_dim = first.setdefault(match.name, (heads, length, dim))
    if first_dim != dim:
        return f"its owner's parameters are for head dimension {first_dim}, that of an earlier call"
    if config.has_alpha and first_heads != heads:
        return f"its owner's parameters are for {first_heads} heads, those of an earlier call"
    if config.alpha_per == "block" and first_length != length:
        return f"its owner's parameters are for {first_length} tokens, those of an earlier call"
    return ""


def _heads(query: Operand) -> Any:
    """Heads of (B, H, L, D); a flat (B, L, D) is one head."""
    return query.shape[1] if len(query.shape) == 4 else 1


def _why_dense(match: Match, config: SLAConfig, may_guard: bool) -> str:
    reader = match.scope.reader
    operands = (match.query, match.key, match.value)
    values = [reader.value(operand.node) for operand in operands]
    mask_value = None if match.mask is None else reader.value(match.mask.node)
    if any(not isinstance(value, torch.Tensor) for value in values) or (match.mask is not None and mask_value is None):
        raise ValueError(
            f"the graph has no shapes for {match.name}: pass example_inputs to accelerate, or capture the graph with "
            "torch.export or torch.compile, which note them"
        )
    if any(map(_is_transformed, (*values, mask_value))):
        return "under a transform of torch.func, where graphs are not rewritten"
    if may_guard and torch.is_grad_enabled() and any(scope.operation == "scan" for scope in match.scope.chain()):
        return "inside a scan, which takes no gradients of it; without gradients it would be rewritten"
    shapes = [operand.shape or tuple(value.shape) for operand, value in zip(operands, values, strict=True)]
    mask_shape = () if match.mask is None else match.mask.shape
    sizes = [size for shape in (*shapes, mask_shape) for size in shape]
    if any(hint(size) is None for size in sizes):
        return "its shape depends on data"
    if may_guard:
        for operand, shape in zip(operands, shapes, strict=True):
            operand.shape = (*shape[:-1], int(shape[-1]))  # the head dimension is a constant of the op
        shapes = [operand.shape for operand in operands]
    elif isinstance(shapes[0][-1], torch.SymInt):
        return "its head dimension is symbolic"
    elif any(isinstance(reader.value(node), (torch.SymInt, torch.SymFloat)) for _, node in match.scale_nodes):
        return "its scale is symbolic"  # exports would take the example's
    else:
        reason = _equal_by_chance(shapes[0], shapes[1], shapes[2], mask_shape)
        if reason:
            return reason
        shapes = [tuple(hint(size) for size in shape) for shape in shapes]
        mask_shape = tuple(hint(size) for size in mask_shape)
    query, key, value = (_Described(shape, value) for shape, value in zip(shapes, values, strict=True))
    mask = None if mask_value is None else _Described(mask_shape, mask_value)
    if match.mask is not None:
        if not may_guard and _is_input(match.mask.node, match.scope):
            mask.expanded = False  # type: ignore[union-attr]  # another call may give one that is written out
        match.mask.written_out = not is_key_padding_mask(mask, query)  # type: ignore[arg-type]
    flags = (match.dropout_p, match.is_causal, match.enable_gqa, config)
    return why_dense(query, key, value, mask, *flags) or ""  # type: ignore[arg-type]


def _is_transformed(value: Any) -> bool:
    functorch = torch._C._functorch
    return isinstance(value, torch.Tensor) and (
        functorch.is_batchedtensor(value) or functorch.is_gradtrackingtensor(value)
    )


class _Described:
    """What why_dense looks at of a tensor: an operand may be a view that no node of the graph holds yet."""

    def __init__(self, shape: tuple, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device, self.requires_grad = (
            shape,
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
        )
        self.is_nested = tensor.is_nested
        self.expanded = True
        self._strides = tensor.stride()

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int) -> int:
        return self._strides[dim] if self.expanded else max(self._strides[dim], 1)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _is_input(node: torch.fx.Node, scope: Scope) -> bool:
    """Whether a tensor is an input of the whole graph or a view of one: its strides are those of the example alone."""
    while True:
        if node.op == "placeholder":
            if not scope.callers:
                return True
            caller, inputs = scope.callers[0], [each for each in scope.nodes if each.op == "placeholder"]
            passed = None if caller.operands is None else caller.operands[inputs.index(node)]
            if not isinstance(passed, torch.fx.Node):
                return True
            node, scope = passed, caller.scope
            continue
        call = scope.reader.call(node)
        if call is None or call.name not in VIEWS or not isinstance(call["input"], torch.fx.Node):
            return False
        node = call["input"]
        shape = scope.reader.shape(node)
        if call.name == "expand" and shape is not None and all(size == 1 for size in shape[-3:-1]):
            return False


def _equal_by_chance(query: tuple, key: tuple, value: tuple, mask: tuple) -> str:
    """Sizes that agree in the example, but whose symbols may differ in another call."""
    pairs = [(query[-2], key[-2]), *zip(query[:-3], key[:-3], strict=False), *zip(key, value, strict=False)]
    pairs += [(m, q) for m, q in zip(mask[-1:], query[-2:-1], strict=True)] if mask else []
    pairs += [(mask[0], query[0])] if len(mask) == len(query) else []
    for left, right in pairs:
        if hint(left) == hint(right) and not same(left, right):
            return f"{left} and {right} are equal in the example alone: capture them as one dynamic size"
    return ""


class ModuleParameters:
    """Puts an owner's parameters into the graph module, below the owner's own path."""

    def __init__(self, root: GraphModule, modules: dict[str, SparseLinearAttention]) -> None:
        self.root, self.modules = root, modules
        self._added: set[torch.fx.Node] = set()

    def module(
        self, owner: str, config: SLAConfig, query: Operand, device: torch.device
    ) -> tuple[str, SparseLinearAttention]:
        """The path and the module of an owner's parameters, made at the first call."""
        path = f"{owner}.sla"
        if path not in self.modules:
            _check_free(self.root, path)
            dtype, trained = _like_owner(self.tensors(), owner)
            blocks = num_blocks(query.shape[-2], config.block_q) if config.alpha_per == "block" else None
            heads = _heads(query) if config.has_alpha else None
            module = SparseLinearAttention(
                config, query.shape[-1], num_heads=heads, query_blocks=blocks, device=device, dtype=dtype
            )
            module.set_trainable(trained)
            self.modules[path] = module
        return path, self.modules[path]

    def tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """All parameters by name."""
        return self.root.named_parameters()

    def node(self, graph: torch.fx.Graph, path: str, parameter: nn.Parameter) -> torch.fx.Node:
        """The node that reads a parameter in the root graph, before everything that computes."""
        kept = (node for node in graph.nodes if node.op != "placeholder" and node not in self._added)
        with graph.inserting_before(next(kept)):
            node = graph.create_node("get_attr", path, name=path.replace(".", "_"))
        self._added.add(node)
        return node


def _like_owner(tensors: Iterable[tuple[str, torch.Tensor]], owner: str) -> tuple[torch.dtype, bool]:
    """Dtype and trainability of an owner's own parameters, for the added ones; float32 if the graph has none."""
    for name, tensor in tensors:
        if name.startswith(f"{owner}.") and tensor.dtype in DTYPES["cpu"]:
            return tensor.dtype, tensor.requires_grad
    return torch.float32, True


def _check_free(root: nn.Module, path: str) -> None:
    module: Any = root
    names = path.split(".")
    for position, name in enumerate(names):
        module = getattr(module, name, None)
        if module is None:
            return
        if not isinstance(module, nn.Module) or position == len(names) - 1:
            raise ValueError(
                f"the parameters of sparse-linear attention belong at {path}, but the graph has {name} there"
            )


def _unshare(root: nn.Module, owner: str) -> None:
    """Gives the graph its own object for an owner that the trace took as a leaf and shares with the model it traced."""
    parent_path, _, name = owner.rpartition(".")
    parent = _submodule(root, parent_path)
    if parent is None:
        return
    module = parent._modules.get(name)
    if module is not None and type(module) is not nn.Module:
        own = copy.copy(module)
        own._modules = dict(module._modules)
        parent._modules[name] = own


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def check_fresh(graph_module: GraphModule) -> None:
    """Raises where the graph was accelerated before."""
    kept = graph_module.meta.get(META_KEY)
    if kept is not None:
        raise RuntimeError(f"this graph is accelerated already, by a call at {kept['caller']}")
    if has_op(graph_module):
        raise RuntimeError(
            "this graph computes sparse-linear attention already: it was captured or saved after accelerate"
        )


def has_op(graph_module: GraphModule) -> bool:
    """Whether the op is in the graph or in a graph it calls."""
    op = torch.ops.sla_compile.sparse_linear_attention.default
    modules = (module for module in graph_module.modules() if isinstance(module, GraphModule))
    return any(node.target in (op, op.overloadpacket) for module in modules for node in module.graph.nodes)


def check_found(sites: list[Site], allow_no_match: bool) -> None:
    """Raises where nothing is rewritten, unless that is allowed."""
    if allow_no_match or any(site.rewritten for site in sites):
        return
    if not sites:
        raise ValueError("the graph has no attention that the pass knows; pass allow_no_match=True if that is fine")
    rows = "\n".join(f"  {site.name}: {site.reason} {site.shape}".rstrip() for site in sites)
    raise ValueError(f"no attention of the graph qualifies; pass allow_no_match=True if that is fine\n{rows}")


def recorded_sites(model: GraphModule | ExportedProgram) -> list[Site] | None:
    """The report of an accelerated graph or program; None for others.

    A program that was saved and loaded, or a graph captured from an accelerated model, has lost the record: its
    rewritten attentions are read off the graph, its dense ones are not known any more.
    """
    found = recorded(model)
    return None if found is None else found[0]


def record(decisions: Sequence[Decision]) -> dict[str, Any]:
    """What an accelerated graph keeps in its metadata."""
    configs = {decision.config.fingerprint(): decision.config for decision in decisions if decision.config is not None}
    return {"sites": [site(decision) for decision in decisions], "configs": configs, "caller": caller()}


def recorded(model: GraphModule | ExportedProgram) -> tuple[list[Site], dict[str, SLAConfig]] | None:
    """:func:`recorded_sites` with the configurations that they name by their fingerprint."""
    graph_module = model.graph_module if isinstance(model, ExportedProgram) else model
    kept = graph_module.meta.get(META_KEY)
    if kept is not None:
        return list(kept["sites"]), dict(kept["configs"])
    if not has_op(graph_module):
        return None
    op = torch.ops.sla_compile.sparse_linear_attention.default
    found: list[Site] = []
    configs: dict[str, SLAConfig] = {}
    for scope in scopes(graph_module):
        for node in scope.nodes:
            if node.target in (op, op.overloadpacket):
                shape = scope.reader.shape(node.all_input_nodes[0]) or ()
                name = owner(node).removesuffix(".sla") or (f"{scope.path}.{node.name}" if scope.path else node.name)
                config = _config_of(node, scope.reader.shape)
                fingerprint = "" if config is None else config.fingerprint()
                if config is not None:
                    configs[fingerprint] = config
                found.append(_row(name, shape, shape, rewritten=True, calls=scope.calls, config=fingerprint))
    return found, configs


def _config_of(node: torch.fx.Node, shape: Callable[[Any], Any]) -> SLAConfig | None:
    """The configuration that a call of the op has: for every length, as nothing compares it any more. None where the
    call is written otherwise than ours."""
    if len(node.args) < 21:
        return None
    values: Any = node.args[11:21]
    sparsity, negligible, count, first, last, feature_map, linear, block_q, block_k, low_bit = values
    alpha = None if node.args[7] is None else shape(node.args[7])
    return SLAConfig(
        sparsity=sparsity, negligible=negligible, method="sla" if node.args[7] is None else "sla2",
        feature_map=feature_map, linear=linear, block_q=block_q, block_k=block_k, critical_blocks=count or None,
        pinned=(first, last), min_seq_len=1, alpha_per="head" if alpha is None or alpha[-1] == 1 else "block",
        low_bit=None if low_bit == "none" else low_bit,
    )  # fmt: skip


def added_parameters(model: GraphModule | ExportedProgram) -> dict[str, nn.Parameter]:
    """The parameters that accelerate added, by their names in the state dict."""
    endings = tuple(f".sla.{name}" for name in NAMES)
    return {name: p for name, p in model.named_parameters() if f".{name}".endswith(endings)}


def site(decision: Decision) -> Site:
    """The report's row of a decision."""
    match = decision.match
    return _row(
        match.name,
        match.query.shape,
        match.key.shape,
        rewritten=decision.config is not None,
        reason=decision.reason,
        kind=match.kind,
        config=decision.config.fingerprint() if decision.config else "",
        calls=match.scope.calls,
    )


def _row(name: str, query: tuple, key: tuple, **rest: Any) -> Site:
    dim = query[-1] if query and isinstance(query[-1], int) else None
    text = f"({', '.join(map(str, query))})" if query else ""
    return Site(name, shape=text, keys=str(key[-2]) if len(key) > 1 else "", head_dim=dim, **rest)


def caller() -> str:
    """Where the user's code called into this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sla_compile"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
