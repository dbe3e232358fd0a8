"""Models whose sparse branch runs in low bit: eager, compiled, trained, as operators."""

import pytest
import torch
from models import SelfAttention

import sla_compile
from sla_compile import SLAConfig

OP = torch.ops.sla_compile.sparse_linear_attention.default


def config(method, low_bit):
    return SLAConfig(method=method, sparsity=0.6, low_bit=low_bit, min_seq_len=64)


def accelerated(method, low_bit):
    torch.manual_seed(0)
    model = SelfAttention()
    x = torch.randn(2, 300, 32)
    sla_compile.accelerate(model, config=config(method, low_bit), example_inputs=(x,))
    with torch.no_grad():
        for parameter in sla_compile.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


@pytest.mark.parametrize("low_bit", ["int8", "fp8"])
@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_eager_compiled_and_trained(method, low_bit):
    model, x = accelerated(method, low_bit)
    exact, _ = accelerated(method, None)
    output, wanted = model(x), exact(x)
    error = ((output - wanted).norm() / wanted.norm()).item()
    assert 1e-4 < error < 0.06  # quantised, and no more than that
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), output)

    # Quantisation-aware: nearly the gradients of 16 bit, and every added parameter that trains has one.
    parameters = [p for p in sla_compile.parameters(model) if p.requires_grad]
    others = [p for p in sla_compile.parameters(exact) if p.requires_grad]
    grads = torch.autograd.grad(output.square().sum(), [model.qkv.weight, *parameters])
    expected = torch.autograd.grad(wanted.square().sum(), [exact.qkv.weight, *others])
    for grad, other in zip(grads, expected, strict=True):
        assert 1e-5 < ((grad - other).norm() / other.norm()).item() < 0.2


@pytest.mark.parametrize("low_bit", ["int8", "fp8"])
def test_opcheck(low_bit):
    query, key, value = (torch.randn(1, 200, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    alpha = torch.full((2, 1), 0.7, requires_grad=True)
    scalars = sla_compile.ops.op_scalars(config("sla2", low_bit), 16, None)
    torch.library.opcheck(OP, (query, key, value, None, None, None, None, alpha, None, None, *scalars))
