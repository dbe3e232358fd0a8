"""Stage 1 of SLA2 for one attention: its router and alpha, by the error against full attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.config import SLAConfig
from sla_compile.functional import route, sparse_linear_attention
from sla_compile.kernels.masks import key_bias
from sla_compile.kernels.routing import pinned_blocks, pooled_tokens
from sla_compile.kernels.soft_attention import soft_attention
from sla_compile.kernels.soft_topk import soft_topk
from sla_compile.kernels.spec import Spec, critical_count, num_blocks
from sla_compile.ops import default_scale
from sla_compile.samples import Sample

# Keeps the logit finite, and either branch with a gradient in stage 2.
ALPHA_RANGE = (1e-3, 1 - 1e-3)
# Scores that `row_mass` holds at a time.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class TrainingOptions:
    """How a router is trained.

    Args:
        steps: of Adam, each with one sample, one sparsity and some query blocks.
        learning_rate: of the router; alpha's is ten times as much.
        tau: temperature of SoftTop-k on the scaled scores of pooled tokens.
        query_blocks: how many query blocks of a sample are looked at in a step.
        seed: of the order of samples, sparsities and query blocks.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    tau: float = 0.1
    query_blocks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "query_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Router:
    """Parameters of an attention: routers (D, D), and alpha in (0, 1) of (H, 1) or (H, T_m) for each sparsity."""

    router_q: Tensor
    router_k: Tensor
    alphas: tuple[Tensor, ...]


class SiteSamples:
    """The samples of one attention on its device, those to train on and those held out for the error.

    Args:
        get: gives a sample by number.
        count: how many there are; of two or more a quarter, at least one, is held out.
        config: of the attention; with each of its `sparsities`.
    """

    def __init__(
        self,
        get: Callable[[int], Sample],
        count: int,
        config: SLAConfig,
        sparsities: Sequence[float],
        device: torch.device,
    ) -> None:
        self.get, self.device = get, device
        # An explicit number of blocks stands in place of a share: then there is one density, and it is not replaced.
        self.configs = [config if s == config.sparsity else config.replace(sparsity=s) for s in sparsities]
        held_out = max(1, count // 4) if count > 1 else 0
        self.training = range(count - held_out)
        self.held_out = range(count - held_out, count) if held_out else self.training

    def __getitem__(self, number: int) -> Sample:
        return self.get(number).to(self.device)


def train(
    samples: SiteSamples, start: Router, options: TrainingOptions, advance: Callable[[], None] = lambda: None
) -> Router:
    """Trains the router and alpha by the mean squared error against full attention with SoftTop-k's shares of blocks.

    Alpha of each sparsity ends where the error with the hard choice is least, in closed form (`fit_alpha`). A router
    that is no better than the one it started with, on the samples it was trained on, is not kept.
    """
    random = torch.Generator().manual_seed(options.seed)
    router_q, router_k = (m.detach().float().clone().requires_grad_() for m in (start.router_q, start.router_k))
    logits = [torch.logit(alpha.detach().float()).requires_grad_() for alpha in start.alphas]
    rate = options.learning_rate
    optimizer = torch.optim.Adam([dict(params=[router_q, router_k], lr=rate), dict(params=logits, lr=10 * rate)])
    soft_error = _SoftError(samples, options)
    for _ in range(options.steps):
        number, density = _draw(len(samples.training), random), _draw(len(samples.configs), random)
        error = soft_error(number, density, router_q, router_k, logits[density], random)
        if error is not None:
            trained = [router_q, router_k, logits[density]]
            for parameter, grad in zip(trained, torch.autograd.grad(error, trained), strict=True):
                parameter.grad = grad
            optimizer.step()
            optimizer.zero_grad()
        advance()
    end = Router(router_q.detach(), router_k.detach(), tuple(logit.detach().sigmoid() for logit in logits))
    start, end = (fit_alpha(samples, router) for router in (start, end))
    before, after = (sum(errors(samples, router, samples.training)) for router in (start, end))
    return end if after < before else start


def _draw(count: int, random: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=random, device="cpu"))


