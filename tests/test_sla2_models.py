"""SLA2 in models: parameters, training, saving, compilation, and graphs."""

import copy
import io
import json

import pytest
import torch
from models import SelfAttention, build, make_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import ALL_CASES, pairs
from torch import nn
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig

CONFIG = SLAConfig(method="sla2", sparsity=0.6, min_seq_len=64)
PER_BLOCK = CONFIG.replace(alpha_per="block")
OP = torch.ops.sla_compile.sparse_linear_attention.default
ATTENTIONS = ["blocks.0.attn", "blocks.1.attn"]
ADDED = ["alpha_logit", "router_q", "router_k"]


def accelerated(config=CONFIG, seed=0, length=None, **options):
    """An accelerated TinyDiT whose alpha and routers are not what they were at first."""
    inputs = None if length is None else make_inputs(length)
    model = sla_compile.accelerate(build(seed, **options), config=config, example_inputs=inputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sla_compile.parameters(model):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def test_what_is_added():
    model = build().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model(*(tensor.bfloat16() for tensor in make_inputs()))
    assert sla_compile.accelerate(model, sparsity=0.97, config=CONFIG) is model
    assert [site.name for site in sla_compile.report(model).rewritten] == ATTENTIONS
    added = {name: tensor for name, tensor in model.state_dict().items() if name not in before}
    assert list(added) == [f"{owner}.sla.{name}" for owner in ATTENTIONS for name in ADDED]
    sla = model.blocks[0].attn.sla
    assert sla.config.sparsity == 0.97 and sla.alpha_logit.shape == (2, 1)
    assert sla.alpha.dtype == torch.float32 and sla.alpha_logit.dtype == torch.bfloat16
    torch.testing.assert_close(sla.alpha, torch.full((2, 1), 0.7), rtol=0, atol=1e-3)
    assert torch.equal(sla.router_q, torch.eye(16).bfloat16()) and torch.equal(sla.router_k, sla.router_q)
    inputs = [tensor.bfloat16() for tensor in make_inputs()]
    assert not torch.equal(model(*inputs), dense)
    with sla_compile.dense(model):
        assert torch.equal(model(*inputs), dense)
    assert sla_compile.restore(model) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(*inputs), dense)


@pytest.mark.parametrize("config", [CONFIG, PER_BLOCK], ids=["head", "block"])
def test_it_computes_the_functional_form(config):
    module = SelfAttention().eval()
    model = sla_compile.accelerate(
        nn.Sequential(module), config=config, example_inputs=(torch.zeros(1, 200, 32),), include="0"
    )
    with torch.no_grad():
        for parameter in sla_compile.parameters(model):
            parameter += torch.randn(parameter.shape)
    x = torch.randn(1, 200, 32)
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    expected = sla_compile.sparse_linear_attention(
        query, key, value, config=config, alpha=torch.sigmoid(module.sla.alpha_logit),
        router_q=module.sla.router_q, router_k=module.sla.router_k,
    )  # fmt: skip
    assert torch.equal(model(x), module.proj(expected.transpose(1, 2).flatten(2)))


def test_multi_head_attention_and_flat_heads():
    class Flat(nn.Module):
        """Heads folded into the batch, as some processors have it: to the operator it is one head."""

        def __init__(self):
            super().__init__()
            self.heads = 2
            self.to_qkv = nn.Linear(32, 96)

        def forward(self, x):
            query, key, value = self.to_qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).flatten(1, 2)
            return F.scaled_dot_product_attention(query, key, value)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.many = Flat(), nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.flat(x), self.many(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 200, 32)
    model = sla_compile.accelerate(Mixed().eval(), config=CONFIG, example_inputs=(x,))
    assert model.flat.sla.alpha_logit.shape == (1, 1) and model.many.sla.alpha_logit.shape == (4, 1)
    sum(output.square().sum() for output in model(x)).backward()
    assert all(p.grad.abs().min() > 0 for p in sla_compile.parameters(model, stage=1) if p.requires_grad)
    by_structure = sla_compile.accelerate(nn.Sequential(Flat()), config=CONFIG)
    with pytest.raises(ValueError, match=r"^0: alpha must be \(1, 1\) .* got \(2, 1\)"):
        by_structure(x)


def test_stages():
    model = accelerated()
    assert sla_compile.parameters(model) == [p for n, p in model.named_parameters() if ".sla." in n]
    first, second = sla_compile.parameters(model, stage=1), sla_compile.parameters(model, stage=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in first] == [f"{owner}.sla.{name}" for owner in ATTENTIONS for name in ADDED]
    routers = {f"{owner}.sla.{name}" for owner in ATTENTIONS for name in ADDED[1:]}
    assert {names[id(p)] for p in second} == set(names.values()) - routers and len(second) == len(names) - 4
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == routers
    with pytest.raises(ValueError, match="stage must be None, 1 or 2"):
        sla_compile.parameters(model, stage=3)
    with pytest.raises(ValueError, match="stage 1 trains the routers and alpha of SLA2"):
        sla_compile.parameters(sla_compile.accelerate(build(), config=SLAConfig(min_seq_len=64)), stage=1)
    frozen = sla_compile.accelerate(build().requires_grad_(False), config=CONFIG)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert len(sla_compile.parameters(frozen, stage=2)) == 2  # the two logits; the model's own are not trained


