"""Finds the attentions of captured graphs, in every spelling and in subgraphs too.

out = F.scaled_dot_product_attention(q, k, v)                  Dynamo, symbolic_trace
out = aten.scaled_dot_product_attention.default(q, k, v)       torch.export
out = aten._scaled_dot_product_flash_attention...(q, k, v)[0]  make_fx
out = F.multi_head_attention_forward(x, x, x, ...)[0]          nn.MultiheadAttention under Dynamo
out = softmax(q @ k.mT * s + mask) @ v                         written out, see softmax.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph_module import GraphModule

from sla_compile.passes.layout import Mask, Operand, shared_mask
from sla_compile.passes.nodes import Call, Reader
from sla_compile.passes.scopes import Scope, scopes
from sla_compile.passes.sites import WRAPPERS
from sla_compile.passes.softmax import Written, match_softmax
from sla_compile.passes.sources import Sources

SDPA = "scaled_dot_product_attention"
MULTI_HEAD = "nn.MultiheadAttention"
WRITTEN = "softmax(q k^T) v"

_BACKEND_CALLS = frozenset(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable".split()
)
_OPAQUE = re.compile(
    r"flash_attn|flex_attention|sage_?attn|memory_efficient_attention|_native_multi_head_attention|"
    r"_transformer_encoder_layer_fwd|varlen_attn",
    re.IGNORECASE,
)


_NO_MODULES = WRAPPERS | {"__dict__", "_modules"}
"""What Dynamo and wrappers put between the names of modules."""


@dataclass(eq=False)
class Match:
    """One attention of a graph, whatever its spelling.

    Args:
        scope: the graph it is in.
        name: path of the owner, or of the node where the owner is unknown.
        kind: the spelling.
        output: the node whose value is the attention's result.
        query, key, value: operands in the layout (batch, heads, tokens, depth), or without heads.
        mask: what is added to the scores or selects keys.
        scale: factor of the scores: a number, a node, or None for 1/sqrt(depth).
        inner: nodes that a rewrite replaces, `output` among them.
        views: from the op's output to that of `output`.
        multi_head: the arguments, if it is a whole ``multi_head_attention_forward``.
        refusal: why it cannot be rewritten whatever the configuration; empty if it can.
    """

    scope: Scope
    name: str
    kind: str
    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    mask: Mask | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    scale: Any = None
    scale_nodes: list[tuple[str, fx.Node]] = field(default_factory=list)
    inner: set[fx.Node] = field(default_factory=set)
    views: list[tuple] = field(default_factory=list)
    multi_head: dict[str, Any] | None = None
    refusal: str = ""

    @property
    def named(self) -> bool:
        """Whether the owner is known."""
        return bool(owner(self.output))


def find_attention(
    graph_module: GraphModule, *, values: Mapping[fx.Node, Any] | None = None, constants: set[str] | None = None
) -> list[Match]:
    """Every attention of `graph_module` and of the graphs it calls, in the order of the graphs.

    Nothing is changed. What cannot be rewritten carries a `refusal`; cross-attention is told from self-attention as
    sources.py explains in NOTE [Self-attention].

    Args:
        values: fake results of nodes whose metadata has none.
        constants: names of placeholders that are parameters, buffers or constants (an exported program knows).
    """
    found = scopes(graph_module, values)
    matches = [match for scope in found for match in _in_scope(scope)]
    sources = Sources(found, {match.output for match in matches}, constants or set())
    kept = []
    for match in matches:
        operands = (match.query.node, match.key.node, match.value.node)
        if match.kind == WRITTEN and not all(sources.of(node) for node in operands):
            continue  # a softmax between parameters is a router or a code book
        if not match.refusal and match.scope.operation == "autograd_function_apply":
            match.refusal = "inside an autograd.Function, whose own backward would not fit any more"
        if not match.refusal:
            match.refusal = sources.why_cross(*operands)
        kept.append(match)
    return kept


def owner(node: fx.Node) -> str:
    """Path of the module whose forward made the node, empty where it is the root or not known.

    ``L['self'].blocks.0.attn1``, ``L__self___blocks_0_attn1`` and ``blocks.0.attn1@1`` are all ``blocks.0.attn1``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^L__self___?(.*)$", lambda m: re.sub(r"_(\d+)(?=_|$)_?", r".\1.", m[1]).strip("."), path)
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path)
    path = re.sub(r"@\d+", "", path)
    return ".".join(part for part in path.split(".") if part and part not in _NO_MODULES)


def _name(scope: Scope, node: fx.Node) -> str:
    return owner(node) or (f"{scope.path}.{node.name}" if scope.path else node.name)


def _in_scope(scope: Scope) -> list[Match]:
    matches = []
    for node in scope.nodes:
        match = _read(scope, node)
        if match is not None:
            matches.append(match)
    return matches


def _read(scope: Scope, node: fx.Node) -> Match | None:
    reader = scope.reader
    if node.op == "call_module":
        module = scope.module.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            return _multi_head_module(scope, node, module)
        if not isinstance(module, GraphModule) and any(isinstance(m, nn.MultiheadAttention) for m in module.modules()):
            text = f"inside {type(module).__name__}, which the trace took as one call: trace into it"
            return _dense(scope, node, MULTI_HEAD, text)
    call = reader.call(node)
    if call is not None and call.name == SDPA:
        return _product_attention(scope, node, node, call)
    if call is not None and call.name in _BACKEND_CALLS:
        return _backend_attention(scope, node, call)
    if call is not None and call.name == "multi_head_attention_forward":
        return _multi_head(scope, node, call.arguments)
    if call is not None and call.name == "softmax":
        written = match_softmax(node, reader)
        return None if written is None else _from_written(scope, written)
    if node.op == "call_function" and _OPAQUE.search(str(node.target)) and "backward" not in str(node.target):
        return _dense(scope, node, str(node.target), f"{node.target} is opaque to the pass")
    return None


