"""Packing against vectors worked out by hand."""

from __future__ import annotations

import numpy as np

from megafab.data.config import Packing
from megafab.data.packing import pack

# Two windows of L = 6. The first begins inside a document (10 11 0), then come 20 0, then 30 31.
# The second is whole: one document begins with it, and the next begins with the very last token.
WINDOW_BW = np.array([[10, 11, 0, 20, 0, 30, 31], [40, 41, 42, 43, 44, 0, 50]])
STARTS_BW = np.array([[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]], bool)


def test_document_packing():
    packed = pack(WINDOW_BW, STARTS_BW, Packing.document)
    assert packed.tokens_BL.tolist() == [[10, 11, 0, 20, 0, 30], [40, 41, 42, 43, 44, 0]]
    assert packed.labels_BL.tolist() == [[11, 0, 20, 0, 30, 31], [41, 42, 43, 44, 0, 50]]
    # The end of a document (0) is asked for; what follows it is not.
    assert packed.loss_mask_BL.tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 0]]
    assert packed.position_BL.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert packed.document_BL.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]]


def test_concatenate_packing():
    packed = pack(WINDOW_BW, STARTS_BW, Packing.concatenate)
    assert packed.tokens_BL.tolist() == [[10, 11, 0, 20, 0, 30], [40, 41, 42, 43, 44, 0]]
    assert packed.labels_BL.tolist() == [[11, 0, 20, 0, 30, 31], [41, 42, 43, 44, 0, 50]]
    assert packed.loss_mask_BL.tolist() == [[1] * 6, [1] * 6]
    assert packed.position_BL.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert packed.document_BL.tolist() == [[0] * 6] * 2


def test_a_row_numbers_its_documents_from_0_wherever_it_begins():
    starts_BW = STARTS_BW.copy()
    starts_BW[:, 0] = True
    marked, unmarked = (pack(WINDOW_BW, starts, Packing.document) for starts in (starts_BW, STARTS_BW))
    assert np.array_equal(marked.document_BL, unmarked.document_BL)
    assert np.array_equal(marked.loss_mask_BL, unmarked.loss_mask_BL)


def test_documents_of_one_token():
    starts_BW = np.array([[0, 1, 1, 1]], bool)
    packed = pack(np.array([[0, 0, 0, 0]]), starts_BW, Packing.document)
    assert packed.loss_mask_BL.tolist() == [[0, 0, 0]]
    assert packed.position_BL.tolist() == [[0, 0, 0]]
    assert packed.document_BL.tolist() == [[0, 1, 2]]


def test_types_are_those_of_a_batch_and_rows_are_contiguous():
    for packing in Packing:
        packed = pack(WINDOW_BW, STARTS_BW, packing)
        arrays = {name: getattr(packed, name) for name in packed.__slots__}
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            "tokens_BL": "int64",
            "labels_BL": "int64",
            "loss_mask_BL": "float32",
            "position_BL": "int64",
            "document_BL": "int32",
        }
        assert all(array.flags.c_contiguous for array in arrays.values())
