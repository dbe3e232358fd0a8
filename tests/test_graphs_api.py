"""accelerate, report and parameters on graphs, through the public interface."""

import pytest
import torch
from models import build, make_inputs

import sla_compile
from sla_compile import SLAConfig

CONFIG = SLAConfig(sparsity=0.8, min_seq_len=64)


def export():
    return torch.export.export(build(), make_inputs(), strict=True)


def test_exported_program():
    program = export()
    accelerated = sla_compile.accelerate(program, config=CONFIG)
    report = sla_compile.report(accelerated)
    assert [site.name for site in report.rewritten] == ["blocks.0.attn", "blocks.1.attn"]
    assert all("cross-attention" in site.reason for site in report.dense)
    assert len(sla_compile.parameters(accelerated)) == 4
    expected = sla_compile.accelerate(build(), config=CONFIG)(*make_inputs())
    module = accelerated.module()
    assert set(sla_compile.parameters(module)) == set(sla_compile.parameters(accelerated))
    torch.testing.assert_close(module(*make_inputs()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(program.module()(*make_inputs()), build()(*make_inputs()), rtol=1e-5, atol=1e-6)


def test_graph_module():
    graph_module = export().module()
    assert sla_compile.accelerate(graph_module, config=CONFIG) is graph_module
    assert len(sla_compile.report(graph_module).rewritten) == 2 and len(sla_compile.parameters(graph_module)) == 4
    expected = sla_compile.accelerate(build(), config=CONFIG)(*make_inputs())
    torch.testing.assert_close(graph_module(*make_inputs()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capture", [export, lambda: export().module()])
def test_bad_patterns_and_second_calls_change_nothing(capture):
    graph = capture()
    inner = graph if isinstance(graph, torch.fx.GraphModule) else graph.graph_module
    before = inner.code
    with pytest.raises(ValueError, match="matches no attention"):
        sla_compile.accelerate(graph, config=CONFIG, include="transformer.*")
    with pytest.raises(ValueError, match="min_seq_len"):
        sla_compile.accelerate(graph)
    assert inner.code == before
    accelerated = sla_compile.accelerate(graph, config=CONFIG)
    with pytest.raises(RuntimeError, match="accelerated already"):
        sla_compile.accelerate(accelerated, config=CONFIG)


def test_what_is_for_modules_says_so(tmp_path):
    program = sla_compile.accelerate(torch.export.export(build(), make_inputs()), config=CONFIG)
    for graph in (
        program,
        sla_compile.accelerate(torch.fx.symbolic_trace(build()), config=CONFIG, example_inputs=make_inputs()),
    ):
        with pytest.raises(TypeError, match="is a graph, which accelerate rewrites for good: keep a copy"):
            sla_compile.restore(graph)
        with pytest.raises(TypeError, match="is a graph"), sla_compile.dense(graph):
            pass
    for function in (sla_compile.save, sla_compile.load):
        with pytest.raises(TypeError, match="take an nn.Module, got ExportedProgram; torch.export.save"):
            function(program, tmp_path / "sla.safetensors")


def test_backend_by_name():
    model, inputs = build(), make_inputs()
    options = {"sparsity": 0.8, "min_seq_len": 64, "inner": "eager"}
    with torch.no_grad():
        from sla_compile.passes.backend import sla

        compiled = torch.compile(model, backend=sla, options=options)
        expected = sla_compile.accelerate(build(), config=CONFIG.replace(linear="none"))(*inputs)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-6)
