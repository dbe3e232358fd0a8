"""Export an accelerated network: a .pt2 program, one in core ATen, and an AOTInductor package that needs no Python.

python examples/export_pt2.py            # 4096 tokens and more, a minute or two
python examples/export_pt2.py --small    # a few hundred tokens
"""

import argparse
import tempfile
from pathlib import Path

import torch
from export_onnx import build, relative_difference

import sla_compile.export


@torch.no_grad()
def main(arguments: list[str] | None = None) -> float:
    """Returns the largest relative difference between the package and the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--output", type=Path, help="folder for the files; a temporary one by default")
    given = parser.parse_args(arguments)
    folder = given.output or Path(tempfile.mkdtemp())
    model, lengths = build(given.small)

    tokens = torch.export.Dim("tokens", min=64, max=65536)
    inputs = model.make_inputs(lengths[0])
    program = torch.export.export(model, inputs, dynamic_shapes={"x": {1: tokens}})
    # One readable node per attention. Loading takes `import sla_compile`, which brings the operator.
    torch.export.save(program, folder / "program.pt2")
    # The operator as core ATen: loads and runs where there is no sla_compile.
    core = program.run_decompositions(sla_compile.export.decompositions())
    torch.export.save(core, folder / "core_aten.pt2")
    # Machine code. torch._inductor.aoti_load_package loads it, or AOTIModelPackageLoader in C++.
    package = torch._inductor.aoti_load_package(sla_compile.export.aoti(program, folder / "compiled.pt2"))

    worst = 0.0
    for length in lengths:
        (x,) = model.make_inputs(length)
        expected = model(x)
        for name, run in (("program", program.module()), ("core ATen", core.module()), ("package", package)):
            difference = relative_difference(run(x), expected)
            worst = max(worst, difference)
            print(f"{length} tokens, {name}: {difference:.1e} from the model")
    print("written to", folder)
    return worst


if __name__ == "__main__":
    main()
