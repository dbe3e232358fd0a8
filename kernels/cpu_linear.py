"""The linear branch on the CPU: sums over marginal blocks, and what they give each query.

NOTE [Projected values]
The projection is linear, so ``(phi(Q) H / den) W^T = phi(Q) (sum phi(K)^T (V W^T)) / den``: the branch works on projected
values V' = V W^T from the start. Its backward then needs neither O_l nor dO W: with t = dO H'^T it is
``delta_l = rowsum(phi(Q) * t) / den``, ``dphi(Q) = (t - delta_l Z^T) / den``, and ``dW = dV'^T V``, ``dV += dV' W``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla_compile.kernels.cpu_blocks import CHUNK_TOKENS, Workspace
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec

# Elements of the block sums that are summed at a time: 4 MB of float32, so that every row finds them in a nearby cache.
SUMMED_ELEMENTS = 2**20


def feature(tokens: Tensor, feature_map: str, out: Tensor) -> Tensor:
    """phi of (..., D) tokens, written to `out`."""
    if feature_map == "softmax":
        return torch.softmax(tokens, -1, out=out)
    if feature_map == "relu":
        return torch.clamp(tokens, min=0, out=out)
    return out.copy_(F.elu(tokens)).add_(1)


def feature_backward(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """The gradient of the tokens from that of phi, in place; for softmax up to ``-phi * rowsum(grad * phi)``."""
    if feature_map == "softmax":
        return grad.mul_(features)
    if feature_map == "relu":
        return grad.mul_(features > 0)
    return grad.mul_(features.clamp(max=1))  # elu(x) + 1 is its own derivative exp(x) up to 1, and 1 from there


class Selection:
    """``[M == 0] @ x`` and its transpose, for (T, n) matrices x, one row of sums for each row of the map."""

    def __init__(self, marginal: Tensor, dtype: torch.dtype) -> None:
        self.weights = marginal.to(dtype)

    def sums(self, blocks: Tensor, *, transposed: bool = False) -> Tensor:
        """(T_m, n) sums over the marginal blocks of (T_n, n), or the other way round when transposed."""
        return torch.mm(self.weights.t() if transposed else self.weights, blocks)


def feature_step(blocks: int, dim: int) -> int:
    """How many features to sum at a time: all, or the largest of D/2, D/4, ... whose block sums are small enough."""
    step = dim
    while step % 2 == 0 and step > 32 and blocks * step * dim > SUMMED_ELEMENTS:
        step //= 2
    return step


class LinearKeys:
    """Block sums h = phi(K)^T V', z = sum phi(K) of one key head, and later the gradients through them."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        weight: Tensor | None,
        length: int,
        proj_weight: Tensor,
        spec: Spec,
        workspace: Workspace,
    ) -> None:
        """keys, values: (T_n, b_k, D); weight: (T_n, b_k, 1), of each key, or None; proj_weight: (D, D)."""
        self.keys, self.values, self.weight, self.length = keys, values, weight, length
        self.proj_weight, self.spec, self.workspace = proj_weight, spec, workspace
        count, _, dim = keys.shape
        self.step = dim if spec.linear == "all" else feature_step(count, dim)
        self.sums_kv = workspace("sums_kv", dim // self.step, count, self.step, dim)
        self.sums_k = workspace("sums_k", count, dim)
        for start, stop in self._chunks():
            features, _ = self._features(start, stop)
            projected = self._projected(start, stop)
            torch.sum(features, 1, out=self.sums_k[start:stop])
            for index, part in enumerate(features.split(self.step, -1)):
                torch.bmm(part.transpose(1, 2), projected, out=self.sums_kv[index, start:stop])
        self.total_kv = self.sums_kv.sum(1, keepdim=True) if spec.linear == "all" else None

    def _chunks(self) -> list[tuple[int, int]]:
        count, block, _ = self.keys.shape
        step = max(1, CHUNK_TOKENS // block)
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def _features(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """phi(K) times the weight of each key, and without it."""
        keys = self.keys[start:stop]
        features = feature(keys, self.spec.feature_map, self.workspace("features", *keys.shape))
        if stop == self.keys.shape[0]:  # keys past the end weigh nothing, and phi of zeros is not zero
            features.flatten(0, 1)[self.length - start * keys.shape[1] :] = 0
        if self.weight is None:
            return features, features
        weighted = torch.mul(features, self.weight[start:stop], out=self.workspace("weighted", *keys.shape))
        return weighted, features

    def _projected(self, start: int, stop: int) -> Tensor:
        values = self.values[start:stop]
        projected = self.workspace("projected", *values.shape)
        torch.mm(values.flatten(0, 1), self.proj_weight.t(), out=projected.flatten(0, 1))
        return projected

    def select(self, marginal: Tensor) -> Selection | None:
        """The sums that the query blocks of a head take; None for scope "all", where there is one for all."""
        return None if self.spec.linear == "all" else Selection(marginal, self.keys.dtype)

    def query_sums(self, selection: Selection | None, index: int, rows: int) -> Tensor:
        """H' of each query block, the index-th share of its features: (rows, step, D)."""
        if selection is None:
            return self.total_kv[index].expand(rows, -1, -1)
        return selection.sums(self.sums_kv[index].flatten(1)).view(rows, self.step, -1)

    def query_weights(self, selection: Selection | None, rows: int) -> Tensor:
        """Z of each query block: (rows, D, 1)."""
        sums = self.sums_k.sum(0, keepdim=True).expand(rows, -1) if selection is None else selection.sums(self.sums_k)
        return sums.unsqueeze(-1)

    def forward(self, queries: Tensor, selection: Selection | None, proj_bias: Tensor | None) -> Tensor:
        """O_l W^T + b of one query head: (T_m, b_q, D)."""
        rows, block_q, dim = queries.shape
        features, _, inverse = self.query_features(queries, selection)
        features.mul_(inverse)
        output = self.workspace("linear", rows, block_q, dim)
        for index, part in enumerate(features.split(self.step, -1)):
            sums = self.query_sums(selection, index, rows)
            if index:
                output.baddbmm_(part, sums)
            elif proj_bias is None:
                torch.bmm(part, sums, out=output)
            else:
                torch.baddbmm(proj_bias, part, sums, out=output)
        return output

    def query_features(self, queries: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
        """phi(Q), Z (rows, D, 1) and 1 / (phi(Q) Z + epsilon), zero where the branch is undefined."""
        rows, block_q, dim = queries.shape
        features = feature(queries, self.spec.feature_map, self.workspace("query_features", rows, block_q, dim))
        weights = self.query_weights(selection, rows)
        denominator = torch.bmm(features, weights).add_(self.spec.epsilon)
        return features, weights, torch.where(denominator > MIN_DENOMINATOR, 1 / denominator, 0)

    def query_backward(self, grads: Tensor, queries: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """Gradient of one head's queries, and ``delta_l`` (rows, b_q, 1); adds to the gradients of h and z.

        Args:
            grads: dO, (rows, b_q, D).
        """
        rows, block_q, dim = queries.shape
        features, weights, inverse = self.query_features(queries, selection)
        result = self.workspace("query_grads", rows, block_q, dim)
        for index, part in enumerate(result.split(self.step, -1)):
            part.copy_(torch.bmm(grads, self.query_sums(selection, index, rows).transpose(1, 2)))
        delta = (features * result).sum(-1, keepdim=True).mul_(inverse)
        result.addcmul_(delta, weights.transpose(1, 2), value=-1).mul_(inverse)
        if self.spec.feature_map == "softmax" and self.spec.epsilon:  # rowsum(phi * dphi), zero without an epsilon
            result.sub_(delta * inverse, alpha=self.spec.epsilon)
        feature_backward(result, features, self.spec.feature_map)

        features.mul_(inverse)
        for index, part in enumerate(features.split(self.step, -1)):
            self.grad_kv[index] += self._key_sums(selection, torch.bmm(part.transpose(1, 2), grads).flatten(1)).view(
                -1, self.step, dim
            )
        self.grad_k -= self._key_sums(selection, torch.bmm(features.transpose(1, 2), delta)[..., 0])
        return result, delta

    def _key_sums(self, selection: Selection | None, blocks: Tensor) -> Tensor:
        return blocks.sum(0, keepdim=True) if selection is None else selection.sums(blocks, transposed=True)

    def start_backward(self) -> None:
        """Zeroes the gradients of h and z that the query heads of this key head add to."""
        count, dim = self.sums_k.shape
        count = 1 if self.spec.linear == "all" else count
        self.grad_kv = self.workspace("grad_kv", dim // self.step, count, self.step, dim).zero_()
        self.grad_k = self.workspace("grad_k", count, dim).zero_()

    def key_backward(self, grad_keys: Tensor, grad_values: Tensor, grad_proj_weight: Tensor) -> None:
        """Adds to the gradients of keys and values (T_n, b_k, D) and of the projection (D, D)."""
        for start, stop in self._chunks():
            weighted, features = self._features(start, stop)
            projected, values = self._projected(start, stop), self.values[start:stop]
            grad_features, grad_projected = torch.empty_like(features), torch.empty_like(features)
            part_of_kv = self.grad_kv.expand(-1, self.keys.shape[0], -1, -1)[:, start:stop]
            for index, part in enumerate(weighted.split(self.step, -1)):
                sums = part_of_kv[index]
                grad_features.split(self.step, -1)[index].copy_(torch.bmm(projected, sums.transpose(1, 2)))
                torch.baddbmm(grad_projected, part, sums, beta=float(index > 0), out=grad_projected)
            grad_features += self.grad_k.expand(self.keys.shape[0], -1)[start:stop, None]
            if self.weight is not None:
                grad_features *= self.weight[start:stop]
            if self.spec.feature_map == "softmax":
                grad_features -= (grad_features * features).sum(-1, keepdim=True)
            grad_keys[start:stop] += feature_backward(grad_features, features, self.spec.feature_map)
            flat = grad_projected.flatten(0, 1)
            grad_values[start:stop].flatten(0, 1).addmm_(flat, self.proj_weight)
            grad_proj_weight.addmm_(flat.t(), values.flatten(0, 1))
