"""``sla-compile demo``: what acceleration does to a video DiT, shown on a machine without a GPU or a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla_compile.api import accelerate, parameters, report
from sla_compile.config import SLAConfig
from sla_compile.functional import route, sparse_linear_attention

SEED = 0
TEXT_TOKENS, TEXT_DIM, LATENT_CHANNELS = 512, 4096, 16
FORWARD_REPEATS, ATTENTION_REPEATS = 2, 7
TRAINING_CLIP = (5, 160, 272)  # 340 tokens: fine-tuning at full length would take most of the demo's time


@dataclass(frozen=True)
class Clip:
    """Size of a video as Wan sees it: its VAE makes one latent of 4 frames (after the first) and of 8 x 8 pixels, and
    the model one token of 1 x 2 x 2 latents.

    Raises:
        ValueError: the size does not divide so.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames % 4 != 1:
            raise ValueError(f"frames must be 4 n + 1 (1, 5, 9, ...), got {self.frames}")
        if self.height % 16 or self.width % 16:
            raise ValueError(f"height and width must be multiples of 16, got {self.height} x {self.width}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Length of the video's sequence."""
        frames, height, width = self.latent_shape
        return frames * (height // 2) * (width // 2)

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height} x {self.width}, {self.tokens} tokens"


@dataclass(frozen=True)
class DemoOptions:
    """What ``sla-compile demo`` was asked for."""

    clip: Clip
    layers: int
    steps: int
    config: SLAConfig
    device: torch.device
    dtype: torch.dtype
    output: Path
    compile: bool

    @property
    def training_clip(self) -> Clip:
        """The clip to fine-tune on: a small one, or the given one where that is smaller."""
        return min(self.clip, Clip(*TRAINING_CLIP), key=lambda clip: clip.tokens)


def run(options: DemoOptions) -> int:
    """Runs the demo; 0, or 1 where a check of the fine-tuning failed."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # .to(bfloat16) warns of what this demo does not need
    began = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log wants whole lines
    # Training uses a shorter clip than the measurement, and the demo shall work at any size.
    config = options.config.replace(min_seq_len=min(options.config.min_seq_len, options.training_clip.tokens))
    with _status(console, "building the model"):
        dense = build_model(options.layers).to(options.device, options.dtype).eval().requires_grad_(False)
        inputs = make_inputs(options.clip, options.device, options.dtype)
        accelerated = accelerate(copy.deepcopy(dense), config=config, example_inputs=inputs)
    console.print(
        f"Wan2.1-1.3B with {options.layers} of its 30 layers (12 heads of 128, text cross-attention), random weights, "
        f"on a video of {options.clip}\n{_where(options)}"
    )
    console.print(report(accelerated))
    with _status(console, "one dense forward in eager mode, to look at its attention"):
        query, key, value = capture_self_attention(dense, inputs)

    _compare(console, options, dense, accelerated, inputs, (query, key, value), config)
    draw_blocks(route(query, key, config=config), options.output, f"{options.clip}, sparsity {config.sparsity:g}")
    console.print(
        f"The blocks of the last layer's self-attention are drawn in [bold]{escape(str(options.output))}[/bold].\n"
    )
    del dense, query, key, value

    passed = _fine_tune(console, options, accelerated)
    console.print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0 if passed else 1


def build_model(layers: int) -> nn.Module:
    """Wan2.1-1.3B's transformer with fewer layers and random weights, float32, on the CPU."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            ffn_dim=8960,
            num_layers=layers,
            patch_size=(1, 2, 2),
        )


