"""The compiled CPU kernels as a program: built once, threads, without a compiler. Their numbers: test_cpu_kernels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sla_compile.kernels import cpu, native
from sla_compile.kernels.routing import route
from sla_compile.kernels.spec import Spec

SPEC = Spec(0.2)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No library is loaded, and the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "sla_compile"
    monkeypatch.undo()
    native.library.cache_clear()


def call(batch: int = 1) -> list[Tensor | None]:
    """Output, log-sum-exp and gradients of a small call."""
    generator = torch.Generator().manual_seed(1)
    query, key, value, grad = (
        torch.randn(batch, 300, 4, 32, generator=generator).transpose(1, 2) for _ in range(4)
    )  # fmt: skip
    classes = route(query, key, scale=0.2, block_q=64, block_k=64, sparsity=0.6, negligible=0.2)
    parameters = dict(proj_weight=torch.eye(32), proj_bias=torch.ones(32))
    output, logsumexp = cpu.forward(query, key, value, classes, SPEC, **parameters)
    grads = cpu.backward(grad, query, key, value, output, logsumexp, classes, SPEC, **parameters)
    return [output, logsumexp, *grads]


def test_built_once(fresh: Path) -> None:
    if native.library() is None:
        pytest.skip("no C compiler")
    (built,) = fresh.iterdir()
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]


def test_threads_change_nothing() -> None:
    if native.library() is None:
        pytest.skip("no C compiler")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(batch=2)
        torch.set_num_threads(3)
        several = call(batch=2)
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(one, several, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("reason", ["switched off", "compiler fails", "no folder"])
def test_operations_run_instead(
    reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = call()
    native.library.cache_clear()
    if reason == "switched off":
        monkeypatch.setenv("SLA_COMPILE_NATIVE", "0")
    elif reason == "compiler fails":
        monkeypatch.setenv("CC", "false")
        for path in fresh.glob("*"):
            path.unlink()
    else:
        folder = fresh.parent / "file"
        folder.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with caplog.at_level(logging.INFO, logger=native.__name__):
        assert native.library() is None
    assert "PyTorch operations run" in caplog.text
    for left, right in zip(call(), expected, strict=True):
        if left is not None and right is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_nan_is_not_hidden() -> None:
    query, key, value = (torch.randn(1, 1, 256, 32) for _ in range(3))
    query[0, 0, 5, 3] = torch.nan
    classes = torch.ones(1, 1, 4, 4, dtype=torch.int8)
    output, logsumexp = cpu.forward(query, key, value, classes, Spec(0.2, linear="none"))
    assert output[0, 0, 5].isnan().all()
    assert logsumexp[0, 0, 5].isnan()
    assert not output[0, 0, :5].isnan().any()
