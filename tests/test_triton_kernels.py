"""The Triton kernels against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import strategies as st
from kernel_cases import Case
from kernel_cases import run as run_case

pytest.importorskip("triton")

HERE = Path(__file__).parent
SERVE = "import interpreter_speed, kernel_cases; interpreter_speed.install(); kernel_cases.serve()"
# How many drawn cases: ten take about 20 seconds in the interpreter.
EXAMPLES = int(os.environ.get("SLA_HYPOTHESIS_EXAMPLES", "10"))


class Worker:
    """Runs cases in a process with TRITON_INTERPRET=1; one that dies fails its case only, the next starts another."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, case: Any) -> dict[str, float]:
        if self.process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE],
                cwd=HERE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.process = None
            pytest.fail(f"the interpreter ended with status {status}: an access out of bounds")
        answer = json.loads(answer)
        if isinstance(answer, str):
            pytest.fail(answer)
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Any], dict[str, float]]]:
    """Runs a case where kernels can run; returns error over budget of each result."""
    if torch.cuda.is_available():
        yield functools.partial(run_case, device="cuda")
        return
    worker = Worker()
    yield worker
    worker.stop()


def check(ratios: dict[str, float]) -> None:
    over = {name: ratio for name, ratio in ratios.items() if math.isnan(ratio) or ratio > 1}
    assert not over, f"error over budget: {over}"


