"""``sla-compile bench``: sparse-linear attention next to dense attention and its rivals, in one run.

Nothing is timed before the numbers are checked. All contenders take turns, so that what else the machine does reaches
all alike; the GPU's second-level cache is emptied before every call. On the CPU it is process time: wall time on shared
cores says nothing.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import datetime
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sla_compile.api import accelerate
from sla_compile.arithmetic import BACKWARD_PRODUCTS, attention_operations
from sla_compile.config import SLAConfig
from sla_compile.functional import route, sparse_linear_attention

CHECKED_LENGTH = 1000  # ragged, and small enough for float64
# Scores reach a size of about ten, so their exponentials are off by as many roundings; operands and results are rounded
# a few times, and in 16 bit only these. float32 products are TF32 on a GPU; a low-bit score may round to another number
# than in float64.
ALLOWED_ROUNDINGS = 16
ALLOWED_IN_16_BIT = 4
TF32_EPS, LOW_BIT_ERROR = 2.0**-10, 0.02
CACHE_BYTES = 2**28  # more than any second-level cache
# Written so often before each call that the call is enqueued meanwhile: its kernels are timed, not their launches. That
# takes our backward about a millisecond, and a GPU that writes 4 TB/s 2 for this.
FLUSHES = 32
PEAK_SIZE = 8192, 2048  # rows of the square matrices whose product measures the peak, on a GPU and on the CPU


@dataclass(frozen=True)
class Shape:
    """Sizes of q, k and v: (batch, heads, length, dim)."""

    batch: int
    heads: int
    length: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B{self.batch} H{self.heads} L{self.length} D{self.dim} {dtype}"


@dataclass(frozen=True)
class Row:
    """One contender in one direction; times in milliseconds, memory in MiB above what was there before (GPU only)."""

    name: str
    direction: str
    length: int
    p20: float
    p50: float
    p80: float
    dense_over_this: float
    teraflops: float
    share_of_peak: float
    peak_mib: float | None


class Inputs:
    """q, k and v as transposed (B, L, H, D), the parameters the method takes, none of them zero, and a gradient."""

    def __init__(self, shape: Shape, config: SLAConfig) -> None:
        generator = torch.Generator(shape.device).manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=shape.device)

        tokens = shape.batch, shape.length, shape.heads, shape.dim
        self.query, self.key, self.value, self.grad = (draw(*tokens).to(shape.dtype).transpose(1, 2) for _ in range(4))
        self.parameters: dict[str, Any] = {}
        if config.method == "sla2":
            self.parameters["alpha"] = draw(shape.heads, 1).sigmoid()
        elif config.has_projection:
            self.parameters["proj_weight"] = draw(shape.dim, shape.dim) * shape.dim**-0.5
            self.parameters["proj_bias"] = draw(shape.dim)
        for tensor in (self.query, self.key, self.value, *self.parameters.values()):
            tensor.requires_grad_()

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def attention(self, config: SLAConfig, block_map: Tensor | None = None) -> Tensor:
        """Our output."""
        return sparse_linear_attention(*self.tokens, config=config, block_map=block_map, **self.parameters)


@dataclass(frozen=True)
class Contender:
    """Something that computes attention.

    Args:
        leaves: what its backward differentiates.
        forward: gives the output.
        operations: of its forward.
    """

    name: str
    leaves: tuple[Tensor, ...]
    forward: Callable[[], Tensor]
    operations: float


def check(shape: Shape, config: SLAConfig) -> str | None:
    """What is wrong with output or gradients at a small, ragged length, against float64 on the CPU, if anything."""
    small = dataclasses.replace(shape, batch=1, heads=min(shape.heads, 2), length=CHECKED_LENGTH)
    inputs = Inputs(small, config)
    with torch.no_grad():
        block_map = route(inputs.query, inputs.key, config=config)
    exact = Inputs(small, config)
    for name in ("query", "key", "value", "grad"):
        setattr(exact, name, getattr(inputs, name).detach().cpu().double().requires_grad_())
    exact.parameters = {n: t.detach().cpu().double().requires_grad_() for n, t in inputs.parameters.items()}
    found, expected = (
        [output, *torch.autograd.grad(output, [*given.tokens, *given.parameters.values()], given.grad)]
        for given, output in (
            (inputs, inputs.attention(config, block_map)),
            (exact, exact.attention(config, block_map.cpu())),
        )
    )
    eps = TF32_EPS if shape.dtype == torch.float32 and shape.device.type == "cuda" else torch.finfo(shape.dtype).eps
    roundings = ALLOWED_ROUNDINGS if shape.dtype == torch.float32 else ALLOWED_IN_16_BIT
    allowed = LOW_BIT_ERROR if config.low_bit else roundings * eps
    for name, result, reference in zip(
        ("output", "query", "key", "value", *inputs.parameters), found, expected, strict=True
    ):
        error = ((result.cpu().double() - reference).norm() / reference.norm()).item()
        if not error <= allowed:
            what = name if name == "output" else f"the gradient of {name}"
            return f"{what} is off by {error:.1e} of its norm, allowed are {allowed:.1e}: nothing was measured"
    return None


@dataclass(frozen=True)
class Job:
    """One call to be timed; `operations` 0 where nobody counts them."""

    name: str
    direction: str
    call: Callable[[], object]
    operations: float = 0.0


def measure(
    shape: Shape, contenders: list[Contender], grad: Tensor, repeats: int, backward: bool, console: Console
) -> list[Row]:
    """Times every contender's forward and, if asked, its backward alone."""
    jobs = []
    for contender in contenders:
        jobs.append(Job(contender.name, "forward", torch.no_grad()(contender.forward), contender.operations))
        if backward:
            call = _backward(contender.forward(), contender.leaves, grad)
            jobs.append(Job(contender.name, "backward", call, BACKWARD_PRODUCTS * contender.operations))
    return time_jobs(
        jobs, shape.length, shape.device, peak_operations(shape.dtype, shape.device), repeats, f"{shape}", console
    )


