"""SLA2 through the operator: output and every gradient against a dense formula, routing, checks, compilation."""

from dataclasses import dataclass

import pytest
import torch
from sampling import every_other
from torch.nn import functional as F

import sla_compile
from sla_compile import SLAConfig
from sla_compile.kernels.masks import key_bias
from sla_compile.ops import op_scalars
from sla_compile.testing import assert_accurate, reference

CONFIG = SLAConfig(method="sla2", sparsity=0.75)
OP = torch.ops.sla_compile.sparse_linear_attention.default
DIM = 16


@dataclass(frozen=True)
class Case:
    """One call; `mask` is "bool" or "float" (with -inf and weights between), or None."""

    name: str
    config: SLAConfig = CONFIG
    length: int = 200
    heads: int = 2
    kv_heads: int = 2
    per_block: bool = False
    mask: str | None = None
    mapped: bool = False
    routers: bool = False
    scale: float | None = None

    def inputs(self, dtype=torch.float64):
        """query, key, value, alpha (which require gradients) and the options of the call."""
        generator = torch.Generator().manual_seed(self.length)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Keys far from zero: without the mean's subtraction, and without its gradient, the result is another one.
        shift = 2 * draw(1, 1, 1, DIM)
        query, key, value = (
            (draw(2, self.length, heads, DIM) + offset).to(dtype).transpose(1, 2).requires_grad_()
            for heads, offset in ((self.heads, 0), (self.kv_heads, shift), (self.kv_heads, 1))
        )
        blocks = -(-self.length // self.config.block_q) if self.per_block else 1
        alpha = draw(self.heads, blocks).sigmoid().to(torch.float64 if dtype == torch.float64 else torch.float32)
        options = {"config": self.config, "scale": self.scale}
        if self.mask is not None:
            keep = torch.rand(2, 1, 1, self.length, generator=generator) > 0.3
            keep[0, ..., :90] = False  # a block without a key that takes part
            float_mask = draw(2, 1, 1, self.length).float().masked_fill(~keep, -torch.inf)
            options["key_padding_mask"] = keep if self.mask == "bool" else float_mask
        if self.routers:
            options |= {"router_q": draw(DIM, DIM), "router_k": draw(DIM, DIM)}
        grouped = self.heads != self.kv_heads
        options["block_map"] = sla_compile.route(query, key, enable_gqa=grouped, **options)
        if self.mapped:  # also blocks that no branch sums, and rows with nothing marginal
            options["block_map"][:, :, 0] = -1
            options["block_map"][..., 3] = -1
            options["block_map"][..., 0] = 1
        return query, key, value, alpha.requires_grad_(), options


CASES = [
    Case("head"),
    Case("block", per_block=True),
    Case("all-keys", CONFIG.replace(linear="all", feature_map="elu")),
    Case("relu-q128", CONFIG.replace(feature_map="relu", block_q=128), length=330, per_block=True),
    Case("bool-mask", CONFIG.replace(feature_map="elu"), mask="bool"),
    Case("float-mask", per_block=True, mask="float", heads=4),
    Case("gqa", heads=4, kv_heads=2, per_block=True, length=256),
    Case("pinned", CONFIG.replace(pinned=(70, 0)), length=400, mask="bool", per_block=True),
    Case("mapped", mapped=True, mask="float", length=333),
    Case("routers-scale", CONFIG.replace(linear="all"), routers=True, scale=0.4, kv_heads=1),
    Case("one-block", length=64),
]


def dense_sla2(query, key, value, alpha, *, config, block_map, scale=None, key_padding_mask=None, **_):
    """``alpha O_s + (1 - alpha) O_l`` as written, over L x L matrices and with every key less the mean."""
    batch, heads, length, dim = query.shape
    bias = key_bias(key_padding_mask, batch, length)
    bias = query.new_zeros(batch, 1, 1, length) if bias is None else bias.to(query.dtype)[:, None, None]
    valid = (bias > -torch.inf).transpose(-1, -2)
    key = key - (key * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
    key, value = (tokens.repeat_interleave(heads // key.shape[1], 1) for tokens in (key, value))
    classes = block_map.repeat_interleave(config.block_q, 2).repeat_interleave(config.block_k, 3)
    classes = classes[:, :, :length, :length]
    scores = query @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale) + bias
    scores = scores.masked_fill(classes != 1, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    sparse = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ value
    phi = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[config.feature_map]
    everything = config.linear == "all"
    weights = phi(query) @ phi(key).transpose(-1, -2) * bias.exp() * (everything | (classes == 0))
    total = weights.sum(-1, keepdim=True) + (1e-5 if everything else 0)
    linear = (weights @ value) / total.where(total > 0, 1)
    share = alpha.to(query.dtype).repeat_interleave(config.block_q, 1) if alpha.shape[1] > 1 else alpha.to(query.dtype)
    share = share[None, :, :length, None]
    share = share.where(((classes == 0) & valid.transpose(-1, -2)).any(-1, keepdim=True), 1)
    return share * sparse + (1 - share) * linear


def run(function, inputs, options, grad):
    """The output and the gradients of query, key, value and alpha."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs[:3], alpha=inputs[3], **options)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients_in_float64(case):
    *inputs, options = case.inputs()
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = run(dense_sla2, inputs, options, grad)
    gqa = {"enable_gqa": case.heads != case.kv_heads}
    found = run(sla_compile.sparse_linear_attention, inputs, options | gqa, grad)
    oracle = run(reference, inputs, options, grad)
    for name, result, from_oracle, exact in zip("OQKVa", found, oracle, expected, strict=True):
        bound = 1e-12 * max(1.0, exact.abs().max().item())  # some thousand sums and products of float64
        for each in (result, from_oracle):
            assert each.shape == exact.shape and (each - exact).abs().max() < bound, name
    if case.name != "one-block":
        assert expected[4].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[:4] + CASES[5:8], ids=lambda case: case.name)
def test_output_and_gradients_in_low_precision(case, dtype):
    *inputs, options = case.inputs(dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    exact = run(dense_sla2, [tensor.double() for tensor in inputs], options, grad)
    eager = run(dense_sla2, inputs, options, grad)
    gqa = {"enable_gqa": case.heads != case.kv_heads}
    found = run(sla_compile.sparse_linear_attention, inputs, options | gqa, grad)
    assert [tensor.dtype for tensor in found] == [dtype] * 4 + [torch.float32]
    # The gradients to queries, keys and values pass through each other's products. In that to a query the keys' mean
    # cancels, after a rounding in float32 of probability gradients times keys (in 16 bits, that of the result is more).
    scale = max(tensor.abs().max().item() for tensor in exact[1:4])
    value = inputs[2].repeat_interleave(case.heads // case.kv_heads, 1)
    terms = (grad.double() @ value.double().transpose(-1, -2)).abs().max() * inputs[1].abs().max() * DIM**-0.5
    of_query = terms.item() if dtype == torch.float32 else scale
    for result, exactly, eagerly, size in zip(found, exact, eager, (0, of_query, scale, scale, 0), strict=True):
        assert_accurate(result, exactly, eagerly.to(result.dtype), tokens=case.length, scale=size)


def op_args(case, dtype=torch.float32):
    query, key, value, alpha, options = case.inputs(dtype)
    mask = options.get("key_padding_mask")
    block_map = options["block_map"] if case.mapped else None
    routers = (options.get("router_q"), options.get("router_k"))
    scalars = op_scalars(case.config, DIM, case.scale)
    return [query, key, value, None, None, *routers, alpha, mask, block_map, *scalars]


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 5, 6, 8, 9)], ids=lambda case: case.name)
def test_opcheck(case):
    args = op_args(case)
    torch.library.opcheck(OP, args)
    args = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in args]
    output, logsumexp = OP(*args)
    backward_args = (torch.randn_like(output), *args[:3], output, logsumexp, *args[3:])
    torch.library.opcheck(torch.ops.sla_compile.sparse_linear_attention_backward.default, backward_args)


def test_identity_routers_choose_as_sla_does():
    query, key, *_ = CASES[5].inputs(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    maps = {
        name: sla_compile.route(query, key[:, :1], config=CONFIG, enable_gqa=True, router_q=one, router_k=other)
        for name, one, other in (
            ("identity", torch.eye(DIM), torch.eye(DIM)),
            ("rotated", rotation, rotation),  # (R q) . (R k) = q . k
            ("random", torch.randn(DIM, DIM, generator=generator), torch.eye(DIM)),
        )
    }
    config = CONFIG.replace(method="sla", negligible=0.0)
    expected = sla_compile.route(query, key[:, :1], config=config, enable_gqa=True)
    assert torch.equal(maps["identity"], expected) and torch.equal(maps["rotated"], expected)
    assert not torch.equal(maps["random"], expected)
    assert set(expected.unique().tolist()) == {0, 1}


def test_the_operator_routes_with_the_routers():
    query, key, value, alpha, options = CASES[9].inputs()
    block_map = options.pop("block_map")
    routed = sla_compile.sparse_linear_attention(query, key, value, alpha=alpha, enable_gqa=True, **options)
    options |= {"block_map": block_map}
    assert torch.equal(
        routed, sla_compile.sparse_linear_attention(query, key, value, alpha=alpha, enable_gqa=True, **options)
    )
    without = {name: options[name] for name in ("config", "scale")}
    other = sla_compile.sparse_linear_attention(query, key, value, alpha=alpha, enable_gqa=True, **without)
    assert not torch.allclose(routed, other)


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_complement_it_is_exact_attention(masked):
    query, key, value, alpha, options = Case("", CONFIG.replace(critical_blocks=2 if masked else 99)).inputs()
    mask = None
    if masked:  # two blocks hold all keys that take part; the two others are marginal and empty
        mask = (torch.arange(200) < 128)[None, None, None]
    output = sla_compile.sparse_linear_attention(
        query, key, value, config=options["config"], alpha=alpha, key_padding_mask=mask
    )
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-12)
    inputs = (query, key, value, alpha)
    grads = torch.autograd.grad(output.square().sum(), inputs)
    expected = torch.autograd.grad(exact.square().sum(), inputs[:3])
    torch.testing.assert_close(grads[:3], expected, rtol=1e-10, atol=1e-10)
    assert not grads[3].any()


def test_an_entry_without_valid_keys_is_zero():
    query, key, value, alpha, _ = CASES[0].inputs(torch.float32)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    mask[1] = False
    output = sla_compile.sparse_linear_attention(query, key, value, config=CONFIG, alpha=alpha, key_padding_mask=mask)
    output.square().sum().backward()
    assert not output[1].any() and output[0].any()
    for tensor in (query, key, value):
        assert torch.isfinite(tensor.grad).all() and not tensor.grad[1].any()


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_a_saturated_alpha_leaves_one_branch(logit):
    query, key, value, _, options = CASES[0].inputs(torch.float32)
    alpha = torch.full((2, 1), logit).sigmoid().requires_grad_()
    output = sla_compile.sparse_linear_attention(query, key, value, alpha=alpha, **options)
    exact = dense_sla2(*(t.double() for t in (query, key, value)), alpha, **options)
    assert_accurate(output, exact, exact.float(), tokens=200)
    grads = torch.autograd.grad(output.square().sum(), (query, key, value, alpha))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_only_asked_gradients_are_made():
    query, key, value, alpha, options = CASES[1].inputs()
    tokens = [tensor.detach() for tensor in (query, key, value)]
    routers = [torch.eye(DIM).requires_grad_() for _ in range(2)]
    options |= dict(zip(("router_q", "router_k"), routers, strict=True))
    sla_compile.sparse_linear_attention(*tokens, alpha=alpha, **options).sum().backward()
    assert alpha.grad is not None and alpha.grad.shape == alpha.shape
    assert not any(tensor.grad is not None for tensor in (*tokens, *routers))


def test_autocast_leaves_alpha_and_routers_alone():
    query, key, value, alpha, options = CASES[0].inputs(torch.float32)
    alpha.data.fill_(0.7001)  # not a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sla_compile.sparse_linear_attention(query, key, value, alpha=alpha, **options)
    low = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(output, sla_compile.sparse_linear_attention(*low, alpha=alpha, **options))


@pytest.mark.parametrize("backend", every_other(["aot_eager", "inductor"]))
def test_compiles_with_a_dynamic_length_and_without_recompiling(backend):
    def function(query, key, value, logit, router):
        output = sla_compile.sparse_linear_attention(
            query, key, value, config=CONFIG, alpha=torch.sigmoid(logit), router_q=router, router_k=router
        )
        return F.silu(output.transpose(1, 2).flatten(2))

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    logit, router = torch.tensor([[0.3], [1.0]]), torch.eye(DIM)
    for number, length in enumerate((200, 330, 77)):
        results = []
        for run in (compiled, function):
            *inputs, _, _ = Case("", length=length).inputs(torch.float32)
            inputs.append(logit.clone().requires_grad_())
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                output = run(*inputs, router)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)  # silu is rounded otherwise


BAD = {
    "no alpha": (dict(alpha=None), 'method="sla2" needs alpha.* \\(2, 1\\), or \\(2, 4\\)'),
    "heads": (dict(alpha=torch.ones(3, 1)), "for 2 heads, got \\(3, 1\\)"),
    "rank": (dict(alpha=torch.ones(2)), "must be \\(2, 1\\)"),
    "another length": (dict(alpha=torch.ones(2, 5)), "5 query blocks, but 200 tokens are 4 blocks of 64"),
    "dtype": (dict(alpha=torch.ones(2, 1).int()), "alpha must be floating point"),
    "device": (dict(alpha=torch.ones(2, 1, device="meta")), "query is on cpu but alpha is on meta"),
    "a logit": (dict(alpha=torch.full((2, 1), 2.2)), "between 0 and 1; pass torch.sigmoid"),
    "not a number": (dict(alpha=torch.full((2, 1), torch.nan)), "between 0 and 1"),
    "one router": (dict(router_q=torch.eye(DIM)), "router_k is missing"),
    "router shape": (dict(router_q=torch.eye(8), router_k=torch.eye(8)), "router_q must be .* shape \\(16, 16\\)"),
    "projection": (dict(proj_weight=torch.eye(DIM)), "SLA2 has no projection"),
    "alpha of sla": (dict(config=SLAConfig(linear="none")), 'alpha is for method="sla2"'),
    "router of sla": (
        dict(config=SLAConfig(linear="none"), alpha=None, router_q=torch.eye(DIM), router_k=torch.eye(DIM)),
        'router_q and router_k are for method="sla2"',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, message = BAD[case]
    arguments = {"config": CONFIG, "alpha": torch.full((2, 1), 0.5)} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        sla_compile.sparse_linear_attention(*torch.zeros(3, 1, 2, 200, DIM).unbind(), **arguments)


def test_config():
    assert (CONFIG.negligible, SLAConfig().negligible) == (0.0, 0.10)
    assert SLAConfig().replace(method="sla2").negligible == 0.0
    assert CONFIG.replace(alpha_per="block").replace(method="sla") == SLAConfig(sparsity=0.75)
    assert SLAConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.fingerprint() != CONFIG.replace(alpha_per="block").fingerprint()
    assert isinstance(CONFIG.to_dict()["negligible"], float)
    for bad, message in (
        (dict(method="sla2", negligible=0.1), 'negligible=0.1 is for method="sla"'),
        (dict(method="sla2", linear="none"), 'use method="sla" with linear="none"'),
        (dict(alpha_per="block"), "SLA has no alpha"),
        (dict(method="sla2", alpha_per="token"), "alpha_per must be one of 'head', 'block'"),
        (dict(low_bit="int4"), "low_bit must be one of None, 'int8', 'fp8'"),
        (dict(low_bit="none"), "low_bit must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            SLAConfig(**bad)


@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_a_precision_without_kernels_is_refused(method, monkeypatch):
    from sla_compile.kernels import cpu

    monkeypatch.setattr(cpu, "LOW_BIT", ("none", "int8"), raising=False)
    config = SLAConfig(method=method, low_bit="fp8")
    parameters = {"alpha": torch.full((2, 1), 0.5)} if method == "sla2" else {"proj_weight": torch.eye(DIM)}
    with pytest.raises(NotImplementedError, match='low_bit="fp8" has no kernels for cpu tensors'):
        sla_compile.sparse_linear_attention(*torch.zeros(3, 1, 2, 200, DIM).unbind(), config=config, **parameters)
