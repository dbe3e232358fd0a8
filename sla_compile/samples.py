"""Queries, keys and values of a model's attentions, collected while it runs densely, in memory or in a folder."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sla_compile.kernels.masks import key_bias
from sla_compile.ops import autocast_tokens

_ANEW = "delete its folder to calibrate anew, or give another one"


@dataclass(frozen=True)
class Sample:
    """One attention of one batch entry, on the CPU.

    Args:
        query: (1, H, L, D); key, value: (1, H_kv, L, D).
        mask: float32 (1, 1, 1, L), added to the scores of each key, or None.
        scale: of the softmax, or None for the default.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None

    def to(self, device: torch.device) -> Sample:
        """The sample on another device."""
        query, key, value = (tensor.to(device) for tensor in (self.query, self.key, self.value))
        return Sample(query, key, value, None if self.mask is None else self.mask.to(device), self.scale)


class SampleStore:
    """At most `limit` samples of each site, drawn evenly from all that are offered (reservoir sampling).

    What is kept depends on the seed and the order alone: an interrupted collection goes on as if it had not been.

    Args:
        sites: names of the attentions.
        folder: where to keep them, a safetensors file each; in memory if None.
    """

    def __init__(self, sites: list[str], limit: int, seed: int, folder: Path | None) -> None:
        self.limit, self.seed, self.folder = limit, seed, folder
        self.seen = dict.fromkeys(sites, 0)
        self.kept: dict[tuple[str, int], Sample] = {}

    def offer(self, site: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: Any) -> None:
        """Takes the tensors of a call of scaled_dot_product_attention, each batch entry as a sample, or not."""
        if query.dim() == 3:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            mask = mask if mask is None or mask.dim() < 3 else mask.unsqueeze(1)
        batch, _, length, _ = query.shape
        bias = key_bias(mask, batch, length)
        for entry in range(batch):
            masked = None if bias is None else bias[entry : entry + 1, None, None].cpu()
            if masked is not None and not masked.isfinite().any():
                continue  # no key takes part: the attention is zero whatever is chosen
            number = self.seen[site]
            self.seen[site] += 1
            slot = number
            if number >= self.limit:
                slot = random.Random(f"{self.seed}/{site}/{number}").randrange(number + 1)
            if slot < self.limit:
                _check_finite(site, query=query[entry], key=key[entry], value=value[entry])
                q, k, v = (t[entry : entry + 1].detach().to("cpu", copy=True).contiguous() for t in (query, key, value))
                self._keep(site, slot, Sample(q, k, v, masked, scale))

    def count(self, site: str) -> int:
        """How many samples there are."""
        return min(self.seen[site], self.limit)

    def get(self, site: str, slot: int) -> Sample:
        """One of them."""
        if self.folder is None:
            return self.kept[site, slot]
        path = self._file(site, slot)
        with readable(path, _ANEW), safe_open(path, framework="pt") as file:
            scale = json.loads(file.metadata()["scale"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Sample(**tensors, scale=scale)

    def _keep(self, site: str, slot: int, sample: Sample) -> None:
        if self.folder is None:
            self.kept[site, slot] = sample
            return
        tensors = {name: getattr(sample, name) for name in ("query", "key", "value", "mask")}
        path = self._file(site, slot)
        part = path.with_suffix(".part")
        save_file({n: t for n, t in tensors.items() if t is not None}, part, {"scale": json.dumps(sample.scale)})
        os.replace(part, path)

    def _file(self, site: str, slot: int) -> Path:
        assert self.folder is not None
        return self.folder / f"site{list(self.seen).index(site):03d}-sample{slot:03d}.safetensors"


def _check_finite(site: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            raise ValueError(
                f"{site or 'the model'}: {wrong} of the {tensor.numel()} values of its {name} are NaN or infinite, and "
                "so is full attention; calibrate on batches that the dense model runs without (float16 overflows where "
                "bfloat16 does not)"
            )


class Observer:
    """Offers a site's calls to a store; `Redirection.observer` while the model runs densely.

    Args:
        why_unfit: tells of a (B, H, L, D) query why the site's parameters are not for it, or None.
    """

    def __init__(self, site: str, store: SampleStore, why_unfit: Callable[[Tensor], str | None]) -> None:
        self.site, self.store, self.why_unfit = site, store, why_unfit
        self.reason = "its attention was not called"

    def __call__(self, reason: str | None, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: Any) -> None:
        if reason is None:
            problem = self.why_unfit(query if query.dim() == 4 else query.unsqueeze(1))
            if problem:
                raise ValueError(f"{self.site or 'the model'}: {problem}")
            if torch.is_autocast_enabled(query.device.type):  # they may differ: normed queries are float32, say
                query, key, value = autocast_tokens(query, key, value)
            self.store.offer(self.site, query, key, value, mask, scale)
        else:
            self.reason = reason


def read_json(path: Path) -> Any:
    """The file's contents, None where there is no such file."""
    with readable(path, _ANEW):
        return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Names the file, and what to do, where it is cut off or damaged."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    os.replace(part, path)
