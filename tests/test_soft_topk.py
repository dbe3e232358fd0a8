"""SoftTop-k against its definition, finite differences, and the implicit function written out in autograd."""

import pytest
import torch

from sla_compile.kernels.soft_topk import soft_topk

EPS = torch.finfo(torch.float64).eps


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def implicit(logits, count, tau):
    """The same by autograd: one Newton step at the solution makes lambda a differentiable function of the logits."""
    solved = soft_topk(logits.detach(), count, tau)
    free = (solved > 0) & (solved < 1)
    shift = torch.logit(solved).sub(logits.detach() / tau).masked_fill(~free, 0).sum(-1) / free.sum(-1)
    guess = (logits / tau + shift[..., None]).sigmoid()
    slope = (guess * (1 - guess)).detach().sum(-1)
    shift = shift - (guess.sum(-1) - count) / slope
    return (logits / tau + shift[..., None]).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize("count", [1, 3, 19])
def test_sums_to_the_count_in_the_order_of_the_logits(dtype, scale, count):
    logits = (scale * draw(2, 3, 5, 20)).to(dtype)
    chosen = soft_topk(logits, count)
    assert chosen.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert chosen.min() >= 0 and chosen.max() <= 1
    # Rounding of the largest P / tau + lambda moves each y by at most a quarter of it.
    size = (logits.double().amax(-1) - logits.double().amin(-1)) / 0.1 + 5
    bound = 20 * torch.finfo(chosen.dtype).eps * size
    assert ((chosen.double().sum(-1) - count).abs() <= bound).all()
    ordered = chosen.gather(-1, logits.argsort(-1))
    assert (ordered.diff() >= 0).all()


def test_is_the_sigmoid_of_shifted_logits():
    logits = draw(4, 12)
    shift = torch.logit(soft_topk(logits, 4, tau=0.5)) - logits / 0.5
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-9)


def test_tends_to_the_hard_choice():
    logits = draw(6, 30)
    hard = torch.zeros_like(logits).scatter_(-1, logits.topk(7).indices, 1)
    torch.testing.assert_close(soft_topk(logits, 7, tau=1e-5), hard, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("columns", "count", "tau"), [(5, 1, 0.1), (7, 3, 0.5), (6, 5, 1.0), (4, 2, 0.1)])
def test_gradient_is_that_of_finite_differences(columns, count, tau):
    logits = (0.3 * draw(2, 3, columns)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, count, tau), logits)
    assert torch.autograd.gradgradcheck(lambda x: soft_topk(x, count, tau), logits)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_gradient_is_that_of_the_implicit_function(tau):
    logits, weight = draw(5, 40).requires_grad_(), draw(5, 40, seed=1)
    expected = torch.autograd.grad((implicit(logits, 6, tau) * weight).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((soft_topk(logits, 6, tau) * weight).sum(), logits)[0], expected)
    # Lambda taken as a constant, which is wrong, is another gradient: the comparison can tell.
    chosen = soft_topk(logits.detach(), 6, tau)
    assert (chosen * (1 - chosen) * weight / tau - expected).abs().max() > 1e-2


def test_gradient_sums_to_zero_as_the_count_does_not_change():
    logits = draw(3, 25).requires_grad_()
    (grad,) = torch.autograd.grad((soft_topk(logits, 4) * draw(3, 25, seed=2)).sum(), logits)
    assert grad.abs().max() > 0.1
    # Of 25 terms, each a few roundings of the sums behind it.
    assert grad.sum(-1).abs().max() < 10 * 25 * EPS * grad.abs().max()


@pytest.mark.parametrize("count", [6, 9])
def test_all_columns(count):
    logits = draw(2, 6).requires_grad_()
    chosen = soft_topk(logits, count)
    assert torch.equal(chosen, torch.ones(2, 6, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(chosen.square().sum(), logits)[0], torch.zeros_like(chosen))


def test_equal_logits_share():
    logits = torch.full((3, 8), 2.5, dtype=torch.float64, requires_grad=True)
    chosen = soft_topk(logits, 2)
    torch.testing.assert_close(chosen, torch.full_like(chosen, 0.25))
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, 2), logits)


def test_columns_that_take_no_part():
    logits = draw(3, 6)
    logits[0, [1, 4]] = -torch.inf
    logits[1, 2:] = -torch.inf  # fewer than the count
    logits[2] = -torch.inf  # none at all
    logits.requires_grad_()
    chosen = soft_topk(logits, 3)
    torch.testing.assert_close(chosen[0, [0, 2, 3, 5]], soft_topk(logits[0, [0, 2, 3, 5]], 3))
    assert torch.equal(chosen[0, [1, 4]], torch.zeros(2, dtype=torch.float64))
    assert chosen[1].tolist() == [1, 1, 0, 0, 0, 0]
    assert chosen[2].tolist() == [0] * 6
    (grad,) = torch.autograd.grad((chosen * draw(3, 6, seed=1)).sum(), logits)
    assert grad.isfinite().all()
    assert torch.equal(grad[1:], torch.zeros(2, 6, dtype=torch.float64))
    assert torch.equal(grad[0, [1, 4]], torch.zeros(2, dtype=torch.float64))


def test_an_extreme_outlier():
    logits = torch.zeros(1, 8)
    logits[0, 3] = -1e4
    torch.testing.assert_close(soft_topk(logits, 7), (logits == 0).float())
    logits[0, 3] = 1e4
    torch.testing.assert_close(soft_topk(logits, 3).sum(), torch.tensor(3.0), rtol=0, atol=1e-2)


def test_compiles_into_one_graph():
    compiled = torch.compile(lambda x: soft_topk(x, 3).square().sum(), backend="aot_eager", fullgraph=True)
    logits = draw(2, 9).requires_grad_()
    expected = torch.autograd.grad(soft_topk(logits, 3).square().sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits)[0], expected)


@pytest.mark.parametrize("wrong", [dict(count=0), dict(tau=0.0), dict(tau=float("nan")), dict(steps=0)])
def test_refuses(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        soft_topk(torch.zeros(2, 4), **{"count": 1, **wrong})
