"""Blocks of one head for the CPU kernels: padded views, reused buffers, chunks of query blocks that fit the cache."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from sla_compile.kernels.spec import num_blocks

# NOTE [Chunks]
# Elements of the gathered keys, and then values, of a chunk of query blocks: with the scores some 2 MB, near a core in
# the caches, and enough arithmetic for the few microseconds that a call of torch costs (measured: half and double the
# size are slower). Query blocks go through both branches in groups of GROUP_ROWS, so that what one branch adds to the
# other is still in the cache.
CHUNK_ELEMENTS = 6 * 2**16
CHUNK_TOKENS = 512
GROUP_ROWS = 8

# NOTE [Kept buffers]
# Memory fresh from the operating system costs a page fault per 4 KB, 5 % of a call at 8192 tokens, or the zeros of huge
# pages, up to 25 % of a backward at 16384: a thread keeps this much of its buffers from call to call, and the rest
# until the system wants the memory, where it knows of that (MADV_FREE).
KEPT_BYTES = 2**26

# NOTE [Huge pages]
# States that are read here and there miss the processor's table of pages: where the system has pages of 2 MB (Linux, if
# only on advice), buffers from this size on ask for them. Measured at 16384 tokens: 9 % of a forward, 13 % of a
# backward. So do results, whose memory is fresh from the system in every call: 2 % of a forward, 4 % of a backward.
HUGE_BYTES = 2**22
HUGE_PAGE = 2**21

_THREAD = threading.local()


class Workspace:
    """Named buffers that are reused from chunk to chunk and from head to head."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._mapped: dict[tuple[str, torch.dtype], mmap.mmap | None] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor; the previous one of that name and dtype is overwritten."""
        slot = name, dtype or self.dtype
        elements = math.prod(shape)
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < elements:
            with torch.inference_mode(False):  # a later call outside of it writes here, too
                buffer, self._mapped[slot] = _empty(elements, slot[1])
            self._buffers[slot] = buffer
        return buffer[:elements].view(shape)

    def copy(self, tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`: itself, or a copy in the buffer of that name."""
        return tensor if tensor.dtype == dtype else self(name, *tensor.shape, dtype=dtype).copy_(tensor)

    def trim(self, limit: int) -> None:
        """Drops the largest buffers, or lends them to the system, until the rest takes at most `limit` bytes."""
        kept = 0
        for slot, buffer in sorted(self._buffers.items(), key=lambda item: item[1].numel()):
            kept += buffer.nbytes
            if kept > limit and not _lend(self._mapped[slot]):
                del self._buffers[slot], self._mapped[slot]


def _empty(elements: int, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap | None]:
    """Uninitialised memory, and its mapping where it has one of its own. NOTE [Huge pages]"""
    size = elements * dtype.itemsize
    if size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(elements, dtype=dtype), None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: then they are small
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype), memory


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, contiguous in some order of its dimensions, whose memory nobody has written to. NOTE [Huge pages]"""
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - first
    if tensor.nbytes >= HUGE_BYTES and size > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        # What it says does not matter: pages stay small where there are no others.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def _lend(memory: mmap.mmap | None) -> bool:
    """Lets the system take memory whose contents do not matter until it is written to; False where it cannot."""
    if memory is None or not hasattr(mmap, "MADV_FREE"):
        return False
    try:
        memory.madvise(mmap.MADV_FREE)
    except OSError:
        return False
    return True


@contextmanager
def thread_workspace(dtype: torch.dtype) -> Iterator[Workspace]:
    """The calling thread's workspace, or a new one where that is in use."""
    spaces = _THREAD.__dict__.setdefault("spaces", {})
    workspace = spaces.pop(dtype, None) or Workspace(dtype)
    try:
        yield workspace
    finally:
        workspace.trim(KEPT_BYTES)
        spaces[dtype] = workspace


def blocks_of(tokens: Tensor, block: int, dtype: torch.dtype, workspace: Workspace, name: str) -> Tensor:
    """(L, D) of any strides as (T, block, D) in `dtype`: a view where the kernels can read it as it is, else a copy in
    the buffer of that name with the ragged tail filled with zeros."""
    length, dim = tokens.shape
    blocks = num_blocks(length, block)
    if tokens.stride(1) == 1 and tokens.stride(0) >= dim and length == blocks * block and tokens.dtype == dtype:
        return tokens.unflatten(0, (blocks, block))
    return contiguous_blocks(tokens, block, dtype, workspace, name)


def contiguous_blocks(tokens: Tensor, block: int, dtype: torch.dtype, workspace: Workspace, name: str) -> Tensor:
    """As :func:`blocks_of`, for what is gathered from: contiguous."""
    length, dim = tokens.shape
    blocks = num_blocks(length, block)
    if tokens.is_contiguous() and length == blocks * block and tokens.dtype == dtype:
        return tokens.view(blocks, block, dim)
    padded = workspace(name, blocks, block, dim, dtype=dtype)
    flat = padded.flatten(0, 1)
    flat[:length] = tokens
    flat[length:] = 0
    return padded


def row_groups(rows: int) -> Iterator[slice]:
    """Consecutive query blocks that are worked on together."""
    for start in range(0, rows, GROUP_ROWS):
        yield slice(start, min(start + GROUP_ROWS, rows))


class CriticalBlocks:
    """The critical key blocks of a head's query blocks, from its boolean map (T_m, T_n)."""

    def __init__(self, critical: Tensor) -> None:
        counts = critical.sum(1)
        self.columns = critical.nonzero()[:, 1]
        self.counts: list[int] = counts.tolist()
        self.offsets: list[int] = [0, *counts.cumsum(0).tolist()]

    def chunks(self, rows: slice, elements: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Query blocks of `rows`, counted from its start, that have equally many critical key blocks, and these,
        (number, count), also where there are none.

        Args:
            elements: of a key block.
        """
        counts = self.counts[rows]
        for count in sorted(set(counts)):
            step = max(1, CHUNK_ELEMENTS // max(1, count * elements))
            alike = [row for row, other in enumerate(counts) if other == count]
            whole = len(alike) == len(counts)
            for start in range(0, len(alike), step):
                part = alike[start : start + step]
                first = [self.offsets[rows.start + row] for row in part]
                if whole:
                    listed = self.columns[first[0] : first[-1] + count]
                    yield slice(part[0], part[-1] + 1), listed.view(-1, count) if count else listed.view(len(part), 0)
                else:
                    yield torch.tensor(part), torch.stack([self.columns[i : i + count] for i in first])


def gather(blocks: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """The listed blocks (rows, count) of (T, block, D), side by side: (rows, count * block, D).

    `buffer` has that shape; where every block is listed there is nothing to copy.
    """
    rows, count = columns.shape
    if count == blocks.shape[0]:
        return blocks.reshape(1, -1, blocks.shape[2]).expand(rows, -1, -1)
    torch.index_select(blocks.flatten(1), 0, columns.reshape(-1), out=buffer.view(rows * count, -1))
    return buffer
