"""Under torch.compile: the same numbers as eager, in one graph, without a recompile that the dense model has not."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SelfAttention, build, make_inputs
from sampling import ALL_CASES, every_other
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sla_compile
from sla_compile import SLAConfig
from sla_compile.array_operators import OPERATORS

CONFIG = SLAConfig(sparsity=0.8, min_seq_len=64)


def accelerated(**options):
    model = sla_compile.accelerate(build(**options), config=CONFIG)
    for parameter in sla_compile.parameters(model):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def assert_same_gradients(one, other, **tolerance):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(
    ("backend", "checkpointing"),  # some models checkpoint in inference, too
    [("eager", False), ("aot_eager", True), *([("inductor", False)] if ALL_CASES else [])],  # see max_autotune
)
def test_whole_model_in_one_graph(backend, checkpointing):
    model = accelerated(checkpointing=checkpointing, depth=1 if backend == "inductor" else 2)
    counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*make_inputs()), model(*make_inputs()), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [("aot_eager", False), ("aot_eager", True), ("inductor", True), *([("inductor", False)] if ALL_CASES else [])],
)
def test_training(backend, checkpointing):
    depth = 1 if backend == "inductor" else 2
    model, reference = (accelerated(checkpointing=checkpointing, depth=depth).train() for _ in range(2))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(*make_inputs()).square().sum().backward()
    reference(*make_inputs()).square().sum().backward()
    assert_same_gradients(model, reference, rtol=1e-4, atol=1e-3 if backend == "inductor" else 0)
    assert all(p.grad.abs().sum() > 0 for p in sla_compile.parameters(model))


class WithArrays(SelfAttention):
    """Arithmetic of NumPy, which Dynamo traces, in a timestep embedding and for a temperature."""

    def forward(self, x):
        rates = 1 / 10000 ** (np.arange(16) / 16)
        angles = np.concatenate([np.sin(-rates * 3), np.cos(rates @ np.eye(16) - 1)])
        return super().forward(x + torch.from_numpy(angles).float()) * (2 / np.sqrt(self.num_heads))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("owner", [False, True])
def test_arithmetic_of_arrays(owner, grad):
    torch.manual_seed(0)
    model = nn.Sequential(WithArrays(), SelfAttention()).requires_grad_(grad)
    sla_compile.accelerate(model, config=CONFIG, exclude=None if owner else "0")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 200, 32)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_every_operator_of_an_array_is_said_again():
    """What the operators become is told apart by names, which no two of them may share."""
    array = np.array([5.0])
    for name, function in OPERATORS.items():
        arguments = (array.copy(),) if name in ("abs", "neg", "positive") else (array.copy(), np.array([2.0]))
        tensors = [torch.from_numpy(argument.copy()) for argument in arguments]
        expected = getattr(torch.Tensor, name)(*tensors).numpy()
        np.testing.assert_array_equal(function(*arguments).reshape(expected.shape), expected, name)


def test_checkpointing_compiled_block_by_block():
    model, reference = (accelerated(checkpointing=True).train() for _ in range(2))
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    model(*make_inputs()).square().sum().backward()
    reference(*make_inputs()).square().sum().backward()
    assert_same_gradients(model, reference, rtol=0, atol=0)


@pytest.mark.parametrize("outer", ["checkpoint", "compile"])
def test_checkpoints_put_around_blocks(outer):
    """As trainers with FSDP2 do it; a checkpoint that is compiled without the model needs Dynamo's setting."""
    model, reference = (accelerated().train() for _ in range(2))
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = (
            checkpoint_wrapper(compiler(block)) if outer == "checkpoint" else compiler(checkpoint_wrapper(block))
        )
    setting = {"skip_fwd_side_effects_in_bwd_under_checkpoint": outer == "compile"}
    with torch._dynamo.config.patch(setting):
        model(*make_inputs()).square().sum().backward()
    reference(*make_inputs()).square().sum().backward()
    assert_same_gradients(reference, model, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_recompile_that_the_dense_model_has_not(dynamic):
    graphs = {}
    for kind, model in (("dense", build(depth=1)), ("accelerated", accelerated(depth=1))):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        with torch.no_grad():
            for length in (200, 330, 577, 150):
                torch.testing.assert_close(
                    compiled(*make_inputs(length)), model(*make_inputs(length)), rtol=1e-5, atol=1e-5
                )
        graphs[kind] = counters["stats"]["unique_graphs"]
    assert graphs["accelerated"] == graphs["dense"]


def test_a_threshold_crossed_is_one_more_graph_and_exact():
    model = accelerated(depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (200, 40, 330, 50):
            torch.testing.assert_close(
                compiled(*make_inputs(length)), model(*make_inputs(length)), rtol=1e-5, atol=1e-5
            )
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(*make_inputs(45)), compiled(*make_inputs(280))


def test_dense_context_switches_a_compiled_model():
    model, inputs = accelerated(), make_inputs()
    expected = build()(*inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        sparse = compiled(*inputs)
        with sla_compile.dense(model):
            torch.testing.assert_close(compiled(*inputs), expected, rtol=0, atol=0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(*inputs), sparse)


@pytest.mark.parametrize("backend", every_other(["aot_eager", "inductor"]))
def test_autocast(backend):
    model = accelerated(depth=1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(*make_inputs()), model(*make_inputs()), rtol=2e-2, atol=2e-2)


def test_inductor_fuses_around_the_op_and_copies_nothing():
    def function(x, weight, bias):
        query, key, value = (x * 2 + 1).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        output = sla_compile.sparse_linear_attention(
            query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias
        )
        return torch.relu(output.transpose(1, 2).flatten(2) + 1)

    inputs = (torch.randn(1, 200, 96), torch.randn(16, 16), torch.randn(16))
    with torch.no_grad():
        output, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *inputs)
    torch.testing.assert_close(output, function(*inputs), rtol=1e-5, atol=1e-5)
    kernels = [line for line in code.splitlines() if line.lstrip().startswith("cpp_fused")]
    assert sum("= async_compile" in line for line in kernels) == 2, "one kernel before the op and one after, no copies"


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.11's autotuner
def test_max_autotune():
    model = accelerated()
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*make_inputs()), model(*make_inputs()), rtol=1e-4, atol=1e-4)


def test_a_cold_process_compiles_the_same(tmp_path):
    """Nothing may depend on what an earlier eager run left behind."""
    tests = Path(__file__).parent
    program = f"""
import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]
import torch, sla_compile
from models import build, make_inputs
model = sla_compile.accelerate(build(), config=sla_compile.SLAConfig(sparsity=0.8, min_seq_len=64))
with torch.no_grad():
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*make_inputs())
    torch.testing.assert_close(compiled, model(*make_inputs()), rtol=0, atol=0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
