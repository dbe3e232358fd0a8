"""Attention with shares of blocks: against its formula in dense float64 autograd, and finite differences."""

import pytest
import torch

from sla_compile.kernels import cpu, soft_attention
from sla_compile.kernels.reference import feature
from sla_compile.kernels.soft_attention import soft_attention as attend
from sla_compile.kernels.soft_topk import soft_topk
from sla_compile.kernels.spec import Spec

NAMES = ("query", "key", "value", "shares", "alpha")


def small(**changes):
    return Spec(**dict(dict(scale=0.4, block_q=4, block_k=3), **changes))


def draw(length=10, dim=3, batch=1, heads=2, kv_heads=2, spec=None, seed=0, dtype=torch.float64, queries=None):
    spec = spec or small()
    generator = torch.Generator().manual_seed(seed)
    queries = length if queries is None else queries
    rows, columns = -(-queries // spec.block_q), -(-length // spec.block_k)
    options = dict(generator=generator, dtype=torch.float64)
    query = torch.randn(batch, heads, queries, dim, **options)
    key = torch.randn(batch, kv_heads, length, dim, **options) + 2
    value = torch.randn(batch, kv_heads, length, dim, **options)
    shares = 0.02 + 0.96 * torch.rand(batch, heads, rows, columns, **options)
    alpha = 0.1 + 0.8 * torch.rand(heads, 1, **options)
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key, value, shares, alpha)]


