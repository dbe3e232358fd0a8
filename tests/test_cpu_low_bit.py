"""The CPU's low-bit forward, and the backward that follows it, against the definition of the operands."""

from __future__ import annotations

import itertools

import kernel_cases
import pytest
import torch
from kernel_cases import NAMES, Case
from low_bit_reference import low_bit_evaluate

from sla_compile.kernels import cpu
from sla_compile.kernels.smoothing import token_mean
from sla_compile.kernels.spec import Spec

CASES = [
    *(
        Case(low_bit=low_bit, alpha=alpha, linear=linear, length=300, heads=4, kv_heads=2, dim=24)
        for low_bit, alpha, linear in itertools.product(("int8", "fp8"), ("", "block"), ("marginal", "all"))
    ),
    Case(low_bit="int8", linear="none", length=200, block_q=128, dim=72, heads=1, kv_heads=1),
    Case(low_bit="fp8", mask="row", batch=2, dim=12, length=150, layout="padded"),
    Case(low_bit="int8", mask="additive", scale=-0.3, layout="spread", feature_map="relu"),
    Case(low_bit="fp8", blocks="none", mask="keys", alpha="head"),
]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case: Case, dtype: str) -> None:
    """In float64 within 1e-9: the same operands, bit for bit. Else within twice the error of the definition in the
    tested dtype, and a few roundings."""
    generator = torch.Generator().manual_seed(3)
    spec = Spec(case.scale or case.dim**-0.5, case.feature_map, case.linear, case.block_q, low_bit=case.low_bit)
    inputs = [kernel_cases.tokens(case, heads, 0, generator) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    inputs = [
        tensor.to(getattr(torch, {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}[dtype]))
        for tensor in inputs
    ]
    wide = torch.float64 if dtype == "fp64" else torch.float32
    weight = torch.randn(case.dim, case.dim, generator=generator, dtype=wide) * case.dim**-0.5
    parameters = [None, None] if case.linear == "none" or case.alpha else [weight, weight[0].clone()]
    classes, bias = kernel_cases.block_map(case, generator), kernel_cases.key_bias(case, generator)
    alpha = kernel_cases.draw_alpha(case, classes, generator)
    alpha = None if alpha is None else alpha.to(wide)
    smoothing = token_mean(inputs[1], bias)
    mean = None if alpha is None else smoothing
    grad = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(inputs[0].dtype)

    options = dict(proj_weight=parameters[0], proj_bias=parameters[1], key_bias=bias, alpha=alpha, key_mean=mean)
    output, logsumexp = cpu.forward(*inputs, classes, spec, **options)
    grads = cpu.backward(grad, *inputs, output, logsumexp, classes, spec, **options)

    given = [*inputs, *parameters, alpha]
    rest = (classes, spec, bias, mean, smoothing)
    exact, slack = low_bit_evaluate(given, grad.double(), *rest, torch.float64)
    low, _ = low_bit_evaluate(given, grad, *rest, inputs[0].dtype)
    for name, result, wanted, eager in zip(
        (*NAMES, "grad_alpha"), (output, logsumexp, *grads), exact, low, strict=True
    ):
        assert (result is None) == (wanted is None), name
        if result is None:
            continue
        if name == "grad_alpha":  # its logit gets alpha (1 - alpha) of it; the op ignores rows of nothing marginal
            result, wanted, eager = (alpha * (alpha < 1) * tensor for tensor in (result, wanted, eager))
        finite = wanted.isfinite()
        assert torch.equal(result.isfinite(), finite), name
        error = (result.double() - wanted)[finite].abs().max().item() if finite.any() else 0.0
        size = max(1.0, wanted[finite].abs().max().item() if finite.any() else 0.0)
        allowed = 1e-9
        if dtype != "fp64":
            made = (eager.double() - wanted)[finite].abs().max().item() if finite.any() else 0.0
            allowed = 2 * made / size + 8 * torch.finfo(result.dtype).eps + slack.max().item()
            # The gradients to alpha and through delta come of the rounded output: a rounding of each term of <dO, O>.
            allowed += torch.finfo(inputs[0].dtype).eps * (grad * output).double().norm(dim=-1).max().item() / size
        assert error <= allowed * size, (name, error, allowed * size)


@pytest.mark.parametrize("low_bit", ["int8", "fp8"])
def test_what_all_keys_share_reaches_no_gradient(low_bit: str) -> None:
    """The softmax does not see it, and smoothing takes it away before it is rounded."""
    query, key, value, grad = torch.randn(4, 1, 2, 512, 64, dtype=torch.float64).unbind(0)
    classes, spec = torch.ones(1, 2, 8, 8, dtype=torch.int8), Spec(0.125, linear="none", low_bit=low_bit)
    found, expected = (
        cpu.backward(grad, query, given, value, *cpu.forward(query, given, value, classes, spec), classes, spec)[:3]
        for given in (key + 100.0, key)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("low_bit", ["int8", "fp8"])
def test_close_to_16_bit(low_bit: str) -> None:
    """Quantisation costs a few percent of the output's norm, not its meaning."""
    query, key, value = torch.randn(3, 1, 2, 512, 64).unbind(0)
    classes = torch.ones(1, 2, 8, 8, dtype=torch.int8)
    exact, _ = cpu.forward(query, key, value, classes, Spec(0.125, linear="none"))
    output, _ = cpu.forward(query, key, value, classes, Spec(0.125, linear="none", low_bit=low_bit))
    error = ((output - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.06