class _SoftError:
    """Squared error over the target's, with SoftTop-k's shares, of some query blocks of a sample at one sparsity."""

    def __init__(self, samples: SiteSamples, options: TrainingOptions) -> None:
        self.samples, self.options = samples, options
        self.pooled: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(
        self, number: int, density: int, router_q: Tensor, router_k: Tensor, logit: Tensor, random: torch.Generator
    ) -> Tensor | None:
        """A scalar, or None where nothing is left to choose."""
        sample, config = self.samples[number], self.samples.configs[density]
        query, key = sample.query, sample.key
        length, block_q = query.shape[2], config.block_q
        bias = None if sample.mask is None else key_bias(sample.mask, 1, length)
        if number not in self.pooled:
            self.pooled[number] = pooled_tokens(query, key, block_q, config.block_k, bias)
        pooled_query, pooled_key, counts = self.pooled[number]
        pinned = pinned_blocks(length, config.block_k, config.pinned, query.device)
        columns, free = pinned.shape[0], int((~pinned).sum())
        count = min(critical_count(columns, config.sparsity, config.critical_blocks), free)
        open_rows = (~pinned_blocks(length, block_q, config.pinned, torch.device("cpu"))).nonzero().flatten()
        if count == free or not len(open_rows):
            return None  # all blocks are critical
        picked = torch.randperm(len(open_rows), generator=random, device="cpu")[: self.options.query_blocks]
        rows = open_rows[picked].sort().values
        tokens = (rows[:, None] * block_q + torch.arange(block_q, device="cpu")).flatten()
        tokens, rows = tokens[tokens < length].to(query.device), rows.to(query.device)

        scale = default_scale(sample.scale, query.shape[-1])
        routed_key = F.linear(pooled_key, router_k).repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = scale * F.linear(pooled_query[:, :, rows], router_q) @ routed_key.transpose(-1, -2)
        if counts is not None:
            scores = scores.masked_fill((counts[:, :1] == 0).transpose(-1, -2), -torch.inf)
        scores = scores.masked_fill(pinned, -torch.inf)
        shares = soft_topk(scores, count, self.options.tau).masked_fill(pinned, 1)
        alpha = logit.sigmoid() if logit.shape[1] == 1 else logit.sigmoid()[:, rows]

        chosen = query[:, :, tokens]
        spec = Spec(scale, config.feature_map, config.linear, block_q, config.block_k)
        output = soft_attention(chosen.float(), key, sample.value, shares, alpha, spec, bias)
        target = full_attention(sample, chosen).float()
        return (output - target).square().sum() / target.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def full_attention(sample: Sample, query: Tensor | None = None) -> Tensor:
    """Exact attention of the sample's queries, or of some others, in their dtype."""
    query = sample.query if query is None else query
    mask = None if sample.mask is None else sample.mask.to(query.dtype)
    grouped = sample.query.shape[1] != sample.key.shape[1]
    return F.scaled_dot_product_attention(query, sample.key, sample.value, mask, scale=sample.scale, enable_gqa=grouped)


@torch.no_grad()
def errors(samples: SiteSamples, router: Router, which: Sequence[int]) -> list[float]:
    """Relative squared error ``sum |O - O_full|^2 / sum |O_full|^2`` with the hard choice, for each sparsity."""
    wrong, size = torch.zeros(len(samples.configs), dtype=torch.float64, device="cpu"), 0.0
    for number in which:
        sample = samples[number]
        target = full_attention(sample).double()
        size += target.square().sum().item()
        for density, config in enumerate(samples.configs):
            output = _hard(sample, config, router, router.alphas[density])
            wrong[density] += (output.double() - target).square().sum().item()
    return (wrong / max(size, torch.finfo(torch.float64).tiny)).tolist()


