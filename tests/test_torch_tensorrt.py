"""What Torch-TensorRT is told. It loads beside a CUDA build of torch only, so a stand-in takes the call here;
benchmarks/tensorrt_segments.py is the real thing."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from export_cases import NETWORK_SHAPES, network
from models import build, make_inputs
from torch import nn
from torch.export import Dim, export

from sla_compile.export import torch_tensorrt as ours


@dataclass
class Input:
    min_shape: tuple
    opt_shape: tuple
    max_shape: tuple
    dtype: torch.dtype


@pytest.fixture
def calls(monkeypatch):
    """The calls of torch_tensorrt.dynamo.compile, which returns the program's module."""
    calls = []

    def compile(program, *, arg_inputs, kwarg_inputs, **options):
        calls.append((arg_inputs, kwarg_inputs, options))
        return program.module()

    dynamo = types.SimpleNamespace(compile=compile)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.SimpleNamespace(Input=Input, dynamo=dynamo))
    return calls


def test_static_and_dynamic_sizes(calls):
    inputs = make_inputs(200)
    ours.compile(network(), inputs, min_block_size=1)
    ours.compile(network(), inputs, dynamic_shapes=NETWORK_SHAPES)
    shape = (1, 200, 32)
    static = Input(shape, shape, shape, torch.float32)
    dynamic = Input((1, 1, 32), shape, (1, 4096, 32), torch.float32)
    assert [call[0] for call in calls] == [(static, static), (dynamic, dynamic)]
    assert [call[1:] for call in calls] == [({}, {"min_block_size": 1}), ({}, {})]


def test_derived_sizes_named_inputs_and_what_is_no_tensor(calls):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, context, *, factor, pair):
            return self.inner(x, context) * factor + torch.cat(pair, 1)

    half = Dim("half", min=32, max=2048)
    x, context = make_inputs(200)
    shapes = {"x": {1: 2 * half}, "context": None, "factor": None, "pair": ({1: half}, {1: half})}
    named = {"factor": 0.5, "pair": (x[:, :100], x[:, 100:])}
    program = export(Halves().eval(), (x, context), named, dynamic_shapes=shapes)
    ours.compile(program)
    ((given, kwargs, _),) = calls
    assert given[0] == Input((1, 64, 32), (1, 200, 32), (1, 4096, 32), torch.float32)
    assert kwargs["factor"] == 0.5
    assert kwargs["pair"] == (Input((1, 32, 32), (1, 100, 32), (1, 2048, 32), torch.float32),) * 2


def test_errors(calls, monkeypatch):
    inputs = make_inputs(200)
    with pytest.raises(ValueError, match=r"require_full_compilation=True cannot be.*sla_compile\.export\.onnx"):
        ours.compile(network(), inputs, require_full_compilation=True)
    with pytest.raises(ValueError, match="accelerate the model first"):
        ours.compile(build(0), inputs)
    unbounded = ({1: Dim("length")},) * 2
    with pytest.raises(ValueError, match=r"a dimension of x has no largest size: give it one"):
        ours.compile(network(), inputs, dynamic_shapes=unbounded)
    assert not calls
    dense = torch.fx.symbolic_trace(nn.Linear(2, 2))
    monkeypatch.setattr(sys.modules["torch_tensorrt"].dynamo, "compile", lambda *_, **__: dense)
    with pytest.raises(RuntimeError, match="left 0 of 1 calls of sla_compile::sparse_linear_attention"):
        ours.compile(network(), inputs)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ImportError, match=r'does not load, try pip install "torch-tensorrt"'):
        ours.compile(network(), inputs)
