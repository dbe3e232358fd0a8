"""The operator: opcheck, gradients, autocast, fakes, and the checks of the functional form."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sla_compile
import sla_compile.flops  # counts the operator
from sla_compile import SLAConfig
from sla_compile.arithmetic import attention_operations
from sla_compile.kernels import cpu
from sla_compile.kernels.reference import reference_attention
from sla_compile.kernels.spec import Spec
from sla_compile.ops import op_scalars

CONFIG = SLAConfig(sparsity=0.75, negligible=0.1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_inputs(batch=1, heads=2, length=200, dim=16, dtype=torch.float32, kv_heads=None, layout="blhd", grad=True):
    """Seeded query, key, value as (B, H, L, D) in the layouts that models produce."""
    generator = torch.Generator().manual_seed(0)
    kv_heads = kv_heads or heads

    def one(count):
        tensor = torch.randn(batch, length, count, dim, generator=generator).to(dtype)
        tensor = tensor.transpose(1, 2)
        return tensor.contiguous() if layout == "bhld" else tensor

    if layout == "packed":
        packed = torch.randn(batch, length, 3, heads, dim, generator=generator).to(dtype)
        return [t.detach().requires_grad_(grad) for t in packed.permute(2, 0, 3, 1, 4)]
    return [one(count).detach().requires_grad_(grad) for count in (heads, kv_heads, kv_heads)]


def make_projection(dim=16, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(dim, dim, generator=generator).mul(dim**-0.5).to(dtype).requires_grad_()
    return weight, torch.randn(dim, generator=generator).to(dtype).requires_grad_() if bias else None


def op_args(query, key, value, weight, bias, mask=None, block_map=None, config=CONFIG, scale=None):
    return (
        query,
        key,
        value,
        weight,
        bias,
        None,
        None,
        None,
        mask,
        block_map,
        *op_scalars(config, query.shape[-1], scale),
    )


CASES = {
    "plain": {},
    "bhld": {"layout": "bhld"},
    "packed": {"layout": "packed"},
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "gqa": {"heads": 4, "kv_heads": 2},
    "no-grad": {"grad": False},
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck_layouts_and_dtypes(case):
    inputs = make_inputs(**CASES[case])
    weight, bias = make_projection()
    if case == "no-grad":
        weight, bias = weight.detach(), bias.detach()
    torch.library.opcheck(torch.ops.sla_compile.sparse_linear_attention.default, op_args(*inputs, weight, bias))


@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("mapped", [False, True])
def test_opcheck_optional_arguments(linear, mask, mapped):
    config = CONFIG.replace(linear=linear, block_q=128)
    query, key, value = make_inputs()
    weight, bias = make_projection(bias=mapped) if linear != "none" else (None, None)
    if mask is not None:
        mask = torch.arange(200)[None, None, None] < 150
        mask = mask if mask == "bool" else torch.zeros(1, 1, 1, 200).masked_fill(~mask, -torch.inf)
    block_map = sla_compile.route(query, key, config=config) if mapped else None
    args = op_args(query, key, value, weight, bias, mask, block_map, config, 0.3)
    torch.library.opcheck(torch.ops.sla_compile.sparse_linear_attention.default, args)


@pytest.mark.parametrize("linear", ["marginal", "none"])
@pytest.mark.parametrize("with_output", [True, False])
def test_opcheck_backward(linear, with_output):
    config = CONFIG.replace(linear=linear)
    query, key, value = make_inputs(grad=False)
    weight, bias = (p.detach() for p in make_projection()) if linear != "none" else (None, None)
    args = op_args(query, key, value, weight, bias, config=config)
    output, logsumexp = torch.ops.sla_compile.sparse_linear_attention(*args)
    backward_args = (torch.randn_like(output), *args[:3], output if with_output else None, logsumexp, *args[3:])
    torch.library.opcheck(torch.ops.sla_compile.sparse_linear_attention_backward.default, backward_args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transposed_projection_has_the_gradient_that_the_fake_promises(dtype):
    query, key, value = make_inputs(dtype=dtype, grad=False)
    weight, bias = (parameter.detach() for parameter in make_projection())
    args = op_args(query, key, value, weight.t(), bias)
    output, logsumexp = torch.ops.sla_compile.sparse_linear_attention(*args)
    backward_args = (torch.randn_like(output), *args[:3], output, logsumexp, *args[3:])
    torch.library.opcheck(
        torch.ops.sla_compile.sparse_linear_attention_backward.default, backward_args, test_utils="test_faketensor"
    )


@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_gradcheck_in_float64(linear, feature_map):
    config = CONFIG.replace(linear=linear, feature_map=feature_map)
    query, key, value = make_inputs(heads=1, length=130, dim=3, dtype=torch.float64)
    block_map = sla_compile.route(query, key, config=config)
    weight, bias = make_projection(3, torch.float64) if linear != "none" else (None, None)

    def function(query, key, value, *parameters):
        return sla_compile.sparse_linear_attention(
            query, key, value, config=config, block_map=block_map,
            **dict(zip(("proj_weight", "proj_bias"), parameters, strict=False)),
        )  # fmt: skip

    inputs = (query, key, value) if weight is None else (query, key, value, weight, bias)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradcheck_of_the_reference():
    query, key, value = make_inputs(heads=1, length=130, dim=3, dtype=torch.float64)
    weight, bias = make_projection(3, torch.float64)
    block_map = sla_compile.route(query, key, config=CONFIG)

    def function(query, key, value, weight, bias):
        spec = Spec(0.5)
        return reference_attention(query, key, value, block_map, spec, proj_weight=weight, proj_bias=bias)[0]

    assert torch.autograd.gradcheck(function, (query, key, value, weight, bias), fast_mode=True)


def test_output_is_laid_out_for_the_next_reshape():
    query, key, value = make_inputs(grad=False)
    weight, bias = make_projection()
    output = sla_compile.sparse_linear_attention(query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("native", [True, False], ids=["c", "operations"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_can_be_changed_in_place(native, dtype, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu.native, "supports", lambda *_: False)
    leaves = *make_inputs(dtype=dtype), *make_projection()

    def attention():
        query, key, value, weight, bias = leaves
        return sla_compile.sparse_linear_attention(query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias)

    found = torch.autograd.grad(attention().mul_(2).sum(), leaves)
    expected = torch.autograd.grad((attention() * 2).sum(), leaves)
    assert all(map(torch.equal, found, expected))
    assert not any(grad._is_view() for grad in found)


@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_operations_are_counted(method):
    query, key = torch.randn(2, 4, 700, 32, requires_grad=True), torch.randn(2, 2, 700, 32)
    config = SLAConfig(method=method, sparsity=0.7, pinned=70)
    parameters = dict(proj_weight=torch.eye(32)) if method == "sla" else dict(alpha=torch.full((4, 1), 0.5))
    with FlopCounterMode(display=False) as counter:
        output = sla_compile.sparse_linear_attention(query, key, key, config=config, enable_gqa=True, **parameters)
    forward = counter.get_total_flops()
    assert forward == int(attention_operations((2, 4, 700, 32), 700, config).after)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == int(2.5 * forward)


def test_all_critical_is_dense_attention():
    query, key, value = make_inputs(grad=False, dtype=torch.float64)
    config = CONFIG.replace(critical_blocks=10**6)
    weight, bias = (p.detach() for p in make_projection())
    output = sla_compile.sparse_linear_attention(
        query, key, value, config=config, proj_weight=weight, proj_bias=torch.zeros_like(bias)
    )
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value), rtol=1e-12, atol=1e-12)


def test_autocast_casts_tokens_and_leaves_parameters():
    query, key, value = make_inputs()
    weight, bias = make_projection()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sla_compile.sparse_linear_attention(
            query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias
        )
        assert output.dtype == F.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
    output.float().sum().backward()
    assert query.grad.dtype == weight.grad.dtype == torch.float32
    low = [t.detach().bfloat16() for t in (query, key, value)]
    expected = sla_compile.sparse_linear_attention(*low, config=CONFIG, proj_weight=weight, proj_bias=bias)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_autocast_around_the_backward_changes_nothing():
    query, key, value = make_inputs(heads=8, length=1000, dim=64)  # enough near ties for a rounding to show
    weight, bias = make_projection(64)
    leaves = (query, key, value, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block_map = sla_compile.route(query, key, config=CONFIG)
        output = sla_compile.sparse_linear_attention(
            query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias
        )
        loss = output.float().square().sum()
        inside = torch.autograd.grad(loss, leaves, retain_graph=True)
    for found, expected in zip(inside, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(block_map, sla_compile.route(query.bfloat16(), key.bfloat16(), config=CONFIG))


def test_autocast_takes_mixed_dtypes():
    query, key, value = make_inputs(grad=False)
    weight, bias = make_projection()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sla_compile.sparse_linear_attention(
            query, key.bfloat16(), value, config=CONFIG, proj_weight=weight, proj_bias=bias
        )
    assert output.dtype == torch.bfloat16


def test_only_asked_gradients_are_made():
    query, key, value = make_inputs(grad=False)
    weight, bias = make_projection()
    sla_compile.sparse_linear_attention(
        query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias
    ).sum().backward()
    assert query.grad is None and weight.grad is not None and bias.grad is not None


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_checks_of_values_do_not_stop_a_trace(tracing):
    query, key, value = make_inputs(grad=False)
    config = SLAConfig(method="sla2", sparsity=0.75)
    block_map = sla_compile.route(query, key, config=config)

    def function(*tensors):
        query, key, value, alpha, block_map = tensors
        return sla_compile.sparse_linear_attention(query, key, value, config=config, alpha=alpha, block_map=block_map)

    arguments = query, key, value, torch.full((2, 1), 0.6), block_map
    traced = make_fx(function, tracing_mode=tracing)(*arguments)
    assert torch.equal(traced(*arguments), function(*arguments))
    with FakeTensorMode() as mode:
        assert function(*map(mode.from_tensor, arguments)).shape == query.shape


def test_a_row_without_valid_keys_is_zero():
    query, key, value = make_inputs(batch=2)
    weight, bias = make_projection()
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    mask[1] = False
    output = sla_compile.sparse_linear_attention(
        query, key, value, config=CONFIG, proj_weight=weight, proj_bias=torch.zeros_like(bias), key_padding_mask=mask
    )
    output.square().sum().backward()
    assert not output[1].any() and output[0].any()
    for tensor in (query, key, value):
        assert torch.isfinite(tensor.grad).all() and not tensor.grad[1].any()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_the_default_dtype_changes_nothing(method, default):
    mask = torch.arange(200)[None, None, None] < 150
    inputs = make_inputs()
    names = ("proj_weight", "proj_bias") if method == "sla" else ("alpha",)
    parameters = make_projection() if method == "sla" else [torch.full((2, 1), 0.6, requires_grad=True)]

    def run():
        output = sla_compile.sparse_linear_attention(
            *inputs, config=SLAConfig(method=method, sparsity=0.75), key_padding_mask=mask,
            **dict(zip(names, parameters, strict=True)),
        )  # fmt: skip
        return output, *torch.autograd.grad(output.square().sum(), (*inputs, *parameters))

    expected = run()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("method", ["sla", "sla2"])
@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float16).min, torch.finfo(torch.float32).min])
def test_a_finite_mask_hides_whole_blocks(hidden, method):
    """A query block whose choice were hidden blocks alone would attend to their padding."""
    query, key, value = make_inputs(length=512, grad=False)
    config = SLAConfig(method=method, sparsity=0.75)
    valid = torch.arange(512)[None, None, None] < 100
    parameters = dict(proj_weight=torch.eye(16)) if method == "sla" else dict(alpha=torch.full((2, 1), 0.6))
    found, expected = (
        sla_compile.sparse_linear_attention(query, key, value, config=config, key_padding_mask=mask, **parameters)
        for mask in (torch.zeros(1, 1, 1, 512).masked_fill(~valid, hidden), valid)
    )
    assert torch.equal(found, expected)


BAD = {
    "rank": (dict(query=torch.zeros(2, 200, 16)), "must be \\(batch, heads, tokens, head_dim\\)"),
    "not a tensor": (dict(query=[1.0]), "must be a torch.Tensor"),
    "lengths": (dict(key=torch.zeros(1, 2, 100, 16), value=torch.zeros(1, 2, 100, 16)), "200 tokens and key 100"),
    "key and value": (dict(value=torch.zeros(1, 2, 100, 16)), "key and value must have the same shape"),
    "dtype": (dict(key=torch.zeros(1, 2, 200, 16).half()), "must share a dtype"),
    "integer": ({n: torch.zeros(1, 2, 200, 16).int() for n in ("query", "key", "value")}, "query must be one of"),
    "device": (dict(key=torch.zeros(1, 2, 200, 16, device="meta")), "query is on cpu but key is on meta"),
    "heads": (dict(query=torch.zeros(1, 4, 200, 16)), "enable_gqa=True"),
    "head groups": (dict(query=torch.zeros(1, 3, 200, 16), enable_gqa=True), "not a multiple"),
    "head dim": ({n: torch.zeros(1, 1, 64, 257) for n in ("query", "key", "value")}, "up to 256"),
    "empty": ({n: torch.zeros(1, 1, 0, 16) for n in ("query", "key", "value")}, "must not be empty"),
    "no key heads": (
        {n: torch.zeros(1, 0, 200, 16) for n in ("key", "value")} | dict(enable_gqa=True),
        "must not be empty, got \\(1, 2, 200, 16\\) and \\(1, 0, 200, 16\\)",
    ),
    "no projection": (dict(proj_weight=None, proj_bias=None), 'or linear="none"'),
    "projection shape": (dict(proj_weight=torch.zeros(8, 8)), "must be floating point of shape \\(16, 16\\)"),
    "unused projection": (dict(config=CONFIG.replace(linear="none")), "belong to the linear branch"),
    "mask shape": (dict(key_padding_mask=torch.ones(200, 200, dtype=torch.bool)), "masks that differ between queries"),
    "mask dtype": (dict(key_padding_mask=torch.ones(1, 1, 1, 200).int()), "bool or floating point"),
    "mask gradient": (dict(key_padding_mask=torch.zeros(1, 1, 1, 200, requires_grad=True)), "detach"),
    "map shape": (dict(block_map=torch.ones(1, 2, 3, 3, dtype=torch.int8)), "shape \\(1, 2, 4, 4\\)"),
    "map dtype": (dict(block_map=torch.ones(1, 2, 4, 4)), "must be int8"),
    "map row": (dict(block_map=torch.zeros(1, 2, 4, 4, dtype=torch.int8)), "needs a critical block"),
    "map value": (dict(block_map=torch.ones(1, 2, 4, 4, dtype=torch.int8).cumsum(3).to(torch.int8)), "must hold 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, message = BAD[case]
    query, key, value = make_inputs(grad=False)
    weight, bias = (p.detach() for p in make_projection())
    arguments = dict(query=query, key=key, value=value, config=CONFIG, proj_weight=weight, proj_bias=bias) | changes
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        sla_compile.sparse_linear_attention(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_a_dynamic_length_and_without_recompiling(backend):
    weight, bias = make_projection()

    def function(query, key, value):
        output = sla_compile.sparse_linear_attention(
            query * 2, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias
        )
        return F.silu(output.transpose(1, 2).flatten(2))

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for number, length in enumerate((200, 330, 77)):
        inputs = make_inputs(length=length)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            output = compiled(*inputs)
        expected_inputs = make_inputs(length=length)
        expected = function(*expected_inputs)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        output.sum().backward()
        expected.sum().backward()
        for one, other in zip(inputs, expected_inputs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)  # silu is rounded otherwise


def test_config_validates_and_round_trips():
    config = SLAConfig(sparsity=0.9, pinned=7)
    assert config.pinned == (7, 0)
    assert SLAConfig.from_dict(config.to_dict()) == config
    assert config.fingerprint() == SLAConfig(sparsity=0.9, pinned=(7, 0)).fingerprint() != SLAConfig().fingerprint()
    for bad in (dict(sparsity=0), dict(sparsity=1.0), dict(sparsity=float("nan")), dict(negligible=-0.1),
                dict(sparsity=0.2, negligible=0.3), dict(method="flash"), dict(feature_map="gelu"),
                dict(linear="some"), dict(block_q=48), dict(critical_blocks=0), dict(pinned=(-1, 0)),
                dict(min_seq_len=0)):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            SLAConfig(**bad)
    for bad in (dict(sparsity="high"), dict(critical_blocks=1.5), dict(pinned=(1, 2, 3)), dict(block_q=True)):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            SLAConfig(**bad)
    with pytest.raises(ValueError, match="unknown SLAConfig fields"):
        SLAConfig.from_dict({"sparsty": 0.9})
