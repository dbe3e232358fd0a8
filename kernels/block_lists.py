"""Lists of the critical blocks of each row and of each column of a block map, built on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_start", "heads", "lists", "length"])
def block_lists_kernel(
    map_ptr,
    entries_ptr,
    counts_ptr,
    stride_batch,
    stride_head,
    stride_list,
    stride_entry,
    head_start,
    heads,
    lists,
    length,
    LISTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compacts LISTS lines of one head's map: the places of its +1, ascending, and how many there are."""
    tiles = tl.cdiv(lists, LISTS)
    local = tl.program_id(0) // tiles
    head = head_start + local
    line = (tl.program_id(0) % tiles) * LISTS + tl.arange(0, LISTS)
    map_ptr += (head // heads).to(tl.int64) * stride_batch + (head % heads).to(tl.int64) * stride_head
    destination = (local.to(tl.int64) * lists + line) * length

    count = tl.zeros([LISTS], tl.int32)
    for start in range(0, length, STEP):
        place = start + tl.arange(0, STEP)
        exists = (line < lists)[:, None] & (place < length)[None, :]
        offsets = line.to(tl.int64)[:, None] * stride_list + place.to(tl.int64)[None, :] * stride_entry
        critical = (tl.load(map_ptr + offsets, mask=exists, other=0) == 1).to(tl.int32)  # (LISTS, STEP)
        before = count[:, None] + tl.cumsum(critical, 1) - critical
        values = tl.broadcast_to(place[None, :], (LISTS, STEP))
        tl.store(entries_ptr + destination[:, None] + before, values, mask=critical != 0)
        count += tl.sum(critical, 1)
    tl.store(counts_ptr + local.to(tl.int64) * lists + line, count, mask=line < lists)
