"""Attention as people write it, for the tests of the passes."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def matmul_scale_after(q, k, v):
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1]), dim=-1) @ v


def operators_scale_query(q, k, v):
    return ((q * 0.3) @ k.mT).softmax(-1) @ v


def scale_both(q, k, v):
    factor = q.shape[-1] ** -0.25
    return F.softmax((q * factor) @ (k * factor).transpose(2, 3), dim=-1) @ v


def float_softmax(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3
    return torch.matmul(F.softmax(scores.float(), dim=-1, dtype=torch.float32).to(q.dtype), v)


def bmm_flat_heads(q, k, v):
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.3).softmax(dim=-1), v)
    return out.view(batch, heads, length, dim)


def baddbmm(q, k, v):
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    empty = torch.empty(batch * heads, length, length, dtype=q.dtype, device=q.device)
    probabilities = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3).softmax(dim=-1)
    return torch.bmm(probabilities, v).view(batch, heads, length, dim)


def einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_tokens_first(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("b l h d, b m h d -> b h l m", q * 0.3, k)
    return torch.einsum("b h l m, b m h d -> b l h d", scores.softmax(-1), v).transpose(1, 2)


def einsum_ellipsis(q, k, v):
    return torch.einsum("...ij,...jd->...id", (torch.einsum("...id,...jd->...ij", q, k) * 0.3).softmax(-1), v)


def keys_first(q, k, v):
    """Scores transposed, as the attention of convolutional autoencoders has them."""
    scores = (k @ q.transpose(-2, -1)) * 0.3
    return (v.transpose(-2, -1) @ scores.softmax(dim=-2)).transpose(-2, -1)


def inplace(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores *= 0.3
    return F.dropout(scores.softmax(-1), 0.0) @ v


def heads_in_batch_then_split(q, k, v):
    batch, heads = q.shape[:2]
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, heads))
    return (scores * 0.3).softmax(-1) @ v


def dropout_off(q, k, v):
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.5, training=False) @ v


SPELLINGS = {f.__name__: f for f in (
    sdpa, sdpa_scale, matmul_scale_after, operators_scale_query, scale_both, float_softmax, bmm_flat_heads, baddbmm,
    einsum, einsum_tokens_first, einsum_ellipsis, keys_first, inplace, heads_in_batch_then_split, dropout_off,
)}  # fmt: skip
DEFAULT_SCALE = {"sdpa", "matmul_scale_after", "scale_both"}  # the others have 0.3


def masked_sdpa(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], scale=0.3)


def masked_fill(q, k, v, keep):
    scores = (q @ k.mT) * 0.3
    return scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min).softmax(-1) @ v


def masked_add(q, k, v, keep):
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, float("-inf"))[:, None, None, :]
    return ((q @ k.mT) * 0.3 + bias).softmax(-1) @ v


def masked_where(q, k, v, keep):
    return torch.where(keep[:, None, None, :], (q @ k.mT) * 0.3, float("-inf")).softmax(-1) @ v


def masked_then_scaled(q, k, v, keep):
    return ((q @ k.mT).masked_fill(~keep[:, None, None, :], float("-inf")) * 0.3).softmax(-1) @ v


def masked_baddbmm(q, k, v, keep):
    batch, heads, length, dim = q.shape
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, float("-inf"))
    bias = bias[:, None, None, :].expand(-1, heads, -1, -1).reshape(batch * heads, 1, length)
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    return torch.bmm(torch.baddbmm(bias, q * 0.3, k.transpose(1, 2)).softmax(-1), v).view(batch, heads, length, dim)


MASKED = {f.__name__: f for f in (
    masked_sdpa, masked_fill, masked_add, masked_where, masked_then_scaled, masked_baddbmm,
)}  # fmt: skip


class Attention(nn.Module):
    """Self-attention of two heads around one of the spellings, from query, key, value and masks to their result."""

    def __init__(self, attend, dim=32, num_heads=2):
        super().__init__()
        self.attend, self.num_heads = attend, num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def heads(self, x):
        batch, length, dim = x.shape
        packed = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, *mask):
        batch, length, dim = x.shape
        query, key, value = self.heads(x)
        return self.out(self.attend(query, key, value, *mask).transpose(1, 2).reshape(batch, length, dim))


class Model(nn.Module):
    """One block, so that the attention has an owner other than the root."""

    def __init__(self, attend, dim=32):
        super().__init__()
        self.block = nn.Module()
        self.block.attn = Attention(attend, dim)

    def forward(self, x, *mask):
        return x + self.block.attn(x, *mask)