CASES = [
    # The settings, in each dtype.
    *(Case(dtype=dtype, linear=linear) for dtype in ("fp32", "fp16", "bf16") for linear in ("marginal", "all", "none")),
    Case(feature_map="elu"),
    Case(feature_map="relu", dtype="fp16"),
    Case(feature_map="elu", linear="all", dtype="bf16"),
    Case(feature_map="relu", linear="all"),
    Case(feature_map="relu", linear="all", length=1, magnitude=0.003),  # the added epsilon is seen
    # Head dimensions, padded ones among them, with the tiles of several architectures.
    Case(dim=1, length=70),
    Case(dim=4, dtype="fp16"),
    Case(dim=12, linear="all"),
    Case(dim=40, dtype="bf16", feature_map="elu"),
    Case(dim=72, heads=1, kv_heads=1, dtype="fp16", length=100),
    Case(dim=80, heads=1, kv_heads=1, length=70, arch=89),
    Case(dim=88, heads=1, kv_heads=1, dtype="fp16", length=100, feature_map="relu", arch=89),
    Case(dim=96, heads=1, kv_heads=1, dtype="bf16", length=100, arch="gfx942"),
    Case(dim=112, heads=1, kv_heads=1, length=100, linear="all"),
    Case(dim=128, dtype="bf16", length=100),
    Case(dim=128, dtype="fp16", length=70, arch=89),
    Case(dim=256, dtype="fp16", length=70, heads=1, kv_heads=1),
    Case(dim=256, length=70, heads=1, kv_heads=1, arch="gfx942"),
    # Lengths: one token, one block, exactly whole blocks, a ragged last block of either kind.
    Case(length=1),
    Case(length=64, dtype="fp16"),
    Case(length=192),
    Case(length=193, blocks="critical", linear="none"),
    Case(block_q=128, length=128),
    Case(block_q=128, length=300, dtype="bf16"),
    Case(block_q=128, length=150, dim=128, dtype="fp16", linear="all"),
    # Maps.
    Case(blocks="critical", bias=False),
    Case(blocks="critical", linear="all", dtype="fp16"),
    Case(blocks="marginal"),
    Case(blocks="negligible", dtype="fp16"),
    Case(blocks="none"),
    # Layouts; what surrounds the values is NaN.
    Case(layout="bhld", dtype="fp16"),
    Case(layout="packed", dim=40),
    Case(layout="padded", dtype="bf16"),
    Case(layout="padded", block_q=128, dim=20, mask="keys"),
    Case(layout="spread", length=100),
    Case(grad="expanded", dtype="fp16"),
    Case(grad="expanded", heads=4, layout="packed"),
    # Key-value heads shared by query heads; heads in chunks.
    Case(heads=4, dtype="bf16"),
    Case(heads=6, batch=2, length=70, linear="all"),
    Case(heads=3, kv_heads=1, length=100, linear="none", mask="keys"),
    Case(heads=4, batch=2, length=70, chunk_bytes=1),
    Case(heads=3, kv_heads=3, batch=2, length=70, linear="all", chunk_bytes=400000),
    # Masks.
    Case(mask="keys"),
    Case(mask="keys", linear="all", feature_map="relu", dtype="fp16"),
    Case(mask="additive", dtype="fp16"),
    Case(mask="row", batch=2, length=70),
    Case(mask="row", dtype="bf16", batch=2, length=70, feature_map="relu"),
    Case(mask="row", linear="none", batch=2),
    # SLA2.
    *(
        Case(dtype=dtype, linear=linear, alpha="block", heads=heads)
        for dtype, heads in (("fp32", 2), ("fp16", 2), ("bf16", 4))
        for linear in ("marginal", "all")
    ),
    Case(alpha="head", blocks="marginal", mask="keys"),
    Case(alpha="head", feature_map="relu", mask="additive", dtype="fp16", block_q=128, length=200),
    Case(alpha="extreme", length=200, feature_map="elu"),
    Case(alpha="extreme", length=200, dtype="fp16"),
    Case(alpha="extreme", length=200, dtype="bf16", linear="all"),
    Case(alpha="block", blocks="critical", dtype="fp16"),
    Case(alpha="block", blocks="none", layout="packed", dim=40, chunk_bytes=1),
    Case(alpha="block", mask="row", batch=2, length=70, feature_map="elu"),
    Case(alpha="block", dim=128, dtype="fp16", length=70, arch=89),
    Case(alpha="block", dim=256, length=40, heads=1, kv_heads=1, block_q=128, arch="gfx942"),
    Case(alpha="block", length=1),
    # A sparse branch of 8 bits.
    *(
        Case(dtype=dtype, low_bit=low_bit, alpha=alpha, length=length, heads=heads)
        for dtype, alpha, length, heads in (("fp32", "", 100, 2), ("fp16", "block", 100, 4), ("bf16", "", 70, 2))
        for low_bit in ("int8", "fp8")
    ),
    Case(low_bit="int8", linear="none", length=200, block_q=128, dim=72, dtype="fp16", heads=1, kv_heads=1),
    Case(low_bit="fp8", alpha="head", blocks="none", mask="keys", dtype="fp16", length=200),
    Case(low_bit="fp8", mask="row", batch=2, dim=12, length=70, layout="padded", chunk_bytes=1),
    Case(low_bit="int8", mask="additive", linear="all", scale=-0.3, layout="spread"),
    Case(low_bit="fp8", length=1, alpha="extreme"),
    Case(low_bit="int8", magnitude=4.0, dtype="fp16", layout="packed"),
    Case(low_bit="fp8", dim=128, dtype="bf16", length=100, arch=89, magnitude=4.0),
    Case(low_bit="int8", dim=256, dtype="bf16", length=70, heads=1, kv_heads=1, block_q=128),  # half a block a tile
    Case(low_bit="int8", linear="none", key_offset=30.0),
    Case(low_bit="fp8", alpha="head", key_offset=-30.0, heads=4, mask="keys", block_q=128, length=150),
    # The rest.
    Case(proj_dtype="fp16"),
    Case(proj_dtype="bf16", dtype="fp16", bias=False),
    Case(proj_dtype="fp64", dtype="bf16"),
    Case(scale=1.0, dtype="fp16"),
    Case(scale=-0.3),
    Case(magnitude=8.0, dtype="bf16"),
    Case(magnitude=30.0, dtype="fp16", linear="all"),
    Case(wide=True, dtype="fp16", layout="packed"),
    Case(shipped=True, dim=16, length=100),
    # The other tiles that tuning may choose; the candidates that differ in warps and stages look the same here.
    Case(candidate=1, dtype="fp16", block_q=128, length=150),
    Case(candidate=2, dtype="bf16", block_q=128, length=150, arch=89),
    Case(candidate=1, dtype="fp16", dim=128, length=70, heads=1, kv_heads=1, arch=89),
    Case(candidate=1, dtype="bf16", dim=80, length=70, heads=1, kv_heads=1, arch="gfx942"),
    Case(candidate=1, dtype="fp16", heads=4, alpha="block", mask="keys", length=100, chunk_bytes=1),
    Case(candidate=1, dtype="fp16", low_bit="fp8", linear="none", length=100, arch=89),
    # Values multiplied a step late: no step at all, a ragged one alone, several a block, a negative scale.
    Case(block_q=128, dtype="fp16", blocks="none", length=150),
    Case(block_q=128, dtype="bf16", length=40),
    Case(candidate=-1, dtype="fp16", dim=128, length=100, heads=1, kv_heads=1, arch=89),
    Case(block_q=128, dtype="fp16", scale=-0.3, mask="additive", length=150),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case: Any, run: Callable[[Any], dict[str, float]]) -> None:
    check(run(case))