def make_inputs(clip: Clip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the model's forward: random latents, a timestep, random text embeddings."""
    random = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, LATENT_CHANNELS, *clip.latent_shape, generator=random)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=random)
    return {
        "hidden_states": latents.to(device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": text.to(device, dtype),
        "return_dict": False,
    }


class _Capture(TorchFunctionMode):
    """Keeps the arguments of the last self-attention that runs inside."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (args + tuple(kwargs.get(n) for n in ("query", "key", "value")[len(args) :]))[:3]
            if query.shape[-2] == key.shape[-2] == self.tokens:
                self.found = (query, key, value)
        return func(*args, **kwargs)


@torch.no_grad()
def capture_self_attention(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, L, D) of the last layer's self-attention of a dense Wan model."""
    frames, height, width = inputs["hidden_states"].shape[2:]
    with _Capture(frames * (height // 2) * (width // 2)) as capture:
        model(**inputs)
    assert capture.found is not None
    return capture.found


@torch.no_grad()
def _compare(
    console: Console,
    options: DemoOptions,
    dense: nn.Module,
    accelerated: nn.Module,
    inputs: dict[str, Any],
    attention: tuple[Tensor, Tensor, Tensor],
    config: SLAConfig,
) -> None:
    """Prints times of dense and accelerated, taken in turn, and how far apart their outputs are."""
    head_dim = attention[0].shape[-1]
    # As freshly attached: zero, so the linear branch is computed and adds nothing before it is trained.
    weight, bias = (torch.zeros(shape, device=options.device) for shape in ((head_dim, head_dim), head_dim))

    def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def sla_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sparse_linear_attention(query, key, value, config=config, proj_weight=weight, proj_bias=bias)

    def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function) if options.compile else function

    table = Table(title=f"Dense against accelerated, {'both compiled' if options.compile else 'both in eager mode'}")
    for column in ("", "dense, ms", "accelerated, ms", "dense / accelerated", "relative difference"):
        table.add_column(column, justify="left" if not column else "right")
    rows: tuple[tuple[str, int, tuple[Callable[..., Any], ...], tuple, dict[str, Any]], ...] = (
        (
            "attention of the last layer",
            ATTENTION_REPEATS,
            (prepared(dense_attention), prepared(sla_attention)),
            attention,
            {},
        ),
        ("whole forward", FORWARD_REPEATS, (prepared(dense), prepared(accelerated)), (), inputs),
    )
    for name, repeats, functions, args, kwargs in rows:
        outputs = []
        for function, kind in zip(functions, ("dense", "accelerated"), strict=True):
            with _status(console, f"{'compiling' if options.compile else 'warming up'}: {name}, {kind}"):
                output = function(*args, **kwargs)
                outputs.append(output[0] if isinstance(output, tuple) else output)
        times: tuple[list[float], list[float]] = ([], [])
        with _status(console, f"measuring: {name}"):
            for _ in range(repeats):
                for function, taken in zip(functions, times, strict=True):
                    taken.append(_seconds(function, args, kwargs, options.device))
        first, second = (statistics.median(taken) for taken in times)
        difference = relative_difference(outputs[1], outputs[0])
        table.add_row(name, f"{first * 1e3:.0f}", f"{second * 1e3:.0f}", f"{first / second:.2f}", f"{difference:.3f}")
    console.print(table)
    console.print(
        f"Medians of {FORWARD_REPEATS} forwards and {ATTENTION_REPEATS} attentions, dense and accelerated in turn. The "
        "difference says nothing about quality: random weights spread attention almost evenly over the video, so that "
        "no few blocks can stand for all, and the added projection is still zero. A trained model attends to few "
        "blocks, and is fine-tuned.\n"
    )


def relative_difference(given: Tensor, expected: Tensor) -> float:
    """``|given - expected| / |expected|`` in the Frobenius norm."""
    given, expected = given.double(), expected.double()
    return float((given - expected).norm() / expected.norm())


def draw_blocks(block_map: Tensor, path: Path, title: str, heads: int = 4) -> None:
    """Writes a PNG of the first heads of a block map (B, H, T_m, T_n): critical, marginal and negligible blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = (
        ("negligible: skipped", "#e8e8e8"),
        ("marginal: linear attention", "#9ecae1"),
        ("critical: exact", "#b2182b"),
    )
    heads = min(heads, block_map.shape[1])
    figure = Figure(figsize=(3.2 * heads, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    colors = ListedColormap([color for _, color in classes])
    for head, axes in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
        axes.imshow(block_map[0, head].cpu().numpy(), cmap=colors, vmin=-1, vmax=1, interpolation="nearest")
        axes.set(title=f"head {head}", xlabel="key block", ylabel="query block" if head == 0 else "")
    figure.suptitle(title)
    patches = [Patch(facecolor=color, edgecolor="black", label=name) for name, color in reversed(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def _fine_tune(console: Console, options: DemoOptions, model: nn.Module) -> bool:
    """Trains all weights on a synthetic clip with the flow-matching loss; whether it learned, and all of it."""
    clip, device, dtype = options.training_clip, options.device, options.dtype
    model.train().requires_grad_(True)
    added = parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    random = torch.Generator().manual_seed(SEED)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=random).to(device, dtype)
    # One clip, noise and time for all steps: fresh ones would hide in ten losses what was learned.
    video = synthetic_latents(clip, random)
    noise, sigma = torch.randn(video.shape, generator=random), torch.tensor([0.7])
    noisy, target = ((1 - sigma) * video + sigma * noise).to(device, dtype), (noise - video).to(device)
    timestep = (1000 * sigma).to(device)
    losses: list[float] = []
    reached: set[int] = set()
    with Progress(
        TextColumn("fine-tuning"), *Progress.get_default_columns(), TextColumn("loss {task.fields[loss]}"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=options.steps, loss="")
        for _ in range(options.steps):
            output = model(noisy, timestep, text, return_dict=False)[0]
            loss = F.mse_loss(output.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            reached |= {index for index, parameter in enumerate(added) if _has_gradient(parameter)}
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}")
    fell, complete = losses[-1] < losses[0], len(reached) == len(added)
    console.print(f"Fine-tuning all weights, {options.steps} steps on one synthetic clip of {clip.tokens} tokens:")
    console.print(f"  loss {' '.join(f'{loss:.3f}' for loss in losses)}  {_verdict(fell)} it fell")
    console.print(f"  {_verdict(complete)} gradients reached {len(reached)} of the {len(added)} added parameters")
    return fell and complete


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all() and gradient.any())


def synthetic_latents(clip: Clip, random: torch.Generator) -> Tensor:
    """Latents (1, 16, F, H, W) of a plane wave that moves through the video, each channel with its own amplitude."""
    frames, height, width = (torch.linspace(0, 1, size) for size in clip.latent_shape)
    speed, down, right, phase = (6.0 * torch.rand(4, generator=random)).tolist()
    wave = speed * frames[:, None, None] + down * height[:, None] + right * width + phase
    amplitude = torch.randn(LATENT_CHANNELS, 1, 1, 1, generator=random)
    return (amplitude * wave.sin())[None]


def _seconds(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _where(options: DemoOptions) -> str:
    if options.device.type == "cuda":
        device = torch.cuda.get_device_name(options.device)
    else:
        device = f"the CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    return f"on {device}, {str(options.dtype).removeprefix('torch.')}, torch {torch.__version__}\n"


def _verdict(passed: bool) -> str:
    return "[green]yes:[/green]" if passed else "[red]no:[/red]"


@contextlib.contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    hidden = not console.is_terminal
    # Rarely redrawn: it shares the CPU with what is measured.
    with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=2) as progress:
        progress.add_task(text, total=None)
        yield
