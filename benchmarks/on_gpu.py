"""The day a GPU is there: checks, then times everything in one call, and writes what it has after every step.

    python benchmarks/on_gpu.py --output results                          # all steps, in at most 540 seconds
    python benchmarks/on_gpu.py --output results --steps ceilings kernels --budget 120
    SLA_COMPILE_AUTOTUNE=1 python benchmarks/on_gpu.py --output tuned --steps attention kernels
    python benchmarks/on_gpu.py --output results --device cpu --small     # tries the script itself

Steps: the kernels' tests on the device; ceilings, what the machine copies and multiplies; attention of Wan2.1's 1.3B
and 14B against every rival; kernels, one by one next to a roofline (roofline.py); pieces, what transient memory buys;
a sweep over lengths and sparsities that says from where on sparse-linear attention is faster than dense. What no
time is left for is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from roofline import Ceilings, kernel_work  # makes an uninstalled checkout importable
from torch.profiler import ProfilerActivity, profile

from sla_compile import bench, bench_rivals
from sla_compile.bench import Contender, Inputs, Row, Shape
from sla_compile.config import SLAConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"1.3B": (12, 32760), "14B": (40, 75600)}  # heads and tokens of Wan2.1, head dimension 128
SWEPT_LENGTHS, SWEPT_SPARSITIES = (2048, 4096, 8192, 16384, 32760, 65536, 131072), (0.8, 0.9, 0.95, 0.97, 0.99)
COPIED = {"memory": 2**32, "cache": 2**23}  # bytes: far more than a GPU's second-level cache, and far less
TESTS_SHARE = 0.6  # of the time that is left
PIECES = 32, 64, 128, 192, 384  # MiB of transient tensors; 32 is one head of 1.3B
KERNELS_SHOWN = 12  # of each direction in the summary; all are in results.json


@dataclass
class Session:
    """What the steps share: where they run, until when, and what came of them."""

    device: torch.device
    small: bool
    repeats: int
    peer: Path | None
    output: Path
    deadline: float
    console: Console
    results: dict[str, Any] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    checked: dict[SLAConfig, bool] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def shapes(self) -> dict[str, Shape]:
        if self.small:
            return {"small": Shape(1, 2, 512, 32, self.dtype, self.device)}
        return {name: Shape(1, *sizes, 128, self.dtype, self.device) for name, sizes in SHAPES.items()}

    def out_of_time(self, what: str) -> bool:
        if self.left > 0:
            return False
        self.summary.append(f"left out, no time: {what}")
        return True

    def correct(self, shape: Shape, config: SLAConfig) -> bool:
        """Whether output and gradients agree with float64; what does not is not timed."""
        if config not in self.checked:
            try:
                wrong = bench.check(shape, config)
            except NotImplementedError as error:  # low_bit that the device has no products for
                self.checked[config] = False
                self.summary.append(f"not here: {label(config)}: {error}")
            except Exception as error:  # of a compiler, say: the others can still be measured
                self.console.print_exception()
                self.checked[config] = False
                self.failed.append(f"{label(config)}: {type(error).__name__}: {error}")
            else:
                self.checked[config] = wrong is None
                if wrong:
                    self.failed.append(f"{label(config)}: {wrong}")
        return self.checked[config]

    def keep(self, step: str, rows: list[Row], pictures: dict[str, list[Row]]) -> None:
        """Writes rows as CSV, and a picture of each group."""
        constants = {**bench.environment(self.device), "command": " ".join(sys.argv)}
        bench.write_csv(rows, self.output / f"{step}.csv", constants)
        for name, group in pictures.items():
            bench.draw(group, self.output / f"{name}.png", f"{name}, {constants['device']}, torch {constants['torch']}")

    def write(self) -> None:
        about = {"environment": bench.environment(self.device), "summary": self.summary, "failed": self.failed}
        (self.output / "results.json").write_text(json.dumps({**self.results, **about}, indent=1))


def label(config: SLAConfig) -> str:
    parts = [config.method, f"{config.sparsity:g}", f"q{config.block_q}"]
    parts += ["all"] * (config.linear == "all") + [config.low_bit] * (config.low_bit is not None)
    return " ".join(parts)


def tests(session: Session) -> None:
    """The kernels against the float64 reference, and those of routing, on a GPU if there is one.

    Nothing else looks at the latter: before a measurement, results are compared over the blocks that they chose.
    """
    files = ["tests/test_triton_kernels.py", "tests/test_routing_kernels.py"]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-o", "minversion=8"]
    # A warning of a library must not cost the one chance to see the kernels' errors.
    command += ["-W", "default", "--tb=line"]
    if session.small:
        command += ["-k", "agrees and L64-D32 or selection"]
    elif find_spec("xdist"):  # compiling takes longest, and needs no GPU
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    log = session.output / "tests.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # of each worker, which computes references
                stdout=file,
                stderr=file,
                timeout=TESTS_SHARE * session.left,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    said = log.read_text().strip().splitlines()
    last = said[-1].strip("= ") if said else "nothing said"
    session.results["tests"] = {"status": status, "said": last}
    session.summary.append(f"kernel tests: {last}")
    if status != 0:
        session.failed.append(f"kernel tests: {last}, see {log}")


def ceilings(session: Session) -> None:
    """Bytes a second of copies, read and written, and operations a second of a matrix product."""
    found = {}
    for name, size in COPIED.items():
        source = torch.ones(size // 2**8 if session.small else size, dtype=torch.uint8, device=session.device)
        target = torch.empty_like(source)
        rounds = COPIED["memory"] // size if not session.small else 4
        copies = repeated(lambda source=source, target=target: target.copy_(source), rounds, session.device)
        seconds = 1e-3 * min(bench.milliseconds(copies, session.device) for _ in range(4))
        found[name] = 2 * source.numel() * rounds / seconds
    found["operations"] = bench.peak_operations(session.dtype, session.device)
    session.results["ceilings"] = found
    session.summary.append(
        f"ceilings: copy {found['memory'] / 1e9:.0f} GB/s, in cache {found['cache'] / 1e9:.0f} GB/s, "
        f"product {found['operations'] / 1e12:.3g} TFLOP/s"
    )


def repeated(call: Callable[[], object], rounds: int, device: torch.device) -> Callable[[], object]:
    """The call many times: on a GPU as a graph, as launches one by one take longer than small copies."""

    def run() -> None:
        for _ in range(rounds):
            call()

    run()
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def attention(session: Session) -> None:
    """Forward and backward of both sizes: dense backends, SLA 95 % and SLA2 97 % at 64 and 128 rows, flex, a peer."""
    sla, sla2 = SLAConfig(), SLAConfig(method="sla2", sparsity=0.97)
    chosen = (sla, sla.replace(linear="all"), sla2, sla2.replace(low_bit="fp8"), sla2.replace(low_bit="int8"))
    configs = [config.replace(block_q=block_q) for block_q in (128, 64) for config in chosen]
    rows: list[Row] = []
    pictures: dict[str, list[Row]] = {}
    for name, shape in session.shapes().items():
        if session.out_of_time(f"attention of {name}"):
            continue
        right = [config for config in configs if session.correct(shape, config)]
        if not right:
            continue
        flex = session.device.type == "cuda"
        found, missing = contenders(session, shape, right, flex=flex)
        grad = Inputs(shape, right[0]).grad
        pictures[name] = bench.measure(shape, found, grad, session.repeats, True, session.console)
        rows += pictures[name]
        bench.show(pictures[name], f"{name}: {shape}", "", session.console)
        session.summary += [f"not here: {line}" for line in missing]
        session.summary += ratios(name, pictures[name])
        session.results["attention"] = [dataclasses.asdict(row) for row in rows]
        session.keep("attention", rows, {f"attention-{key}": value for key, value in pictures.items()})
        session.write()  # the next size may take longer than whoever waits


def contenders(
    session: Session, shape: Shape, configs: list[SLAConfig], *, flex: bool
) -> tuple[list[Contender], list[str]]:
    """All rivals of the first configuration, and ours for each, named after it."""
    inputs = Inputs(shape, configs[0])
    found, missing = bench_rivals.contenders(
        shape, configs[0], inputs, backward=True, flex=flex, peer=session.peer if flex else None
    )
    found = [contender for contender in found if contender.name != bench_rivals.OURS]
    for config in configs:
        given = Inputs(shape, config)
        # The tokens are the same: one copy of them.
        given.query, given.key, given.value, given.grad = inputs.query, inputs.key, inputs.value, inputs.grad
        found.append(bench_rivals.ours(shape, config, given, label(config)))
    return found, missing


def ratios(name: str, rows: list[Row]) -> list[str]:
    lines = []
    for direction in dict.fromkeys(row.direction for row in rows):
        parts = [
            f"{row.name} {row.p50:.3g} ms ({row.dense_over_this:.2f}x)" for row in rows if row.direction == direction
        ]
        lines.append(f"{name} {direction}: {', '.join(parts)}")
    return lines


def kernels(session: Session) -> None:
    """Time of every kernel of a forward and a backward, as a profiler sees it, next to the roofline of its work."""
    measured = session.results.get("ceilings")
    if measured is None:
        ceilings(session)
        measured = session.results["ceilings"]
    limits = Ceilings(**measured)
    session.results["kernels"] = found = []
    for name, shape in session.shapes().items():
        low_bit = SLAConfig(method="sla2", sparsity=0.97, block_q=128, low_bit="fp8")
        for config in (SLAConfig(block_q=128), SLAConfig(block_q=64), low_bit):
            if session.out_of_time(f"kernels of {name}, {label(config)}") or not session.correct(shape, config):
                continue
            inputs = Inputs(shape, config)
            leaves = (*inputs.tokens, *inputs.parameters.values())
            output = inputs.attention(config)

            def forward(inputs: Inputs = inputs, config: SLAConfig = config) -> None:
                with torch.no_grad():
                    inputs.attention(config)

            def backward(output: Any = output, leaves: Any = leaves, inputs: Inputs = inputs) -> None:
                torch.autograd.grad(output, leaves, inputs.grad, retain_graph=True)

            for direction, call in (("forward", forward), ("backward", backward)):
                work = kernel_work(shape, config, backward=direction == "backward")
                floors = {kernel: each.milliseconds(limits) for kernel, each in work.items()}
                times = kernel_times(call, session.device, session.repeats)
                found.append(
                    {"shape": name, "config": label(config), "direction": direction, "ms": times, "roofline_ms": floors}
                )
                session.summary.append(
                    f"{name} {label(config)} {direction}: {sum(times.values()):.3g} ms in kernels, "
                    f"roofline {sum(floors.values()):.3g}"
                )
                slowest = sorted(times, key=lambda kernel: -times[kernel])[:KERNELS_SHOWN]
                for kernel in dict.fromkeys([*slowest, *floors]):
                    taken = f"{times[kernel]:.3g} ms" if kernel in times else "under another name"
                    floor = f", roofline {floors[kernel]:.3g}" if kernel in floors else ""
                    session.summary.append(f"    {kernel[:60]} {taken}{floor}")
                session.write()  # as in attention


def kernel_times(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds that a call spends in each kernel (on the CPU: operator), by name."""
    gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            call()
        if gpu:
            torch.cuda.synchronize(device)
    microseconds = "self_device_time_total" if gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, microseconds) / repeats / 1e3 for event in seen.key_averages()}
    return {name: ms for name, ms in times.items() if ms > 0}