@st.composite
def drawn_cases(draw: st.DrawFn) -> Any:
    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    block_q = one_of(64, 64, 128)
    kv_heads = one_of(1, 2)
    dtype = one_of("fp32", "fp16", "bf16")
    alpha = one_of("", "block", "head", "extreme")
    low_bit = one_of("none", "none", "int8", "fp8")
    return Case(
        length=draw(st.integers(1, 200 if block_q == 64 else 300)),
        dim=one_of(draw(st.integers(1, 48)), 16, 32, 64, 64, 80, 128),
        batch=one_of(1, 1, 2),
        heads=kv_heads * one_of(1, 2),
        kv_heads=kv_heads,
        dtype=dtype,
        linear=one_of("marginal", "all", "marginal" if alpha else "none"),
        alpha=alpha,
        low_bit=low_bit,
        feature_map=one_of("softmax", "elu", "relu"),
        block_q=block_q,
        blocks=one_of("random", "random", "critical", "marginal", "negligible", "none"),
        layout=one_of("blhd", "bhld", "packed", "padded", "spread"),
        grad=one_of("same", "expanded"),
        mask=one_of("", "", "keys", "additive", "row"),
        proj_dtype=one_of("fp32", dtype),
        bias=draw(st.booleans()),
        scale=one_of(None, None, 0.5),
        arch=one_of(90, 89, "gfx942" if low_bit != "fp8" else 90),
        wide=draw(st.booleans()),
        chunk_bytes=one_of(None, 100000),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    # On a GPU every step of shrinking compiles eight kernels.
    phases=[phase for phase in Phase if not (torch.cuda.is_available() and phase == Phase.shrink)],
    print_blob=True,
)
@given(case=drawn_cases())
def test_drawn_cases_agree_with_the_reference(case: Any, run: Callable[[Any], dict[str, float]]) -> None:
    ratios = run(case)
    check(ratios)
    target(max(ratios.values()), label="largest error over budget")


@pytest.mark.parametrize(
    ("arch", "low_bit", "message"),
    [
        (80, "fp8", 'compute capability 8.9 or later.*sm_80.*use low_bit="int8"'),
        ("gfx942", "fp8", 'gfx942 has none.*use low_bit="int8"'),
        (75, "int8", "compute capability 8.0 or later.*sm_75"),
    ],
)
def test_low_bit_is_refused_where_there_are_no_such_products(
    arch: int | str, low_bit: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sla_compile.kernels import gpu
    from sla_compile.kernels.spec import Spec
    from sla_compile.kernels.tuning import Target

    monkeypatch.setattr(gpu, "target_of", lambda device: Target.of_arch(arch))
    tokens, classes = torch.empty(1, 1, 64, 32, device="meta"), torch.empty(1, 1, 1, 1, dtype=torch.int8, device="meta")
    with pytest.raises(NotImplementedError, match=message):
        gpu.forward(tokens, tokens, tokens, classes, Spec(1.0, linear="none", low_bit=low_bit))


@pytest.mark.parametrize(
    ("shape", "strides", "wide", "align"),
    [
        ((2, 3, 50, 64), (9600, 64, 192, 1), False, 8),
        ((2, 3, 50, 72), (10800, 72, 216, 1), False, 8),
        ((2, 3, 50, 12), (1800, 12, 36, 1), False, 4),
        ((2, 3, 50, 7), (1050, 7, 21, 1), False, 1),
        ((2, 3, 50, 64), (0, 0, 0, 0), False, 8),
        ((1, 1, 50, 64), (0, 0, 2**24, 1), True, 8),
        ((1, 1, 50, 64), (0, 0, 2**24 - 8, 1), False, 8),
    ],
)
def test_addressing(shape: tuple[int, ...], strides: tuple[int, ...], wide: bool, align: int) -> None:
    from sla_compile.kernels.layout import addressing

    tensor = torch.empty(1 << 32, dtype=torch.float16, device="meta").as_strided(shape, strides)
    assert addressing(tensor) == {"WIDE": wide, "ALIGN": align}
