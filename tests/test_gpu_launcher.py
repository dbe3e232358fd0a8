"""The launcher of the Triton kernels: what it launches and allocates follows from shapes alone.

That is what CUDA graphs ask for, and what a call without a wait for the GPU is made of: tensors on the meta device have
shapes and no values, so that whatever reads one raises.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sla_compile import SLAConfig, ops
from sla_compile.kernels.spec import Spec

gpu = pytest.importorskip("sla_compile.kernels.gpu", reason="the kernels need Triton")
from sla_compile.kernels.tuning import Target  # noqa: E402

CASES = {
    "sla": SLAConfig(),
    "all": SLAConfig(linear="all"),
    "block sparse": SLAConfig(linear="none"),
    "pinned": SLAConfig(pinned=(70, 30), block_q=128),
    "sla2": SLAConfig(method="sla2", sparsity=0.97),
    "int8": SLAConfig(low_bit="int8"),
    "fp8": SLAConfig(method="sla2", low_bit="fp8"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_no_value_is_read(config: SLAConfig, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, programs, **_: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(gpu, "target_of", lambda device: Target.of_arch(90))
    monkeypatch.setattr(ops, "routing_kernels", lambda query: dict(pool=gpu.pool_blocks, select=gpu.select_blocks))
    tokens: dict[str, Any] = dict(dtype=dtype, device="meta")
    query, key = torch.empty(2, 4, 3000, 64, **tokens), torch.empty(2, 2, 3000, 64, **tokens)
    mask = torch.empty(2, 1, 1, 3000, dtype=torch.bool, device="meta") if masked else None
    spec = Spec(0.125, config.feature_map, config.linear, config.block_q, config.block_k, config.low_bit or "none")
    weight = alpha = None
    if config.method == "sla2":
        alpha = torch.empty(1, 4, 1, device="meta")
    elif config.linear != "none":
        weight = torch.empty(64, 64, device="meta")
    routing = (config.sparsity, config.negligible, 0, config.pinned, None, None)

    prepared = ops._prepared(query, key, alpha, mask, None, spec, routing)
    output, logsumexp = gpu.forward(query, key, key, spec=spec, proj_weight=weight, **prepared)
    gpu.backward(output, query, key, key, output, logsumexp, spec=spec, proj_weight=weight, **prepared)
    wanted = {"pool_kernel", "select_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    assert wanted <= set(launched)


@pytest.mark.parametrize("block_q", [64, 128])
def test_another_length_compiles_no_large_kernel(block_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton builds into a kernel, ones and multiples of 16 among the integers, is the same for all lengths."""
    built: dict[str, set[Any]] = {}

    def launch(kernel: Any, programs: int, **arguments: Any) -> None:
        of_integers = []
        for parameter in kernel.params:
            value = arguments.get(parameter.name)
            if isinstance(value, int) and not parameter.do_not_specialize:
                of_integers.append((parameter.name, value if parameter.is_constexpr else (value == 1, value % 16 == 0)))
        built.setdefault(kernel.fn.__name__, set()).add(tuple(of_integers))

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(gpu, "target_of", lambda device: Target.of_arch(90))
    for length in (32760, 75600, 100, 1000):
        blocks = -(-length // block_q), -(-length // 64)
        tokens = torch.empty(1, length, 3, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        classes = torch.empty(1, 3, *blocks, dtype=torch.int8, device="meta")
        alpha, mean = torch.empty(1, 3, blocks[0], device="meta"), torch.empty(1, 3, 128, device="meta")
        options: dict[str, Any] = dict(alpha=alpha, key_mean=mean)
        gpu.pool_blocks(tokens, 64, torch.empty(1, length, device="meta"))
        output, logsumexp = gpu.forward(tokens, tokens, tokens, classes, Spec(1.0, block_q=block_q), **options)
        gpu.backward(output, tokens, tokens, tokens, output, logsumexp, classes, Spec(1.0, block_q=block_q), **options)
    small = {"block_lists_kernel"}  # a map's rows are read 16 bytes at a time where its width lets them
    assert {name for name, kinds in built.items() if len(kinds) > 1} <= small
    assert "forward_kernel" in built and "query_linear_kernel" in built


@pytest.fixture
def launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launch", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "target_of", lambda device: Target.of_arch(90))


@pytest.mark.usefixtures("launches_nothing")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_pooled_tokens_are_float32_whatever_the_default_dtype(default: torch.dtype) -> None:
    tokens, bias = torch.empty(2, 3, 100, 64, dtype=torch.float16, device="meta"), torch.empty(2, 100, device="meta")
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        means, counts = gpu.pool_blocks(tokens, 64, bias)
    finally:
        torch.set_default_dtype(before)
    assert means.dtype == counts.dtype == torch.float32
    assert means.shape == (2, 3, 2, 64) and counts.shape == (2, 3, 2, 1)


@pytest.mark.usefixtures("launches_nothing")
def test_a_transposed_projection_has_the_gradient_that_the_fake_promises() -> None:
    tokens = torch.empty(1, 2, 100, 64, dtype=torch.bfloat16, device="meta")
    classes, weight = torch.empty(1, 2, 2, 2, dtype=torch.int8, device="meta"), torch.empty(64, 64, device="meta").t()
    options: dict[str, Any] = dict(proj_weight=weight, proj_bias=weight[0])
    results = gpu.forward(tokens, tokens, tokens, classes, Spec(1.0), **options)
    grads = gpu.backward(tokens, tokens, tokens, tokens, *results, classes, Spec(1.0), **options)
    promised = ops._backward_fake(*[tokens] * 5, None, weight, weight[0], None, None, None)
    assert [grad.stride() for grad in grads[:5]] == [grad.stride() for grad in promised[:5]]


@pytest.mark.usefixtures("launches_nothing")
@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 1, 3), (3, 2, 1, 0)])
def test_block_map_with_any_strides(order: tuple[int, ...]) -> None:
    query, key = (torch.empty(1, heads, 300, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    shape = 1, 4, 5, 5
    classes = torch.empty([shape[dim] for dim in order], dtype=torch.int8, device="meta").permute(order)
    weight = torch.empty(64, 64, device="meta")
    assert classes.shape == shape
    results = gpu.forward(query, key, key, classes, Spec(1.0), proj_weight=weight)
    gpu.backward(query, query, key, key, *results, classes, Spec(1.0), proj_weight=weight)


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("block_q", [64, 128])
def test_memory_at_14b(block_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: at most a tenth more than dense attention, which has query, key, value, output and the log-sum-exp.
    Backward: a tenth more than those, their gradients and one more statistic, FlashAttention's float32 dQ left out."""
    monkeypatch.setattr(gpu, "launch", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "target_of", lambda device: Target.of_arch(90))
    monkeypatch.setattr(ops, "routing_kernels", lambda query: dict(pool=gpu.pool_blocks, select=gpu.select_blocks))
    query = torch.empty(1, 75600, 40, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    weight, bias = torch.empty(128, 128, device="meta"), torch.empty(128, device="meta")
    spec = Spec(0.1, block_q=block_q)
    tokens, statistics = 2 * query.numel(), 4 * 40 * 75600

    def prepared() -> dict[str, Any]:
        return ops._prepared(query, query, None, None, None, spec, (0.95, 0.1, 0, (0, 0), None, None))

    with Allocations() as forward:
        results = gpu.forward(query, query, query, spec=spec, proj_weight=weight, proj_bias=bias, **prepared())
    assert 3 * tokens + forward.most <= 1.1 * (4 * tokens + statistics)
    options = dict(spec=spec, proj_weight=weight, proj_bias=bias)
    with Allocations() as backward:
        gpu.backward(query, query, query, query, *results, **options, **prepared())
    assert 5 * tokens + statistics + backward.most <= 1.1 * (8 * tokens + 2 * statistics)
