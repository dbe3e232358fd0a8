"""The compiled CPU kernels as a program: built once, threads, without a compiler. Their numbers: test_cpu_kernels."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sla_compile.kernels import cpu, native
from sla_compile.kernels.routing import route
from sla_compile.kernels.spec import Spec


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No library is loaded, and the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "sla_compile"
    monkeypatch.undo()
    native.library.cache_clear()


def call(
    batch: int = 1, heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float32, linear: str = "marginal"
) -> list[Tensor | None]:
    """Output, log-sum-exp and gradients of a small call, on values that bfloat16 has."""
    generator = torch.Generator().manual_seed(1)
    query, key, value, grad = (
        torch.randn(batch, 700, count, 32, generator=generator).bfloat16().to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    classes = route(query, key, scale=0.2, block_q=64, block_k=64, sparsity=0.6, negligible=0.2)
    parameters = dict(proj_weight=torch.eye(32), proj_bias=torch.ones(32))
    spec = Spec(0.2, linear=linear)
    output, logsumexp = cpu.forward(query, key, value, classes, spec, **parameters)
    grads = cpu.backward(grad, query, key, value, output, logsumexp, classes, spec, **parameters)
    return [output, logsumexp, *grads]


def equal(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all((one is None and two is None) or torch.equal(one, two) for one, two in zip(left, right, strict=True))


def test_built_once(fresh: Path) -> None:
    if native.library() is None:
        pytest.skip("no C compiler")
    (built,) = fresh.iterdir()
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]


def test_a_damaged_file_is_built_anew(fresh: Path) -> None:
    compiler = native._compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    native._build(compiler).write_bytes(b"")
    assert native.library() is not None


@pytest.mark.parametrize("linear", ["marginal", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1, 1), (1, 4, 2), (3, 2, 2)], ids=["one", "shared", "several"])
def test_threads_change_nothing(heads: tuple[int, int, int], dtype: torch.dtype, linear: str) -> None:
    """More threads than heads, and fewer."""
    if native.library() is None:
        pytest.skip("no C compiler")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(call(*heads, dtype=dtype, linear=linear))
    finally:
        torch.set_num_threads(threads)
    assert equal(found[0], found[1]) and equal(found[0], found[2])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_in_flight_grow_with_the_threads_alone(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that run at once share them: memory is not threads times heads."""
    if native.library() is None:
        pytest.skip("no C compiler")
    phases, kept = native._phases, []

    def recorded(calls: list[Any]) -> Any:
        kept.append(sum(call.strip for call in calls))
        return phases(calls)

    threads = torch.get_num_threads()
    monkeypatch.setattr(native, "_phases", recorded)
    try:
        torch.set_num_threads(4)
        call(1, 4, kv_heads)
    finally:
        torch.set_num_threads(threads)
    assert max(kept) == native.STRIP * 4


def test_threads_share_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no C compiler")
    workers: dict[str, set[int]] = {}
    met = threading.Barrier(2)  # a task of the rows ends only when another thread has one, too

    class Recorded:
        def __init__(self, name_and_library: tuple[str, Any]) -> None:
            self.name, self.phase = name_and_library[0], phase(name_and_library)

        def __call__(self, *arguments: Any) -> None:
            seen = workers.setdefault(self.name, set())
            if self.name.endswith("ward_rows") and threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                met.wait(timeout=60)
            self.phase(*arguments)

    phase = native._PHASE
    threads = torch.get_num_threads()
    monkeypatch.setattr(native, "_PHASE", Recorded)
    try:
        torch.set_num_threads(2)
        call(1, 1, 1)
    finally:
        torch.set_num_threads(threads)
    assert {name: len(seen) for name, seen in workers.items() if seen} == {
        "sla_forward_rows": 2,
        "sla_backward_rows": 2,
    }


def test_bfloat16_products(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used where the processor has them; without them bfloat16 is float32 of the same values, rounded in the end."""
    if native.library() is None:
        pytest.skip("no C compiler")
    query = torch.zeros(1, dtype=torch.bfloat16)
    has = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    assert native.operand_dtype(query) == (torch.bfloat16 if has else torch.float32)
    assert native.operand_dtype(query.half()) == native.operand_dtype(query.float()) == torch.float32
    with_products = call(dtype=torch.bfloat16)
    if has:
        monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512bf16"))
        native.library.cache_clear()
    assert native.operand_dtype(query) == torch.float32
    without = call(dtype=torch.bfloat16)
    assert has != equal(with_products, without)
    exact = call()
    rounded = [tensor.bfloat16() if i in (0, 2, 3, 4) else tensor for i, tensor in enumerate(exact)]
    assert equal(without, rounded)


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
