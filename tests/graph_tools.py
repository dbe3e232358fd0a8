"""What the tests of the passes share: capturing, rewriting, counting, and what the result should be."""

import torch
from torch import fx

import sla_compile
from sla_compile import SLAConfig
from sla_compile.passes.rewrite import accelerate_graph, added_parameters

CONFIG = SLAConfig(sparsity=0.6, min_seq_len=1)
OP = torch.ops.sla_compile.sparse_linear_attention.default


def choose(name):
    """The same configuration for every attention."""
    return CONFIG


def captured(model, *args, **kwargs):
    """Dynamo's graph of one call."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    (graph,) = graphs
    return graph


class Rewriting:
    """A Dynamo backend that rewrites the graph and runs it as it is; keeps the graphs and their sites."""

    def __init__(self, choose=choose, prepare=None):
        self.choose, self.prepare = choose, prepare
        self.graphs, self.sites = [], []

    def __call__(self, graph_module, example_inputs):
        self.sites.append(accelerate_graph(graph_module, self.choose))
        self.graphs.append(graph_module)
        if self.prepare is not None:
            self.prepare(graph_module)
        return graph_module.forward


def targets(graph_module):
    """Targets of all call_function nodes, in subgraphs too."""
    modules = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    return [node.target for module in modules for node in module.graph.nodes if node.op == "call_function"]


def ops(graph_module):
    """How often sparse-linear attention is called."""
    return targets(graph_module).count(OP)


def is_dense(target):
    """Whether a target is part of an exact attention."""
    name = str(target)
    return "softmax" in name or "scaled_dot_product" in name or "multi_head_attention" in name


def dense_left(graph_module):
    """Calls that belong to exact attentions."""
    methods = [n.target for n in graph_module.graph.nodes if n.op == "call_method" and n.target == "softmax"]
    return [target for target in targets(graph_module) if is_dense(target)] + methods


def fill(parameters, seed=0):
    """Gives added parameters values, so that the linear branch matters; returns the first weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return list(parameters)[:2]


def fill_graph(graph_module):
    """The same for a graph module."""
    return fill(added_parameters(graph_module).values())


def expected(attention, x, weight, bias, *, scale=None, keep=None, config=CONFIG):
    """What spellings.Attention computes once it is sparse-linear."""
    query, key, value = attention.heads(x)
    mask = None if keep is None else keep[:, None, None, :]
    attended = sla_compile.sparse_linear_attention(
        query, key, value, config=config, proj_weight=weight, proj_bias=bias, key_padding_mask=mask, scale=scale
    )
    return attention.out(attended.transpose(1, 2).flatten(2))


def snapshot(graph_module):
    """All that a graph module is: code, nodes, metadata, tensors, modules."""
    modules = dict(graph_module.named_modules())
    graphs = {name: module for name, module in modules.items() if isinstance(module, fx.GraphModule)}
    return (
        {
            name: (graph.code, [(id(n), n.format_node(), dict(n.meta)) for n in graph.graph.nodes])
            for name, graph in graphs.items()
        },
        {name: (id(module), type(module)) for name, module in modules.items()},
        {name: (id(tensor), tensor.clone()) for name, tensor in graph_module.state_dict(keep_vars=True).items()},
        dict(graph_module.meta),
    )


def assert_same_snapshot(left, right):
    """Compares two snapshots, tensors bit for bit."""
    assert left[0].keys() == right[0].keys()
    for name, (code, nodes) in left[0].items():
        assert code == right[0][name][0]
        assert [(i, text) for i, text, _ in nodes] == [(i, text) for i, text, _ in right[0][name][1]]
        for (_, _, before), (_, _, after) in zip(nodes, right[0][name][1], strict=True):
            assert before.keys() == after.keys()
            assert all(before[key] is after[key] for key in before)
    assert left[1] == right[1]
    assert left[2].keys() == right[2].keys()
    for name, (identity, tensor) in left[2].items():
        assert identity == right[2][name][0]
        assert torch.equal(tensor, right[2][name][1])
    assert left[3] == right[3]
