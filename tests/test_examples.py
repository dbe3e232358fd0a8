"""The examples run in their small mode."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling import ALL_CASES

pytest.importorskip("diffusers")

from sla_compile import SLAConfig

FOLDER = Path(__file__).parent.parent / "examples"
EXPORT_PAGE = FOLDER.parent / "docs" / "export.md"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Examples import each other, as they do where they are run as scripts."""
    monkeypatch.syspath_prepend(str(FOLDER))


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_tested(path):
    assert any(path.name in test.read_text() for test in Path(__file__).parent.glob("test_*.py"))


def test_compile_a_dit(capsys):
    difference = load(FOLDER / "compile_a_dit.py").main(["--small", "--backend", "aot_eager"])
    # Attention over one key block in four is another function, but only one part of the network.
    assert 0 < difference < 0.1
    assert "2 of 4 attentions rewritten" in capsys.readouterr().out


def test_fine_tune_learns_and_its_file_loads(capsys):
    losses = load(FOLDER / "fine_tune.py").main(["--small"])
    assert all(math.isfinite(loss) for loss in losses)
    assert torch.tensor(losses[-5:]).mean() < torch.tensor(losses[:5]).mean()
    assert "4 parameters" in capsys.readouterr().out


def test_fine_tune_sla2_takes_both_stages(capsys, tmp_path):
    arguments = ["--small", "--folder", str(tmp_path)]
    calibration, losses = load(FOLDER / "fine_tune_sla2.py").main(arguments)
    assert [row.name for row in calibration] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert all(row.after < row.before for row in calibration)
    assert torch.tensor(losses[-5:]).mean() < torch.tensor(losses[:5]).mean()
    told = capsys.readouterr().out
    assert "blocks.1.attn1" in told and "saved and loaded" in told
    assert load(FOLDER / "fine_tune_sla2.py").main([*arguments, "--steps", "1"])[0] == calibration  # resumed


def test_moving_shapes_learns(tmp_path):
    untrained = load(FOLDER / "moving_shapes.py").main(["--small", "--steps", "1"])
    trained = load(FOLDER / "moving_shapes.py").main(["--small", "--steps", "60", "--save", str(tmp_path / "w.pt")])
    assert trained < 0.8 * untrained
    assert torch.load(tmp_path / "w.pt")


def test_ordering(capsys):
    rows = load(FOLDER / "ordering.py").main(["--small"])
    names = ["dense", "sparse only", "SLA", "SLA2, no stage 1", "SLA2", "SLA2, int8", "SLA2, fp8"]
    assert [row["name"] for row in rows] == names
    assert rows[0]["before"][0] == 0 and all(0 < row["before"][0] < 1 for row in rows[1:])
    assert rows[1]["before"] == rows[2]["before"]  # SLA's projection is zero at first
    assert rows[4]["before"][0] < rows[1]["before"][0]  # stage 1 is for this
    assert rows[4]["before"] != rows[3]["before"]
    assert all(math.isfinite(value) for row in rows for value in (*row["before"], *row["after"]))
    assert "| SLA2 | 50% |" in capsys.readouterr().out


def test_turbodiffusion(capsys):
    pytest.importorskip("transformers")  # diffusers has no pipelines without
    frames = load(FOLDER / "turbodiffusion.py").main(["--small", "--steps", "2"])
    assert frames.shape == (5, 128, 160, 3) and 0 <= frames.min() < frames.max() <= 1
    assert "2 of 4 attentions rewritten" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_export_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert load(FOLDER / "export_onnx.py").main(["--small", "--output", str(tmp_path / "network.onnx")]) < 1e-5
    assert (tmp_path / "network.onnx").is_file()


def instead_of_aoti(monkeypatch):
    """A saved program in place of the package, which takes a minute to make; tests/test_aoti.py makes some."""
    monkeypatch.setattr(
        torch._inductor,
        "aoti_compile_and_package",
        lambda program, package_path, **_: torch.export.save(program, package_path),
    )
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # by torch 2.11's export.load
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which AOTInductor compiles with")
def test_export_pt2(tmp_path, monkeypatch):
    if not ALL_CASES:
        instead_of_aoti(monkeypatch)
    assert load(FOLDER / "export_pt2.py").main(["--small", "--output", str(tmp_path)]) < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"program.pt2", "core_aten.pt2", "compiled.pt2"}


@pytest.mark.filterwarnings("ignore")  # of diffusers and the exporters
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which AOTInductor compiles with")
def test_export_page(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    compiled = "torch._inductor.aoti_load_package('wan_compiled.pt2')\n"
    if not ALL_CASES:
        instead_of_aoti(monkeypatch)
        compiled = ""
    blocks = re.findall(r"^```python\n(.*?)^```$", EXPORT_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names = {"__name__": "export_page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{EXPORT_PAGE.name}, block {number}", "exec"), names)
    with torch.no_grad():
        torch.testing.assert_close(names["video"], names["model"](**names["inputs"])[0])
    files = ("wan.pt2", "wan_core_aten.pt2", "wan_compiled.pt2", "wan.onnx")
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    alone = (
        "import sys, torch\n"
        "torch.export.load('wan_core_aten.pt2')\n"
        f"{compiled}"
        "assert not {'sla_compile', 'diffusers'} & set(sys.modules)\n"
        "import sla_compile\n"
        "torch.export.load('wan.pt2')\n"
    )
    subprocess.run([sys.executable, "-c", alone], check=True)


def test_the_committed_snapshot_has_todays_fields():
    """The check of the 14B model takes seconds that CI spends elsewhere; what changes for all sites shows here."""
    snapshot = json.loads((FOLDER / "wan2.1-14b.json").read_text())
    assert snapshot["configurations"] == {"A": SLAConfig().to_dict()}
