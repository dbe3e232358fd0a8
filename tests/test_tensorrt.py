"""TensorRT-RTX engines of the ONNX files, built without a GPU; running them would take one."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from export_cases import CASES, Attention
from sampling import every_other, pairs
from test_onnx import file_of

pytest.importorskip("onnxscript", reason='needs pip install "sla-compile[onnx]"')
pytest.importorskip("tensorrt_rtx_libs", reason='needs pip install "sla-compile[tensorrt]"')

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of SWIG, in the bindings
]
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("example_export_tensorrt", EXAMPLES / "export_tensorrt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_network_for_two_gpus_static_and_dynamic(example, tmp_path, capsys):
    sizes = example.main(["--small", "--output", str(tmp_path)])
    assert set(sizes) == {"static", "dynamic"}
    assert all(size > 100_000 for size in sizes.values())
    assert len(re.findall(r"length: an engine of .* MiB for sm_89, sm_120", capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    ("case", "dynamic"),
    pairs(every_other([case for case in CASES if case.dtype == torch.float32], 1), [True, False]),
    ids=lambda one: ("dynamic" if one else "static") if isinstance(one, bool) else one.name,
)
def test_every_kind_of_attention(case, dynamic, example, tmp_path):
    inputs = case.inputs(200)
    path = file_of(Attention(case), tmp_path / "attention.onnx", inputs, case.dynamic_shapes if dynamic else None)
    names = ("query", "key", "value", "weight", "bias", "mask")
    calls = zip(names, *(case.inputs(length) for length in (64, 200, 333)), strict=False)
    shapes = {name: tuple(tensor.shape for tensor in tensors) for name, *tensors in calls if tensors[0] is not None}
    assert len(example.build_engine(path, shapes, ("89",))) > 100_000


def test_what_is_refused_says_why(example, tmp_path):
    class Determinant(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.det(x)

    path = tmp_path / "determinant.onnx"
    torch.onnx.export(Determinant().eval(), (torch.randn(2, 4, 4),), dynamo=True, verbose=False).save(path)
    with pytest.raises(RuntimeError, match="Det"):
        example.build_engine(path, {}, ("89",))
