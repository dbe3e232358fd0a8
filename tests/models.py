"""Small transformers of our own that the tests accelerate."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class SelfAttention(nn.Module):
    """Plain multi-head self-attention over (B, L, C) with a packed projection."""

    def __init__(self, dim: int = 32, num_heads: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Queries from x, keys and values from context; structurally undecidable without its caller."""

    def __init__(self, dim: int = 32, num_heads: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x, context=None):
        context = x if context is None else context
        query = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, dim: int = 32, num_heads: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.text = CrossAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, context):
        x = x + self.attn(self.norm(x))
        x = x + self.text(x, context)
        return x + self.mlp(x)


class TinyDiT(nn.Module):
    """Two blocks of self-attention, cross-attention to `context` and an MLP."""

    def __init__(self, dim: int = 32, num_heads: int = 2, depth: int = 2, checkpointing: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.checkpointing = checkpointing

    def forward(self, x, context):
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False) if self.checkpointing else block(x, context)
        return x


def build(seed: int = 0, **options) -> TinyDiT:
    torch.manual_seed(seed)
    return TinyDiT(**options).eval()


def make_inputs(length: int = 200, batch: int = 1, dim: int = 32, context: int | None = None):
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(batch, length, dim, generator=generator),
        torch.randn(batch, length if context is None else context, dim, generator=generator),
    )
