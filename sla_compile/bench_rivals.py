"""What ``sla-compile bench`` measures sparse-linear attention against."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla_compile.bench import Contender, Inputs, Shape, our_operations
from sla_compile.config import SLAConfig
from sla_compile.functional import route
from sla_compile.ops import op_scalars

GPU_BACKENDS = {
    "dense, FlashAttention": SDPBackend.FLASH_ATTENTION,
    "dense, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "dense, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS, OURS_SPARSE = "sparse-linear", "block-sparse, no linear branch"


def contenders(
    shape: Shape, config: SLAConfig, inputs: Inputs, *, backward: bool, flex: bool, peer: Path | None
) -> tuple[list[Contender], list[str]]:
    """Everything that runs here, and a line for each that does not."""
    found: list[Contender] = []
    missing: list[str] = []
    dense = 4.0 * shape.batch * shape.heads * shape.length**2 * shape.dim

    def add(name: str, leaves: tuple[Tensor, ...], forward: Callable[[], Tensor], operations: float) -> None:
        try:
            with torch.set_grad_enabled(backward):
                output = forward()
            if backward:
                torch.autograd.grad(output, leaves, inputs.grad)
        except Exception as error:  # whatever a backend, a compiler or somebody else's code raises
            missing.append(_reason(name, error))
        else:
            found.append(Contender(name, leaves, forward, operations))

    if shape.device.type == "cuda":
        for name, backend in GPU_BACKENDS.items():
            add(name, inputs.tokens, _dense(inputs, backend), dense)
    else:
        add("dense", inputs.tokens, _dense(inputs, None), dense)
    # Not through `add`: that ours fails is an error of the run.
    found.append(ours(shape, config, inputs))
    if flex:
        sparse = SLAConfig(
            sparsity=config.sparsity,
            negligible=0,
            linear="none",
            block_q=config.block_q,
            critical_blocks=config.critical_blocks,
        )
        with torch.no_grad():
            block_map = route(inputs.query, inputs.key, config=sparse)
        operations = our_operations(shape, sparse)
        found.append(Contender(OURS_SPARSE, inputs.tokens, _alone(inputs, block_map, sparse), operations))
        name = "flex_attention, same blocks"
        try:
            forward = _flex(inputs, block_map, sparse, backward)
        except Exception as error:  # whatever another release of torch raises
            missing.append(_reason(name, error))
        else:
            add(name, inputs.tokens, forward, operations)
    if peer is not None:
        name = f"thu-ml/SLA at {peer.name}"
        try:
            leaves, forward = _peer(shape, config, inputs, peer)
        except Exception as error:  # whatever somebody else's code raises
            missing.append(_reason(name, error))
        else:
            add(name, leaves, forward, our_operations(shape, config))
    return found, missing


def ours(shape: Shape, config: SLAConfig, inputs: Inputs, name: str = OURS) -> Contender:
    leaves = (*inputs.tokens, *inputs.parameters.values())
    return Contender(name, leaves, lambda: inputs.attention(config), our_operations(shape, config))


def _dense(inputs: Inputs, backend: SDPBackend | None) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*inputs.tokens)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*inputs.tokens)

    return forward


def _alone(inputs: Inputs, block_map: Tensor, config: SLAConfig) -> Callable[[], Tensor]:
    """Our sparse branch over the given blocks: the operator itself, as the functional form looks at the map's values,
    for which it waits for the GPU in every call."""
    scalars = op_scalars(config, inputs.query.shape[-1], None)
    operator = torch.ops.sla_compile.sparse_linear_attention
    return lambda: operator(*inputs.tokens, *[None] * 6, block_map, *scalars)[0]


def _flex(inputs: Inputs, block_map: Tensor, config: SLAConfig, backward: bool) -> Callable[[], Tensor]:
    """flex_attention over the same critical blocks, all of them full: it evaluates no mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    critical = block_map == 1
    counts = critical.sum(-1, dtype=torch.int32)
    indices = torch.argsort(critical.int(), dim=-1, descending=True, stable=True).int()
    lengths = inputs.query.shape[2], inputs.key.shape[2]
    none = torch.zeros_like(counts), torch.zeros_like(indices)  # blocks that are critical in part
    blocks = config.block_q, config.block_k
    mask = BlockMask.from_kv_blocks(*none, counts, indices, BLOCK_SIZE=blocks, seq_lengths=lengths)
    # Of the rows that torch's backward takes by itself none fits blocks of 64 keys on sm_90, of those it times many do.
    options: Any = {"max_autotune": True} if inputs.query.is_cuda else None
    # Static: the second length measured would be compiled for any length.
    compiled: Any = torch.compile(flex_attention, dynamic=False, options=options)
    # On the CPU it refuses whatever requires a gradient.
    tokens = inputs.tokens if backward else tuple(tensor.detach() for tensor in inputs.tokens)
    return lambda: compiled(*tokens, block_mask=mask)


def _peer(
    shape: Shape, config: SLAConfig, inputs: Inputs, folder: Path
) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
    """The authors' module: what its backward differentiates, and its forward."""
    with _importable(folder):
        module = importlib.import_module("sparse_linear_attention")
    theirs = module.SparseLinearAttention(
        head_dim=shape.dim, topk=1 - config.sparsity, feature_map=config.feature_map, BLKQ=64, BLKK=64
    ).to(shape.device)
    tokens = [tensor.detach().contiguous().requires_grad_() for tensor in inputs.tokens]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=shape.dim**-0.5)
    return (*tokens, *theirs.parameters()), lambda: theirs(*tokens)


def _reason(name: str, error: Exception) -> str:
    """The first line of what an error says."""
    said = str(error).strip().splitlines()
    return f"{name}: {said[0] if said else type(error).__name__}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
