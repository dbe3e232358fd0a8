"""The CPU kernels against the float64 reference: output, log-sum-exp and gradients, within a derived error budget."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, NAMES, Case
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels import cpu, cpu_blocked, cpu_blocks, cpu_linear, native
from sla_compile.kernels.routing import route
from sla_compile.kernels.spec import Spec

EXAMPLES = int(os.environ.get("SLA_HYPOTHESIS_EXAMPLES", "40"))


@pytest.fixture(autouse=True, params=["native", "blocked"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the compiled kernels and on PyTorch operations."""
    if request.param == "blocked":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setenv("SLA_COMPILE_NATIVE", "0")
    elif native.library() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.fixture(autouse=True)
def filled_with_nan() -> Iterator[None]:
    """What torch.empty gives is NaN, so that an element nobody writes is seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def draw(case: Case) -> tuple[list[Tensor | None], Tensor, Tensor, Spec, Tensor | None]:
    """query, key, value, proj_weight and proj_bias; grad_output, block map, spec and key bias of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    spec = Spec(case.scale or case.dim**-0.5, case.feature_map, case.linear, case.block_q, case.block_k)
    inputs: list[Tensor | None] = [
        kernel_cases.tokens(case, case.heads, 0, generator),
        kernel_cases.tokens(case, case.kv_heads, 3, generator),
        kernel_cases.tokens(case, case.kv_heads, 4, generator),
        None,
        None,
    ]
    if case.linear != "none":
        inputs[3] = (torch.randn(case.dim, case.dim, generator=generator) * case.dim**-0.5).to(DTYPES[case.proj_dtype])
        inputs[4] = torch.randn(case.dim, generator=generator).to(DTYPES[case.proj_dtype]) if case.bias else None
    classes = kernel_cases.block_map(case, generator)
    bias = kernel_cases.key_bias(case, generator)
    if case.grad == "expanded":
        grad = torch.ones((), dtype=inputs[0].dtype).expand(inputs[0].shape)
    else:
        grad = kernel_cases.tokens(replace(case, magnitude=1.0), case.heads, 5, generator)
    return inputs, grad, classes, spec, bias


def run(inputs: list[Tensor | None], grad: Tensor, classes: Tensor, spec: Spec, bias: Tensor | None) -> list[Any]:
    """Output, log-sum-exp and the five gradients of the kernels."""
    options = dict(proj_weight=inputs[3], proj_bias=inputs[4], key_bias=bias)
    output, logsumexp = cpu.forward(*inputs[:3], classes, spec, **options)
    grads = cpu.backward(grad, *inputs[:3], output, logsumexp, classes, spec, **options)
    assert grads[5] is None  # no alpha
    return [output, logsumexp, *grads[:5]]


def terms(inputs: list[Tensor | None], grad: Tensor, spec: Spec) -> float:
    """The size of what gradients are sums of, where too few tokens leave it to chance whether they cancel.

    dV sums dO and dO W; dQ and dK are differences of s (dO V^T) K in float32, which cancel altogether for one token.
    """
    if grad.shape[2] > 64:
        return 0.0
    plain = grad.double() if inputs[3] is None else torch.cat([grad.double(), grad.double() @ inputs[3].double()])
    longest = [tensor.double().norm(dim=-1).max().item() for tensor in (grad, *inputs[:3])]
    product = spec.scale * longest[0] * longest[3] * max(longest[1:3])
    return max(plain.abs().max().item(), product * min(torch.finfo(torch.float32).eps / torch.finfo(grad.dtype).eps, 1))