@pytest.mark.parametrize("config", [CONFIG, PER_BLOCK], ids=["head", "block"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_training_step_reaches_alpha_and_not_the_routers(config, checkpointing):
    model = accelerated(config, length=200, checkpointing=checkpointing).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(sla_compile.parameters(model, stage=2), lr=0.1)
    model(*make_inputs()).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_router = ".router_" in name
        assert (parameter.grad is None) == is_router, name
        assert torch.equal(parameter, before[name]) == is_router, name


@pytest.mark.parametrize("config", [CONFIG, PER_BLOCK], ids=["head", "block"])
def test_saves_and_loads(config, tmp_path):
    path, inputs = tmp_path / "sla2.safetensors", make_inputs()
    model = accelerated(config, length=200)
    sla_compile.save(model, path)
    for other in (build(), sla_compile.accelerate(build(), config=config, example_inputs=inputs)):
        assert sla_compile.load(other, path) is other
        assert torch.equal(other(*inputs), model(*inputs))
        assert [p.requires_grad for p in sla_compile.parameters(other)] == [True, False, False] * 2
    wider = build(num_heads=4, dim=64)
    with pytest.raises(ValueError, match=r"needs alpha_logit \(4, \d\), found \(2, \d\)"):
        sla_compile.load(wider, path)
    assert not any(".sla." in name for name in wider.state_dict())


def test_loads_a_file_from_before_sla2(tmp_path):
    path = tmp_path / "sla.safetensors"
    config = SLAConfig(min_seq_len=64)
    model = sla_compile.accelerate(build(), config=config)
    sla_compile.save(model, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sla_compile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for site in header["sites"].values():
        site.pop("num_heads"), site.pop("query_blocks")
        site["config"].pop("alpha_per"), site["config"].pop("low_bit")
    save_file(tensors, path, metadata={"sla_compile": json.dumps(header)})
    for other in (build(), sla_compile.accelerate(build(), config=config)):
        assert torch.equal(sla_compile.load(other, path)(*make_inputs()), model(*make_inputs()))


def test_copies_and_state_dicts():
    model, inputs = accelerated(), make_inputs()
    expected = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), expected)
    other = sla_compile.accelerate(build(1), config=CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), expected)
    with torch.device("meta"):
        empty = build()
    empty = sla_compile.accelerate(empty, config=CONFIG).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(*inputs), expected)
    empty.blocks[0].attn.sla.reset_parameters()
    fresh = sla_compile.accelerate(build(), config=CONFIG).blocks[0].attn.sla.state_dict()
    assert all(torch.equal(fresh[name], p) for name, p in empty.blocks[0].attn.sla.named_parameters())


def test_a_default_device_that_is_another():
    model = build()
    with torch.device("meta"):
        sla_compile.accelerate(model, config=CONFIG)
    assert torch.equal(model.blocks[0].attn.sla.router_q, torch.eye(16))


def test_methods_side_by_side():
    sla = SLAConfig(min_seq_len=64, sparsity=0.6)
    model = sla_compile.accelerate(build(), config=CONFIG, per_site={"blocks.1.*": sla})
    assert set(model.blocks[0].attn.sla.state_dict()) == set(ADDED)
    assert set(model.blocks[1].attn.sla.state_dict()) == {"proj_weight", "proj_bias"}
    assert len(sla_compile.parameters(model)) == 5 and len(sla_compile.parameters(model, stage=1)) == 3
    model(*make_inputs()).sum().backward()
    assert all(p.grad is not None for p in sla_compile.parameters(model, stage=2))


def test_an_alpha_for_each_block_is_bound_to_its_length():
    with pytest.raises(
        ValueError, match='blocks.0.attn: alpha_per="block" is bound to one length(.|\n)*example_inputs'
    ):
        sla_compile.accelerate(build(), config=PER_BLOCK)
    model = accelerated(PER_BLOCK, length=200)
    assert model.blocks[0].attn.sla.alpha_logit.shape == (2, 4)
    model(*make_inputs(193))  # four blocks, too
    with pytest.raises(ValueError, match="^blocks.0.attn: alpha is for sequences of 4 query blocks, but 330 tokens"):
        model(*make_inputs(330))
    with sla_compile.dense(model):
        model(*make_inputs(330))

    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, x):
            return self.attention(x), self.attention(x[:, :100])

    with pytest.raises(ValueError, match='calls of different lengths, and alpha_per="block" is bound to one'):
        sla_compile.accelerate(Lengths(), config=PER_BLOCK, example_inputs=(torch.zeros(1, 200, 32),))
    sla_compile.accelerate(Lengths(), config=CONFIG, example_inputs=(torch.zeros(1, 200, 32),))


