"""The small module that holds the parameters of sparse-linear attention for one owner."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sla_compile.config import SLAConfig
from sla_compile.functional import sparse_linear_attention


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention with its learnable projection, a drop-in for scaled_dot_product_attention.

    The projection is zero at first, so that the output is the sparse branch's alone until it is trained. Its
    parameters are ordinary ones: they follow ``.to()``, are trained, sharded, saved and offloaded with the model.

    Args:
        config: the split into critical, marginal and negligible blocks.
        head_dim: D; the projection is (D, D) and shared by the heads.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: SLAConfig,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.dense = False  # set by sla_compile.dense
        if config.has_projection:
            self.proj_weight = nn.Parameter(torch.empty(head_dim, head_dim, device=device, dtype=dtype))
            self.proj_bias = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("proj_weight", None)
            self.register_parameter("proj_bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeroes the projection (also what FSDP and `to_empty` users call)."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

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
            key_padding_mask=key_padding_mask,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, {self.config}"