def sweep(session: Session) -> None:
    """From which length on each sparsity is faster than the fastest dense attention."""
    lengths = (256, 512) if session.small else SWEPT_LENGTHS
    sizes = next(iter(session.shapes().values()))
    configs = [SLAConfig(sparsity=sparsity, block_q=128) for sparsity in SWEPT_SPARSITIES]
    rows: list[Row] = []
    for length in lengths:
        if session.out_of_time(f"sweep at {length} tokens"):
            continue
        shape = dataclasses.replace(sizes, length=length)
        right = [config for config in configs if session.correct(shape, config)]
        if not right:
            continue
        found, _ = contenders(session, shape, right, flex=False)
        grad = Inputs(shape, right[0]).grad
        rows += bench.measure(shape, found, grad, session.repeats, True, session.console)
        session.results["sweep"] = [dataclasses.asdict(row) for row in rows]
        session.keep("sweep", rows, {"sweep": rows})
        session.write()
    for config in configs:
        for direction in ("forward", "backward"):
            mine = [row for row in rows if row.name == label(config) and row.direction == direction]
            faster = min((row.length for row in mine if row.dense_over_this > 1), default=math.inf)
            parts = ", ".join(f"{row.length}: {row.dense_over_this:.2f}x" for row in mine)
            session.summary.append(f"sweep {label(config)} {direction}: faster from {faster:g} tokens on ({parts})")


