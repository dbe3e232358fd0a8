"""Tuning on request, with a clock and a launch of our own: when a kernel is timed, what is chosen, kept and restored.

That the candidates' numbers are right: test_triton_kernels. That they compile: test_compile_gate.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from sla_compile.kernels import autotune  # noqa: E402
from sla_compile.kernels.backward import key_gradient_kernel  # noqa: E402

DEFAULT = {"TILE_Q": 64, "TILE_K": 64, "num_warps": 4, "num_stages": 3}
SMALL = {**DEFAULT, "TILE_Q": 32}


class Kernel(triton.KernelInterface):
    """key_gradient, but that it only adds one to its gradients and notes how it was launched."""

    __name__ = key_gradient_kernel.__name__
    arg_names = key_gradient_kernel.arg_names
    fn = key_gradient_kernel

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], dict[str, int]]] = []

    def run(self, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        for name in ("grad_key_ptr", "grad_value_ptr"):
            arguments[name] += 1
        grid = grid(arguments) if callable(grid) else grid
        self.launched.append((grid, {name: arguments[name] for name in DEFAULT}))


class Driver:
    """As much of a GPU as the names in Triton's cache take."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Setup:
    """A kernel and a clock by which SMALL is the fastest row, until `fastest` says otherwise."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.timed: list[dict[str, int]] = []
        self.fastest = SMALL

    def do_bench(self, call: Any, quantiles: tuple[float, ...]) -> list[float]:
        for _ in range(3):
            call()
        _, row = self.kernel.launched[-1]
        self.timed.append(row)
        return [1.0 if row == self.fastest else 2.0] * len(quantiles)

    def launch(self, length: int = 5000, **changed: Any) -> tuple[tuple[int, ...], dict[str, int]]:
        """The last launch, with which a call ends; adding one to gradients of 1 is all that call may have done."""
        grads = {name: torch.ones(4, 3).T for name in ("grad_key_ptr", "grad_value_ptr")}
        options = {"length": length, "HEAD_DIM": 64, "PRECISION": "tf32", "stride_key_dim": 1, "key_bias_ptr": None}
        autotune.launch(self.kernel, 100, {**grads, **options, **DEFAULT, **changed})
        for grad in grads.values():
            assert torch.equal(grad, torch.full_like(grad, 2))
        return self.kernel.launched[-1]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    if triton.knobs.runtime.interpret:
        pytest.skip("what the interpreter runs is not cached")
    made = Setup()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=made.do_bench))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "_chosen", {})
    return made


def test_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for value, asked in ((None, False), ("0", False), ("1", True)):
        if value is None:
            monkeypatch.delenv("SLA_COMPILE_AUTOTUNE", raising=False)
        else:
            monkeypatch.setenv("SLA_COMPILE_AUTOTUNE", value)
        autotune.asked.cache_clear()
        assert autotune.asked() is asked
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    autotune.asked.cache_clear()
    assert not autotune.asked()
    autotune.asked.cache_clear()


def test_times_every_candidate_once(setup: Setup) -> None:
    assert setup.launch() == ((100,), SMALL)
    assert setup.timed[0] == DEFAULT and SMALL in setup.timed
    assert len(setup.timed) == len({str(row) for row in setup.timed}) > 3
    setup.timed.clear()
    for length in (5000, 4096, 8191):
        assert setup.launch(length) == ((100,), SMALL)
    assert not setup.timed


def test_programs_follow_the_tile(setup: Setup) -> None:
    setup.fastest = {**DEFAULT, "TILE_K": 64}
    assert setup.launch(TILE_K=128, num_warps=8) == ((200,), setup.fastest)


@pytest.mark.parametrize(
    "changed", [{"length": 8192}, {"HEAD_DIM": 128}, {"key_bias_ptr": torch.ones(1)}, {"stride_key_dim": 3}]
)
def test_another_situation_is_timed_anew(changed: dict[str, Any], setup: Setup) -> None:
    setup.launch()
    setup.fastest, setup.timed = DEFAULT, []
    assert setup.launch(**changed) == ((100,), DEFAULT)
    assert setup.timed


def test_another_process_reads_what_was_timed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.launch()
    setup.fastest, setup.timed = DEFAULT, []
    autotune._chosen.clear()
    assert setup.launch() == ((100,), SMALL)
    assert not setup.timed
    autotune._chosen.clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert setup.launch() == ((100,), DEFAULT)
    assert setup.timed


def test_times_nothing_in_a_capture(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert setup.launch() == ((100,), DEFAULT)
    assert not setup.timed
    assert setup.launch() == ((100,), SMALL)
    with monkeypatch.context() as capture:  # what is known by then is taken
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert setup.launch() == ((100,), SMALL)


def test_leaves_float32_alone(setup: Setup) -> None:
    assert setup.launch(PRECISION="ieee") == ((100,), DEFAULT)
    assert not setup.timed
