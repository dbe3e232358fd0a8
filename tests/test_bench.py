"""``sla-compile bench``: it checks first, measures all contenders, and writes what it measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from sla_compile import bench
from sla_compile.cli import main
from sla_compile.config import SLAConfig

SMALL = ["--device", "cpu", "--heads", "1", "--dim", "16", "--repeats", "2"]


@pytest.fixture(autouse=True)
def keeps_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stem = tmp_path / "run"
    assert main(["bench", "--length", "128", "200", "--backward", *SMALL, "--output", str(stem)]) == 0
    rows = list(csv.DictReader(stem.with_suffix(".csv").read_text().splitlines()))
    found = [(row["name"], row["direction"], row["length"]) for row in rows]
    assert found == [
        (name, direction, length)
        for length in ("128", "200")
        for name in ("dense", "sparse-linear")
        for direction in ("forward", "backward")
    ]
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["torch"] == torch.__version__ and row["commit"]
        assert (float(row["dense_over_this"]) == 1) == (row["name"] == "dense")
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "best dense / this" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sla", "sla2"])
def test_wrong_numbers_are_not_timed(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "--length", "128", "--method", method, *SMALL]) == 0
    attention = bench.Inputs.attention

    def off(self, config, block_map=None):
        output = attention(self, config, block_map)
        return output if output.dtype == torch.float64 else output * 1.001

    monkeypatch.setattr(bench.Inputs, "attention", off)
    capsys.readouterr()
    assert main(["bench", "--length", "128", "--method", method, *SMALL]) == 1
    told = capsys.readouterr()
    assert "output is off by 1.0e-03" in told.err and "best dense" not in told.out


def test_low_bit_gate_takes_quantised_numbers() -> None:
    shape = bench.Shape(1, 2, 500, 32, torch.bfloat16, torch.device("cpu"))
    assert bench.check(shape, SLAConfig(low_bit="int8")) is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rival_that_fails_is_named(
    direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from sla_compile import bench_rivals

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens):
            if direction == "forward":
                raise RuntimeError("no such thing here\nand more")
            return tokens.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no such thing here\nand more")

    monkeypatch.setattr(bench_rivals, "_flex", lambda inputs, *_: lambda: Broken.apply(inputs.query))
    assert main(["bench", "--length", "128", "--flex", "--backward", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "not here: flex_attention, same blocks: no such thing here" in out
    assert bench_rivals.OURS_SPARSE in out


def test_a_rival_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from sla_compile import bench_rivals

    def broken(*_: object) -> None:
        raise TypeError("from_kv_blocks() takes other arguments")

    monkeypatch.setattr(bench_rivals, "_flex", broken)
    assert main(["bench", "--length", "128", "--flex", *SMALL]) == 0
    assert "not here: flex_attention, same blocks: from_kv_blocks() takes" in capsys.readouterr().out


def test_our_sparse_branch_is_timed_without_a_look_at_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    from sla_compile import bench_rivals, functional

    inputs = bench.Inputs(bench.Shape(1, 1, 200, 16, torch.float32, torch.device("cpu")), SLAConfig())
    config = SLAConfig(linear="none", negligible=0)
    block_map = functional.route(inputs.query, inputs.key, config=config)
    expected = functional.sparse_linear_attention(*inputs.tokens, config=config, block_map=block_map)
    monkeypatch.delattr(functional, "_check_block_map")
    assert torch.equal(bench_rivals._alone(inputs, block_map, config)(), expected)


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert bench.environment(torch.device("cpu"))["commit"] == "unknown"


def test_whole_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With a model of the same class but small, and not compiled: that is torch's."""
    diffusers = pytest.importorskip("diffusers")
    from sla_compile import demo

    small = dict(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, text_dim=demo.TEXT_DIM)
    monkeypatch.setattr(demo, "build_model", lambda layers: diffusers.WanTransformer3DModel(**small))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert main(["bench", "--model", "--backward", "--frames", "1", "--device", "cpu", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    for name in ("dense, eager", "accelerated, eager", "dense, compiled", "accelerated, compiled"):
        assert out.count(name) == 2, out
    monkeypatch.setattr(bench, "check", lambda *_: "wrong")
    assert main(["bench", "--model", "--device", "cpu"]) == 1
    assert "wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sparsity", "1.5"], "sparsity must be in (0, 1)"),
        (["--output", "nowhere/stem"], "the folder nowhere does not exist"),
        (["--dim", "300"], "--dim: head dimensions up to 256 are supported, got 300"),
        (["--peer", "."], "holds no sparse_linear_attention; get it with: git clone"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--model", "--frames", "4"], "frames must be 4 n + 1"),
    ],
)
def test_mistakes(options: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *SMALL[2:], *options]) == 2
    assert told in capsys.readouterr().err
