"""The operator and accelerated models under torch.func: as loops compute it, or an error; never another number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig, sparse_linear_attention

CONFIG = SLAConfig(sparsity=0.5, min_seq_len=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return tokens + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.fixture(params=["sla", "sla2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    config = CONFIG.replace(method=request.param)
    sla_compile.accelerate(model, config=config, example_inputs=(torch.randn(1, 200, 16).double(),))
    for parameter in sla_compile.parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(3, 200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
    return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, sample: Tensor) -> dict[str, Tensor]:
    parameters = trained(model)
    found = torch.autograd.grad(loss(model, parameters, sample), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient)


def test_grad(model: nn.Module, samples: Tensor) -> None:
    found = torch.func.grad(lambda parameters: loss(model, parameters, samples[0]))(trained(model))
    assert_equal(found, gradients(model, samples[0]))


def test_vjp(model: nn.Module, samples: Tensor) -> None:
    samples.requires_grad_()
    cotangent = torch.randn_like(samples)
    (expected,) = torch.autograd.grad(model(samples), samples, cotangent)
    torch.testing.assert_close(torch.func.vjp(model, samples)[1](cotangent)[0], expected)


def test_vmap(model: nn.Module, samples: Tensor) -> None:
    torch.testing.assert_close(torch.func.vmap(lambda sample: model(sample[None])[0])(samples), model(samples))


def test_gradients_of_each_sample(model: nn.Module, samples: Tensor) -> None:
    of_one = torch.func.grad(lambda parameters, sample: loss(model, parameters, sample))
    found = torch.func.vmap(of_one, in_dims=(None, 0))(trained(model), samples)
    of_each = [gradients(model, sample) for sample in samples]
    assert_equal(found, {name: torch.stack([one[name] for one in of_each]) for name in of_each[0]})


def test_compiled(model: nn.Module, samples: Tensor) -> None:
    model.requires_grad_(False)
    of_sample = torch.func.vmap(torch.func.grad(lambda sample: model(sample[None]).square().sum()))
    compiled = torch.compile(of_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(samples), of_sample(samples))


def dual(function: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(tokens, torch.ones_like(tokens)))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "derive", [dual, lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x)]
)
def test_forward_mode_is_refused(recorded: bool, derive: Callable) -> None:
    """The operator must not count as a constant, whose tangent is zero."""
    query, key, value = torch.randn(3, 1, 1, 70, 8, requires_grad=recorded).unbind()
    config = CONFIG.replace(linear="none")
    with torch.set_grad_enabled(recorded), pytest.raises(NotImplementedError, match="jvp|forward-mode"):
        derive(lambda tokens: sparse_linear_attention(tokens, key, value, config=config), query.detach())


def test_second_derivatives_are_refused(model: nn.Module, samples: Tensor) -> None:
    samples.requires_grad_()
    (first,) = torch.autograd.grad(model(samples).square().sum(), samples, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative: .* sla_compile\.dense"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match=r"no second derivative: .* sla_compile\.dense"):
        torch.func.grad(lambda tokens: torch.func.grad(lambda x: model(x).sum())(tokens).sum())(samples)
