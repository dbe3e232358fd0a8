"""Carries out rewrites on copies of graphs, which replace the originals at the end or not at all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode

from sla_compile.config import SLAConfig
from sla_compile.module import SparseLinearAttention
from sla_compile.ops import op_scalars
from sla_compile.passes.eligibility import DIFFERENT_KEYS
from sla_compile.passes.find import Match
from sla_compile.passes.layout import Operand
from sla_compile.passes.nodes import hint, is_idle, mutates, same, same_shape
from sla_compile.passes.scopes import Scope

aten = torch.ops.aten

_TAKES_OPERANDS = frozenset(
    "tag_activation_checkpoint wrap wrap_activation_checkpoint wrap_with_set_grad_enabled wrap_with_autocast "
    "invoke_subgraph cond call_module".split()
)
"""Operations to which a parameter can be passed as one more operand."""

_RESULT_META = (
    "val",
    "example_value",
    "tensor_meta",
    "unbacked_bindings",
    "original_aten",
    "torch_fn",
    "source_fn_stack",
)


def can_pass_operands(scope: Scope) -> str:
    """Why the parameters of an attention in this graph cannot reach it; empty if they can."""
    for each in scope.chain():
        if not each.callers:
            break
        if len(each.callers) > 1:
            return (
                f"its graph {each.path} is called {len(each.callers)} times and would share one set of parameters; "
                'method="sla" with linear="none" needs none'
            )
        caller = each.callers[0]
        named = each.operation == "call_module" and caller.node.kwargs
        if each.operation not in _TAKES_OPERANDS or caller.operands is None or named:
            return f'parameters cannot be passed into {each.operation}; method="sla" with linear="none" needs none'
    return ""


class Parameters(Protocol):
    """Where added parameters live: see rewrite.ModuleParameters."""

    def module(
        self, owner: str, config: SLAConfig, query: Operand, device: torch.device
    ) -> tuple[str, SparseLinearAttention]: ...

    def node(self, graph: fx.Graph, path: str, parameter: nn.Parameter) -> fx.Node: ...


class Edits:
    """Rewrites of all graphs of a module, collected until :meth:`commit`."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._graphs: dict[Scope, _Edit] = {}
        self._nodes: dict[tuple[Scope, str], fx.Node] = {}

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def rewrite(self, chosen: Iterable[tuple[Match, SLAConfig]]) -> None:
        """Writes every match as the op, on the copies."""
        for match, config in chosen:
            edit = self._edit(match.scope)
            value = match.scope.reader.value(match.query.node)
            parameters: dict[str, fx.Node] = {}
            if config.has_parameters:
                path, module = self._parameters.module(match.name, config, match.query, value.device)
                parameters = {
                    name: self._parameter(match.scope, f"{path}.{name}", parameter, value)
                    for name, parameter in module.named_parameters()
                }
            edit.rewrite(match, config, parameters)
        for edit in self._graphs.values():
            edit.finish()

    def commit(self) -> None:
        """Puts the copies in place of the originals."""
        for scope, edit in self._graphs.items():
            scope.module.graph = edit.graph

    def _edit(self, scope: Scope) -> _Edit:
        if scope not in self._graphs:
            self._graphs[scope] = _Edit(scope)
        return self._graphs[scope]

    def _parameter(self, scope: Scope, path: str, parameter: nn.Parameter, like: Tensor) -> fx.Node:
        """The node that holds a parameter in a graph: in the root as its owner has it, below as one more operand."""
        if (scope, path) in self._nodes:
            return self._nodes[scope, path]
        edit = self._edit(scope)
        fake = _fake_parameter(parameter, like)
        if scope.parent is None:
            node = self._parameters.node(edit.graph, path, parameter)
            edit.note(node, fake)
        else:
            outer = self._parameter(scope.parent, path, parameter, like)
            caller = self._edit(scope.parent).map[scope.callers[0].node]
            if scope.operation == "cond":
                predicate, accepted, rejected, operands = caller.args
                assert isinstance(operands, (tuple, list))
                caller.args = (predicate, accepted, rejected, (*operands, outer))
            else:
                caller.args = (*caller.args, outer)
            for sibling in scope.siblings:
                self._nodes[sibling, path] = self._edit(sibling).placeholder(path.replace(".", "_"), fake)
            return self._nodes[scope, path]
        self._nodes[scope, path] = node
        return node


def _fake_parameter(parameter: nn.Parameter, like: Tensor) -> Tensor | None:
    mode = detect_fake_mode([like])
    return None if mode is None else mode.from_tensor(parameter, static_shapes=True)


