"""Every way out of Python for small transformers of diffusers: largest difference from the eager model in each cell.

python benchmarks/export_matrix.py --output matrix.md

Six accelerated models of tests/zoo.py at sparsity 0.7, in float32 on the CPU. A cell that fails says whether the dense
model fails there, too. Takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
import zoo
from export_cases import build_runner, difference, run_python, run_runner
from export_tensorrt import ROWS_PER_STEP, build_engine
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import sla_compile
import sla_compile.export

MODELS = {
    "Wan": "WanTransformer3DModel",
    "HunyuanVideo, masked": "HunyuanVideoTransformer3DModel",
    "Flux, joint": "FluxTransformer2DModel",
    "CogVideoX": "CogVideoXTransformer3DModel",
    "LTX": "LTXVideoTransformer3DModel",
    "DiT": "DiTTransformer2DModel",
}
COLUMNS = (
    "strict", "not strict", "dynamic", ".pt2 reloaded", "AOTI Python", "AOTI C++", "onnx.checker", "ONNX Runtime",
    "TensorRT-RTX",
)  # fmt: skip
SHOWN = {"onnx.checker": "passes", "TensorRT-RTX": "{:.1f} MiB"}  # differences in the others
LEGEND = """
* **strict**, **not strict**: `torch.export.export` with the one length; **dynamic**: not strict, with every size
  dynamic that differs between short and long inputs (DiT: the batch, since its position embeddings fix the length; LTX
  gets its positions as a tensor, since numbers are fixed in any program), compared at three sizes. This program goes on
  to the other columns, which compare at all three, too.
* **.pt2 reloaded**: `torch.export.save`, loaded in a fresh process after `import sla_compile` alone.
* **AOTI Python**: `sla_compile.export.aoti`, loaded in a fresh process that does not import sla_compile; **AOTI C++**:
  by a program that is not linked with Python.
* **onnx.checker**: of the file of `sla_compile.export.onnx`, with full_check; **ONNX Runtime**: on the CPU.
* **TensorRT-RTX**: size of the engine built from such a file for sm_89 and sm_120; there was no GPU to run it.

Differences are the largest of all outputs and sizes, relative to the output's largest value. The eager model runs in
the CPU kernels, as the first four columns do; the others are other code.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(MODELS)}; all without")
    parser.add_argument("--output", type=Path, help="Markdown file to write; printed without")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        runner = build_runner(Path(folder))
        for title in options.models or MODELS:
            start = time.perf_counter()
            (Path(folder) / title).mkdir()
            rows[title] = Model(MODELS[title], True, Path(folder) / title, runner).cells()
            print(f"{time.perf_counter() - start:6.1f} s  {title}: {rows[title]}", file=sys.stderr, flush=True)
    table = markdown(rows)
    if options.output:
        options.output.write_text(table)
    else:
        print(table)


class Model:
    """One model, accelerated or dense, with inputs of three sizes."""

    def __init__(self, name: str, accelerated: bool, folder: Path, runner: Path) -> None:
        self.name, self.folder, self.runner = name, folder, runner
        self.calls = [_inputs(name, extra) for extra in range(3)]
        if not _different(self.calls):
            self.calls = [_repeated(self.calls[0], times) for times in (2, 1, 3)]
        self.model = accelerate(name, self.calls[0]) if accelerated else zoo.build(name)
        with torch.no_grad():
            self.expected = [zoo.outputs(self.model(**call)) for call in self.calls]
        self.accelerated = accelerated

    def cells(self) -> dict[str, float | str]:
        """The largest difference in each column, or why there is none."""
        result: dict[str, float | str] = {}
        for column, step in zip(COLUMNS, self.steps(), strict=True):
            try:
                with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                    result[column] = step()
            except Exception as error:
                result[column] = f"{type(error).__name__}: {_first_line(error)}"
            torch._dynamo.reset()
        if self.accelerated and any(isinstance(cell, str) for cell in result.values()):
            dense = Model(self.name, False, self.folder, self.runner).cells()
            for column, cell in result.items():
                if isinstance(cell, str):
                    result[column] = (
                        f"{cell} (the dense model {'too' if isinstance(dense[column], str) else 'does not'})"
                    )
        return result

    def steps(self) -> list[Callable[[], float]]:
        return [
            lambda: self.worst(self.exported(True, False).module(), 1),
            lambda: self.worst(self.exported(False, False).module(), 1),
            lambda: self.worst(self.dynamic().module()),
            self.reloaded,
            self.aoti_python,
            self.aoti_cpp,
            self.onnx,
            self.onnx_runtime,
            self.tensorrt,
        ]

    def worst(self, run: Callable, calls: int = 3) -> float:
        pairs = zip(self.calls[:calls], self.expected[:calls], strict=True)
        return max(_difference(zoo.outputs(run(**call)), expected) for call, expected in pairs)

    def exported(self, strict: bool, dynamic: bool) -> ExportedProgram:
        shapes = _different(self.calls) if dynamic else None
        program = torch.export.export(self.model, (), self.calls[0], strict=strict, dynamic_shapes=shapes)
        if self.accelerated:
            found = sla_compile.export.decompose.count_operators(program)
            if found != zoo.ZOO[self.name].rewritten:
                raise RuntimeError(f"{found} operators in the graph, expected {zoo.ZOO[self.name].rewritten}")
        return program

    def dynamic(self) -> ExportedProgram:
        if not hasattr(self, "program"):
            self.program = self.exported(False, True)
        return self.program

    def fresh(self, script: str, file: Path) -> float:
        """Compares in a new process, which prints the largest difference."""
        torch.save((self.calls, self.expected), self.folder / "calls.pt")
        done = run_python(script + _COMPARE, file, self.folder / "calls.pt")
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return float(done.stdout.split()[-1])

    def reloaded(self) -> float:
        file = self.folder / "program.pt2"
        torch.export.save(self.dynamic(), file)
        script = "import sys, torch\n" + "import sla_compile\n" * self.accelerated
        return self.fresh(script + "run = torch.export.load(sys.argv[1]).module()\n", file)

    def aoti_python(self) -> float:
        if self.accelerated:
            sla_compile.export.aoti(self.dynamic(), self.package)
        else:
            torch._inductor.aoti_compile_and_package(self.dynamic(), package_path=str(self.package))
        return self.fresh("import sys, torch\nrun = torch._inductor.aoti_load_package(sys.argv[1])\n", self.package)

    @property
    def package(self) -> Path:
        return self.folder / "package.pt2"

    def aoti_cpp(self) -> float:
        def run(call: dict) -> list[Tensor]:
            return [run_runner(self.runner, self.package, _tensors(self.dynamic(), call).values(), self.folder)]

        return max(_difference(run(call), out[:1]) for call, out in zip(self.calls, self.expected, strict=True))

    def onnx(self) -> float:
        """Nothing to compare: the checker passes or raises."""
        file = self.folder / "model.onnx"
        if self.accelerated:
            sla_compile.export.onnx(self.dynamic(), file)
        else:
            torch.onnx.export(self.dynamic(), dynamo=True, verbose=False).save(file)
        return 0.0

    def onnx_runtime(self) -> float:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"), providers=["CPUExecutionProvider"])

        def run(call: dict) -> list[Tensor]:
            tensors = _tensors(self.dynamic(), call)
            feed = {entry.name: tensors[entry.name].numpy() for entry in session.get_inputs()}
            return [torch.from_numpy(result) for result in session.run(None, feed)]

        return max(_difference(run(call), out) for call, out in zip(self.calls, self.expected, strict=True))

    def tensorrt(self) -> float:
        """MiB of an engine for two GPUs, neither of which is here to run it."""
        file = self.folder / "for_tensorrt.onnx"
        if self.accelerated:
            sla_compile.export.onnx(self.dynamic(), file, rows_per_step=ROWS_PER_STEP)
        else:
            file = self.folder / "model.onnx"
        calls = [_tensors(self.dynamic(), call) for call in self.calls]
        shapes = {}
        for name, usual in calls[0].items():
            every = [call[name].shape for call in calls]
            shapes[name] = tuple(map(min, *every)), tuple(usual.shape), tuple(map(max, *every))
        return len(build_engine(file, shapes, ("89", "120"))) / 2**20


