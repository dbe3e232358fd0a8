"""The launcher of the Triton kernels: what it launches and allocates follows from shapes alone.

That is what CUDA graphs ask for, and what a call without a wait for the GPU is made of: tensors on the meta device have
shapes and no values, so that whatever reads one raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    monkeypatch.setattr(ops, "block_selector", lambda query: gpu.select_blocks)
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
    assert {"select_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"} <= set(launched)