@torch.no_grad()
def fit_alpha(samples: SiteSamples, router: Router) -> Router:
    """The router with the alpha of least squared error on the training samples, for each sparsity.

    ``O = O_l + alpha (O_s - O_l)`` is linear in alpha: ``alpha = sum <O_full - O_l, O_s - O_l> / sum |O_s - O_l|^2``
    over whatever shares an alpha. The branches come from two runs of the operator itself.
    """
    sums = [
        (torch.zeros_like(alpha, dtype=torch.float64), torch.zeros_like(alpha, dtype=torch.float64))
        for alpha in router.alphas
    ]
    for number in samples.training:
        sample = samples[number]
        target = full_attention(sample).double()
        for density, config in enumerate(samples.configs):
            alpha = router.alphas[density]
            linear, sparse = (_hard(sample, config, router, torch.full_like(alpha, a)).double() for a in (0, 1))
            difference = sparse - linear
            for total, product in zip(
                sums[density], ((target - linear) * difference, difference.square()), strict=True
            ):
                total += _per_alpha(product, alpha, config.block_q)
    alphas = [
        torch.where(size > 0, inner / size.clamp(min=torch.finfo(torch.float64).tiny), alpha).clamp(*ALPHA_RANGE)
        for alpha, (inner, size) in zip(router.alphas, sums, strict=True)
    ]
    return Router(router.router_q, router.router_k, tuple(a.float() for a in alphas))


@torch.no_grad()
def mass_start(samples: SiteSamples, router: Router) -> Router:
    """The router with alpha as the mass that full attention puts on the chosen blocks, the training samples' mean.

    That is what alpha is for: the sparse branch renormalises, and ``O = mass O_s + (1 - mass) O_rest`` is exact.
    """
    found = []
    for config, alpha in zip(samples.configs, router.alphas, strict=True):
        sums = [torch.zeros_like(alpha, dtype=torch.float64) for _ in range(2)]
        for number in samples.training:
            sample = samples[number]
            mass = row_mass(sample, _block_map(sample, config, router), config)[..., None].double()
            partial = mass < 1 - 1e-6  # rows with nothing but critical blocks do without alpha
            for total, values in zip(sums, (mass * partial, partial.double()), strict=True):
                total += _per_alpha(values, alpha, config.block_q)
        mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), alpha)
        found.append(mean.clamp(*ALPHA_RANGE).float())
    return Router(router.router_q, router.router_k, tuple(found))


def row_mass(sample: Sample, block_map: Tensor, config: SLAConfig) -> Tensor:
    """Share of full attention's probabilities that lies on each query's critical blocks, (1, H, L) float32."""
    query, key = sample.query.float(), sample.key.float()
    heads, length = query.shape[1], query.shape[2]
    scale = default_scale(sample.scale, query.shape[-1])
    key = key.repeat_interleave(heads // key.shape[1], 1)
    rows = max(1, CHUNK_BYTES // (4 * heads * length * config.block_q))
    masses = []
    for first in range(0, num_blocks(length, config.block_q), rows):
        part = slice(first * config.block_q, (first + rows) * config.block_q)
        scores = scale * query[:, :, part] @ key.transpose(-1, -2)
        if sample.mask is not None:
            scores += sample.mask
        critical = (block_map[:, :, first : first + rows] == 1).repeat_interleave(config.block_q, 2)
        critical = critical[:, :, : scores.shape[2]].repeat_interleave(config.block_k, 3)[..., :length]
        whole = scores.logsumexp(-1)
        masses.append((scores.masked_fill_(~critical, -torch.inf).logsumexp(-1) - whole).exp())
    return torch.cat(masses, 2)


def _hard(sample: Sample, config: SLAConfig, router: Router, alpha: Tensor) -> Tensor:
    """The operator's attention (1, H, L, D)."""
    return sparse_linear_attention(
        sample.query, sample.key, sample.value, config=config, router_q=router.router_q, router_k=router.router_k,
        alpha=alpha, key_padding_mask=sample.mask, scale=sample.scale, enable_gqa=True,
    )  # fmt: skip


def _block_map(sample: Sample, config: SLAConfig, router: Router) -> Tensor:
    return route(
        sample.query, sample.key, config=config, key_padding_mask=sample.mask, scale=sample.scale, enable_gqa=True,
        router_q=router.router_q, router_k=router.router_k,
    )  # fmt: skip


def _per_alpha(values: Tensor, alpha: Tensor, block: int) -> Tensor:
    """(1, H, L, n) summed over whatever shares an alpha: (H, 1) or (H, T_m)."""
    if alpha.shape[1] == 1:
        return values.sum((0, 2, 3))[:, None]
    per_token = values.sum((0, 3))
    padded = F.pad(per_token, (0, alpha.shape[1] * block - per_token.shape[1]))
    return padded.unflatten(1, (-1, block)).sum(-1)
