"""Build TensorRT-RTX engines of an accelerated network, on a machine that needs no GPU.

python examples/export_tensorrt.py            # 4096 to 8192 tokens
python examples/export_tensorrt.py --small    # a few hundred tokens, seconds

The network goes through ONNX; the engines are made for the GPUs named by --capabilities (89: RTX 40, 120: RTX 50).
Running them takes such a GPU. Needs: pip install "sla-compile[tensorrt]"
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_onnx import build

import sla_compile.export

ROWS_PER_STEP = 256  # of the loop over critical blocks: a GPU wants more work at once than a CPU


def build_engine(onnx_path: Path, shapes: dict[str, tuple], capabilities: tuple[str, ...]) -> bytes:
    """The serialized engine of an ONNX file.

    Args:
        shapes: smallest, usual and largest shape of each input that has dynamic sizes.
        capabilities: compute capabilities of the GPUs it is for, such as "89".

    Raises:
        RuntimeError: the parser or the builder refused; the text says which node and why.
    """
    import tensorrt_rtx_libs  # noqa: F401, I001  # loads the libraries that the bindings are linked with
    import tensorrt_rtx_bindings as tensorrt

    logger = Errors(tensorrt)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = (parser.get_error(index) for index in range(parser.num_errors))
        raise RuntimeError("; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, f"SM{capability}"), index)
    dynamic = [entry for entry in map(network.get_input, range(network.num_inputs)) if -1 in tuple(entry.shape)]
    if dynamic:
        profile = builder.create_optimization_profile()
        for entry in dynamic:
            profile.set_shape(entry.name, *shapes[entry.name])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"TensorRT-RTX built no engine: {'; '.join(logger.messages)}")
    return bytes(engine)


def Errors(tensorrt: Any) -> Any:  # a class of a module that is imported late
    """A logger that keeps errors and drops the rest."""

    class Logger(tensorrt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    return Logger()


def main(arguments: list[str] | None = None) -> dict[str, int]:
    """Returns the sizes of the engines in bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--output", type=Path, help="folder for the files; a temporary one by default")
    parser.add_argument("--capabilities", nargs="+", default=["89", "120"], metavar="CAPABILITY")
    given = parser.parse_args(arguments)
    folder = given.output or Path(tempfile.mkdtemp())
    model, lengths = build(given.small)
    inputs = model.make_inputs(lengths[0])
    tokens = torch.export.Dim("tokens", min=64, max=65536)
    sizes = {}
    for name, shapes in (("static", None), ("dynamic", {"x": {1: tokens}})):
        path = folder / f"{name}.onnx"
        sla_compile.export.onnx(model, path, inputs, dynamic_shapes=shapes, rows_per_step=ROWS_PER_STEP)
        profile = {"x": tuple(model.make_inputs(n)[0].shape for n in (min(lengths), lengths[0], max(lengths)))}
        engine = build_engine(path, profile, tuple(given.capabilities))
        path.with_suffix(".engine").write_bytes(engine)
        sizes[name] = len(engine)
        print(f"{name} length: an engine of {len(engine) / 2**20:.1f} MiB for sm_{', sm_'.join(given.capabilities)}")
    print("written to", folder)
    return sizes


if __name__ == "__main__":
    main()
