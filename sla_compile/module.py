"""The small module that holds the parameters of sparse-linear attention for one owner."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sla_compile.config import SLAConfig
from sla_compile.functional import sparse_linear_attention

# NOTE [Where alpha starts]
# alpha is the share of the softmax's mass on the critical blocks, which a model's attentions differ in: stage 1 or the
# closed form finds it. Until then one value serves all. On made-up attentions with 12 % to 79 % of their mass on the
# critical blocks (at sparsities of 90 to 97 %), the error against full attention with 0.7 was at most 1.44 times that
# with the best constant of eight; with 0.5 it was 1.54, and with 0.9, close to the sparse branch alone, 1.89 times. The
# sigmoid passes alpha (1 - alpha) of alpha's gradient on to the logit, 21 % at 0.7, nearly the most it can.
INITIAL_ALPHA = 0.7

ROUTERS = ("router_q", "router_k")
NAMES = ("proj_weight", "proj_bias", "alpha_logit", *ROUTERS)
"""The parameters of both methods, in the order of a state dict."""


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention with its parameters, a drop-in for scaled_dot_product_attention.

    They are ordinary parameters: they follow ``.to()``, are trained, sharded, saved and offloaded with the model.

    * SLA has ``proj_weight`` (D, D) and ``proj_bias`` (D), shared by the heads. They are zero at first, so that the
      output is the sparse branch's alone until they are trained.
    * SLA2 has ``alpha_logit`` (H, 1) or (H, query blocks), where alpha is its sigmoid, 0.7 at first, and ``router_q``
      and ``router_k`` (D, D), shared by the heads, at first the identity, which is SLA's choice of blocks. The routers
      are frozen: only stage 1 trains them, and they get no gradient here.

    Args:
        config: the split into critical, marginal and negligible blocks.
        head_dim: D.
        num_heads: H, of the queries; SLA2 needs it.
        query_blocks: query blocks of the one length that ``config.alpha_per="block"`` is for, which needs it.
        device, dtype: of the parameters.
    """

    proj_weight: nn.Parameter | None
    proj_bias: nn.Parameter | None
    alpha_logit: nn.Parameter | None
    router_q: nn.Parameter | None
    router_k: nn.Parameter | None

    def __init__(
        self,
        config: SLAConfig,
        head_dim: int,
        *,
        num_heads: int | None = None,
        query_blocks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.dense = False  # set by sla_compile.dense
        for name, shape in parameter_shapes(config, head_dim, num_heads, query_blocks).items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        self.set_trainable(True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the parameters their first values (also what FSDP and `to_empty` users call)."""
        for name, parameter in self.named_parameters():
            if name in ROUTERS:
                with parameter.device:  # eye_ refuses a default device that is another
                    nn.init.eye_(parameter)
            elif name == "alpha_logit":
                nn.init.constant_(parameter, math.log(INITIAL_ALPHA / (1 - INITIAL_ALPHA)))
            else:
                nn.init.zeros_(parameter)

    def set_trainable(self, trainable: bool) -> None:
        """Freezes the parameters, or unfreezes all but the routers."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable and name not in ROUTERS)

    @property
    def alpha(self) -> Tensor | None:
        """SLA2's weight of the sparse branch, the shape of its logit, float32 for low-precision parameters."""
        logit = self.alpha_logit
        if logit is None:
            return None
        return torch.sigmoid(logit.float() if logit.dtype in (torch.float16, torch.bfloat16) else logit)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As :func:`sla_compile.sparse_linear_attention`; (B, L, D) tensors are taken as one head."""
        if query.dim() == 3:
            mask = key_padding_mask
            if mask is not None and mask.dim() == 3:
                mask = mask.unsqueeze(1)
            return self.forward(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask, scale).squeeze(1)
        return sparse_linear_attention(
            query,
            key,
            value,
            config=self.config,
            proj_weight=self.proj_weight,
            proj_bias=self.proj_bias,
            router_q=self.router_q,
            router_k=self.router_k,
            alpha=self.alpha,
            key_padding_mask=key_padding_mask,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def extra_repr(self) -> str:
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return f"head_dim={self.head_dim}{heads}, {self.config}"


def parameter_shapes(
    config: SLAConfig, head_dim: int, num_heads: int | None, query_blocks: int | None
) -> dict[str, tuple[int, ...] | None]:
    """The shape of each parameter, None for those that the method does without.

    Raises:
        ValueError: the shape of alpha is not known.
    """
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(NAMES)
    if config.has_projection:
        shapes |= {"proj_weight": (head_dim, head_dim), "proj_bias": (head_dim,)}
    if config.has_alpha:
        if num_heads is None:
            raise ValueError('method="sla2" has an alpha for each head and needs num_heads')
        if config.alpha_per == "block" and query_blocks is None:
            raise ValueError('alpha_per="block" has an alpha for each query block and needs query_blocks')
        blocks = query_blocks if config.alpha_per == "block" else 1
        shapes |= {"alpha_logit": (num_heads, blocks or 1)} | dict.fromkeys(ROUTERS, (head_dim, head_dim))
    return shapes