def measure_model(
    layers: int,
    clip: Any,
    config: SLAConfig,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    backward: bool,
    console: Console,
) -> list[Row]:
    """Times forward and, if asked, training step of the demo's model: dense and accelerated, eager and compiled."""
    from sla_compile.demo import build_model, make_inputs

    inputs = make_inputs(clip, device, dtype)
    dense = build_model(layers).to(device, dtype)
    models = {"dense": dense, "accelerated": accelerate(copy.deepcopy(dense), config=config, example_inputs=inputs)}
    jobs = []
    for way in ("eager", "compiled"):
        for name, model in models.items():
            run = torch.compile(model) if way == "compiled" else model

            def forward(run: Any = run) -> object:
                with torch.no_grad():
                    return run(**inputs)

            def step(run: Any = run, model: nn.Module = model) -> object:
                model.zero_grad()
                run(**inputs)[0].square().mean().backward()
                return None

            jobs.append(Job(f"{name}, {way}", "forward", forward))
            if backward:
                jobs.append(Job(f"{name}, {way}", "training step", step))
    return time_jobs(jobs, clip.tokens, device, math.inf, repeats, str(clip), console)


def time_jobs(
    jobs: list[Job], length: int, device: torch.device, peak: float, repeats: int, what: str, console: Console
) -> list[Row]:
    """Runs all jobs in turn, `repeats` times."""
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    hidden = not console.is_terminal
    # And the first call of each, which compiles.
    memory = [
        _peak_memory(job.call, device) for job in track(jobs, f"warming up {what}", console=console, disable=hidden)
    ]
    times: list[list[float]] = [[] for _ in jobs]
    for _ in track(range(repeats), f"measuring {what}", console=console, disable=hidden):
        for taken, job in zip(times, jobs, strict=True):
            if flush is not None:
                for _ in range(FLUSHES):
                    flush.zero_()
            taken.append(milliseconds(job.call, device))
    medians = [statistics.median(taken) for taken in times]
    rows = []
    for job, taken, p50, mebibytes in zip(jobs, times, medians, memory, strict=True):
        rivals = zip(jobs, medians, strict=True)
        best = min(m for other, m in rivals if other.direction == job.direction and other.name.startswith("dense"))
        p20, _, _, p80 = statistics.quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else taken * 4
        rate = job.operations / (1e-3 * p50)
        rows.append(
            Row(job.name, job.direction, length, p20, p50, p80, best / p50, rate / 1e12, rate / peak, mebibytes)
        )
    return rows


def our_operations(shape: Shape, config: SLAConfig) -> float:
    """Operations of our forward."""
    return attention_operations((shape.batch, shape.heads, shape.length, shape.dim), shape.length, config).after


def _backward(output: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def milliseconds(job: Callable[[], object], device: torch.device) -> float:
    """Of one call: the GPU's time from event to event, process time on the CPU."""
    if device.type != "cuda":
        began = time.process_time()
        job()
        return 1e3 * (time.process_time() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak_memory(job: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call allocates at most, after one call that compiles."""
    job()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_operations(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large square matrix product in the same dtype, measured now."""
    size = PEAK_SIZE[device.type != "cuda"]
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    return 2 * size**3 / (1e-3 * min(milliseconds(lambda: left @ right, device) for _ in range(6)))


def environment(device: torch.device) -> dict[str, str]:
    """Date, device and versions, for every row that is kept."""
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": str(torch.get_num_threads()) if device.type != "cuda" else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def show(rows: Iterable[Row], title: str, caption: str, console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(title=title, caption=caption)
    columns = ("", "", "p20 ms", "p50 ms", "p80 ms", "best dense / this", "TFLOP/s", "of peak", "peak MiB")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    for row in rows:
        times = (f"{value:.2f}" for value in (row.p20, row.p50, row.p80, row.dense_over_this))
        rate = (f"{row.teraflops:.3g}", f"{row.share_of_peak:.0%}") if row.teraflops else ("", "")
        table.add_row(row.name, row.direction, *times, *rate, "" if row.peak_mib is None else f"{row.peak_mib:.0f}")
    console.print(table)


def write_csv(rows: list[Row], path: Path, constants: dict[str, str]) -> None:
    """Writes the rows, each with what all of them share."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in dataclasses.fields(Row)), *constants])
        writer.writeheader()
        for row in rows:
            writer.writerow({**dataclasses.asdict(row), **constants})


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Writes a picture: bars for one length, lines over several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(row.direction for row in rows))
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(
        figsize=(6.5 * len(directions), 1.5 + 0.45 * len(names) if len(lengths) == 1 else 5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        here = [row for row in rows if row.direction == direction]
        if len(lengths) == 1:
            bars = axes.barh([row.name for row in here], [row.p50 for row in here], color="#4a7ab5")
            axes.bar_label(bars, [f" {row.p50:.3g} ms, {row.dense_over_this:.2f}x" for row in here])
            axes.invert_yaxis()
            axes.set(xlabel="milliseconds, median", xmargin=0.3)
        else:
            for name in names:
                line = [(row.length, row.p50) for row in here if row.name == name]
                axes.plot(*zip(*line, strict=True), marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, median")
            axes.legend()
        axes.set_title(direction)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
