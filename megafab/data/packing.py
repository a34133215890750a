"""A window of the token stream as inputs, labels and mask: what may see and predict what.

Shape suffixes: B windows, L sequence length, W = L + 1 tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megafab.data.config import Packing


@dataclass(frozen=True, slots=True)
class Packed:
    """Arrays of one batch, named as in `megafab.run.Batch`, all contiguous."""

    tokens_BL: np.ndarray  # int64
    labels_BL: np.ndarray  # int64
    loss_mask_BL: np.ndarray  # float32
    position_BL: np.ndarray  # int64
    document_BL: np.ndarray  # int32


@dataclass(frozen=True, slots=True)
class Passages:
    """Text to stand in front of windows: tokens [B, P], of which the first `length_B` are text."""

    token_BP: np.ndarray  # int64
    length_B: np.ndarray  # int64


def put_in_front(passages: Passages, packed: Packed) -> Packed:
    """Rows of passage and window: the window's first document goes on from the passage, as one document.

    A passage stands at the end of its P places; what is before it is a document that nobody sees. Nothing is
    predicted within it, nor is the first token of the window, which no window predicts.
    """
    token_BP, length_B = passages.token_BP, passages.length_B
    rows, places = token_BP.shape
    place_P = np.arange(places)
    start_B1 = places - length_B[:, None]
    source_BP = np.maximum(place_P - start_B1, 0)
    first_BL = packed.document_BL == 0
    tokens_BP = np.take_along_axis(token_BP, source_BP, axis=1)
    following_BP = np.concatenate([tokens_BP[:, 1:], packed.tokens_BL[:, :1]], axis=1)
    return Packed(
        tokens_BL=np.concatenate([tokens_BP, packed.tokens_BL], axis=1),
        labels_BL=np.concatenate([following_BP, packed.labels_BL], axis=1),
        loss_mask_BL=np.concatenate([np.zeros((rows, places), np.float32), packed.loss_mask_BL], axis=1),
        position_BL=np.concatenate(
            [source_BP, packed.position_BL + np.where(first_BL, length_B[:, None], 0)], axis=1
        ),
        document_BL=np.concatenate(
            [(place_P >= start_B1).astype(np.int32), packed.document_BL + np.int32(1)], axis=1
        ),
    )


def pack(window_BW: np.ndarray, starts_BW: np.ndarray, packing: Packing) -> Packed:
    """Splits windows into inputs and labels, and says which of the labels count.

    With `Packing.document` a label in another document is not asked for (its mask is 0), documents are
    numbered from 0 along the row and positions restart with each; the first position of a row is 0 even
    when the row begins inside a document, because what came before is not in the window. With
    `Packing.concatenate` the row is one stream: every label counts, across documents too.

    Args:
        window_BW: token ids.
        starts_BW: bool, True where a token begins a document. The first column is not looked at, and
            nothing is when packing is `concatenate`.
        packing: how documents share a row.
    """
    rows, width = window_BW.shape
    shape = (rows, width - 1)
    position_L = np.arange(width - 1, dtype=np.int64)
    if packing is Packing.concatenate:
        loss_mask_BL = np.ones(shape, np.float32)
        position_BL = np.tile(position_L, (rows, 1))
        document_BL = np.zeros(shape, np.int32)
    else:
        starts_BL = starts_BW[:, :-1].copy()
        starts_BL[:, 0] = False
        loss_mask_BL = (~starts_BW[:, 1:]).astype(np.float32)
        first_BL = np.maximum.accumulate(np.where(starts_BL, position_L, 0), axis=1)
        position_BL = position_L - first_BL
        document_BL = np.cumsum(starts_BL, axis=1, dtype=np.int32)
    return Packed(
        tokens_BL=np.ascontiguousarray(window_BW[:, :-1], np.int64),
        labels_BL=np.ascontiguousarray(window_BW[:, 1:], np.int64),
        loss_mask_BL=loss_mask_BL,
        position_BL=position_BL,
        document_BL=document_BL,
    )
