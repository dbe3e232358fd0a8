"""AOTInductor packages of accelerated models, run from Python and from C++ without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from export_cases import (
    NETWORK_SHAPES,
    SLA2,
    Attention,
    build_runner,
    difference,
    network,
    run_python,
    run_runner,
)
from models import build, make_inputs
from sampling import ALL_CASES, every_other
from torch.export import export

import sla_compile.export

TOLERANCE = 3e-6
pytestmark = [
    # run_decompositions copies tree specifications, whose class warns about it from inside the standard library
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which AOTInductor compiles with"),
]


@pytest.fixture(scope="module", params=every_other(["sla_compile", "torch"]))
def package(request, tmp_path_factory):
    """A package with a dynamic length; with SLA_ALL_CASES=1 also as torch's own function makes it."""
    path = tmp_path_factory.mktemp("aoti") / "network.pt2"
    if request.param == "torch":
        with torch.no_grad():
            program = export(network(), make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        sla_compile.export.aoti(network(), path, make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
    assert os.listdir(path.parent) == [path.name]
    return path


def expected(length):
    with torch.no_grad():
        return network()(*make_inputs(length))


def test_every_length_from_python(package):
    run = torch._inductor.aoti_load_package(str(package))
    for length in (200, 1, 63, 64, 65, 128, 333, 1000):
        assert difference(run(*make_inputs(length)), expected(length)) < TOLERANCE, length


def test_from_cpp_without_python(package, tmp_path):
    runner = build_runner(tmp_path)
    linked = subprocess.run(["ldd", str(runner)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_python" not in linked
    assert "libpython" not in linked
    for length in (64, 333):
        result = run_runner(runner, package, make_inputs(length), tmp_path)
        assert result.shape == (1, length, 32)
        assert difference(result, expected(length)) < TOLERANCE


def test_fresh_process_without_sla_compile(package, tmp_path):
    torch.save((make_inputs(130), expected(130)), tmp_path / "expected.pt")
    script = """
        import os, sys, torch
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # packages check the range of their inputs only then
        inputs, expected = torch.load(sys.argv[2])
        run = torch._inductor.aoti_load_package(sys.argv[1])
        torch.testing.assert_close(run(*inputs), expected)
        assert "sla_compile" not in sys.modules
        run(torch.zeros(1, 5000, 32), torch.zeros(1, 5000, 32))
    """
    done = run_python(script, package, tmp_path / "expected.pt")
    assert done.returncode != 0
    assert "expected to be <= 4096, but got: 5000" in done.stderr, done.stderr


@pytest.mark.skipif(not ALL_CASES, reason="takes a minute; SLA_ALL_CASES=1 runs it")
def test_helper_static_length_mask_shared_heads_and_sla2(tmp_path):
    case = SLA2[1]
    model, inputs = Attention(case).eval(), case.inputs(200)
    path = sla_compile.export.aoti(model, tmp_path / "attention.pt2", inputs)
    assert os.listdir(tmp_path) == ["attention.pt2"]
    result = torch._inductor.aoti_load_package(path)(*inputs)
    assert difference(result, model(*inputs)) < TOLERANCE


def test_errors_leave_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"must end in \.pt2, got .*model\.so"):
        sla_compile.export.aoti(network(), tmp_path / "model.so", make_inputs(200))
    with pytest.raises(ValueError, match="accelerate the model first"):
        sla_compile.export.aoti(build(0), path, make_inputs(200))
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        sla_compile.export.aoti(network().train(), path, make_inputs(200))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        sla_compile.export.aoti(network(), tmp_path / "nowhere" / "model.pt2", make_inputs(200))
    with pytest.raises(TypeError, match="has its inputs and shapes already"):
        sla_compile.export.aoti(export(network(), make_inputs(200)), path, make_inputs(200))

    def fail(program, package_path, **_):
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("the compiler died")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RuntimeError, match="the compiler died"):
        sla_compile.export.aoti(network(), path, make_inputs(200))
    assert os.listdir(tmp_path) == ["model.pt2"]
    assert path.read_bytes() == b"before"
