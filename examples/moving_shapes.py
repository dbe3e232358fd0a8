"""A video transformer small enough to train here, and its data: shapes that drift and bounce, drawn as they are needed.

    python examples/moving_shapes.py --steps 400    # trains it, some minutes on one core

`ordering.py` compares attentions on it.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FRAMES, SIZE, PATCH = 16, 32, 2  # 16 x 16 x 16 = 4096 tokens


def clips(seed: int, batch: int = 1, frames: int = FRAMES, size: int = SIZE) -> Iterator[Tensor]:
    """Videos (batch, frames, size, size) in [-1, 1] without end: three discs or squares on straight ways, reflected."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.arange(size).float()
    when = torch.arange(frames).float()[:, None]
    while True:
        shape = (batch, 1, 3)  # of three objects
        radius = 2 + 3 * torch.rand(shape, generator=random)
        square = torch.rand(shape, generator=random) < 0.5
        shade = 0.4 + 0.6 * torch.rand(shape, generator=random)
        place = []
        for _ in range(2):
            start, speed = size * torch.rand(shape, generator=random), 4 * torch.rand(shape, generator=random) - 2
            way = (start + speed * when).remainder(2 * size)
            place.append(torch.where(way < size, way, 2 * size - way))  # (batch, frames, 3)
        down, right = ((pixels[:, None] if axis == 0 else pixels) - place[axis][..., None, None] for axis in range(2))
        distance = torch.where(
            square[..., None, None], torch.maximum(down.abs(), right.abs()), torch.hypot(down, right)
        )
        drawn = (radius[..., None, None] - distance).clamp(0, 1) * shade[..., None, None]
        yield 2 * drawn.amax(2) - 1


def noisy(video: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching: ``x_s = (1 - s) video + s noise``, s of each clip, and the target ``noise - video``."""
    noise = torch.randn(video.shape, generator=random)
    sigma = torch.rand(video.shape[0], generator=random)
    mix = sigma[:, None, None, None]
    return (1 - mix) * video + mix * noise, sigma, noise - video


class SelfAttention(nn.Module):
    """Multi-head self-attention with normalised queries and keys, as video transformers have it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width // num_heads), nn.RMSNorm(width // num_heads)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(self.norm_q(query), self.norm_k(key), value)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, modulated by the noise level."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, level: Tensor) -> Tensor:
        scales = self.modulation(level)[:, None].chunk(6, -1)
        for part, (scale, shift, gate) in ((self.attn, scales[:3]), (self.mlp, scales[3:])):
            tokens = tokens + (1 + gate) * part(F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift)
        return tokens


class VideoTransformer(nn.Module):
    """(B, frames, size, size) and noise levels (B) to velocities of the same shape."""

    def __init__(
        self, width: int = 64, num_heads: int = 2, depth: int = 3, frames: int = FRAMES, size: int = SIZE
    ) -> None:
        super().__init__()
        self.grid = (frames, size // PATCH, size // PATCH)
        self.into, self.out = nn.Linear(PATCH**2, width), nn.Linear(width, PATCH**2)
        self.register_buffer("place", _waves(self.grid, width), persistent=False)
        self.position = nn.Linear(self.place.shape[-1], width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))

    def forward(self, video: Tensor, sigma: Tensor) -> Tensor:
        patches = video.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 1, 2, 4, 3, 5).flatten(4)
        tokens = self.into(patches.flatten(1, 3)) + self.position(self.place)
        waves = sigma[:, None] * torch.arange(1, 9, device=sigma.device) * math.pi / 2
        level = self.level(torch.cat([waves.sin(), waves.cos()], 1))
        for block in self.blocks:
            tokens = block(tokens, level)
        patches = (
            self.out(F.layer_norm(tokens, tokens.shape[-1:])).unflatten(1, self.grid).unflatten(-1, (PATCH, PATCH))
        )
        return patches.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def _waves(grid: tuple[int, ...], width: int) -> Tensor:
    """Sines and cosines of each token's frame, row and column: (tokens, 48)."""
    axes = torch.meshgrid(*(torch.arange(size) / size for size in grid), indexing="ij")
    angles = torch.stack(axes, -1).flatten(0, 2)[..., None] * math.pi * torch.tensor([0.5, 1, 2, 3, 4, 6, 8, 12])
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def train(
    model: nn.Module, steps: int, *, rates: dict[float, list[nn.Parameter]], seed: int = 1, batch: int = 1,
    tell: Callable[[int, float], None] | None = None, **sizes: int,
) -> list[float]:  # fmt: skip
    """The flow-matching loss of every step; `rates` maps learning rates to the parameters that have them."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([dict(params=params, lr=rate) for rate, params in rates.items()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    losses = []
    model.train()
    for step, video in zip(range(steps), clips(seed, batch, **sizes), strict=False):
        given, sigma, target = noisy(video, random)
        loss = F.mse_loss(model(given, sigma), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if tell is not None:
            tell(step, losses[-1])
    return losses


def validation(count: int, seed: int = 1000, **sizes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Clips that training does not see, with noise at levels spread over (0, 1)."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for number, video in zip(range(count), clips(seed, **sizes), strict=False):
        noise, sigma = torch.randn(video.shape, generator=random), torch.tensor([(number + 0.5) / count])
        found.append(((1 - sigma) * video + sigma * noise, sigma, noise - video))
    return found


@torch.no_grad()
def validation_loss(model: nn.Module, samples: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean flow-matching loss."""
    model.eval()
    return sum(F.mse_loss(model(given, sigma), target).item() for given, sigma, target in samples) / len(samples)


def main(arguments: list[str] | None = None) -> float:
    """Returns the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="four frames")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save", help="write the weights to this file")
    given = parser.parse_args(arguments)
    sizes = dict(frames=4, size=16) if given.small else {}
    torch.manual_seed(0)
    model = VideoTransformer(**sizes)
    samples = validation(8, **sizes)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {math.prod(model.grid)} tokens")
    print(f"validation loss {validation_loss(model, samples):.4f} before training")
    start = time.perf_counter()

    def tell(step: int, loss: float) -> None:
        if step % 25 == 24:
            print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)

    train(model, given.steps, rates={2e-3: list(model.parameters())}, tell=tell, **sizes)
    loss = validation_loss(model, samples)
    print(f"validation loss {loss:.4f}")
    if given.save:
        torch.save(model.state_dict(), given.save)
    return loss


if __name__ == "__main__":
    main()
