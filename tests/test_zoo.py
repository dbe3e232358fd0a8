"""Small transformers of diffusers: the right calls are redirected, with the right arguments, and restored."""

import pytest
import torch
import zoo
from sampling import pairs
from torch._dynamo.utils import counters

import sla_compile
from sla_compile import SLAConfig

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore", "error:sla_compile")  # what diffusers warns of is not our concern

SPARSE = SLAConfig(sparsity=0.7, min_seq_len=zoo.MIN_SEQ_LEN)
EVERYTHING_CRITICAL = SPARSE.replace(critical_blocks=10**6)
# One for each way of calling attention: joint with padding, alone, joint of two streams, joint in one, packed tokens.
COMPILED = [
    "HunyuanVideoTransformer3DModel",
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "LTXVideoTransformer3DModel",
]
every_model = pytest.mark.parametrize("name", zoo.ZOO, ids=lambda name: name.replace(" ", "-"))


def accelerate(name, config, example_inputs=None):
    """The model accelerated, with projections that are not zero, so that they matter where blocks are marginal."""
    config = zoo.chosen(name, config)
    model = sla_compile.accelerate(zoo.build(name), config=config, example_inputs=example_inputs, allow_no_match=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sla.proj_weight"):
                parameter.normal_(std=0.2, generator=generator)
    return model


def run(model, inputs):
    with torch.no_grad():
        return zoo.outputs(model(**inputs))


def rewritten(model):
    return {site.name for site in sla_compile.report(model).rewritten}


def assert_equal_to_rounding(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 2e-6 * e.abs().max()


@every_model
def test_all_blocks_critical_is_dense_attention(name):
    inputs = zoo.inputs(name)
    dense = zoo.build(name)
    expected = run(dense, inputs)
    model = accelerate(name, EVERYTHING_CRITICAL)
    assert_equal_to_rounding(run(model, inputs), expected)
    assert len(rewritten(model)) == zoo.ZOO[name].rewritten

    sla_compile.restore(model)
    assert all(torch.equal(a, e) for a, e in zip(run(model, inputs), expected, strict=True))
    assert list(model.state_dict()) == list(dense.state_dict())


@every_model
def test_structure_decides_as_a_run_does_and_both_train(name):
    inputs = zoo.inputs(name)
    by_run, by_structure = accelerate(name, SPARSE, inputs), accelerate(name, SPARSE)
    planned = rewritten(by_run)
    assert len(planned) == zoo.ZOO[name].rewritten
    other = dict(by_structure.named_parameters())
    with torch.no_grad():
        for key, parameter in by_run.named_parameters():
            other[key].copy_(parameter)
    outputs = [run(model, inputs) for model in (by_run, by_structure)]
    assert rewritten(by_structure) == rewritten(by_run) == planned  # what the runs did, and not only the plan
    assert all(torch.equal(a, e) for a, e in zip(*outputs, strict=True))
    if zoo.ZOO[name].rewritten:
        check_that_every_added_parameter_gets_a_gradient(name, by_run.train(), inputs)


def check_that_every_added_parameter_gets_a_gradient(name, model, inputs):
    sum(output.square().mean() for output in zoo.outputs(model(**inputs))).backward()
    dead = [key for key, parameter in model.named_parameters()
            if ".sla." in key and (parameter.grad is None or not parameter.grad.any())]  # fmt: skip
    if "differential" in name:  # softmax(q1 k1) v - softmax(q2 k2) v: a bias on both cancels
        dead = [key for key in dead if not key.endswith("proj_bias")]
    assert not dead


@pytest.mark.parametrize(("name", "lengths"), pairs(COMPILED, [2, 1]))
def test_compiled_in_one_graph(name, lengths):
    backend = "eager" if lengths > 1 else "aot_eager"
    model = accelerate(name, SPARSE, zoo.inputs(name))
    counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=lengths > 1)
    for extra in range(lengths):
        inputs = zoo.inputs(name, extra)
        assert_equal_to_rounding(run(compiled, inputs), run(model, inputs))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", COMPILED)
def test_exported(name):
    inputs = zoo.inputs(name)
    model = accelerate(name, SPARSE, inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("sla_compile.sparse_linear_attention.default") == zoo.ZOO[name].rewritten
    assert_equal_to_rounding(run(program.module(), inputs), run(model, inputs))
