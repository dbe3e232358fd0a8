"""ONNX files of accelerated models: checked, and run in ONNX Runtime against PyTorch."""

import functools
import importlib
import os

import pytest
import torch
from export_cases import (
    BLOCK_MAP,
    CASES,
    LENGTHS,
    NETWORK_SHAPES,
    SLA2_BY_BLOCK,
    Attention,
    difference,
    network,
)
from models import build, make_inputs
from sampling import every_other, pairs
from torch.export import export

import sla_compile
from sla_compile import SLAConfig
from sla_compile.export import onnx_translations

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    # run_decompositions copies tree specifications, whose class warns about it from inside the standard library
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unable to import .torchvision:UserWarning"),
]
TOLERANCE = 5e-6
# Each export would read the source of some 500 functions of onnxscript anew, a third of its time.
scripts = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
scripts.get_torchlib_ops = functools.cache(scripts.get_torchlib_ops)


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = [tensor.numpy() for tensor in inputs if tensor is not None]
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])


def file_of(model, path, inputs, shapes=None, **options):
    with torch.no_grad():
        sla_compile.export.onnx(model.eval(), path, inputs, dynamic_shapes=shapes, **options)
    return path


def graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


@pytest.mark.parametrize("case", every_other(CASES), ids=lambda case: case.name)
def test_one_file_for_every_length(case, tmp_path):
    model = Attention(case)
    path = file_of(model, tmp_path / "attention.onnx", case.inputs(200), case.dynamic_shapes)
    for length in LENGTHS:
        inputs = case.inputs(length)
        result, expected = run(path, *inputs), model(*inputs)
        assert result.dtype == expected.dtype
        assert difference(result, expected) < TOLERANCE, length


@pytest.mark.parametrize(
    ("case", "length"),
    pairs([*every_other(CASES, 1), BLOCK_MAP, SLA2_BY_BLOCK], [192, 200]),
    ids=lambda one: getattr(one, "name", one),
)
def test_static_length(case, length, tmp_path):
    model, inputs = Attention(case), case.inputs(length)
    path = file_of(model, tmp_path / "attention.onnx", inputs)
    assert difference(run(path, *inputs), model(*inputs)) < TOLERANCE


@pytest.mark.parametrize("opset", every_other([18, 20, 23]))
def test_network_in_standard_operators(opset, tmp_path):
    model = network(depth=2)
    path = file_of(model, tmp_path / "network.onnx", make_inputs(200), NETWORK_SHAPES, opset_version=opset)
    for length in (200, 64, 333):
        assert difference(run(path, *make_inputs(length)), model(*make_inputs(length)).detach()) < TOLERANCE
    model = onnx.load(path)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", opset)}
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    assert {node.domain for node in nodes} == {""}
    # Rows and linear branch of two attentions; nobody asked for the log-sum-exp.
    assert sum(node.op_type == "Loop" for node in nodes) == 4


def test_unused_statistics_are_gone_and_used_ones_right(tmp_path):
    case = CASES[1]
    scalars = (0.2, *sla_compile.ops.op_scalars(case.config, 12, None)[1:])

    class Statistics(torch.nn.Module):
        def forward(self, query, key, value, weight, bias, mask, block_map, *sla2):
            return torch.ops.sla_compile.sparse_linear_attention(
                query, key, value, weight, bias, *sla2, mask, block_map, *scalars
            )[1]

    for number in (1, 3):  # also one with pinned tokens
        case = CASES[number]
        scalars = (0.2, *sla_compile.ops.op_scalars(case.config, 12, None)[1:])
        path = file_of(Statistics(), tmp_path / "statistics.onnx", case.inputs(200))
        torch.testing.assert_close(run(path, *case.inputs(200)), Statistics()(*case.inputs(200)))


@pytest.mark.parametrize(("rows", "case"), pairs([1, 3, 100], [CASES[1], CASES[3]]), ids=lambda one: str(one)[:30])
def test_any_number_of_rows_in_a_step(rows, case, tmp_path):
    model, inputs = Attention(case), case.inputs(333)
    path = file_of(model, tmp_path / "attention.onnx", inputs, rows_per_step=rows)
    assert difference(run(path, *inputs), model(*inputs)) < TOLERANCE


