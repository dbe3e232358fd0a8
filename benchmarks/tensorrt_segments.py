"""What Torch-TensorRT makes of an accelerated network: which part goes to engines, which to PyTorch.

    python -m venv env && env/bin/pip install torch==2.13.0 torch-tensorrt-rtx==2.13.0 rich safetensors
    LD_LIBRARY_PATH=env/lib/python3.11/site-packages/tensorrt_rtx_libs env/bin/python benchmarks/tensorrt_segments.py

torch must be a CUDA build. With a GPU the compiled network is run and compared with the model. Without one, torch's
questions about the device are answered for it, engines are built for --capabilities but not loaded, and the segments
are run in PyTorch on the CPU instead of in the engines, to hold that the cutting is right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import operator
import sys
import types
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from export_onnx import build, relative_difference
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

ALLOWED = 1e-5  # relative difference, in float32


def answer_for_a_device() -> None:
    """Torch-TensorRT asks for the device's capability and memory when it is imported and when it compiles."""
    properties = types.SimpleNamespace(name="none", major=8, minor=9, total_memory=24 << 30, multi_processor_count=76)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (8, 9)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.mem_get_info = lambda *_: (24 << 30, 24 << 30)
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *_: None


def build_ahead_of_time(capabilities: list[str]) -> None:
    """Lets engines be built for GPUs that are not there, and keeps them as bytes."""
    import tensorrt
    from torch_tensorrt.dynamo import _compiler
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    class Bytes:
        """Stands for tensorrt.Runtime, which would load the engine into a GPU."""

        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, engine: Any) -> Any:
            engine = bytes(engine)
            return types.SimpleNamespace(serialize=lambda: engine)

    populate = TRTInterpreter._populate_trt_builder_config

    def for_capabilities(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = populate(self, *args, **kwargs)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, f"SM{capability}"), index)
        return config

    tensorrt.Runtime = Bytes
    TRTInterpreter._populate_trt_builder_config = for_capabilities
    TorchTensorRTModule.setup_engine = lambda self: None
    TorchTensorRTModule.set_output_tensors_as_unowned = lambda self, enabled: None
    _compiler.to_torch_device = lambda device: torch.device("cpu")


def segments(compiled: GraphModule) -> list[str]:
    """One word for each part, in order: an engine with its size, or what PyTorch calls."""
    parts = []
    for node in compiled.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            parts.append(str(node.target))
        elif node.op == "call_module":
            module = compiled.get_submodule(node.target)
            if isinstance(module, GraphModule):
                called = [str(inner.target) for inner in module.graph.nodes if inner.op == "call_function"]
                parts.append(" ".join(name for name in called if "getitem" not in name) or "getitem")
            else:
                parts.append(f"engine of {len(module.serialized_engine) / 2**10:.0f} KiB")
    return parts


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", default=["89", "120"], help="what engines are for without a GPU")
    parser.add_argument("--show", action="store_true", help="print the segments")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # a page for each compilation
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        answer_for_a_device()
    import torch_tensorrt

    if not on_gpu:
        build_ahead_of_time(given.capabilities)
    import sla_compile.export.torch_tensorrt

    device = "cuda" if on_gpu else "cpu"
    model, lengths = build(small=True)
    model = model.to(device)
    inputs = [model.make_inputs(length)[0].to(device) for length in lengths]
    tokens = torch.export.Dim("tokens", min=64, max=4096)
    table = Table(title="Torch-TensorRT, 2 blocks, operator left to PyTorch")
    for column in (
        "length",
        "engines",
        "operators in engines",
        "operator in PyTorch",
        "largest difference",
        "compared",
    ):
        table.add_column(column)
    for name, shapes, compared in (("static", None, inputs[:1]), ("dynamic", {"x": {1: tokens}}, inputs)):
        compile = sla_compile.export.torch_tensorrt.compile
        options = {"min_block_size": 1, "disable_tf32": True}
        with contextlib.redirect_stdout(io.StringIO()):  # a dry run prints two pages
            cut = compile(model, (inputs[0],), dynamic_shapes=shapes, dryrun=True, **options)
        compiled = compile(model, (inputs[0],), dynamic_shapes=shapes, **options)
        if given.show:
            print(name, *segments(compiled), sep="\n    ")
        run = compiled if on_gpu else cut
        worst = max(relative_difference(run(x), model(x)) for x in compared)
        if not worst < ALLOWED:
            sys.exit(f"{name} length: {worst:.1e} from the model, allowed {ALLOWED:.0e}")
        inside = [m for n, m in cut.named_children() if "_run_on_acc" in n]
        table.add_row(
            name, str(sum("engine" in part for part in segments(compiled))),
            str(sum(node.op == "call_function" for module in inside for node in module.graph.nodes)),
            str(sla_compile.export.torch_tensorrt.operators_in_pytorch(compiled)), f"{worst:.1e}",
            "engines on the GPU" if on_gpu else "segments in PyTorch on the CPU",
        )  # fmt: skip

    core = torch.export.export(model, (inputs[0],)).run_decompositions(sla_compile.export.decompositions())
    try:
        decomposed = torch_tensorrt.dynamo.compile(core, (inputs[0],), min_block_size=1)
        told = "\n    ".join(["the decomposition instead:", *segments(decomposed)])
    except Exception as error:
        told = f"the decomposition instead: {type(error).__name__}: {str(error).splitlines()[0]}"
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torch_tensorrt_rtx", "tensorrt_rtx")
    )
    where = torch.cuda.get_device_name() if on_gpu else f"no GPU, engines for sm_{', sm_'.join(given.capabilities)}"
    table.caption = ", ".join([*versions, where])
    Console(width=120).print(table)
    print(told)


if __name__ == "__main__":
    main()
