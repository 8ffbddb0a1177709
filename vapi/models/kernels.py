"""Attention of one new position to all before it, as a Triton kernel: for ``graphs.py``, imported there alone.

torch's own attention reads as many keys as the tensor it is given has, so a graph that is recorded once
would read the whole cache at every step, twice what is filled on average; and the cache is what sampling
waits for. Here the number of positions is read on the device, when the graph runs.

One program for every row and head. It writes the new key and value into the cache, then walks over the
filled part, keeping the running maximum and sum of a softmax (Milakov and Gimelshein, arXiv 1805.02867):
one for each of ``BLOCK`` slots, which meet every ``BLOCK``-th position, so that threads need not wait for
each other before the end.

Triton comes with torch's builds for CUDA on Linux.
"""

# ruff: noqa: ANN001, ANN202 (a kernel's arguments are what its launch makes of them)
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend(
    q, k, v, cache, out, at, starts,
    q_row, q_head, k_row, k_head, v_row, v_head, value_offset,
    heads, room, scale,
    WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    lanes = tl.arange(0, LANES)
    inside = lanes < WIDTH
    query = tl.load(q + row * q_row + head * q_head + lanes, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(k + row * k_row + head * k_head + lanes, mask=inside, other=0.0)
    value = tl.load(v + row * v_row + head * v_head + lanes, mask=inside, other=0.0)
    position, first = tl.load(at), tl.load(starts + row)
    keys = cache + program * room * WIDTH
    values = keys + value_offset
    tl.store(keys + position * WIDTH + lanes, key, mask=inside)
    tl.store(values + position * WIDTH + lanes, value, mask=inside)
    slots = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.float32) + tl.sum(query * key.to(tl.float32), axis=0)  # the new position sees itself
    total = tl.where(slots == 0, 1.0, 0.0)
    found = tl.where((slots == 0)[:, None], value.to(tl.float32)[None, :], 0.0)
    for start in range(first, position, BLOCK):
        places = start + slots
        there = (places < position)[:, None] & inside[None, :]
        where = places[:, None] * WIDTH + lanes[None, :]
        scores = tl.sum(tl.load(keys + where, mask=there, other=0.0).to(tl.float32) * query[None, :], axis=1)
        scores = tl.where(places < position, scores, -float("inf"))
        higher = tl.maximum(best, scores)
        shrink, weights = tl.exp(best - higher), tl.exp(scores - higher)
        found = found * shrink[:, None] + weights[:, None] * tl.load(values + where, mask=there, other=0.0).to(tl.float32)
        total = total * shrink + weights
        best = higher
    shares = tl.exp(best - tl.max(best, axis=0))
    found_by_all = tl.sum(found * shares[:, None], axis=0) / tl.sum(total * shares, axis=0)
    tl.store(out + program * WIDTH + lanes, found_by_all, mask=inside)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, at: Tensor, starts: Tensor) -> Tensor:
    """``vapi.models.gpt.attend`` for one position (B, H, 1, E) and a layer's cache (2, B, H, P, E), with the position ``at`` (1,) and the
    first position that each row may see, ``starts`` (B,), on the device (int64)."""
    rows, heads, _, width = q.shape
    assert cache.is_contiguous() and q.stride(3) == k.stride(3) == v.stride(3) == 1, (cache.stride(), q.stride(), k.stride(), v.stride())
    out = torch.empty(rows, heads, 1, width, dtype=q.dtype, device=q.device)
    _attend[(rows * heads,)](
        q, k, v, cache, out, at, starts,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.stride(0),
        heads, cache.shape[3], 1 / math.sqrt(width),
        WIDTH=width, LANES=triton.next_power_of_2(width), BLOCK=64,
    )  # fmt: skip
    return out
