"""The decomposition into core ATen, and programs that are saved and loaded."""

import pytest
import torch
from export_cases import (
    BLOCK_MAP,
    CASES,
    LENGTHS,
    NETWORK_SHAPES,
    SLA2,
    SLA2_BY_BLOCK,
    Attention,
    difference,
    network,
    run_python,
)
from graph_tools import OP, ops, targets
from models import SelfAttention, make_inputs
from sampling import every_other, pairs
from torch._dynamo.backends.common import aot_autograd
from torch.export import export

import sla_compile
from sla_compile import SLAConfig
from sla_compile.export import decompositions
from sla_compile.kernels import decomposed

# run_decompositions copies tree specifications, whose class warns about it from inside the standard library
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
TOLERANCE = 3e-6


def by_name(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def attention_program(case, dynamic, strict=False):
    model = Attention(case)
    shapes = case.dynamic_shapes if dynamic else None
    return model, export(model, case.inputs(200), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("case", by_name(every_other(CASES, 1)))
def test_one_decomposed_program_for_every_length(case):
    model, program = attention_program(case, dynamic=True)
    assert ops(program.graph_module) == 1
    decomposed_program = program.run_decompositions(decompositions())
    assert ops(decomposed_program.graph_module) == 0
    module = decomposed_program.module()
    for length in LENGTHS:
        inputs = case.inputs(length)
        result, expected = module(*inputs), model(*inputs)
        assert result.stride() == expected.stride() or length == 1
        assert result.dtype == expected.dtype
        assert difference(result, expected) < TOLERANCE, length


@pytest.mark.parametrize(
    ("case", "strict"),
    pairs([CASES[0], BLOCK_MAP, SLA2_BY_BLOCK], [False, True]),
    ids=lambda one: getattr(one, "name", one),
)
def test_static_length(case, strict):
    model, program = attention_program(case, dynamic=False, strict=strict)
    inputs = case.inputs(200)
    result = program.run_decompositions(decompositions()).module()(*inputs)
    assert difference(result, model(*inputs)) < TOLERANCE


@pytest.mark.parametrize("length", [65, 128])
def test_logsumexp(length):
    for case in (CASES[1], CASES[4], BLOCK_MAP, *SLA2):
        query, key, value, weight, bias, mask, block_map, *sla2 = case.inputs(length)
        rest = (weight, bias, *sla2, mask, block_map)
        scalars = (0.2, *sla_compile.ops.op_scalars(case.config, 12, None)[1:])
        _, result = decomposed.forward(query, key, value, *rest, *scalars)
        _, expected = torch.ops.sla_compile.sparse_linear_attention(query, key, value, *rest, *scalars)
        torch.testing.assert_close(result, expected)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # the redirect's mode
@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_that_is_not_what_the_example_was_is_caught(strict):
    """Nothing in a program holds the next mask to be expanded over queries, as the example's strides told."""
    model = sla_compile.accelerate(SelfAttention(), config=SLAConfig(sparsity=0.5, min_seq_len=64)).eval()
    x, mask = torch.randn(2, 200, 32), (torch.arange(200) < 150).expand(2, 1, 200, 200)
    program = export(model, (x, mask), strict=strict).module()
    torch.testing.assert_close(program(x, mask), model(x, mask))
    torch.testing.assert_close(program(x, mask.contiguous()), model(x, mask))  # its strides do not matter
    with pytest.raises(RuntimeError, match="hides other keys from other queries"):
        program(x, mask.tril())


def test_low_bit_has_kernels_only():
    query, key, value, weight, *_ = CASES[0].inputs(65)
    scalars = sla_compile.ops.op_scalars(CASES[0].config.replace(low_bit="int8"), 12, None)
    with pytest.raises(NotImplementedError, match='low_bit="int8" has kernels only; accelerate with low_bit=None'):
        decomposed.forward(query, key, value, weight, *[None] * 6, *scalars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision(dtype):
    query, key, value, weight, bias, *_ = CASES[0].inputs(200)
    scalars = sla_compile.ops.op_scalars(CASES[0].config, 12, None)
    tokens = [t.to(dtype) for t in (query, key, value)]
    result, _ = decomposed.forward(*tokens, weight, bias, *[None] * 5, *scalars)
    expected, _ = torch.ops.sla_compile.sparse_linear_attention(*tokens, weight, bias, *[None] * 5, *scalars)
    exact, _ = torch.ops.sla_compile.sparse_linear_attention(
        *(t.float() for t in tokens), weight, bias, *[None] * 5, *scalars
    )
    assert result.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert difference(result, exact) < rounding
    assert difference(result, expected) < 2 * rounding


def test_only_core_aten_and_a_loop_are_left():
    _, program = attention_program(CASES[2], dynamic=True)
    program = program.run_decompositions(decompositions())
    called = set(targets(program.graph_module))
    assert {str(t) for t in called if isinstance(t, torch._ops.HigherOrderOperator)} == {"while_loop"}
    operators = {t for t in called if isinstance(t, torch._ops.OpOverload)}
    assert {str(t) for t in operators if torch.Tag.core not in t.tags} == set()
    assert not any("topk" in str(t) for t in called)  # its count would be a share of the length


@pytest.mark.parametrize("length", [1024, 4096])
def test_no_tensor_grows_faster_than_the_length(length):
    query = torch.empty(1, 2, length, 64, device="meta")
    weight = torch.empty(64, 64, device="meta")

    class Call(torch.nn.Module):
        def forward(self, query, weight):
            return sla_compile.sparse_linear_attention(query, query, query, config=CASES[0].config, proj_weight=weight)

    program = export(Call(), (query, weight)).run_decompositions(decompositions())
    largest = max(
        value.numel()
        for graph in program.graph_module.modules()
        if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes
        for value in [node.meta.get("val")]
        if isinstance(value, torch.Tensor)
    )
    assert largest <= max(65 / 64 * query.numel(), (length / 64) ** 2 * 2)


@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_network_and_what_else_the_table_takes(method):
    model = network(method=method)
    program = export(model, make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
    module = program.run_decompositions(decompositions()).module()
    for length in (200, 64, 333):
        torch.testing.assert_close(module(*make_inputs(length)), model(*make_inputs(length)))
    assert ops(program.run_decompositions().graph_module) == 1  # the default table keeps the readable node


def test_saved_program_loads_after_import_alone(tmp_path):
    model = network()
    program = export(model, make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save([(make_inputs(n), model(*make_inputs(n)).detach()) for n in (200, 333)], tmp_path / "expected.pt")
    done = run_python(
        """
        import sys, torch, sla_compile
        module = torch.export.load(sys.argv[1] + "/program.pt2").module()
        for inputs, expected in torch.load(sys.argv[1] + "/expected.pt"):
            assert torch.equal(module(*inputs), expected)
        try:
            module(torch.zeros(1, 5000, 32), torch.zeros(1, 5000, 32))
        except Exception as error:
            print(error)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "4096" in done.stdout, done.stdout  # outside of the exported range


def test_without_the_import_the_error_names_the_operator(tmp_path):
    torch.export.save(export(network(), make_inputs(200)), tmp_path / "program.pt2")
    script = "import sys, torch; torch.export.load(sys.argv[1])"
    done = run_python(script, tmp_path / "program.pt2")
    assert done.returncode != 0
    assert "torch.ops.sla_compile.sparse_linear_attention.default" in done.stderr
    assert "Please import the custom op to register it" in done.stderr


def test_decomposed_program_needs_no_import(tmp_path):
    model = network()
    program = export(model, make_inputs(200), dynamic_shapes=NETWORK_SHAPES)
    torch.export.save(program.run_decompositions(decompositions()), tmp_path / "program.pt2")
    torch.save((make_inputs(333), model(*make_inputs(333)).detach()), tmp_path / "expected.pt")
    script = """
        import sys, torch
        inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
        module = torch.export.load(sys.argv[1] + "/program.pt2").module()
        torch.testing.assert_close(module(*inputs), expected)
        assert "sla_compile" not in sys.modules
    """
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_torch_compile_keeps_the_kernels():
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model = network()
    backend = aot_autograd(fw_compiler=keep)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*make_inputs(200))
    assert sum(targets(graph).count(OP) for graph in graphs) == 1