def test_float16(tmp_path):
    model = network().half()
    inputs = tuple(tensor.half() for tensor in make_inputs(200))
    path = file_of(model, tmp_path / "network.onnx", inputs, NETWORK_SHAPES)
    with torch.no_grad():
        exact = network()(*make_inputs(200))
        eager = difference(model(*inputs), exact)
    result = run(path, *inputs)
    assert result.dtype == torch.float16
    assert difference(result, exact) < 2 * eager


def test_the_work_is_sparse(tmp_path):
    """No value of the graph is as large as the scores of dense attention, nor as all gathered keys."""

    class Call(torch.nn.Module):
        def forward(self, query, weight):
            return sla_compile.sparse_linear_attention(query, query, query, config=SLAConfig(), proj_weight=weight)

    length = 2048
    inputs = torch.randn(1, 2, length, 64), torch.randn(64, 64)
    path = file_of(Call(), tmp_path / "attention.onnx", inputs)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    sizes = {}
    for graph in graphs(model.graph):
        for value in graph.value_info:
            sizes[value.name] = 1
            for size in value.type.tensor_type.shape.dim:
                sizes[value.name] *= size.dim_value
    assert len(sizes) > 40
    assert max(sizes.values()) <= 65 * length * 2
    assert difference(run(path, *inputs), Call()(*inputs)) < TOLERANCE


def test_plain_export_names_the_operator_and_takes_the_table(tmp_path):
    model = network()
    with pytest.raises(Exception, match=r"sla_compile\.sparse_linear_attention") as error:
        torch.onnx.export(model, make_inputs(200), dynamo=True, verbose=False)
    assert "No ONNX function found" in str(error.value)
    program = torch.onnx.export(
        model, make_inputs(200), dynamo=True, verbose=False, custom_translation_table=onnx_translations()
    )
    program.save(tmp_path / "network.onnx")
    result = run(tmp_path / "network.onnx", *make_inputs(200))
    assert difference(result, model(*make_inputs(200)).detach()) < TOLERANCE


def test_weights_in_a_file_of_their_own(tmp_path):
    model = network()
    path = file_of(model, tmp_path / "network.onnx", make_inputs(200), external_data=True)
    assert sorted(os.listdir(tmp_path)) == ["network.onnx", "network.onnx.data"]
    assert difference(run(path, *make_inputs(200)), model(*make_inputs(200)).detach()) < TOLERANCE


def test_length_outside_of_a_static_file(tmp_path):
    path = file_of(network(), tmp_path / "network.onnx", make_inputs(200))
    with pytest.raises(Exception, match=r"Got: 333 Expected: 200"):
        run(path, *make_inputs(333))


def test_length_outside_of_the_exported_range(tmp_path):
    """A file holds no ranges, and is right at any length."""
    model = network()
    path = file_of(model, tmp_path / "network.onnx", make_inputs(200), NETWORK_SHAPES)
    assert difference(run(path, *make_inputs(5000)), model(*make_inputs(5000)).detach()) < TOLERANCE


def test_errors_leave_the_file_that_was_there(tmp_path, monkeypatch):
    path, inputs = tmp_path / "network.onnx", make_inputs(200)
    path.write_bytes(b"before")
    newest = onnx.defs.onnx_opset_version()
    for version in (17, newest + 1, "20", True):
        with pytest.raises(ValueError, match=rf"opset_version must be from 18 to {newest}.*got"):
            file_of(network(), path, inputs, opset_version=version)
    with pytest.raises(ValueError, match="accelerate the model first"):
        file_of(build(0), path, inputs)
    with pytest.raises(ValueError, match="rows_per_step must be a positive integer, got 0"):
        file_of(network(), path, inputs, rows_per_step=0)
    for args in (inputs[0], {"x": inputs[0], "context": inputs[1]}):  # a tuple of it would be its rows, or its names
        with pytest.raises(TypeError, match="args must be a tuple.*kwargs a dict.*got args of type"):
            file_of(network(), path, args)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        sla_compile.export.onnx(network().train(), path, inputs)
    with pytest.raises(TypeError, match=r"is bfloat16, which ONNX Runtime does not run.*bfloat16=True"):
        file_of(network().bfloat16(), path, tuple(tensor.bfloat16() for tensor in inputs))
    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            file_of(network(), path, inputs)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r'onnxscript: pip install "sla-compile\[onnx\]"'):
            file_of(network(), path, inputs)
    assert os.listdir(tmp_path) == ["network.onnx"]
    assert path.read_bytes() == b"before"