class _Edit:
    """One graph's copy, and how to add to it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.graph = fx.Graph(tracer_cls=scope.module.graph._tracer_cls)
        self.map: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        noted = {key for node in scope.module.graph.nodes for key in ("val", "example_value") if key in node.meta}
        self._key = "example_value" if noted == {"example_value"} else "val"
        self._noted = bool(noted)
        for node in scope.module.graph.nodes:
            self.map[node] = self.graph.node_copy(node, self.map.__getitem__)
            for name in vars(node).keys() - vars(self.map[node]).keys():  # Dynamo's `_dynamo_source`
                setattr(self.map[node], name, vars(node)[name])
            self.values[self.map[node]] = scope.reader.value(node)
        self.graph._codegen = scope.module.graph._codegen
        self._replaced: list[tuple[fx.Node, Any]] = []

    def note(self, node: fx.Node, value: Any) -> None:
        """Keeps a node's fake result, in its metadata if the graph has such."""
        self.values[node] = value
        if self._noted and value is not None:
            node.meta[self._key] = value

    def placeholder(self, name: str, value: Any) -> fx.Node:
        """One more input, behind those the graph has."""
        with self.graph.inserting_before(next(node for node in self.graph.nodes if node.op != "placeholder")):
            node = self.graph.placeholder(name)
        self.note(node, value)
        return node

    def rewrite(self, match: Match, config: SLAConfig, parameters: Mapping[str, fx.Node]) -> None:
        """Writes one match as the op."""
        output = self.map[match.output]
        with self.graph.inserting_before(output):
            if match.multi_head is None:
                result = self._attention(match, config, parameters, output)
            else:
                result = self._multi_head(match, config, parameters, output)
        before = self.values[output]
        output.replace_all_uses_with(result)
        self.map[match.output] = result  # another attention may begin where this one ends
        self._replaced.append((result, before))
        self._erase({output, *(self.map[node] for node in match.inner if node is not match.output)})

    def _attention(
        self, match: Match, config: SLAConfig, parameters: Mapping[str, fx.Node], output: fx.Node
    ) -> fx.Node:
        operands = [self._operand(operand, output) for operand in (match.query, match.key, match.value)]
        flat = len(match.query.shape) == 3
        if flat:
            operands = [self._call(output, aten.unsqueeze.default, operand, 1) for operand in operands]
        mask = valid = None
        if match.mask is not None:
            mask = self.map[match.mask.node]
            if match.mask.hides:
                mask = self._call(output, aten.logical_not.default, mask)
            if flat and len(match.mask.shape) == 3:
                mask = self._call(output, aten.unsqueeze.default, mask, 1)
            if match.mask.written_out:
                mask, valid = self._from_written_out(mask, match.name, output)
        result = self._op(output, operands, mask, self._scale(match, output), config, parameters, match.query.shape[-1])
        if valid is not None:
            hidden = self._call(output, aten.logical_not.default, valid)
            result = self._call(output, aten.masked_fill.Scalar, result, hidden, 0)
        if flat:
            result = self._call(output, aten.squeeze.dim, result, 1)
        return self._views(result, match.views, output)

    def _from_written_out(self, mask: fx.Node, site: str, output: fx.Node) -> tuple[fx.Node, fx.Node]:
        """As :func:`sla_compile.passes.eligibility.from_written_out`, of four dimensions."""
        for _ in range(4 - self.values[mask].dim()):
            mask = self._call(output, aten.unsqueeze.default, mask, 0)
        if self.values[mask].dtype == torch.bool:
            keys = self._call(output, aten.any.dims, mask, [1, 2], True)
            valid = self._call(output, aten.any.dims, mask, [1, 3], True)
            same = self._call(output, aten.eq.Tensor, mask, self._call(output, aten.logical_and.default, keys, valid))
        else:
            keys = self._call(output, aten.amax.default, mask, [1, 2], True)
            seen = self._call(output, aten.ne.Scalar, mask, -torch.inf)
            valid = self._call(output, aten.any.dims, seen, [1, 3], True)
            same = self._call(output, aten.eq.Tensor, mask, keys)
            hidden = self._call(output, aten.logical_not.default, valid)
            same = self._call(output, aten.logical_or.default, same, hidden)
        holds = self._call(output, aten.all.default, same)
        self._call(output, aten._assert_async.msg, holds, f"{site}: {DIFFERENT_KEYS}")
        return keys, valid

    def _op(
        self,
        output: fx.Node,
        operands: Sequence[fx.Node],
        mask: fx.Node | None,
        scale: Any,
        config: SLAConfig,
        parameters: Mapping[str, fx.Node],
        head_dim: int,
    ) -> fx.Node:
        scalars = op_scalars(config, head_dim, None if isinstance(scale, fx.Node) else scale)
        if isinstance(scale, fx.Node):
            scalars = (scale, *scalars[1:])
        target = torch.ops.sla_compile.sparse_linear_attention.default
        given = [parameters.get(name) for name in ("proj_weight", "proj_bias", "router_q", "router_k")]
        alpha = self._alpha(parameters["alpha_logit"], output) if config.has_alpha else None
        node = self.graph.call_function(target, (*operands, *given, alpha, mask, None, *scalars))
        self._describe(node, output)
        result = self.graph.call_function(operator.getitem, (node, 0))
        self._describe(result, output)
        query, like = self.values[operands[0]], self.values[output]
        if isinstance(query, Tensor) and isinstance(like, Tensor):
            batch, heads, length, depth = query.shape
            value = like.new_empty(batch, length, heads, depth).transpose(1, 2)
            statistics = torch.float64 if like.dtype == torch.float64 else torch.float32
            self.note(node, (value, like.new_empty((batch, heads, length), dtype=statistics)))
            self.note(result, value)
        return result

    def _alpha(self, logit: fx.Node, output: fx.Node) -> fx.Node:
        """The sigmoid of SLA2's logit, in float32 as SparseLinearAttention.alpha has it."""
        value = self.values[logit]
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            logit = self._cast(logit, output)
        return self._call(output, aten.sigmoid.default, logit)

    def _cast(self, node: fx.Node, output: fx.Node) -> fx.Node:
        cast = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
        self._describe(cast, output)
        self.note(cast, self._result(cast))
        return cast

    def _scale(self, match: Match, output: fx.Node) -> Any:
        scale = self.map[match.scale] if isinstance(match.scale, fx.Node) else match.scale
        for name, factor in match.scale_nodes:
            function = operator.mul if name == "mul" else operator.truediv
            scale = self.graph.call_function(function, (1.0 if scale is None else scale, self.map[factor]))
            self._describe(scale, output)
            self.note(scale, self._result(scale))
        return scale

    def _operand(self, operand: Operand, output: fx.Node) -> fx.Node:
        return self._views(self.map[operand.node], operand.views, output)

    def _views(self, node: fx.Node, views: Iterable[tuple], output: fx.Node) -> fx.Node:
        for view in views:
            if view[0] == "permute":
                node = self._call(output, aten.permute.default, node, list(view[1]))
                continue
            if view[0] == "replay":
                node = self._replay(view[1], node, output)
                continue
            _, number, sizes, _ = view
            if number == 0:
                node, number = self._call(output, aten.unsqueeze.default, node, 0), 1
            if number > 1:
                node = self._call(output, aten.flatten.using_ints, node, 0, number - 1)
            if len(sizes) != 1:
                arguments = [self.map[size] if isinstance(size, fx.Node) else size for size in sizes]
                node = self._call(output, aten.unflatten.int, node, 0, arguments)
        return node

    def _replay(self, original: fx.Node, source: fx.Node, output: fx.Node) -> fx.Node:
        """What `original` does, done to another tensor of the same shape."""
        first = original.all_input_nodes[0]
        node = self.graph.node_copy(original, lambda each: source if each is first else self.map[each])
        self._describe(node, output)
        self.note(node, self._result(node))
        return node

    def _multi_head(
        self, match: Match, config: SLAConfig, parameters: Mapping[str, fx.Node], output: fx.Node
    ) -> fx.Node:
        """``F.multi_head_attention_forward`` with its projections written out."""
        arguments = match.multi_head
        assert arguments is not None
        heads = arguments["num_heads"]

        def read(name: str) -> Any:
            value = arguments[name]
            if isinstance(value, str):
                value = self.graph.get_attr(value)
                self._describe(value, output)
                return value
            return self.map[value] if isinstance(value, fx.Node) else value

        inputs = [read(name) for name in ("query", "key", "value")]
        if arguments["use_separate_proj_weight"]:
            weights = [read(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        else:
            weights = self._thirds(read("in_proj_weight"), output)
        bias = read("in_proj_bias")
        biases = [None] * 3 if bias is None else self._thirds(bias, output)
        order = [0, 2, 1, 3] if arguments.get("batch_first") else [1, 2, 0, 3]  # to (batch, heads, tokens, depth)
        operands = []
        for tensor, weight, bias in zip(inputs, weights, biases, strict=True):
            projected = self._call(output, aten.linear.default, tensor, weight, bias)
            split = self._call(output, aten.unflatten.int, projected, -1, [heads, match.query.shape[-1]])
            operands.append(self._call(output, aten.permute.default, split, order))
        mask = None
        if match.mask is not None:
            mask = self.map[match.mask.node]
            if match.mask.hides:
                mask = self._call(output, aten.logical_not.default, mask)
            for _ in range(2):
                mask = self._call(output, aten.unsqueeze.default, mask, 1)
        result = self._op(output, operands, mask, None, config, parameters, match.query.shape[-1])
        back = [0, 2, 1, 3] if arguments.get("batch_first") else [2, 0, 1, 3]
        result = self._call(output, aten.permute.default, result, back)
        result = self._call(output, aten.flatten.using_ints, result, 2, 3)
        return self._call(output, aten.linear.default, result, read("out_proj_weight"), read("out_proj_bias"))

    def _thirds(self, packed: fx.Node, output: fx.Node) -> list[fx.Node]:
        chunks = self._call(output, aten.chunk.default, packed, 3)
        return [self._call(output, operator.getitem, chunks, i) for i in range(3)]

    def _call(self, output: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A node with the provenance of the one it helps to replace, and its fake result."""
        node = self.graph.call_function(target, args)
        self._describe(node, output)
        self.note(node, self._result(node))
        return node

    def _result(self, node: fx.Node) -> Any:
        inputs = {each: self.values.get(each) for each in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        return _run(node, inputs.__getitem__)

    def _describe(self, node: fx.Node, output: fx.Node) -> None:
        node.meta.update({key: value for key, value in output.meta.items() if key not in _RESULT_META})

    def _erase(self, inner: set[fx.Node]) -> None:
        """Erases the nodes, and upstream of them whatever was computed for them alone."""
        idle = {user for node in inner for user in _idle_users(node)} - inner
        for node in sorted(idle, reverse=True):
            self.graph.erase_node(node)
        queue = sorted(inner, reverse=True)
        while queue:
            node = queue.pop(0)
            if node._erased or node.users or (node not in inner and not _is_pure(node)):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            queue += inputs

    def finish(self) -> None:
        """Refreshes what the rewritten strides change, and checks the graph."""
        for node, before in self._replaced:
            if isinstance(before, Tensor) and isinstance(self.values.get(node), Tensor):
                self._restride(node, before)
        self.graph.lint()

    def _restride(self, node: fx.Node, before: Tensor) -> None:
        """Carries the strides of the op's output on, as far as they differ from the former ones; where that would
        change an output's or break a ``view``, a copy comes between."""
        if _same_layout(self.values[node], before):
            return
        changed = {node: self.values[node]}
        for each in list(self.graph.nodes):
            if not (each > node) or changed.keys().isdisjoint(each.all_input_nodes):
                continue
            after = self._restrided(each, changed)
            if after is None:
                self._restore_layout(node, before)
                return
            if not _same_layout(after, self.values[each]):
                changed[each] = after
        for each, value in changed.items():
            self.note(each, value)

    def _restore_layout(self, node: fx.Node, before: Tensor) -> None:
        """Copies the op's output into the layout that the nodes behind it were traced for."""
        users = list(node.users)
        order = sorted(range(before.dim()), key=lambda dim: -(hint(before.stride(dim)) or 0))
        last = node
        for target, arguments in (
            (aten.permute.default, (order,)),
            (aten.contiguous.default, ()),
            (aten.permute.default, ([order.index(dim) for dim in range(before.dim())],)),
        ):
            if arguments and order == sorted(order):
                continue
            with self.graph.inserting_after(last):
                last = self._call(node, target, last, *arguments)
        for user in users:
            user.replace_input_with(node, last)

    def _restrided(self, node: fx.Node, changed: dict[fx.Node, Any]) -> Any:
        """The node's result from the changed inputs; None where it needs the former layout."""
        known = self.values.get(node)
        if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            return None
        if isinstance(known, (int, float, torch.SymInt, torch.Size)):
            return known
        try:
            result = _run(node, lambda each: changed.get(each, self.values.get(each)))
        except (RuntimeError, TypeError, ValueError):
            return None
        # another dtype: the node is in an autocast region, which only the run enters; its strides do not matter
        pairs = list(zip(_tensors(result), _tensors(known), strict=False))
        fits = pairs and all(a.dtype == b.dtype and same_shape(a.shape, b.shape) for a, b in pairs)
        return result if fits else known


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(each, Tensor)]


def _idle_users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_idle(user):
            yield user
            yield from _idle_users(user)


def _run(node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    """The node's result on fake tensors."""
    args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _same_layout(left: Any, right: Any) -> bool:
    """Whether two results, tensors or tuples of tensors of the same shapes, have the same strides."""
    for a, b in zip(_tensors(left), _tensors(right), strict=False):
        strides = zip(a.shape, a.stride(), b.stride(), strict=True)
        if not all(same(size, 1) or same(first, second) for size, first, second in strides):
            return False
    return True


def _is_pure(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method", "get_attr") and not mutates(node) and not node.is_impure()
