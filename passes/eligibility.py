"""Whether a call of scaled_dot_product_attention can become sparse-linear attention, and if not, why."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sla_compile.config import MAX_HEAD_DIM, SLAConfig

DIFFERENT_KEYS = "padding_masks=True is not for it: its mask hides other keys from other queries"

DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


def why_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    config: SLAConfig,
) -> str | None:
    """The reason why this call stays dense, or None where it qualifies.

    It reads shapes and flags alone, so that it can run on fake tensors and while Dynamo traces; for the same reason its
    texts hold no sizes, which may be symbols. The report shows the shapes beside them.
    """
    if is_causal:
        return "causal attention"
    if dropout_p:
        return "attention dropout is active"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors, whose sequences differ in length"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return "query, key and value are not all (batch, heads, tokens, head_dim)"
    if _differ(query.shape[-2], key.shape[-2]):
        return "cross-attention: as many keys as queries are needed"
    if query.shape[-1] != value.shape[-1]:
        return "value has another head dimension than query"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension over {MAX_HEAD_DIM}"
    if query.shape[:-3] != key.shape[:-3] or any(map(_differ, key.shape, value.shape)):
        return "batch dimensions of query, key and value differ"
    if query.shape[-3] != key.shape[-3] and not (enable_gqa and query.dim() == 4):
        return "query and key have different numbers of heads without enable_gqa"
    device = query.device.type
    if query.dtype not in DTYPES.get(device, DTYPES["cuda"]):
        return f"dtype {query.dtype} is not supported on {device}"
    if _shorter(query.shape[-2], config.min_seq_len):
        return f"sequence shorter than min_seq_len={config.min_seq_len}"
    if attn_mask is not None:
        if attn_mask.requires_grad:
            return "attention mask requires a gradient"
        if not is_key_padding_mask(attn_mask, query):
            reason = "attention mask is not a key-padding mask (batch, 1, 1, tokens)"
            if not is_written_out(attn_mask, query):
                return reason
            if not config.padding_masks:
                return f"{reason}; where it is one, written out for each query, choose padding_masks=True"
    return "the batch is empty" if 0 in query.shape else None


def _differ(one: int, other: int) -> bool:
    """Whether two sizes differ. While a model is exported, sizes that depend on data cannot be compared (slices by the
    length of a prompt, say): these are taken to be equal, as self-attention needs them, and compared at run time."""
    if not isinstance(one, torch.SymInt) and not isinstance(other, torch.SymInt):
        return one != other
    if guard_or_false(one != other):
        return True
    torch._check(one == other)
    return False


def _shorter(length: int, minimum: int) -> bool:
    """Whether a sequence is too short; one of a length that only data tells is not, as far as is known."""
    return guard_or_false(length < minimum) if isinstance(length, torch.SymInt) else length < minimum


def is_key_padding_mask(mask: Tensor, query: Tensor) -> bool:
    """Whether `mask` says the same of a key for every head and every query: broadcastable to (B, 1, 1, L), or expanded
    from that, which a stride of zero tells."""
    if mask.dim() > query.dim() or mask.dim() < 1 or mask.shape[-1] != query.shape[-2]:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    # Heads (of a batched query) and queries must not matter; the batch must fit.
    shared = range(1 if mask.dim() == query.dim() else 0, mask.dim() - 1)
    if any(mask.shape[dim] != 1 and mask.stride(dim) != 0 for dim in shared):
        return False
    return mask.dim() < query.dim() or mask.shape[0] == 1 or mask.shape[0] == query.shape[0]


def is_written_out(mask: Tensor, query: Tensor) -> bool:
    """Whether `mask` has the shape of scores: then it may be a key-padding mask, written out for heads and queries."""
    if not 2 <= mask.dim() <= query.dim() or (mask.dtype != torch.bool and not mask.is_floating_point()):
        return False
    scores = (*query.shape[:-1], query.shape[-2])[-mask.dim() :]
    return mask.shape[-1] == scores[-1] and all(m in (1, s) for m, s in zip(mask.shape, scores, strict=True))


def from_written_out(mask: Tensor, query: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """The key-padding mask that `mask` is written out from, and which queries have keys.

    Raises:
        RuntimeError: queries have different keys; on a GPU where the work on it ends.
    """
    shared = [-2, -3] if query.dim() == 4 and mask.dim() > 2 else [-2]
    if mask.dtype == torch.bool:
        keys = mask.any(shared, keepdim=True)
        valid = mask.any([-1, *shared[1:]], keepdim=True)
        same = mask == keys & valid
    else:  # boolean masks end up here, too, once a program is decomposed
        keys = mask.amax(shared, keepdim=True)
        valid = (mask != -torch.inf).any([-1, *shared[1:]], keepdim=True)
        same = (mask == keys) | ~valid
    torch._assert_async(same.all(), f"{site}: {DIFFERENT_KEYS}")
    return keys, valid
