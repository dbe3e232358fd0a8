"""The command line of ``sla-compile bench``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from sla_compile.config import FEATURE_MAPS, LINEAR_SCOPES, MAX_HEAD_DIM, METHODS, SLAConfig
from sla_compile.usage import Subcommands, UsageError, count, device_named

if TYPE_CHECKING:
    from sla_compile.bench import Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEER = "git clone https://github.com/thu-ml/SLA"


def add_bench_parser(commands: Subcommands) -> None:
    """``sla-compile bench``: attention next to dense attention and rivals; whole models."""
    parser = commands.add_parser(
        "bench",
        help="time sparse-linear attention against dense attention and its rivals",
        description="Checks the numbers, then times all contenders in turn in one run. The defaults are the attention "
        "of Wan2.1-1.3B at 480p on a GPU, and a smaller one on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--length", type=count, nargs="+", help="tokens; several draw lines (32760, or 8192 on the CPU)"
    )
    parser.add_argument("--heads", type=count, help="heads (12, or 2 on the CPU)")
    parser.add_argument("--dim", type=count, default=128, help="head dimension")
    parser.add_argument("--batch", type=count, default=1, help="batch size")
    parser.add_argument("--dtype", choices=DTYPES, help="of q, k and v (bfloat16, or float32 on the CPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    parser.add_argument("--threads", type=count, default=1, help="threads of the CPU")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.95], help="share of blocks not computed exactly"
    )
    parser.add_argument("--negligible", type=float, help="share of blocks that is skipped (0.1, or 0 with sla2)")
    parser.add_argument("--method", choices=METHODS, default="sla", help="SLA or SLA2")
    parser.add_argument("--linear", choices=LINEAR_SCOPES, default="marginal", help="keys of the linear branch")
    parser.add_argument("--feature-map", choices=FEATURE_MAPS, default="softmax", help="of the linear branch")
    parser.add_argument("--block-q", type=count, default=SLAConfig().block_q, help="tokens of a query block")
    parser.add_argument("--low-bit", choices=("int8", "fp8"), help="precision of the sparse branch's forward")
    parser.add_argument("--backward", action="store_true", help="the backward, too")
    parser.add_argument("--flex", action="store_true", help="block-sparse flex_attention over the same blocks, too")
    parser.add_argument(
        "--peer", type=Path, metavar="FOLDER", help=f"the authors' kernels, too, from a checkout: {PEER}"
    )
    parser.add_argument("--model", action="store_true", help="instead: forward and training step of a whole video DiT")
    parser.add_argument("--layers", type=count, default=2, help="transformer blocks of the model")
    parser.add_argument("--frames", type=count, default=9, help="frames of the model's video of 480 x 832, 4 n + 1")
    parser.add_argument("--repeats", type=count, default=9, help="rounds")
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.csv and STEM.png")
    parser.set_defaults(run=run_bench, prog=parser.prog)


def run_bench(given: argparse.Namespace) -> int:
    """0, or 1 where the numbers are wrong."""
    device = device_named(given.device)
    gpu = device.type == "cuda"
    if given.output is not None and not given.output.parent.is_dir():
        raise UsageError(f"--output {given.output}: the folder {given.output.parent} does not exist")
    if given.output is not None and find_spec("matplotlib") is None:
        raise UsageError('--output draws a picture, which needs matplotlib: pip install "sla-compile[demo]"')
    if given.dim > MAX_HEAD_DIM:
        raise UsageError(f"--dim: head dimensions up to {MAX_HEAD_DIM} are supported, got {given.dim}")
    if given.peer is not None and not (given.peer / "sparse_linear_attention").is_dir():
        raise UsageError(f"--peer {given.peer} holds no sparse_linear_attention; get it with: {PEER}")
    if given.peer is not None and not gpu:
        raise UsageError("--peer: the authors' kernels need a GPU")
    if given.model and find_spec("diffusers") is None:
        raise UsageError('--model needs diffusers: pip install "sla-compile[demo]"')
    try:
        configs = [
            SLAConfig(
                sparsity=sparsity, negligible=given.negligible, method=given.method, linear=given.linear,
                feature_map=given.feature_map, block_q=given.block_q, low_bit=given.low_bit,
            )
            for sparsity in given.sparsity
        ]  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None

    from sla_compile import bench

    torch.set_num_threads(given.threads)
    dtype = DTYPES[given.dtype or ("bfloat16" if gpu else "float32")]
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    for config in configs:
        measured = _model_rows if given.model else _rows
        found = measured(given, config, device, dtype, console)
        if found is None:
            return 1
        rows += found
    if given.output is not None:
        constants = {**bench.environment(device), "command": " ".join(["sla-compile", *sys.argv[1:]])}
        bench.write_csv(rows, given.output.with_suffix(".csv"), constants)
        bench.draw(rows, given.output.with_suffix(".png"), f"{constants['device']}, torch {constants['torch']}")
        console.print(f"wrote {given.output.with_suffix('.csv')} and {given.output.with_suffix('.png')}", markup=False)
    return 0


def _rows(
    given: argparse.Namespace, config: SLAConfig, device: torch.device, dtype: torch.dtype, console: Console
) -> list[Row] | None:
    """The rows of one configuration over all lengths; None where the numbers are wrong."""
    from sla_compile import bench, bench_rivals

    rows: list[Row] = []
    for index, length in enumerate(given.length or [32760 if device.type == "cuda" else 8192]):
        heads = given.heads or (12 if device.type == "cuda" else 2)
        shape = bench.Shape(given.batch, heads, length, given.dim, dtype, device)
        if index == 0:
            wrong = bench.check(shape, config)
            if wrong:
                print(f"{given.prog}: {wrong}", file=sys.stderr)  # noqa: T201
                return None
        inputs = bench.Inputs(shape, config)
        contenders, missing = bench_rivals.contenders(
            shape, config, inputs, backward=given.backward, flex=given.flex, peer=given.peer
        )
        found = bench.measure(shape, contenders, inputs.grad, given.repeats, given.backward, console)
        title = (
            f"{shape}, {config.method}, sparsity {config.sparsity:g}, negligible {config.negligible:g}, {config.linear}"
        )
        about = bench.environment(device)
        process = "" if device.type == "cuda" else f", process time of {given.threads} thread(s)"
        caption = (
            f"{given.repeats} rounds{process}; {about['device']}, torch {about['torch']}, commit {about['commit']}"
        )
        bench.show(found, title, caption, console)
        for line in missing:
            console.print(f"not here: {line}", highlight=False, markup=False)
        rows += found
    return rows


def _model_rows(
    given: argparse.Namespace, config: SLAConfig, device: torch.device, dtype: torch.dtype, console: Console
) -> list[Row] | None:
    """The rows of a whole model: dense and accelerated, in eager mode and compiled; None where numbers are wrong."""
    from sla_compile import bench, demo

    try:
        clip = demo.Clip(given.frames, 480, 832)
    except ValueError as error:
        raise UsageError(str(error)) from None
    wrong = bench.check(bench.Shape(1, 2, clip.tokens, 128, dtype, device), config)
    if wrong:
        print(f"{given.prog}: {wrong}", file=sys.stderr)  # noqa: T201
        return None
    config = config.replace(min_seq_len=min(config.min_seq_len, clip.tokens))
    rows = bench.measure_model(given.layers, clip, config, device, dtype, given.repeats, given.backward, console)
    about = bench.environment(device)
    title = f"Wan2.1-1.3B's blocks, {given.layers} layers, {clip}, sparsity {config.sparsity:g}"
    bench.show(rows, title, f"{given.repeats} rounds; {about['device']}, torch {about['torch']}", console)
    return rows
