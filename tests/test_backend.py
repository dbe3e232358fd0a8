"""The Dynamo backend "sla": models that nobody accelerated, over any inner backend."""

import logging
import warnings

import pytest
import torch
from graph_tools import CONFIG, captured, expected, ops
from models import build
from spellings import SPELLINGS, Model
from test_passes import inputs
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig
from sla_compile.passes import backend

NONE = CONFIG.replace(linear="none")
OPTIONS = {"sparsity": CONFIG.sparsity, "min_seq_len": 1}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    backend.clear_reports()


def compiled(model, inner="eager", fullgraph=True, **options):
    options = {**OPTIONS, "inner": inner, **options}
    return torch.compile(model, backend=backend.sla, fullgraph=fullgraph, options=options)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", id="inductor")])
def test_numbers_and_gradients_over_inner_backends(inner):
    torch.manual_seed(0)
    model, x = Model(SPELLINGS["matmul_scale_after"]), inputs().requires_grad_()
    wanted = x + expected(model.block.attn, x, None, None, config=NONE)
    tensors = (x, *model.parameters())
    gradients = torch.autograd.grad(wanted.square().sum(), tensors)
    result = compiled(model, inner)(x)
    torch.testing.assert_close(result, wanted)
    # A small element is a sum of large ones that cancel: roundings are measured by the largest.
    for found, gradient in zip(torch.autograd.grad(result.square().sum(), tensors), gradients, strict=True):
        atol = 4 * torch.finfo(torch.float32).eps * gradient.abs().max().item()
        torch.testing.assert_close(found, gradient, rtol=0, atol=atol)
    ((site,),) = backend.reports()
    assert site.rewritten
    assert site.name == "block.attn"


def test_an_inner_callable_sees_the_rewritten_graph():
    seen = []

    def inner(graph_module, example_inputs, **keywords):
        seen.append((graph_module, keywords))
        return graph_module.forward

    model = Model(SPELLINGS["sdpa"])
    names = list(model.state_dict())
    compiled(model, inner, depth=3)(inputs())
    ((graph, keywords),) = seen
    assert ops(graph) == 1
    assert keywords == {"options": {"depth": 3}}
    assert list(model.state_dict()) == names


def test_a_dynamic_length_compiles_once():
    torch.manual_seed(0)
    model = Model(SPELLINGS["bmm_flat_heads"])
    reports = []
    step = compiled(model, "aot_eager", on_report=reports.append)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (130, 257, 300):
            x = inputs(length)
            torch._dynamo.mark_dynamic(x, 1)
            wanted = x + expected(model.block.attn, x, None, None, scale=0.3, config=NONE)
            torch.testing.assert_close(step(x), wanted)
    ((site,),) = reports
    assert site.shape.startswith("(4, s")


def test_every_size_dynamic():
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    step = torch.compile(attend, backend=backend.sla, dynamic=True, options={**OPTIONS, "inner": "aot_eager"})
    for shape in ((2, 3, 130, 16), (3, 4, 200, 16), (3, 4, 200, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(step(x), sla_compile.sparse_linear_attention(x, x, x, config=NONE))
    assert [site.head_dim for (site,) in backend.reports()] == [16, 32]


class Scaled(Model):
    """Its scale is a float of the module, which dynamic=True makes an input of the graph."""

    def __init__(self, alpha):
        super().__init__(self.alpha if alpha else self.factor)
        self.scale = 0.3

    def factor(self, q, k, v):
        return (q @ k.mT * self.scale).softmax(-1) @ v

    def alpha(self, q, k, v):
        shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))
        empty = torch.empty(q.shape[0], q.shape[1], q.shape[1])
        return torch.bmm(torch.baddbmm(empty, q, k.mT, beta=0, alpha=self.scale).softmax(-1), v).view(shape)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_scale_that_is_symbolic(alpha):
    torch.manual_seed(0)
    model, x = Scaled(alpha), inputs()
    step = torch.compile(model, backend=backend.sla, dynamic=True, options={**OPTIONS, "inner": "aot_eager"})
    wanted = x + expected(model.block.attn, x, None, None, scale=0.3, config=NONE)
    torch.testing.assert_close(step(x), wanted)
    assert all(site.rewritten for sites in backend.reports() for site in sites)


def scanned(x):
    def step(x, bias):
        x = (x @ x.mT * 0.3).softmax(-1) @ x + bias
        return x, x.clone()

    return torch._higher_order_ops.scan(step, x, torch.zeros(3, *x.shape))[0]


def looped(x):
    def step(n, x):
        return n + 1, (x @ x.mT * 0.3).softmax(-1) @ x

    return torch._higher_order_ops.while_loop(lambda n, x: n < 3, step, (torch.tensor(0), x))[1]


