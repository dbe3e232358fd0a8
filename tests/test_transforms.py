"""The operator and accelerated models under torch.func: as loops and formulas have it, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig, ops, route, sparse_linear_attention
from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.reference import reference_attention
from sla_compile.kernels.smoothing import has_complement, token_mean
from sla_compile.kernels.spec import Spec

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


def test_vmap_over_models(model: nn.Module, samples: Tensor) -> None:
    other = copy.deepcopy(model)
    for parameter in sla_compile.parameters(other):
        nn.init.normal_(parameter, std=0.3)
    parameters, _ = torch.func.stack_module_state([model, other])
    found = torch.func.vmap(lambda state: torch.func.functional_call(model, state, (samples,)))(parameters)
    torch.testing.assert_close(found, torch.stack([model(samples), other(samples)]))


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


JVP_CASES = {
    "sla": dict(),
    "all": dict(linear="all", negligible=0.0),
    "none": dict(linear="none"),
    "sla2": dict(method="sla2"),
    "elu": dict(feature_map="elu"),
    "relu": dict(feature_map="relu"),
    "wide blocks": dict(block_q=128),
    "pinned": dict(pinned=(10, 70)),
}


def attention_case(options: dict, *, kv_heads: int = 2, masked: bool = False, mapped: bool = False) -> tuple:
    """The operator and the reference as functions of what has tangents, and random values of these."""
    config = SLAConfig(**{"sparsity": 0.5, "negligible": None, **options})
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    values = {"query": draw(2, 300, 2, 8).transpose(1, 2)}  # as a (B, L, H, D) tensor is seen
    values |= {name: draw(2, kv_heads, 300, 8) for name in ("key", "value")}
    if config.has_projection:
        values |= {"proj_weight": draw(8, 8), "proj_bias": draw(8)}
    elif config.has_alpha:
        values |= {"alpha": draw(2, 1).sigmoid()}
    mask = draw(2, 1, 1, 300) > -1 if masked else None
    options = dict(config=config, enable_gqa=True)
    block_map = route(values["query"], values["key"], **options, key_padding_mask=mask)
    if mapped:
        block_map = block_map.roll(1, 3)
    given = dict(key_padding_mask=mask, block_map=block_map if mapped else None)
    spec = Spec(8**-0.5, config.feature_map, config.linear, config.block_q, config.block_k)
    bias = key_bias(mask, 2, 300)

    def operator(*inputs: Tensor) -> Tensor:
        return sparse_linear_attention(**dict(zip(values, inputs, strict=True)), **options, **given)

    def reference(*inputs: Tensor) -> Tensor:
        named = dict(zip(values, inputs, strict=True))
        if config.has_alpha:
            complement = has_complement(block_map, bias, 64)
            named |= {"alpha": torch.where(complement, named["alpha"], 1), "key_mean": token_mean(named["key"], bias)}
        return reference_attention(**named, block_map=block_map, spec=spec, key_bias=bias)[0]

    return operator, reference, tuple(values.values())


@pytest.mark.parametrize("layout", [{}, {"kv_heads": 1}, {"masked": True}, {"mapped": True}], ids=str)
@pytest.mark.parametrize("options", JVP_CASES.values(), ids=JVP_CASES)
def test_jvp(options: dict, layout: dict) -> None:
    operator, reference, values = attention_case(options, **layout)
    tangents = tuple(torch.randn_like(value) for value in values)
    output, tangent = torch.func.jvp(operator, values, tangents)
    torch.testing.assert_close(output, operator(*values), rtol=0, atol=0)
    torch.testing.assert_close(tangent, torch.func.jvp(reference, values, tangents)[1])
    assert tangent.stride() == output.stride()


@pytest.mark.parametrize(
    ("dtype", "roundings"), [(torch.float32, 16), (torch.bfloat16, 1), (torch.float16, 1)], ids=str
)
def test_precision_of_jvp(dtype: torch.dtype, roundings: int) -> None:
    """In 16 bit the result alone is rounded, by half an eps; in float32 the exponents are, of a size of up to ten."""
    operator, reference, values = attention_case({}, mapped=True)
    values = tuple(value.to(dtype) for value in values)
    tangents = tuple(torch.randn_like(value) for value in values)
    tangent = torch.func.jvp(operator, values, tangents)[1]
    exact = (tuple(tensor.double() for tensor in tensors) for tensors in (values, tangents))
    expected = torch.func.jvp(reference, *exact)[1]
    assert tangent.dtype == dtype
    assert (tangent.double() - expected).norm() < roundings * torch.finfo(dtype).eps * expected.norm()


def test_jvp_routes_tensors_that_kernels_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, _, values = attention_case({"method": "sla2"}, masked=True)
    seen = []

    def routed(*tensors: Tensor, **options: Any) -> Tensor:
        seen.extend(tensor.data_ptr() for tensor in (*tensors, options["key_bias"]))  # of a wrapper it raises
        return original(*tensors, **options)

    original = ops.route
    monkeypatch.setattr(ops, "route", routed)
    twice = lambda *inputs: torch.func.jvp(operator, inputs, values)[1]  # noqa: E731
    torch.func.jvp(twice, values, values)
    assert len(seen) >= 6


@pytest.mark.parametrize("place", range(5))
def test_jvp_of_one_argument(place: int) -> None:
    operator, reference, values = attention_case({})

    def alone(function: Callable) -> Callable:
        return lambda value: function(*values[:place], value, *values[place + 1 :])

    tangent = torch.randn_like(values[place])
    expected = torch.func.jvp(alone(reference), (values[place],), (tangent,))[1]
    torch.testing.assert_close(torch.func.jvp(alone(operator), (values[place],), (tangent,))[1], expected)


def test_jvp_of_a_model_is_the_transpose_of_its_vjp(model: nn.Module, samples: Tensor) -> None:
    direction, cotangent = torch.randn(2, *samples.shape, dtype=torch.float64).unbind()
    tangent = torch.func.jvp(model, (samples,), (direction,))[1]
    expected = (torch.func.vjp(model, samples)[1](cotangent)[0] * direction).sum()
    torch.testing.assert_close((tangent * cotangent).sum(), expected)


def test_a_loss_may_have_the_tangent_in_its_target(model: nn.Module, samples: Tensor) -> None:
    """As consistency models and mean flows train: gradients go through the output alone."""
    output, tangent = torch.func.jvp(model, (samples,), (torch.ones_like(samples),))
    found = torch.autograd.grad((output - tangent.detach()).square().sum(), list(trained(model).values()))
    expected = torch.autograd.grad((model(samples) - tangent.detach()).square().sum(), list(trained(model).values()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_jacfwd() -> None:
    operator, _, values = attention_case({})

    def of_factors(factors: Tensor) -> Tensor:
        return operator(*(factor * value for factor, value in zip(factors, values, strict=True))).sum((0, 1, 2))

    factors = torch.ones(len(values), dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacfwd(of_factors)(factors), torch.func.jacrev(of_factors)(factors))


def test_jvp_under_autocast_takes_its_dtype() -> None:
    operator, _, values = attention_case({"linear": "none"})
    values, direction = tuple(value.float() for value in values), torch.randn(values[0].shape)
    tangents = (direction, *map(torch.zeros_like, values[1:]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, tangent = torch.func.jvp(operator, values, tangents)
    half = [tensor.to(torch.bfloat16) for tensor in (*values, *tangents)]
    expected, of_half = torch.func.jvp(operator, tuple(half[:3]), tuple(half[3:]))
    assert tangent.dtype == output.dtype == torch.bfloat16
    assert torch.equal(output, expected) and torch.equal(tangent, of_half)


def test_jvp_of_low_bit_is_refused() -> None:
    operator, _, values = attention_case({"linear": "none", "low_bit": "int8"})
    with pytest.raises(NotImplementedError, match='low_bit="int8" has no forward-mode derivative'):
        torch.func.jvp(operator, values, values)


def test_vmap_over_jvp_is_refused(model: nn.Module, samples: Tensor) -> None:
    with pytest.raises(NotImplementedError, match=r"no torch.func.vmap over torch.func.jvp; loop over it"):
        torch.func.vmap(lambda x: torch.func.jvp(lambda y: model(y[None]), (x,), (x,))[1])(samples)


@pytest.mark.parametrize("recorded", [True, False])
def test_dual_tensors_without_a_transform_are_refused(recorded: bool) -> None:
    """The operator must not count as a constant, whose tangent is zero."""
    query, key, value = torch.randn(3, 1, 1, 70, 8, requires_grad=recorded).unbind()
    config = CONFIG.replace(linear="none")
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="jvp"):
            sparse_linear_attention(dual, key, value, config=config)


def test_second_derivatives_are_refused(model: nn.Module, samples: Tensor) -> None:
    samples.requires_grad_()
    (first,) = torch.autograd.grad(model(samples).square().sum(), samples, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative: .* sla_compile\.dense"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match=r"no second derivative: .* sla_compile\.dense"):
        torch.func.grad(lambda tokens: torch.func.grad(lambda x: model(x).sum())(tokens).sum())(samples)
