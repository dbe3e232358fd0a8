"""The console script ``sla-compile``: one subcommand, one function in COMMANDS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sla_compile.bench_command import add_bench_parser
from sla_compile.checks import add_check_parser, add_inspect_parser
from sla_compile.config import SLAConfig
from sla_compile.usage import Subcommands, UsageError, count, device_named

if TYPE_CHECKING:
    from sla_compile.demo import DemoOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 where a check failed, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="sla-compile", description="Sparse-Linear Attention for Diffusion Transformers, inside PyTorch's compiler."
    )
    parser.add_argument("--version", action="version", version=f"sla-compile {_version()}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    given = parser.parse_args(arguments)
    try:
        return given.run(given)
    except UsageError as error:
        print(f"{given.prog}: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"{given.prog}: interrupted", file=sys.stderr)  # noqa: T201
        return 130


def add_demo(commands: Subcommands) -> None:
    """``sla-compile demo``: a small video model, accelerated, compared, drawn and fine-tuned."""
    parser = commands.add_parser(
        "demo",
        help="accelerate a small video DiT, compare it with dense attention, draw the blocks, fine-tune it",
        description="Builds a few layers of Wan2.1-1.3B's blocks with random weights, accelerates them, measures dense "
        "against accelerated, draws which blocks are computed how, and fine-tunes for a few steps. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=count, default=2, help="transformer blocks")
    parser.add_argument("--frames", type=count, default=9, help="frames of the video, 4 n + 1")
    parser.add_argument("--height", type=count, default=480, help="height of the video in pixels, a multiple of 16")
    parser.add_argument("--width", type=count, default=832, help="width of the video in pixels, a multiple of 16")
    parser.add_argument("--sparsity", type=float, default=0.95, help="share of blocks not computed exactly, in (0, 1)")
    parser.add_argument("--steps", type=_steps, default=10, help="fine-tuning steps, at least 2")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the measurement; auto is bfloat16 on cuda and float32 on the cpu",
    )
    parser.add_argument("--output", type=Path, default=Path("sla-demo.png"), help="where the picture goes")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile, which needs a C++ compiler"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one layer, a clip of 220 tokens, 3 steps, no compilation, whatever is said above: does it run at all?",
    )
    parser.set_defaults(run=run_demo, prog=parser.prog)


def run_demo(given: argparse.Namespace) -> int:
    """Checks the options of ``demo`` and runs it."""
    missing = [name for name in ("diffusers", "accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the demo needs {', '.join(missing)}; install everything it needs with: "
            'pip install "sla-compile[demo]", or in a checkout: pip install -e ".[demo]"'
        )
    from torch._dynamo.exc import BackendCompilerFailed

    from sla_compile.demo import run

    options = _demo_options(given)
    try:
        return run(options)
    except BackendCompilerFailed as error:
        if type(error.inner_exception).__name__ != "InvalidCxxCompiler":
            raise
        raise UsageError(
            "torch.compile found no C++ compiler; install g++ or clang, name one in the environment variable CXX, "
            "or give --no-compile"
        ) from None
    except torch.OutOfMemoryError as error:
        text = str(error).partition(". ")[0]
        raise UsageError(f"{text}; give fewer --frames or --layers, or a smaller --height and --width") from None


def _demo_options(given: argparse.Namespace) -> DemoOptions:
    from sla_compile.demo import Clip, DemoOptions

    if given.quick:
        given.layers, given.frames, given.height, given.width = 1, 5, 160, 176
        given.steps, given.no_compile = 3, True
    try:
        clip = Clip(given.frames, given.height, given.width)
        config = SLAConfig(sparsity=given.sparsity, negligible=min(0.10, given.sparsity))
    except ValueError as error:
        raise UsageError(str(error)) from None
    device = device_named(given.device)
    name = given.dtype if given.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    if not given.output.parent.is_dir():
        raise UsageError(f"--output {given.output}: the folder {given.output.parent} does not exist")
    if given.output.suffix.lower() != ".png":
        raise UsageError(f"--output {given.output}: the picture is a PNG, so the name must end in .png")
    return DemoOptions(
        clip=clip,
        layers=given.layers,
        steps=given.steps,
        config=config,
        device=device,
        dtype=DTYPES[name],
        output=given.output,
        compile=not given.no_compile,
    )


def _steps(text: str) -> int:
    return count(text, minimum=2)  # of one loss nobody can say whether it fell


def _version() -> str:
    try:
        return version("sla-compile")
    except PackageNotFoundError:
        return "(uninstalled checkout)"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMMANDS: tuple[Callable[[Subcommands], None], ...] = (add_demo, add_inspect_parser, add_check_parser, add_bench_parser)