@pytest.mark.parametrize("attend", [looped, scanned])
def test_attention_in_loops(attend):
    x = torch.randn(2, 2, 130, 16)
    wanted = x
    for _ in range(3):
        wanted = sla_compile.sparse_linear_attention(wanted, wanted, wanted, scale=0.3, config=NONE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(attend)(x), wanted)
    ((site,),) = backend.reports()
    assert site.rewritten


def test_attention_in_a_scan_that_trains_stays_dense():
    x = torch.randn(2, 2, 130, 16, requires_grad=True)
    torch.testing.assert_close(compiled(scanned)(x), scanned(x))
    assert [site.rewritten for (site,) in backend.reports()] == [False]
    assert "inside a scan" in backend.reports()[0][0].reason


def test_a_length_below_the_minimum_compiles_anew_and_stays_dense():
    model = Model(SPELLINGS["sdpa"])
    step = compiled(model, min_seq_len=128)
    for length in (130, 100, 200, 90):
        x = inputs(length)
        torch._dynamo.mark_dynamic(x, 1)
        config = NONE if length >= 128 else None
        wanted = x + expected(model.block.attn, x, None, None, config=config) if config else model(x)
        torch.testing.assert_close(step(x), wanted)
    assert [site.rewritten for (site,) in backend.reports()] == [True, False]


def test_checkpointed_blocks():
    torch.manual_seed(0)
    results = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model, x = build(0, checkpointing=checkpointing), inputs().requires_grad_()
        compiled(model, "aot_eager")(x, inputs(20, seed=1)).square().sum().backward()
        results.append((x.grad, *(p.grad for p in model.parameters())))
    torch.testing.assert_close(*results)
    assert [[site.rewritten for site in sites] for sites in backend.reports()] == [[True, False] * 2] * 2


def test_nothing_eligible_is_logged_and_left_alone(caplog):
    model, x = Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), inputs()
    with caplog.at_level(logging.INFO, logger="sla_compile.passes.backend"):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert "block.attn (2, 2, 130, 16) stays dense: causal attention" in caplog.messages


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap's
@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda q: f(q).sum())])
def test_transforms_of_functions_stay_dense(transform):
    function, x = transform(lambda q: F.scaled_dot_product_attention(q, q, q)), torch.randn(3, 2, 2, 130, 16)
    x = x if transform is torch.func.vmap else x[0]
    torch.testing.assert_close(compiled(function, "aot_eager")(x), function(x))
    assert [site.reason[:33] for (site,) in backend.reports()] == ["under a transform of torch.func, "]


def test_accelerated_models_are_left_alone():
    model = sla_compile.accelerate(build(0), config=CONFIG, example_inputs=(inputs(), inputs(20, seed=1)))
    wanted = model(inputs(), inputs(20, seed=1))
    torch.testing.assert_close(compiled(model, fullgraph=False)(inputs(), inputs(20, seed=1)), wanted)
    assert not any(backend.reports())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear": "marginal"}, "adds no parameters"),
        ({"config": SLAConfig()}, "adds no parameters"),
        ({"sparsity": 2.0}, "sparsity must be in"),
        ({"config": NONE, "sparsity": 0.9}, 'has "config" and'),
        ({"config": "sla"}, "must be an SLAConfig"),
    ],
)
def test_options_that_make_no_sense(options, message):
    graph = captured(Model(SPELLINGS["sdpa"]), inputs())
    with pytest.raises((ValueError, TypeError), match=message):
        backend.sla(graph, [], options={"inner": "eager", **options})
    assert ops(graph) == 0


def test_by_name():
    backend.register()
    backend.register()
    assert "sla" in torch._dynamo.list_backends()
    model, x = Model(SPELLINGS["sdpa"]), inputs()
    result = torch.compile(model, backend="sla", options={**OPTIONS, "inner": "eager"})(x)
    torch.testing.assert_close(result, x + expected(model.block.attn, x, None, None, config=NONE))


def test_inner_options_and_modes_reach_inductor(monkeypatch):
    import torch._inductor.compile_fx

    calls = []

    def compile_fx(graph_module, example_inputs, config_patches=None):
        calls.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    graph = captured(Model(SPELLINGS["sdpa"]), inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.sla(graph, [], options={**OPTIONS, "epilogue_fusion": False}, mode="max-autotune-no-cudagraphs")
    (patches,) = calls
    assert patches["epilogue_fusion"] is False
    assert patches["max_autotune"] is True
    assert not OPTIONS.keys() & patches.keys()