def check(case: Case) -> None:
    """Asserts that every result is within twice the error of the dense formula in the tested dtype, plus the rounding
    band of `kernel_cases.ratio`; float64 within 1e-10."""
    if case.dtype == "fp64":
        case = replace(case, proj_dtype="fp64")
    inputs, grad, classes, spec, bias = draw(case)
    dtype = inputs[0].dtype
    oracle = kernel_cases.evaluate(
        [None if t is None else t.double() for t in inputs], grad.double(), classes, spec, bias
    )
    eager = kernel_cases.evaluate([None if t is None else t.to(dtype) for t in inputs], grad, classes, spec, bias)
    results = run(inputs, grad, classes, spec, bias)

    assert results[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results[1].is_contiguous()
    for result in (results[0], *results[2:5]):
        assert result.dtype == dtype and result.transpose(1, 2).is_contiguous(), result.stride()
    for result, parameter in zip(results[5:], inputs[3:], strict=True):
        assert (result is None) == (parameter is None)
        assert result is None or (result.dtype, result.shape) == (parameter.dtype, parameter.shape)

    # Differences cancel inside the gradients (dP - delta), so the largest gradient to q, k and v measures all three. A
    # log-sum-exp that is off by x makes probabilities off by the share x: its unit is 1.
    shared = max(*(exact.abs().max().item() for exact in oracle[2:5]), terms(inputs, grad, spec))
    # The parameters' gradients sum terms dO * O_l and dO over all tokens: their roundings walk as far as the terms do.
    walk = grad.double().square().sum((0, 1, 2)).sqrt().max().item()
    scales = [0.0, 1.0, shared, shared, shared, walk * inputs[2].abs().max().item(), walk]
    for name, result, exact, low, scale in zip(NAMES, results, oracle, eager, scales, strict=True):
        if result is None:
            continue
        if name == "grad_weight" and cpu._kernels(inputs[0], spec).operand_dtype(inputs[0]) == torch.bfloat16:
            result = result.to(torch.bfloat16)  # as its terms were rounded
        finite = exact.isfinite()
        largest = exact[finite].abs().max().item() if finite.any() else 0.0
        rounded = torch.finfo(result.dtype).eps * max(scale - largest, 0.0)  # of terms larger than the result
        assert kernel_cases.ratio(result, exact, low, rounded, scale, case.length) <= 1, name  # NaN fails
        if dtype == torch.float64:
            worst = (result - exact)[finite].abs().max().item() if finite.any() else 0.0
            assert worst <= 1e-10 * max(scale, largest, 1.0), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(length=256, dim=64),
        Case(length=300, dim=40),
        Case(length=700, dim=128, batch=2, heads=1, kv_heads=1),
        Case(length=520, dim=88, block_q=128),
        Case(length=200, dim=256, heads=1, kv_heads=1),
        Case(length=130, dim=4),
        Case(length=130, dim=12, linear="all"),
        Case(length=1, dim=32),
        Case(length=64, dim=64, block_q=128),
    ],
    ids=str,
)
def test_shapes(case: Case, dtype: str) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("mask", ["", "keys"])
@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_linear_branches(feature_map: str, linear: str, mask: str, dtype: str) -> None:
    check(Case(length=250, dim=24, feature_map=feature_map, linear=linear, mask=mask, dtype=dtype))