def test_context_parallelism_is_refused():
    class Processor:
        _parallel_config = type("Config", (), {"ring_degree": 1})()

    model = accelerated()
    model.blocks[0].attn.processor = Processor()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="blocks.0.attn: .* SLA2's alpha is for all of them"):
        model(*make_inputs())


@pytest.mark.parametrize(
    ("config", "backend"),
    pairs([PER_BLOCK, CONFIG], ["aot_eager", *(["inductor"] if ALL_CASES else [])]),
    ids=lambda one: getattr(one, "alpha_per", one),
)
def test_compiled_it_is_the_same(config, backend):
    model, inputs = accelerated(config, length=200, depth=1), make_inputs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for run in (compiled, model):
        model.zero_grad()
        output = run(*inputs)
        output.square().sum().backward()
        logits = [p.grad for p in sla_compile.parameters(model, stage=1) if p.requires_grad]
        results.append((output.detach(), *logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_other_lengths_do_not_recompile():
    model = accelerated()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for number, length in enumerate((200, 330, 577, 150)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0), torch.no_grad():
            torch.testing.assert_close(
                compiled(*make_inputs(length)), model(*make_inputs(length)), rtol=1e-5, atol=1e-5
            )


def graph_parameters(graph):
    return {name: p for name, p in graph.named_parameters() if ".sla." in name}


# run_decompositions copies tree specifications, whose class warns about it from inside the standard library
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [CONFIG, PER_BLOCK], ids=["head", "block"])
@pytest.mark.parametrize("kind", ["exported", "module", "decomposed"])
def test_graphs_compute_what_the_module_does(kind, config, dtype):
    inputs = tuple(tensor.to(dtype) for tensor in make_inputs())
    graph = program = torch.export.export(build().to(dtype), inputs)
    if kind == "module":
        graph = program.module()
    elif kind == "decomposed":
        graph = program.run_decompositions()
    graph = sla_compile.accelerate(graph, config=config)
    assert [site.name for site in sla_compile.report(graph).rewritten] == ATTENTIONS
    assert list(graph_parameters(graph)) == [f"{owner}.sla.{name}" for owner in ATTENTIONS for name in ADDED]
    assert len(sla_compile.parameters(graph, stage=1)) == 6
    assert len(sla_compile.parameters(graph, stage=2)) == len(list(graph.parameters())) - 4
    run = graph if kind == "module" else graph.module()
    model = sla_compile.accelerate(build().to(dtype), config=config, example_inputs=inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in graph_parameters(run).items():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.5
            model.get_parameter(name).copy_(parameter)
    output, expected = run(*inputs), model(*inputs)
    rounding = 0.0 if kind != "decomposed" else 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=0, atol=rounding)  # decomposed, it rounds in other places
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in graph_parameters(run).items():
        assert (parameter.grad is None) == (".router_" in name) == (not parameter.requires_grad)
        if parameter.grad is not None and kind != "decomposed":
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # by torch 2.11's export.load
def test_a_dynamic_length_fits_an_alpha_for_each_head_only():
    length = torch.export.Dim("length", min=64, max=4096)
    program = torch.export.export(build(), make_inputs(), dynamic_shapes=({1: length}, {1: length}))
    rewritten = sla_compile.accelerate(program, config=CONFIG)
    model = sla_compile.accelerate(build(), config=CONFIG)
    for tokens in (200, 333):
        assert torch.equal(rewritten.module()(*make_inputs(tokens)), model(*make_inputs(tokens)))
    with pytest.raises(ValueError, match='its length is dynamic, and alpha_per="block" is bound to one length'):
        sla_compile.accelerate(program, config=PER_BLOCK)
    reloaded = io.BytesIO()
    torch.export.save(rewritten, reloaded)
    reloaded.seek(0)
    assert torch.equal(torch.export.load(reloaded).module()(*make_inputs()), model(*make_inputs()))


def test_owners_of_several_calls_in_a_graph():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, x, y):
            return self.attention(x), self.attention(y)

    inputs = (torch.randn(1, 200, 32), torch.randn(1, 330, 32))
    graph = torch.export.export(Twice(), inputs).module()
    sla_compile.accelerate(graph, config=CONFIG)
    assert sum(node.target is OP for node in graph.graph.nodes) == 2 and len(graph_parameters(graph)) == 3
    graph = torch.export.export(Twice(), inputs).module()
    sla_compile.accelerate(graph, config=PER_BLOCK)
    assert [site.reason for site in sla_compile.report(graph).dense] == [
        "its owner's parameters are for 200 tokens, those of an earlier call"
    ]


def test_the_backend_adds_no_parameters():
    compiled = torch.compile(build(), backend="sla", options={"method": "sla2", "inner": "eager"})
    with pytest.raises(Exception, match='method="sla2" has alpha and a router to train'):
        compiled(*make_inputs())
