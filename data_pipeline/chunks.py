"""Where the chunks of a token stream are: those to retrieve, and what those that ask are searched with.

Shape suffixes: D documents, N rows of a database, C query chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.progress import Progress
from megafab.data.format import TokenStream

RANGE_TOKENS = 1 << 20  # handled by one process at a time


class ChunkProgress(Progress):
    """Progress in chunks, which are counted as `documents`."""

    def _counts(self) -> str:
        return f"{self._all.documents:,} chunks, {self._rate(self._fresh.documents):,.0f} chunks/s"


def row_bounds(stream: TokenStream, start: int, count: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of the documents that begin at `start:start + count` begin and end: int64 [N] each."""
    if start:
        first_D = stream.document_starts(start - 1, count + 1) + start - 1
    else:
        first_D = np.concatenate([[0], stream.document_starts(0, count)])
    if not len(first_D):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, end = stream.document_bounds(int(first_D[-1]), 1)
    end_D = np.append(first_D[1:], end) - 1  # without EOD
    rows_D = -(-(end_D - first_D) // chunk)
    number_N = np.arange(rows_D.sum()) - np.repeat(np.cumsum(rows_D) - rows_D, rows_D)
    start_N = np.repeat(first_D, rows_D) + number_N * chunk
    return start_N, np.minimum(start_N + chunk, np.repeat(end_D, rows_D))


def texts(stream: TokenStream, start_N: np.ndarray, end_N: np.ndarray) -> list[np.ndarray]:
    """The ids of sorted ranges that lie close together."""
    if not len(start_N):
        return []
    first = int(start_N[0])
    ids = stream.read(first, int(end_N[-1]) - first)
    return [ids[start:end] for start, end in zip(start_N - first, end_N - first, strict=True)]


@dataclass(frozen=True, slots=True)
class Queries:
    """Query chunks: what they are searched with, `start_C:end_C`, and the documents that they overlap.

    Those are the tokens `low_C:high_C`, of whole documents. All int64 [C].
    """

    start_C: np.ndarray
    end_C: np.ndarray
    low_C: np.ndarray
    high_C: np.ndarray


def queries(stream: TokenStream, start: int, chunks: int, chunk: int, eod: int) -> Queries:
    """The query chunks of the tokens from `start` on."""
    count = chunks * chunk
    begin, end = stream.document_bounds(start, count)
    inside = stream.document_starts(start, count) + start
    bounds = np.unique(np.concatenate([[begin], inside, [end]]))  # the last token may end its document
    first_C = start + chunk * np.arange(chunks)
    last_C = first_C + chunk - 1
    ids_C = stream.read(start, count)[chunk - 1 :: chunk]
    # The document of the last token begins at the bound before it, and ends at the one after.
    after_C = np.searchsorted(bounds, last_C, side="right")
    return Queries(
        start_C=np.maximum(bounds[after_C - 1], first_C),
        end_C=last_C + (ids_C != eod),
        low_C=bounds[np.searchsorted(bounds, first_C, side="right") - 1],
        high_C=bounds[after_C],
    )