@pytest.mark.parametrize("linear", ["marginal", "all"])
@pytest.mark.parametrize("blocks", ["critical", "marginal", "negligible", "none"])
def test_classes_of_blocks(blocks: str, linear: str) -> None:
    for dtype in ("fp64", "fp32", "bf16"):
        check(Case(length=450, dim=32, blocks=blocks, linear=linear, dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("layout", ["blhd", "bhld", "packed", "padded", "spread"])
def test_layouts(layout: str, dtype: str) -> None:
    for length in (192, 200):  # read in place, and copied because of the tail
        check(Case(length=length, dim=32, layout=layout, dtype=dtype, batch=2))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_expanded_gradient(dtype: str) -> None:
    check(Case(length=192, dim=64, grad="expanded", dtype=dtype))


@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_shared_key_heads(linear: str, dtype: str) -> None:
    check(Case(length=330, dim=32, heads=6, kv_heads=2, linear=linear, dtype=dtype, batch=2))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mask", ["keys", "additive", "row"])
def test_key_bias(mask: str, dtype: str) -> None:
    for linear in ("marginal", "all", "none"):
        check(Case(length=300, dim=32, batch=2, mask=mask, linear=linear, dtype=dtype))


@pytest.mark.parametrize("proj_dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_parameters_keep_their_dtype(proj_dtype: str) -> None:
    check(Case(length=200, dim=32, proj_dtype=proj_dtype, dtype="fp32"))
    check(Case(length=200, dim=32, proj_dtype=proj_dtype, bias=False, dtype="bf16"))


@pytest.mark.parametrize("products", ["tiles", "pairs", "float32"])
def test_bfloat16_in_all_products(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to compute bfloat16: what this processor has, AMX tiles whatever it has, and without either."""
    monkeypatch.setattr(cpu_blocked, "_has_bfloat16_tiles", lambda: products == "tiles")
    if products == "float32":
        monkeypatch.setattr(native, "operand_dtype", lambda query: torch.float32)
    for case in (
        Case(length=300, dim=64, dtype="bf16", mask="row", batch=2),
        Case(length=256, dim=40, dtype="bf16", heads=4, layout="spread"),
        Case(length=300, dim=128, dtype="bf16", linear="all", feature_map="elu"),
        Case(length=250, dim=12, dtype="bf16", linear="none", blocks="none"),
        Case(length=200, dim=24, dtype="bf16", feature_map="relu", mask="additive", magnitude=4.0),
    ):
        inputs = draw(case)[0]
        operand = torch.bfloat16 if products == "tiles" else torch.float32
        assert cpu_blocked._dtypes(inputs[0]) == (torch.float32, operand)
        check(case)


@pytest.mark.parametrize("few", ["critical", "marginal"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_sums_by_list(few: str, dtype: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block in 37 is the odd one out: it is summed, or subtracted from the total, instead of a matrix product.

    One row is the other way round: it must neither be drowned by a total nor come to one.
    """
    case = Case(length=37 * 64 - 5, dim=16, heads=1, kv_heads=1, dtype=dtype, seed=4)
    inputs, _, classes, _, _ = draw(case)
    classes.fill_(0 if few == "critical" else 1)
    for row in range(classes.shape[2]):
        classes[..., row, (5 * row) % 37] = 1 if few == "critical" else 0
    classes[..., 7, :] = 1 - classes[..., 7, :]
    used = []
    built = cpu_linear.BlockSums.__init__

    def spy(self: Any, *arguments: Any) -> None:
        built(self, *arguments)
        used.append(self.lists)

    monkeypatch.setattr(kernel_cases, "block_map", lambda *_: classes)
    monkeypatch.setattr(cpu_linear.BlockSums, "__init__", spy)
    check(case)
    # Forward; rows and columns of the backward. Products of bfloat16 operands need no list.
    if kernels == "blocked" or dtype == "fp64":
        assert used == [cpu_blocked._dtypes(inputs[0])[1] != torch.bfloat16] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_critical_is_dense_attention(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 200, 40).to(dtype) for _ in range(3))
    classes = torch.ones(2, 3, 4, 4, dtype=torch.int8)
    output, _ = cpu.forward(query, key, value, classes, Spec(0.3), proj_weight=torch.randn(40, 40, dtype=dtype))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.3)
    dense = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    error, theirs = ((x.double() - exact).abs().max().item() for x in (output, dense))
    assert error <= 2 * theirs + 16 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_undefined_denominators_give_zero() -> None:
    """relu of negative queries, or keys without weight: no linear part and no gradient through it, instead of NaN."""
    for mask in ("", "row"):
        case = Case(length=200, dim=16, feature_map="relu", mask=mask, dtype="fp32", batch=2)
        inputs, grad, classes, spec, bias = draw(case)
        inputs[0] = -inputs[0].abs()
        inputs[4] = None
        output, _, grad_query, _, _, grad_weight, _ = run(inputs, grad, classes, spec, bias)
        sparse = replace(spec, linear="none")
        alone, _, grad_alone, *_ = run([*inputs[:3], None, None], grad, classes, sparse, bias)
        torch.testing.assert_close(output, alone)
        torch.testing.assert_close(grad_query, grad_alone, rtol=1e-4, atol=1e-5)
        assert not grad_weight.any()


def test_elu_of_very_negative_keys() -> None:
    """Features of all keys near exp(-18): their ratios count, however small they are."""
    case = Case(length=200, dim=32, feature_map="elu", blocks="marginal", dtype="fp32")
    inputs, grad, classes, spec, bias = draw(case)
    inputs[1] = inputs[1] - 18
    exact = kernel_cases.evaluate([t.double() for t in inputs], grad.double(), classes, spec, bias)[0]
    weighed = inputs[3].double().norm() * inputs[2].double().norm(dim=-1).max()  # of a mean of projected values
    error = (run(inputs, grad, classes, spec, bias)[0] - exact).abs().max()
    assert error <= case.length * torch.finfo(torch.float32).eps * weighed


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_features_that_critical_keys_dominate(feature_map: str) -> None:
    """Sums over the marginal keys, less than a rounding of the total, are not what that leaves without the others."""
    case = Case(length=1000, dim=32, feature_map=feature_map, blocks="marginal", dtype="fp32")
    inputs, grad, classes, spec, bias = draw(case)
    classes[..., 2] = 1
    critical = torch.zeros(case.length, 1, dtype=torch.bool)
    critical[128:192] = True
    key = inputs[1]
    if feature_map == "relu":  # no marginal key has a feature
        inputs[1] = torch.where(critical, key, -key.abs())
    elif feature_map == "elu":  # exp(-16), and up to 4
        inputs[1] = torch.where(critical, key, key - 16)
    else:  # nearly all of one channel, that of the queries, and nearly nothing of it
        inputs[0] = inputs[0] + 12 * F.one_hot(torch.tensor(0), case.dim)
        inputs[1] = key + torch.where(critical, 12, -12) * F.one_hot(torch.tensor(0), case.dim)
    exact = kernel_cases.evaluate([t.double() for t in inputs], grad.double(), classes, spec, bias)
    # Sums of up to `length` terms, each a rounding off; scores of up to 30, of whose exponentials that is one more.
    allowed = (case.length + 30) * torch.finfo(torch.float32).eps
    for name, found, reference in zip(NAMES, run(inputs, grad, classes, spec, bias), exact, strict=True):
        assert (found - reference).norm() <= allowed * reference.norm(), name


def test_relu_passes_nan_on() -> None:
    inputs, grad, classes, spec, bias = draw(Case(length=200, dim=32, feature_map="relu", blocks="marginal"))
    inputs[1] = inputs[1].index_fill(2, torch.tensor(5), torch.nan)
    classes[:, :, :, 0] = 0  # only the linear branch meets it
    classes[:, :, :, 1] = 1
    assert run(inputs, grad, classes, spec, bias)[0].isnan().all()


def test_large_scores_stay_finite() -> None:
    """A single key that outshines all others by more than exp can hold, and keys whose features underflow in fp16."""
    for dtype in ("fp32", "bf16", "fp16"):
        case = Case(length=200, dim=32, magnitude=25.0, dtype=dtype, scale=1.0)
        inputs, grad, classes, spec, bias = draw(case)
        for result in run(inputs, grad, classes, spec, bias):
            assert result.isfinite().all()


def test_results_do_not_depend_on_what_ran_before() -> None:
    """Buffers are kept between calls: neither a larger call before nor another thread's changes a number."""
    case = Case(length=300, dim=32, dtype="fp32")
    drawn = draw(case)
    first = run(*drawn)
    check(Case(length=900, dim=64, dtype="fp32", mask="row", batch=2))
    others: list[Any] = []
    threads = [threading.Thread(target=lambda: others.append(run(*drawn))) for _ in range(2)]
    for thread in threads:
        thread.start()
    again = run(*drawn)
    for thread in threads:
        thread.join()
    assert len(others) == 2
    for results in (again, *others):
        for one, two in zip(first, results, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_buffers_kept_from_inference_mode(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "_THREAD", threading.local())
    drawn = draw(Case(length=300, dim=32, dtype=dtype))
    with torch.inference_mode():
        first = run(*drawn)
    for one, two in zip(first, run(*drawn), strict=True):
        assert torch.equal(one, two)


def test_kept_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "KEPT_BYTES", 100_000)
    with cpu_blocks.thread_workspace(torch.float32) as workspace:
        workspace("small", 20_000)
        workspace("large", 200_000)
        with cpu_blocks.thread_workspace(torch.float32) as other:
            assert other is not workspace
    with cpu_blocks.thread_workspace(torch.float32) as workspace:
        kept = [buffer.nbytes for buffer in workspace._buffers.values() if buffer.nbytes < cpu_blocks.HUGE_BYTES]
        assert sum(kept) <= 100_000


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has pages of 2 MB to ask for")
def test_large_results_ask_for_huge_pages() -> None:
    def advised(tensor: torch.Tensor) -> bool:
        """Whether the system notes the wish for the middle of the tensor's memory."""
        middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *rest = line.split()
            if not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                inside = first <= middle < last
            elif inside and name == "VmFlags:":
                return "hg" in rest
        pytest.skip("this system does not tell")

    fresh = mmap.mmap(-1, 2 * cpu_blocks.HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    large, small = torch.frombuffer(fresh, dtype=torch.int8), torch.empty(100)
    assert not advised(large)
    assert cpu_blocks.ask_for_huge_pages(large) is large and advised(large)
    assert cpu_blocks.ask_for_huge_pages(small) is small


def test_large_buffers_are_lent_to_the_system_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, elements = cpu_blocks.Workspace(torch.float32), cpu_blocks.HUGE_BYTES // 4
    large, small = workspace("large", elements).fill_(1), workspace("small", 100)
    workspace.trim(small.nbytes)
    assert ("large", torch.float32) in workspace._buffers or not hasattr(mmap, "MADV_FREE")
    assert torch.equal(workspace("large", elements).fill_(2), large.fill_(2))
    monkeypatch.setattr(cpu_blocks, "_lend", lambda memory: False)
    workspace.trim(small.nbytes)
    assert list(workspace._buffers) == [("small", torch.float32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_large_buffers_are_memory_like_any(dtype: torch.dtype) -> None:
    elements = cpu_blocks.HUGE_BYTES // dtype.itemsize + 1
    workspace = cpu_blocks.Workspace(dtype)
    buffer = workspace("large", elements).fill_(1)
    assert buffer.shape == (elements,) and buffer.data_ptr() % 64 == 0 and bool((buffer == 1).all())
    assert workspace("large", elements - 1).data_ptr() == buffer.data_ptr()
    assert torch.equal(workspace.copy(buffer.double(), "copy", dtype), buffer)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.sampled_from([1, 2]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return Case(
        # What is left where everything cancels, with a token or two, is chance: exact precision has to decide there.
        length=draw(st.integers(1 if dtype == "fp64" else 40, 400)),
        dim=draw(st.sampled_from([4, 12, 40, 64, 88, 128]) | st.integers(1, 32)),
        batch=draw(st.sampled_from([1, 1, 2])),
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        dtype=dtype,
        linear=draw(st.sampled_from(["marginal", "all", "none"])),
        feature_map=draw(st.sampled_from(["softmax", "elu", "relu"])),
        block_q=draw(st.sampled_from([64, 128])),
        blocks=draw(st.sampled_from(["random", "random", "critical", "marginal", "negligible", "none"])),
        layout=draw(st.sampled_from(["blhd", "bhld", "packed", "padded", "spread"])),
        grad=draw(st.sampled_from(["same", "expanded"])),
        mask=draw(st.sampled_from(["", "keys", "additive", "row"])),
        proj_dtype=draw(st.sampled_from(["fp32", "bf16"])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_any_case(case: Case) -> None:
    check(case)


def test_memory_is_bounded_by_chunks() -> None:
    """Forward and backward at 6144 tokens hold a small part of what one L x L matrix (151 MB) would take."""
    script = """
        import resource, torch
        from sla_compile.kernels import cpu
        from sla_compile.kernels.routing import route
        from sla_compile.kernels.spec import Spec

        torch.set_num_threads(1)
        def tokens(length):
            return [torch.randn(1, length, 2, 64).transpose(1, 2) for _ in range(4)]
        def call(query, key, value, grad):
            spec = Spec(0.125)
            classes = route(query, key, scale=0.125, block_q=64, block_k=64, sparsity=0.95, negligible=0.1)
            options = dict(proj_weight=torch.randn(64, 64), proj_bias=torch.randn(64))
            output, logsumexp = cpu.forward(query, key, value, classes, spec, **options)
            cpu.backward(grad, query, key, value, output, logsumexp, classes, spec, **options)
        call(*tokens(128))
        inputs = tokens(6144)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call(*inputs)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", "import sla_compile\n" + textwrap.dedent(script)]
    kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if sys.platform == "darwin":
        kilobytes //= 1024  # bytes there
    assert kilobytes < 50_000  # of which 13 MB are the results


def test_routed_attention_matches_the_reference() -> None:
    """Routing, then the kernels, as the op calls them: ragged, with a budget of blocks that differs from T_n."""
    query, key, value = (torch.randn(1, 2, 1000, 32, dtype=torch.float64) for _ in range(3))
    classes = route(query, key, scale=0.2, block_q=64, block_k=64, sparsity=0.8, negligible=0.2)
    weight, bias = torch.randn(32, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    output, logsumexp = cpu.forward(query, key, value, classes, Spec(0.2), proj_weight=weight, proj_bias=bias)
    exact = kernel_cases.evaluate([query, key, value, weight, bias], torch.ones_like(query), classes, Spec(0.2), None)
    torch.testing.assert_close(output, exact[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logsumexp, exact[1], rtol=1e-10, atol=1e-10)
