"""The linear branch on the CPU: sums over marginal blocks, and what they give each query.

NOTE [Projected values]
The projection is linear, so ``(phi(Q) H / den) W^T = phi(Q) (sum phi(K)^T (V W^T)) / den``: the branch works on
projected values V' = V W^T from the start. Its backward then needs neither O_l nor dO W: with t = dO H'^T it is
``delta_l = rowsum(phi(Q) * t) / den``, ``dphi(Q) = (t - delta_l Z^T) / den``, and ``dW = dV'^T V``, ``dV += dV' W``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels.cpu_blocks import CHUNK_TOKENS, Workspace
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec

# Reading a listed block costs as much as multiplying that many by zero or one (measured, float32, D = 128).
LISTED_COST = 16
# Rows of one matrix product: fewer read the block sums too often, more leave the cache.
PRODUCT_ROWS = 64


def feature(tokens: Tensor, feature_map: str, out: Tensor) -> Tensor:
    """phi of (..., D) tokens in the dtype of `out`, written there."""
    if tokens.dtype != out.dtype:
        tokens = out.copy_(tokens)
    if feature_map == "softmax":
        return torch.softmax(tokens, -1, out=out)
    if feature_map == "relu":
        return torch.clamp(tokens, min=0, out=out)
    # Not elu(x) + 1, which for x of -17 is a rounding of 1 and no longer the exponential.
    positive = tokens.clamp(min=0)
    return torch.clamp(tokens, max=0, out=out).exp_().add_(positive)


def feature_backward(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """The gradient of the tokens from that of phi, in place; for softmax once rowsum(grad * phi) was subtracted."""
    if feature_map == "softmax":
        return grad.mul_(features)
    if feature_map == "relu":
        return grad.mul_(features > 0)
    return grad.mul_(features.clamp(max=1))  # elu(x) + 1 is its own derivative exp(x) up to 1, and 1 from there


class BlockSums:
    """``selected @ blocks``, rows at a time and in ascending order, in the way that is shorter.

    By lists where these are short: a row sums its selected blocks, or, if those are the majority and enough is left,
    subtracts the others from the total. Else, and always in bfloat16, whose total would be too coarse, it is a matrix
    product.

    Args:
        selected: boolean (rows, n).
        blocks: (n + 1, elements), the last row the sum of the others.
        enough: boolean (rows, 1): where what a row selects is not lost in the total's rounding; None for everywhere.
    """

    def __init__(
        self, selected: Tensor, blocks: Tensor, name: str, workspace: Workspace, enough: Tensor | None = None
    ) -> None:
        self.blocks, self.name, self.workspace = blocks, name, workspace
        most = 2 * selected.sum(1, keepdim=True) > selected.shape[1]
        if enough is not None:
            most &= enough
        listed = selected ^ most
        self.lists = blocks.dtype != torch.bfloat16 and int(listed.sum()) * LISTED_COST < selected.numel()
        if not self.lists:
            self.weights, self.stop = selected.to(blocks.dtype), 0
            return
        listed = torch.cat([listed, most], 1)
        rows, self.indices = listed.nonzero().unbind(1)
        self.offsets = [0, *listed.sum(1).cumsum(0).tolist()]
        self.starts = torch.tensor(self.offsets)
        negative = most[rows, 0] & (self.indices < selected.shape[1])
        self.signs = 1 - 2 * negative.to(blocks.dtype)

    def __call__(self, start: int, stop: int) -> Tensor:
        """(stop - start, elements)."""
        if self.lists:
            first, last = self.offsets[start], self.offsets[stop]
            return F.embedding_bag(
                self.indices[first:last],
                self.blocks,
                self.starts[start:stop] - first,
                mode="sum",
                per_sample_weights=self.signs[first:last],
            )
        if stop > self.stop:
            self.start, self.stop = start, min(start + PRODUCT_ROWS, self.weights.shape[0])
            self.sums = self.workspace(self.name, self.stop - start, self.blocks.shape[1], dtype=self.blocks.dtype)
            torch.mm(self.weights[start : self.stop], self.blocks[:-1], out=self.sums)
        return self.sums[start - self.start : stop - self.start]


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, with operands that may be of a lower precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def _add_total(blocks: Tensor, start: int, stop: int) -> None:
    """Keeps the running total in the last row of blocks that are written in ascending order."""
    if blocks.dtype == torch.bfloat16:
        return
    total = blocks[start:stop].sum(0)
    if start:
        total += blocks[-1]
    blocks[-1] = total


class LinearHead:
    """The linear branch of one key head: block sums h = phi(K)^T V', z = sum phi(K), and the gradients through them.

    Args:
        keys, values: (T_n, b_k, D), zero past the end.
        weight: (T_n, b_k, 1), the weight of each key, or None.
        length: true number of tokens.
        proj_weight: (D, D), or None for V' = V.
        key_mean: (D,), subtracted from the keys before phi, or None.
        kept: whether phi(K) and V' are kept for the backward, which needs them again.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        weight: Tensor | None,
        length: int,
        proj_weight: Tensor | None,
        key_mean: Tensor | None,
        spec: Spec,
        workspace: Workspace,
        *,
        kept: bool,
    ) -> None:
        self.keys, self.values, self.weight, self.length = keys, values, weight, length
        self.spec, self.workspace, self.operand, self.key_mean = spec, workspace, keys.dtype, key_mean
        self.proj_weight = None if proj_weight is None else proj_weight.to(self.operand)
        count, block, dim = keys.shape
        self.everything = spec.linear == "all"
        self.key_step = max(1, CHUNK_TOKENS // block)
        self.block_kv = self._block_buffer("block_kv", count)
        self.block_k = workspace("block_k", count, dim)
        self.kept: tuple[Tensor, Tensor] | None = None
        if kept:
            self.kept = (
                workspace("kept_features", *keys.shape),
                values if proj_weight is None else workspace("kept_projected", *values.shape, dtype=self.operand),
            )
        for start in range(0, count, self.key_step):
            stop = min(start + self.key_step, count)
            features = self._weighted(self._features(start, stop), start, stop)
            torch.sum(features, 1, out=self.block_k[start:stop])
            features = workspace.copy(features, "operand", self.operand)
            projected = self._projected(start, stop)
            if self.everything:
                _accumulate(self.block_kv[0], features.flatten(0, 1).t(), projected.flatten(0, 1))
            else:
                torch.bmm(features.transpose(1, 2), projected, out=self.block_kv[start:stop])
                _add_total(self.block_kv, start, stop)
        if self.everything:
            self.block_kv = self.block_kv.to(self.operand)

    def _block_buffer(self, name: str, count: int) -> Tensor:
        """Room for a (D, D) matrix of each block and their total, or for their sum alone, zeroed."""
        dim = self.keys.shape[2]
        if self.everything:
            return self.workspace(name, 1, dim, dim).zero_()
        return self.workspace(name, count + 1, dim, dim, dtype=self.operand)

    def _features(self, start: int, stop: int) -> Tensor:
        """phi(K), not yet an operand."""
        keys = self.keys[start:stop]
        features = self.workspace("features", *keys.shape) if self.kept is None else self.kept[0][start:stop]
        if self.key_mean is not None:
            keys = torch.sub(keys, self.key_mean, out=features)
        feature(keys, self.spec.feature_map, features)
        if stop == self.keys.shape[0]:  # keys past the end weigh nothing, and phi of zeros is not zero
            features.flatten(0, 1)[self.length - start * keys.shape[1] :] = 0
        return features

    def _weighted(self, features: Tensor, start: int, stop: int) -> Tensor:
        """phi(K) times the weight of each key."""
        if self.weight is None:
            return features
        return torch.mul(features, self.weight[start:stop], out=self.workspace("weighted", *features.shape))

    def _projected(self, start: int, stop: int) -> Tensor:
        """V'."""
        values = self.values[start:stop]
        if self.proj_weight is None:
            return values
        projected = self.workspace("projected", *values.shape, dtype=self.operand)
        if self.kept is not None:
            projected = self.kept[1][start:stop]
        torch.mm(values.flatten(0, 1), self.proj_weight.t(), out=projected.flatten(0, 1))
        return projected

    def start(self, marginal: Tensor) -> None:
        """Takes up a query head with the boolean map (T_m, T_n) of its marginal blocks."""
        self.marginal = marginal
        rows = marginal.shape[0]
        if self.everything:
            self.row_k = self.block_k.sum(0).expand(rows, -1)[..., None]
        else:
            row_k = torch.mm(marginal.to(self.block_k.dtype), self.block_k)
            # At least a quarter of every z: then the same share of the states is left, of which phi is a factor.
            enough = (4 * row_k >= self.block_k.sum(0)).all(1, keepdim=True)
            self.row_k = row_k[..., None]
            self.row_kv = BlockSums(marginal, self.block_kv.flatten(1), "row_kv", self.workspace, enough)

    def _sums(self, rows: slice) -> Tensor:
        """H' of some query blocks: (rows, D, D)."""
        if self.everything:
            return self.block_kv.expand(rows.stop - rows.start, -1, -1)
        return self.row_kv(rows.start, rows.stop).unflatten(1, self.block_kv.shape[1:])

    def _query_features(self, queries: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """phi(Q), and 1 / (phi(Q) Z + epsilon), zero where the branch is undefined."""
        features = feature(queries, self.spec.feature_map, self.workspace("query_features", *queries.shape))
        denominator = self._denominator(features, rows)
        return features, torch.where(denominator > MIN_DENOMINATOR, 1 / denominator, 0)

    def _denominator(self, features: Tensor, rows: slice) -> Tensor:
        """phi(Q) Z + epsilon: (rows, b_q, 1)."""
        # One product of all rows with all Z, of which the diagonal is kept, is quicker than one with a vector a row.
        products = torch.mm(features.flatten(0, 1), self.row_k[rows, :, 0].t()).unflatten(0, features.shape[:2])
        return products.diagonal(dim1=0, dim2=2).t()[..., None] + self.spec.epsilon

    def forward(self, queries: Tensor, rows: slice, proj_bias: Tensor | None, share: Tensor | None) -> Tensor:
        """O_l W^T + b, or `share` (rows, 1, 1) of O_l, of the query blocks `rows` with these queries (rows, b_q, D)."""
        features, inverse = self._query_features(queries, rows)
        if share is not None:
            inverse *= share
        features = self.workspace.copy(features.mul_(inverse), "query_features", self.operand)
        output = self.workspace("linear", *queries.shape, dtype=self.operand)
        torch.bmm(features, self._sums(rows), out=output)
        return output if proj_bias is None else output.add_(proj_bias.to(self.operand))

    def start_backward(self) -> None:
        """Makes room for the gradients that the query blocks of a head hand to the key blocks."""
        rows, dim = self.marginal.shape[0], self.keys.shape[2]
        self.grad_row_kv = self._block_buffer("grad_row_kv", rows)
        self.grad_row_k = self.workspace("grad_row_k", rows, dim)

    def query_backward(self, grads: Tensor, queries: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Gradient of some query blocks' queries (rows, b_q, D), and rowsum(dO_l * O_l) (rows, b_q, 1).

        Args:
            grads: dO_l of those rows.
        """
        features, inverse = self._query_features(queries, rows)
        product = self.workspace("query_grads", *queries.shape, dtype=self.operand)
        torch.bmm(grads, self._sums(rows).transpose(1, 2), out=product)
        result = self.workspace.copy(product, "query_grads", features.dtype)
        delta = torch.mul(features, result, out=self.workspace("products", *queries.shape)).sum(-1, keepdim=True)
        delta.mul_(inverse)
        result.addcmul_(delta, self.row_k[rows].transpose(1, 2), value=-1).mul_(inverse)
        if self.spec.feature_map == "softmax" and self.spec.epsilon:  # rowsum(phi * dphi), zero without an epsilon
            result.sub_(delta * inverse, alpha=self.spec.epsilon)
        feature_backward(result, features, self.spec.feature_map)

        torch.bmm(delta.transpose(1, 2), features.mul_(inverse), out=self.grad_row_k[rows, None])
        features = self.workspace.copy(features, "query_features", self.operand)
        if self.everything:
            _accumulate(self.grad_row_kv[0], features.flatten(0, 1).t(), grads.flatten(0, 1))
        else:
            torch.bmm(features.transpose(1, 2), grads, out=self.grad_row_kv[rows])
            _add_total(self.grad_row_kv, rows.start, rows.stop)
        return result, delta

    def key_backward(self, grad_keys: Tensor, grad_values: Tensor, grad_proj_weight: Tensor | None) -> None:
        """Adds what the query head gives to the gradients of keys and values (T_n, b_k, D) and of the projection."""
        if self.kept is None:
            raise RuntimeError("a backward needs kept=True")
        count = self.keys.shape[0]
        columns = self.marginal.t()
        if self.everything:
            grad_block_k = self.grad_row_k.sum(0).expand(count, -1)
            self.grad_row_kv = self.grad_row_kv.to(self.operand)
        else:
            grad_block_k = torch.mm(columns.to(self.grad_row_k.dtype), self.grad_row_k)
            grad_block_kv = BlockSums(columns, self.grad_row_kv.flatten(1), "row_kv", self.workspace)
        for start in range(0, count, self.key_step):
            stop = min(start + self.key_step, count)
            features, projected = (kept[start:stop] for kept in self.kept)
            if self.everything:
                grad_kv = self.grad_row_kv.expand(stop - start, -1, -1)
            else:
                grad_kv = grad_block_kv(start, stop).unflatten(1, self.grad_row_kv.shape[1:])

            operand = self.workspace.copy(self._weighted(features, start, stop), "operand", self.operand)
            tokens = self.workspace("projected", *features.shape, dtype=self.operand)
            tokens = torch.bmm(operand, grad_kv, out=tokens).flatten(0, 1)
            into = grad_values[start:stop].flatten(0, 1)
            if self.proj_weight is None or grad_proj_weight is None:
                into += tokens
            else:
                _accumulate(into, tokens, self.proj_weight)
                _accumulate(grad_proj_weight, tokens.t(), self.values[start:stop].flatten(0, 1))

            product = self.workspace("query_grads", *features.shape, dtype=self.operand)
            torch.bmm(projected, grad_kv.transpose(1, 2), out=product)
            grad_features = self.workspace.copy(product, "query_grads", features.dtype)
            grad_features -= grad_block_k[start:stop, None]
            if self.weight is not None:
                grad_features *= self.weight[start:stop]
            if self.spec.feature_map == "softmax":
                products = torch.mul(grad_features, features, out=self.workspace("products", *features.shape))
                grad_features -= products.sum(-1, keepdim=True)
            grad_keys[start:stop] += feature_backward(grad_features, features, self.spec.feature_map)
