"""benchmarks/on_gpu.py and roofline.py: what they do without a GPU."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sla_compile import bench
from sla_compile.config import SLAConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = ["--device", "cpu", "--small", "--repeats", "1", "--output"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("on_gpu")


@pytest.fixture
def roofline(script: ModuleType) -> ModuleType:
    return importlib.import_module("roofline")


def test_all_steps_small(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # A process of its own, as it starts pytest and a profiler.
    found = subprocess.run(
        [sys.executable, BENCHMARKS / "on_gpu.py", *CPU, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tests"]["said"].startswith("2 passed") and not results["failed"]
    assert all(rate > 0 for rate in results["ceilings"].values())
    assert [row["direction"] for row in results["kernels"]] == ["forward", "backward"] * 3
    for step, lengths in (("attention", {512}), ("sweep", {256, 512})):
        rows = list(csv.DictReader((tmp_path / f"{step}.csv").read_text().splitlines()))
        assert {int(row["length"]) for row in rows} == lengths
        assert len(rows) == len(results[step]) and rows[0]["torch"] == torch.__version__
    assert len(list(tmp_path.glob("*.png"))) == 2
    last = found.stdout.split("sweep done")[-1]
    for line in (
        "kernel tests: 2 passed",
        "ceilings: copy",
        "small forward: dense",
        "roofline",
        "pieces of small",
        "tokens on",
    ):
        assert line in last, last


def test_what_was_measured_is_written_before_the_next(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the script may end it."""
    measured = iter([{"forward_kernel": 1.0}])

    def kernel_times(*_: object) -> dict[str, float]:
        for times in measured:
            return times
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "kernel_times", kernel_times)
    monkeypatch.setattr(bench, "check", lambda shape, config: None)
    with pytest.raises(KeyboardInterrupt):
        script.main([*CPU, str(tmp_path), "--steps", "ceilings", "kernels"])
    (row,) = json.loads((tmp_path / "results.json").read_text())["kernels"]
    assert row["direction"] == "forward" and row["ms"] == {"forward_kernel": 1.0}


def test_wrong_numbers_are_not_timed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "check", lambda shape, config: "off" if config.method == "sla" else None)
    assert script.main([*CPU, str(tmp_path), "--steps", "attention", "sweep"]) == 1
    names = {row["name"] for row in csv.DictReader((tmp_path / "attention.csv").read_text().splitlines())}
    assert names == {
        "dense",
        *(f"sla2 0.97 {rows}{bits}" for rows in ("q128", "q64") for bits in ("", " fp8", " int8")),
    }
    assert not (tmp_path / "sweep.csv").exists()
    assert "FAILED sla 0.95 q128: off" in capsys.readouterr().out


def test_a_step_that_fails_and_no_time_are_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(session: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(script.STEPS, "ceilings", broken)
    assert script.main([*CPU, str(tmp_path), "--steps", "ceilings"]) == 1
    assert json.loads((tmp_path / "results.json").read_text())["failed"] == ["ceilings: RuntimeError: no such thing"]
    assert script.main([*CPU, str(tmp_path), "--steps", "sweep", "--budget", "0"]) == 0
    assert "left out, no time: sweep" in capsys.readouterr().out


def test_work_of_kernels_counted_by_hand(roofline: ModuleType) -> None:
    # 2 heads of 3 x 3 blocks, one of a row critical: 6 blocks of 64 x 64 scores, each a sum of 16 products.
    shape = bench.Shape(1, 2, 150, 16, torch.bfloat16, torch.device("cpu"))
    config = SLAConfig(critical_blocks=1)
    scores, product, tokens, state = 2 * 6 * 64 * 64 * 16, 2 * 300 * 16 * 16, 300 * 16 * 2, 16 * 17 * 2
    forward = roofline.kernel_work(shape, config, backward=False)
    again = 6 * 2 * 64 * 16 * 2
    assert forward["forward_kernel"] == roofline.Work(2 * scores + product, 4 * tokens + 6 * state, again + 6 * state)
    assert forward["sums of states"].operations == 2 * 2 * 3 * 3 * 16 * 17
    backward = roofline.kernel_work(shape, config, backward=True)
    assert backward["query_gradient_kernel"].operations == 3 * scores
    assert backward["key_gradient_kernel"] == roofline.Work(4 * scores, 8 * tokens, again)
    # SLA2 has no projection.
    sla2 = roofline.kernel_work(shape, config.replace(method="sla2", negligible=0), backward=False)
    assert forward["summaries_kernel"].operations == 2 * product and sla2["summaries_kernel"].operations == product


def test_work_in_low_bit(roofline: ModuleType) -> None:
    shape = bench.Shape(1, 2, 150, 16, torch.bfloat16, torch.device("cpu"))
    config = SLAConfig(method="sla2", critical_blocks=1)
    works = [
        roofline.kernel_work(shape, config.replace(low_bit=bits), backward=False) for bits in (None, "int8", "fp8")
    ]
    scores, tile, state = 2 * 6 * 64 * 64 * 16, 64 * 16, 6 * 16 * 17 * 2
    operations, cache = zip(
        *((work["forward_kernel"].operations, work["forward_kernel"].cache) for work in works), strict=True
    )
    product = 2 * 300 * 16 * 16
    assert operations == (2 * scores + product, 1.5 * scores + product, scores + product)
    assert cache == (6 * 4 * tile + state, 6 * 3 * tile + state, 6 * 2 * tile + state)  # bytes of a key and a value
    assert [work["quantize_kernel"].memory for work in works[1:]] == [300 * 16 * 3, 300 * 16 * 6]
    assert "quantize_kernel" not in works[0]


def test_what_the_device_lacks_is_not_a_failure(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def check(shape: bench.Shape, config: SLAConfig) -> str | None:
        if config.low_bit == "fp8":
            raise NotImplementedError("no such products")
        return None

    monkeypatch.setattr(bench, "check", check)
    assert script.main([*CPU, str(tmp_path), "--steps", "attention"]) == 0
    assert "not here: sla2 0.97 q128 fp8: no such products" in capsys.readouterr().out


def test_roofline_takes_what_is_slowest(roofline: ModuleType) -> None:
    limits = roofline.Ceilings(operations=1e12, memory=1e9, cache=2e9)
    assert roofline.Work(1e12, 1e6, 1e6).milliseconds(limits) == 1000
    assert roofline.Work(1e6, 1e9, 1e6).milliseconds(limits) == 1000
    assert roofline.Work(1e6, 1e6, 1e9).milliseconds(limits) == 500


def test_a_configuration_that_does_not_compile_is_left_out(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def check(shape: bench.Shape, config: SLAConfig) -> str | None:
        if config.linear == "all":
            raise RuntimeError("out of registers")
        return None

    monkeypatch.setattr(bench, "check", check)
    assert script.main([*CPU, str(tmp_path), "--steps", "attention"]) == 1
    assert "FAILED sla 0.95 q64 all: RuntimeError: out of registers" in capsys.readouterr().out
    names = {row["name"] for row in csv.DictReader((tmp_path / "attention.csv").read_text().splitlines())}
    assert {"dense", "sla 0.95 q128", "sla 0.95 q64"} <= names and "sla 0.95 q64 all" not in names