def pieces(session: Session) -> None:
    """Time and memory against the size of the pieces that a call works in: smaller ones stay in the cache."""
    from sla_compile.kernels import gpu

    name, shape = next(iter(session.shapes().items()))
    config, kept = SLAConfig(block_q=128), gpu.TRANSIENT_BYTES
    if not session.correct(shape, config):
        return
    found, _ = contenders(session, shape, [config], flex=False)
    compared = [next(one for one in found if one.name.startswith("dense")), found[-1]]
    rows: list[Row] = []
    try:
        for mebibytes in PIECES:
            if session.out_of_time(f"pieces of {mebibytes} MiB"):
                continue
            gpu.TRANSIENT_BYTES = mebibytes << 20
            grad = Inputs(shape, config).grad
            measured = bench.measure(shape, compared, grad, session.repeats, True, session.console)[2:]
            rows += [dataclasses.replace(row, name=f"{row.name}, {mebibytes} MiB") for row in measured]
    finally:
        gpu.TRANSIENT_BYTES = kept
    session.keep("pieces", rows, {})
    for row in rows:
        memory = "" if row.peak_mib is None else f", {row.peak_mib:.0f} MiB"
        session.summary.append(f"pieces of {name}, {row.name} {row.direction}: {row.p50:.3g} ms{memory}")


STEPS = {step.__name__: step for step in (tests, ceilings, attention, kernels, pieces, sweep)}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="made where it does not exist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no further measurement begins")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of the authors' kernels")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --small tries the script")
    if options.peer is not None and not (options.peer / "sparse_linear_attention").is_dir():
        parser.error(f"--peer {options.peer} holds no sparse_linear_attention")
    options.output.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    session = Session(
        device, options.small, options.repeats, options.peer, options.output, began + options.budget, Console(width=140)
    )
    for name in options.steps:
        if session.out_of_time(name):
            continue
        try:
            STEPS[name](session)
        except Exception as error:  # whatever it is, the other steps can still be measured
            session.console.print_exception()
            session.failed.append(f"{name}: {type(error).__name__}: {error}")
        session.write()
        print(f"{name} done after {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(["", *session.summary, *(f"FAILED {line}" for line in session.failed)]), flush=True)
    return int(bool(session.failed))


if __name__ == "__main__":
    sys.exit(main())
