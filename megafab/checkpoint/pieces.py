"""Logical tensors: which boxes of a global tensor this rank holds, as views of the storage it trains with.

A checkpoint stores logical tensors by name and knows nothing of ranks, so every topology reads it. Because
pieces are views, the same description saves (read from the views) and loads (write into them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megafab.topology.layout import Layout

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape
# What a technique puts before a parameter's name for a bool tensor like it that is False where weights are 0.
MASK = "mask/"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A box of the global tensor: it begins at `offset` and has the shape of `tensor`, a view."""

    offset: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LogicalTensor:
    """This rank's part of a global tensor: disjoint pieces, perhaps none.

    `owner` False marks a replica: another rank writes these values, this one only loads them. Over all
    ranks, the pieces of the owners must cover the global tensor exactly once.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    owner: bool


def whole(local: torch.Tensor, layout: Layout, owner: bool) -> LogicalTensor:
    """A rank's complete local tensor, one piece a block of its layout."""
    assert tuple(local.shape) == layout.local_shape, (local.shape, layout.local_shape)
    return _logical(local, [((0,) * local.dim(), local)], layout, owner)


def flat_slice(flat: torch.Tensor, start: int, layout: Layout, owner: bool) -> LogicalTensor:
    """A contiguous range of a rank's flattened local tensor, as sharded optimizers deal it to data ranks.

    The range [start, start + len(flat)) is cut into boxes (the rest of a row, full rows, the beginning of a
    row; the same inside rows) and each box into the blocks of the layout; all are views of `flat`.

    Args:
        flat: 1-d and contiguous, of any length including 0.
        start: of the range, in elements of the flattened local tensor (row-major).
        layout: how the local tensor lies in the global one.
        owner: whether this rank writes the range.
    """
    assert flat.dim() == 1
    assert flat.is_contiguous()
    assert 0 <= start <= start + flat.numel() <= math.prod(layout.local_shape)
    views, used = [], 0
    for offset, shape in _boxes(layout.local_shape, start, start + flat.numel()):
        size = math.prod(shape)
        views.append((offset, flat[used : used + size].view(shape)))
        used += size
    return _logical(flat, views, layout, owner)


def _logical(
    source: torch.Tensor, views: list[tuple[tuple[int, ...], torch.Tensor]], layout: Layout, owner: bool
) -> LogicalTensor:
    pieces = tuple(piece for offset, view in views for piece in _through_blocks(offset, view, layout))
    return LogicalTensor(layout.global_shape, source.dtype, pieces, owner)


def _through_blocks(offset: tuple[int, ...], view: torch.Tensor, layout: Layout) -> Iterator[Piece]:
    """The parts of `view`, which lies at `offset` of the local tensor, that fall into each block."""
    for block in layout.blocks:
        begins = [max(o, b) for o, b in zip(offset, block.local_offset, strict=True)]
        ends = [
            min(o + n, b + m)
            for o, n, b, m in zip(offset, view.shape, block.local_offset, block.shape, strict=True)
        ]
        if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
            continue
        inside = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offset, strict=True))
        shift = zip(begins, block.local_offset, block.global_offset, strict=True)
        yield Piece(tuple(g + b - o for b, o, g in shift), view[inside])


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The flat range [start, stop) of a row-major tensor as boxes, in flat order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _within_row(shape, first, head, tail)
        return
    if head:
        yield from _within_row(shape, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within_row(shape, last, 0, tail)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, inner in _boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *inner)
