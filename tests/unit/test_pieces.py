"""Logical tensors: every range of every layout, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from megafab.checkpoint.pieces import flat_slice, whole
from megafab.topology.layout import Block, Layout

LAYOUTS = {
    "scalar": [Layout.whole(())],
    "vector": [Layout.whole((7,))],
    "vector over 2 ranks": [Layout.split((4,), 0, 2, part) for part in range(2)],
    "matrix": [Layout.whole((4, 5))],
    "rows over 3 ranks": [Layout.split((2, 3), 0, 3, part) for part in range(3)],
    "columns over 2 ranks": [Layout.split((3, 2), 1, 2, part) for part in range(2)],
    "gate and up halves over 2 ranks": [Layout.split((6, 3), 0, 2, part, stride=2) for part in range(2)],
    "gate and up columns over 2 ranks": [Layout.split((3, 4), 1, 2, part, stride=2) for part in range(2)],
    "3-d": [Layout.whole((2, 3, 4))],
    "3-d over 2 ranks in the middle": [Layout.split((2, 2, 3), 1, 2, part) for part in range(2)],
    "one column": [Layout.whole((4, 1))],
}


def place(target: torch.Tensor, logical) -> None:
    for piece in logical.pieces:
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
        target[box] += piece.tensor


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_tensors_of_all_ranks_make_the_global_one(name):
    layouts = LAYOUTS[name]
    shape = layouts[0].global_shape
    expected = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    rebuilt = torch.zeros(shape)
    for layout in layouts:
        local = torch.zeros(layout.local_shape)
        for b in layout.blocks:
            here = tuple(slice(o, o + n) for o, n in zip(b.local_offset, b.shape, strict=True))
            there = tuple(slice(o, o + n) for o, n in zip(b.global_offset, b.shape, strict=True))
            local[here] = expected[there]
        place(rebuilt, whole(local, layout, owner=True))
    assert torch.equal(rebuilt, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_flat_range_lands_where_the_whole_tensor_puts_it(name):
    for layout in LAYOUTS[name]:
        size = math.prod(layout.local_shape)
        local = torch.arange(1.0, size + 1)
        reference = torch.zeros(layout.global_shape)
        place(reference, whole(local.view(layout.local_shape), layout, owner=True))
        for start in range(size + 1):
            for stop in range(start, size + 1):
                values = torch.zeros(layout.global_shape)
                place(values, flat_slice(local[start:stop], start, layout, owner=True))
                # Values are distinct and positive, and `place` adds: equality means covered once, no more.
                selected = (reference > start) & (reference <= stop)
                assert torch.equal(values, reference * selected), (start, stop)


def test_a_range_of_a_matrix_by_hand():
    #  . . 2        a 3 x 3 local tensor, elements 2..7: the end of row 0, all of row 1,
    #  3 4 5        the first two of row 2; the global tensor has a column block before it
    #  6 7 .
    layout = Layout((3, 6), (3, 3), (Block((0, 0), (0, 3), (3, 3)),))
    logical = flat_slice(torch.arange(2.0, 8.0), 2, layout, owner=False)
    assert [(p.offset, p.tensor.tolist()) for p in logical.pieces] == [
        ((0, 5), [[2.0]]),
        ((1, 3), [[3.0, 4.0, 5.0]]),
        ((2, 3), [[6.0, 7.0]]),
    ]
    assert (logical.global_shape, logical.dtype, logical.owner) == ((3, 6), torch.float32, False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_are_views_so_that_loading_is_in_place(name):
    for layout in LAYOUTS[name]:
        local = torch.zeros(math.prod(layout.local_shape))
        for piece in flat_slice(local, 0, layout, owner=True).pieces:
            piece.tensor.fill_(1.0)
        assert local.all()