_COMPARE = """
worst = 0.0
calls, expected = torch.load(sys.argv[2])
for inputs, outputs in zip(calls, expected):
    with torch.no_grad():
        results = [t for t in torch.utils._pytree.tree_leaves(run(**inputs)) if isinstance(t, torch.Tensor)]
    for result, output in zip(results, outputs, strict=True):
        worst = max(worst, ((result - output).abs().max() / output.abs().max()).item())
print(worst)
"""


def accelerate(name: str, inputs: dict) -> nn.Module:
    """The accelerated model, with a projection that is not zero, so that the linear branch matters."""
    config = sla_compile.SLAConfig(sparsity=0.7, min_seq_len=zoo.MIN_SEQ_LEN)
    model = sla_compile.accelerate(zoo.build(name), config=config, example_inputs=inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sla_compile.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _inputs(name: str, extra: int) -> dict[str, Any]:
    call = zoo.inputs(name, extra)
    if name == "LTXVideoTransformer3DModel":  # numbers of frames and rows are baked; positions as a tensor are not
        sizes = (call.pop("num_frames"), call.pop("height"), call.pop("width"))
        positions = torch.cartesian_prod(*(torch.arange(size).float() for size in sizes))
        call["video_coords"] = positions.T[None].contiguous()
    return call


def _different(calls: list[dict]) -> dict[str, Any] | None:
    """Dynamic shapes of the sizes that differ between the calls, or None where none does."""
    first, *others = calls
    found = False

    def shape(*leaves: Any) -> Any:
        nonlocal found
        if not isinstance(leaves[0], Tensor):
            return None
        axes = [axis for axis in range(leaves[0].dim()) if len({leaf.shape[axis] for leaf in leaves}) > 1]
        found = found or bool(axes)
        return dict.fromkeys(axes, Dim.AUTO)

    shapes = pytree.tree_map(shape, first, *others)
    return shapes if found else None


def _repeated(call: dict, times: int) -> dict:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.repeat(times, *(1,) * (tensor.dim() - 1)), call)


def _tensors(program: ExportedProgram, call: dict) -> dict[str, Tensor]:
    """The call's tensors by their names in the program, in its order."""
    leaves = pytree.tree_leaves(((), call))
    names = program.graph_signature.user_inputs
    return {str(name): leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}


def _difference(results: list[Tensor], expected: list[Tensor]) -> float:
    return max(difference(*pair) for pair in zip(results, expected, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def markdown(rows: dict[str, dict[str, float | str]]) -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for title, cells in rows.items():
        shown = []
        for column, cell in cells.items():
            if isinstance(cell, str):
                notes.append(f"{title}, {column}: {cell}")
                shown.append(f"fails [{len(notes)}]")
            else:
                shown.append(SHOWN.get(column, "{:.1e}").format(cell))
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    lines += [""] * bool(notes) + [f"[{index}] {note}  " for index, note in enumerate(notes, 1)]
    packages = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx_cu13_libs")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return "\n".join([*lines, LEGEND, versions, ""])


if __name__ == "__main__":
    main()