def _dense(scope: Scope, node: fx.Node, kind: str, reason: str) -> Match:
    inputs = [n for n in node.all_input_nodes if isinstance(scope.reader.value(n), Tensor)] or [node]
    query, key, value = (inputs + inputs[-1:] * 2)[:3]
    return Match(scope, _name(scope, node), kind, node, Operand(query), Operand(key), Operand(value), refusal=reason)


def _product_attention(scope: Scope, node: fx.Node, output: fx.Node, call: Call) -> Match:
    reader = scope.reader
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    query, key, value = (Operand(call[name], [], reader.shape(call[name]) or ()) for name in ("query", "key", "value"))
    match = Match(scope, _name(scope, node), SDPA, output, query, key, value, inner={node, output})
    match.mask = None if mask is None else shared_mask(mask, False, reader)
    match.scale = call["scale"]
    for name in ("dropout_p", "is_causal", "enable_gqa"):
        flag = call[name]
        if isinstance(flag, fx.Node):
            match.refusal = f"{name} is not constant"
        elif flag is not None:
            setattr(match, name, flag)
    return match


def _backend_attention(scope: Scope, node: fx.Node, call: Call) -> Match:
    """One of the operations that scaled_dot_product_attention becomes when a graph is traced below autograd."""
    first = [user for user in node.users if user.args[1:] == (0,)]
    if len(first) != 1 or any(user.users for user in node.users if user not in first):
        return _dense(scope, node, SDPA, f"{call.name} has its log-sum-exp used, as the backward pass does")
    match = _product_attention(scope, node, first[0], call)
    match.inner |= set(node.users)
    return match


def _from_written(scope: Scope, written: Written) -> Match:
    return Match(
        scope,
        _name(scope, written.output),
        WRITTEN,
        written.output,
        written.query,
        written.key,
        written.value,
        mask=written.mask,
        dropout_p=written.dropout_p,
        scale=written.scale.number,
        scale_nodes=written.scale.nodes,
        inner=written.inner,
        views=written.views,
        refusal=written.refusal,
    )


# ---- nn.MultiheadAttention -------------------------------------------------------------------------------------------


def _multi_head_module(scope: Scope, node: fx.Node, module: nn.MultiheadAttention) -> Match:
    """The call of a leaf nn.MultiheadAttention in a symbolic trace, as the call of its function."""
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    arguments = {
        **dict.fromkeys(inspect.signature(F.multi_head_attention_forward).parameters),
        **{
            name: bound.arguments[name]
            for name in ("query", "key", "value", "key_padding_mask", "attn_mask", "is_causal")
        },
        "num_heads": module.num_heads,
        "dropout_p": module.dropout,
        "training": module.training,
        "add_zero_attn": module.add_zero_attn,
        "use_separate_proj_weight": not module._qkv_same_embed_dim,
        "out_proj_weight": f"{node.target}.out_proj.weight",
        "batch_first": module.batch_first,
    }
    for name in (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
    ):
        if getattr(module, name) is not None:
            arguments[name] = f"{node.target}.{name}"
    if module.out_proj.bias is not None:
        arguments["out_proj_bias"] = f"{node.target}.out_proj.bias"
    return _multi_head(scope, node, arguments, name=str(node.target))


def _multi_head(scope: Scope, node: fx.Node, arguments: dict[str, Any], name: str = "") -> Match:
    reader = scope.reader
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    weights_used = any(user.users for user in node.users if user not in outputs)
    query, key, value = operands = [Operand(arguments[each]) for each in ("query", "key", "value")]
    output = outputs[0] if len(outputs) == 1 else node
    match = Match(scope, name or _name(scope, node), MULTI_HEAD, output, query, key, value, multi_head=arguments)
    match.inner = {node, *node.users}
    match.refusal = _why_not_multi_head(arguments, len(outputs), weights_used, reader)
    if match.refusal:
        return match
    heads = arguments["num_heads"]
    for operand in operands:
        shape = reader.shape(operand.node)
        if shape is None:
            continue
        batch, length = (shape[0], shape[1]) if arguments.get("batch_first") else (shape[1], shape[0])
        operand.shape = (batch, heads, length, shape[2] // heads)
    mask = arguments["key_padding_mask"]
    if mask is not None:
        batch, length = reader.shape(mask) or (None, None)
        match.mask = Mask(
            mask, getattr(reader.value(mask), "is_floating_point", bool)() is False, (batch, 1, 1, length)
        )
    match.dropout_p = arguments["dropout_p"] if arguments["training"] else 0.0
    match.is_causal = bool(arguments["is_causal"])
    return match


def _why_not_multi_head(arguments: dict[str, Any], outputs: int, weights_used: bool, reader: Reader) -> str:
    if weights_used or outputs != 1:
        return "its attention probabilities are used elsewhere" if weights_used else "its result is not used once"
    if arguments["attn_mask"] is not None:
        return "attention mask is not a key-padding mask (batch, 1, 1, tokens)"
    if arguments["bias_k"] is not None or arguments["bias_v"] is not None or arguments["add_zero_attn"]:
        return "nn.MultiheadAttention adds a key and a value of its own"
    if arguments["static_k"] is not None or arguments["static_v"] is not None:
        return "nn.MultiheadAttention is given its keys and values projected"
    shape = reader.shape(arguments["query"])
    if shape is not None and len(shape) != 3:
        return "query, key and value are not all (batch, heads, tokens, head_dim)"
    return ""