def test_bfloat16_where_it_is_wanted(tmp_path):
    inputs = tuple(tensor.bfloat16() for tensor in make_inputs(200))
    path = file_of(network().bfloat16(), tmp_path / "network.onnx", inputs, bfloat16=True)
    types = {entry.type.tensor_type.elem_type for entry in onnx.load(path).graph.input}
    assert types == {onnx.TensorProto.BFLOAT16}
    with pytest.raises(Exception, match="Could not find an implementation for"):  # as the error without it says
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_mask_expanded_outside_of_the_program_is_refused(tmp_path):
    class Expands(torch.nn.Module):
        def forward(self, query, mask):
            mask = mask.unsqueeze(1).expand(-1, -1, query.shape[2], -1)
            return sla_compile.sparse_linear_attention(query, query, query, config=config, key_padding_mask=mask)

    config = SLAConfig(critical_blocks=1, linear="none")
    query, mask = torch.randn(1, 2, 130, 16), (torch.arange(130) < 100).expand(1, 1, 130)
    assert file_of(Expands(), tmp_path / "inside.onnx", (query, mask)).is_file()
    with pytest.raises(ValueError, match=r"the mask mask that .* export with a mask of shape \(batch, 1, 1, tokens\)"):
        file_of(Expands(), tmp_path / "outside.onnx", (query, mask.expand(-1, 130, -1)))
    assert not (tmp_path / "outside.onnx").exists()


def test_masks_that_are_made_of_booleans(tmp_path):
    """As HunyuanVideo's, with a choice between booleans, which ONNX Runtime has no kernel for."""

    class Masked(torch.nn.Module):
        def forward(self, query, valid, fill):
            mask = valid[:, None, None].masked_fill(fill[:, None, None], True)
            mask = torch.where(fill[:, None, None], mask, valid[:, None, None])
            config = SLAConfig(linear="none", sparsity=0.7)
            return sla_compile.sparse_linear_attention(query, query, query, config=config, key_padding_mask=mask)

    inputs = torch.randn(2, 2, 200, 16), torch.rand(2, 200) > 0.5, torch.rand(2, 200) > 0.8
    path = file_of(Masked(), tmp_path / "attention.onnx", inputs)
    assert difference(run(path, *inputs), Masked()(*inputs)) < TOLERANCE


def test_low_bit_is_refused(tmp_path):
    class Call(torch.nn.Module):
        def forward(self, query):
            config = SLAConfig(linear="none", low_bit="int8")
            return sla_compile.sparse_linear_attention(query, query, query, config=config)

    with pytest.raises(Exception, match='low_bit="int8" has kernels only; accelerate with low_bit=None'):
        file_of(Call(), tmp_path / "attention.onnx", (torch.randn(1, 2, 200, 16),))
    assert not os.listdir(tmp_path)


def test_from_the_module_of_a_program(tmp_path):
    module = export(network(), make_inputs(200)).module()  # it cannot be put into eval mode
    sla_compile.export.onnx(module, tmp_path / "network.onnx", make_inputs(200))
    assert difference(run(tmp_path / "network.onnx", *make_inputs(200)), module(*make_inputs(200)).detach()) < TOLERANCE


@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_from_a_program(method, tmp_path):
    model = network(method=method)
    program = export(model, make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
    sla_compile.export.onnx(program, tmp_path / "network.onnx", input_names=["tokens", "text"])
    names = [entry.name for entry in onnx.load(tmp_path / "network.onnx").graph.input]
    assert names == ["tokens", "text"]
    assert difference(run(tmp_path / "network.onnx", *make_inputs(333)), model(*make_inputs(333)).detach()) < TOLERANCE