def dense(query, key, value, shares, alpha, spec, key_bias=None):
    """The formula with L x L weights."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    bias = key.new_zeros(key.shape[0], keys) if key_bias is None else key_bias.to(key.dtype)
    valid = (bias > -torch.inf)[:, None, :, None]
    key = key - (key * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
    key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
    in_use = torch.nn.functional.pad(valid.flatten(1), (0, shares.shape[3] * spec.block_k - keys))
    in_use = in_use.view(-1, 1, 1, shares.shape[3], spec.block_k).any(-1)
    whole = ((shares < 1) & in_use).any(-1).logical_not()
    share = shares.repeat_interleave(spec.block_q, 2)[:, :, :queries].repeat_interleave(spec.block_k, 3)[..., :keys]
    alpha = alpha.expand(shares.shape[:3]).masked_fill(whole, 1)
    alpha = alpha.repeat_interleave(spec.block_q, 2)[:, :, :queries, None]
    weight = bias.exp()[:, None, None]
    sparse = (spec.scale * query @ key.transpose(-1, -2)).exp() * share * weight
    linear = feature(query, spec.feature_map) @ feature(key, spec.feature_map).transpose(-1, -2) * weight
    if spec.linear == "marginal":
        linear = linear * (1 - share)
    sums = [sparse.sum(-1, keepdim=True), linear.sum(-1, keepdim=True) + spec.epsilon]
    outputs = [w @ value / s.where(s > 1e-12, 1) for w, s in zip((sparse, linear), sums, strict=True)]
    return alpha * outputs[0] + (1 - alpha) * outputs[1]


def assert_same(inputs, spec, key_bias=None, rtol=1e-9):
    expected, result = dense(*inputs, spec, key_bias), attend(*inputs, spec, key_bias)
    assert result.shape == expected.shape and result.dtype == inputs[0].dtype
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    one, two = (torch.autograd.grad(x, inputs, grad.to(x.dtype), allow_unused=True) for x in (expected, result))
    for name, left, right in zip(NAMES, one, two, strict=True):
        size = max(1.0, left.abs().max().item())  # what cancels is of size 1
        torch.testing.assert_close(right, left, rtol=rtol, atol=rtol * size, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize("linear", ["marginal", "all"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("length", [12, 10, 3])
def test_is_the_formula(length, feature_map, linear):
    spec = small(feature_map=feature_map, linear=linear)
    assert_same(draw(length, batch=2, spec=spec), spec)


@pytest.mark.parametrize("linear", ["marginal", "all"])
def test_gradient_is_that_of_finite_differences(linear):
    spec = small(linear=linear)
    inputs = draw(7, 2, heads=1, kv_heads=1, spec=spec)
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, spec), inputs)


def test_router_to_output_is_that_of_finite_differences():
    spec, (query, key, value, _, alpha) = small(), draw(8, 2, heads=1, kv_heads=1)
    logits = torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()

    def run(logits, alpha):
        return attend(query.detach(), key.detach(), value.detach(), soft_topk(logits, 1, tau=0.5), alpha, spec)

    assert torch.autograd.gradcheck(run, (logits, alpha))


def test_grouped_heads_and_some_query_blocks():
    assert_same(draw(13, heads=4, kv_heads=2), small())
    assert_same(draw(13, queries=6), small())


@pytest.mark.parametrize(
    ("heads", "rows", "chunks"),
    [
        (4, 6, [(slice(0, 4), [slice(0, 6)])]),
        (4, 2, [(slice(0, 4), [slice(0, 2), slice(2, 4), slice(4, 6)])]),
        (3, 1, [(slice(i, j), [slice(r, r + 1) for r in range(6)]) for i, j in ((0, 3), (3, 4))]),
    ],
)
def test_chunks_change_nothing(monkeypatch, heads, rows, chunks):
    spec, inputs = small(), draw(22, batch=2)
    whole = attend(*inputs, spec)
    monkeypatch.setattr(soft_attention, "CHUNK_BYTES", 8 * (4 * 24) * heads * rows)  # float64, block_q * padded length
    if rows == 1:  # the last head has room for three
        chunks[1] = (slice(3, 4), [slice(0, 3), slice(3, 6)])
    tokens = torch.empty(4, 24, 3, dtype=torch.float64)
    assert list(soft_attention._chunks(tokens, tokens, spec)) == chunks
    torch.testing.assert_close(attend(*inputs, spec), whole)
    assert_same(inputs, spec)


def test_masked_keys():
    bias = torch.zeros(2, 11)
    bias[0, 2:7] = -torch.inf
    bias[1, 5:] = -1.5
    assert_same(draw(11, batch=2), small(), bias)


def test_a_complement_of_masked_keys_is_none():
    query, key, value, shares, alpha = draw(12)
    shares = torch.ones_like(shares)
    shares[..., 3] = 0.25
    bias = torch.zeros(1, 12)
    bias[:, 9:] = -torch.inf
    mask = bias[:, None, None] == 0
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.4)
    torch.testing.assert_close(attend(query, key, value, shares, alpha, small(), bias), expected)
    assert_same([query, key, value, shares.requires_grad_(), alpha], small(), bias)


def test_a_row_of_no_keys_is_zero():
    inputs = draw(9)
    output = attend(*inputs, small(), torch.full((1, 9), -torch.inf))
    assert torch.equal(output, torch.zeros_like(output))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), inputs))


def test_whole_rows_are_dense_attention():
    query, key, value, shares, alpha = draw(10)
    shares = torch.ones_like(shares).requires_grad_()
    output = attend(query, key, value, shares, alpha, small())
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.4)
    torch.testing.assert_close(output, expected)
    assert torch.equal(torch.autograd.grad(output.sum(), alpha)[0], torch.zeros_like(alpha))


@pytest.mark.parametrize("linear", ["marginal", "all"])
def test_hard_shares_are_the_operators_attention(linear):
    spec = Spec(0.25, linear=linear)
    query, key, value, shares, alpha = draw(300, 16, heads=2, spec=spec)
    hard = torch.zeros_like(shares).scatter_(-1, shares.topk(2).indices, 1)
    expected, _ = cpu.forward(
        *(t.detach() for t in (query, key, value)),
        hard.to(torch.int8),
        spec,
        alpha=alpha.detach().expand(shares.shape[:3]),
        key_mean=key.detach().mean(2),
    )
    torch.testing.assert_close(attend(query, key, value, hard, alpha, spec), expected)


def test_shares_of_zero_have_finite_gradients():
    """Where the largest scores are in a block with a share of zero, P / M overflows in float32."""
    query, key, value, shares, alpha = draw(12, dtype=torch.float32)
    with torch.no_grad():
        key[:, :, :3] += 300
        query.abs_().add_(1)
        shares[..., 0] = 0
    inputs = [query, key, value, shares, alpha]
    output = attend(*inputs, small())
    assert output.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.square().sum(), inputs))


def test_low_precision_inputs_are_computed_in_float32():
    inputs = draw(12, dtype=torch.bfloat16)
    output = attend(*inputs, small())
    exact = attend(*(tensor.double() for tensor in inputs), small())
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_memory_is_bounded_in_the_length(monkeypatch):
    """No tensor is as large as the scores: every product's size is watched."""
    monkeypatch.setattr(soft_attention, "CHUNK_BYTES", 2**18)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    spec = Spec(0.25)
    inputs = draw(2048, 8, heads=2, spec=spec, dtype=torch.float32)
    with Watch():
        attend(*inputs, spec).sum().backward()
    assert max(sizes) <= 2 * 64 * 2048  # a query block of two heads; the scores have 2 * 2048 * 2048
