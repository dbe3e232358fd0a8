"""The ONNX export of sparse-linear attention over that of dense attention, in ONNX Runtime on the CPU.

    python benchmarks/onnx_runtime.py --length 8192 --dim 64 128

Each file runs in a process of its own: process time on one thread, and how much resident memory running it added at its
peak (Linux). The numbers are compared with PyTorch's first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sla_compile
import sla_compile.export

ALLOWED = 1e-5  # relative difference from PyTorch
VARIANTS = ("dense", "dense, opset 23", "sparse-linear", "sparse-linear, dynamic length")


class Dense(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class SparseLinear(nn.Module):
    def __init__(self, dim: int, sparsity: float) -> None:
        super().__init__()
        self.config = sla_compile.SLAConfig(sparsity=sparsity)
        self.weight, self.bias = nn.Parameter(torch.randn(dim, dim) * dim**-0.5), nn.Parameter(torch.randn(dim))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sla_compile.sparse_linear_attention(
            query, key, value, config=self.config, proj_weight=self.weight, proj_bias=self.bias
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--run", nargs=2, metavar=("FILE", "INPUTS"), help="what the processes do; prints JSON")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run, arguments.repeats)))
        return
    for dim in arguments.dim:
        rows = {name: measured(name, dim, arguments) for name in VARIANTS}
        report(dim, rows, arguments)


@torch.no_grad()
def measured(name: str, dim: int, arguments: argparse.Namespace) -> dict:
    """Exports, checks and times one variant."""
    torch.manual_seed(0)
    tokens = [torch.randn(1, arguments.length, arguments.heads, dim).transpose(1, 2) for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/attention.onnx"
        if name.startswith("dense"):
            model: nn.Module = Dense()
            opset = 23 if "23" in name else sla_compile.export.onnx_program.DEFAULT_OPSET
            torch.onnx.export(model.eval(), tuple(tokens), path, dynamo=True, opset_version=opset, verbose=False)
        else:
            model = SparseLinear(dim, arguments.sparsity).eval()
            length = torch.export.Dim("length", max=1 << 20)
            shapes = ({2: length},) * 3 if "dynamic" in name else None
            sla_compile.export.onnx(model, path, tuple(tokens), dynamic_shapes=shapes)
        torch.save((tokens, model(*tokens)), f"{folder}/inputs.pt")
        command = [sys.executable, __file__, "--run", path, f"{folder}/inputs.pt", "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
    result = json.loads(done.stdout)
    if not result["difference"] < ALLOWED:
        sys.exit(f"{name} is off by {result['difference']:.1e}, allowed {ALLOWED:.0e}: nothing measured")
    return result


def run(path: str, inputs_path: str, repeats: int) -> dict:
    """Difference from PyTorch, milliseconds of each run but the first two, and added peak memory in MiB."""
    import onnxruntime

    tokens, expected = torch.load(inputs_path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: tensor.contiguous().numpy() for entry, tensor in zip(session.get_inputs(), tokens, strict=True)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, times = memory("VmRSS"), []
    for _ in range(repeats + 2):  # two to warm up: the memory pattern is learned in the first
        start = time.process_time()
        (result,) = session.run(None, feed)
        times.append(1e3 * (time.process_time() - start))
    added = memory("VmHWM") - before
    difference = (torch.from_numpy(result) - expected).abs().max() / expected.abs().max()
    version = onnxruntime.__version__
    return {"difference": difference.item(), "times": times[2:], "memory": added, "onnxruntime": version}


def memory(entry: str) -> float:
    """MiB of resident memory: VmRSS now, VmHWM at the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024


def report(dim: int, rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    shape = f"B1 H{arguments.heads} L{arguments.length} D{dim} float32"
    table = Table(title=f"ONNX Runtime, {shape}, sparsity {arguments.sparsity}")
    for column in ("", "p20 ms", "p50 ms", "p80 ms", "times faster", "MiB", "difference"):
        table.add_column(column, justify="right" if column else "left")
    dense = statistics.median(rows["dense"]["times"])
    for name, row in rows.items():
        low, _, _, high = statistics.quantiles(row["times"], n=5)
        middle = statistics.median(row["times"])
        table.add_row(
            name, f"{low:.1f}", f"{middle:.1f}", f"{high:.1f}", f"{dense / middle:.2f}", f"{row['memory']:.0f}",
            f"{row['difference']:.1e}",
        )  # fmt: skip
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    table.caption = (
        f"process time, 1 thread, {arguments.repeats} runs; {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"onnxruntime {rows['dense']['onnxruntime']}, commit {git.stdout.strip() or 'unknown'}"
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
