"""The neighbours of windows, as tensors beside their tokens or as text in front of them.

Shape suffixes: B windows, C chunks of a row, K neighbours of a chunk, R tokens of a neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from megafab.data.packing import Passages
from megafab.data.retrieval import Neighbors
from megafab.run import Retrieved


class Shown(Enum):
    """What stands where neighbours are read: those found, chunks drawn at random, or nothing."""

    found = "found"
    wrong = "wrong"
    none = "none"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How windows of a corpus are read with their neighbours: K of each chunk, R tokens of each.

    With `in_context` a row begins with a passage (RETRO++; Wang et al. 2023, arXiv 2304.06762, section 5.2):
    the nearest neighbour of the chunk before the window, whose document goes on in it.
    """

    neighbors: Neighbors
    count: int
    length: int
    in_context: bool = False
    shown: Shown = Shown.found

    @property
    def passage(self) -> int:
        """Tokens of a row that are retrieved, and not of the window."""
        return self.length if self.in_context else 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a resume must find again, JSON-able."""
        return {
            **self.neighbors.facts,
            "count": self.count,
            "length": self.length,
            "in_context": self.in_context,
        }

    def describe(self, layers: Sequence[int]) -> str:
        """One line for people; `layers` are those that look, from 0."""
        database, chunk = self.neighbors.database, self.neighbors.chunk
        looking = ", ".join(str(layer + 1) for layer in layers)
        passage = "; the nearest in front of each window" if self.in_context else ""
        return (
            f"{self.count} neighbours of {self.length} tokens for each chunk of {chunk}, "
            f"of {database.rows:,} in {database.path}, in layers {looking}{passage}"
        )

    def read(
        self,
        split: str,
        domain_B: np.ndarray,
        window_B: np.ndarray,
        length: int,
        continues_B: np.ndarray | None,
    ) -> tuple[Retrieved, Passages | None]:
        """What windows of `length` tokens retrieve, a whole number of chunks; window -1 retrieves nothing.

        Args:
            split: of the corpus.
            domain_B, window_B: the windows.
            length: of each.
            continues_B: whether the document of a window's first token began before it; `in_context` asks.
        """
        chunk, ahead = self.neighbors.chunk, int(self.in_context)
        row_BCK = np.full((len(domain_B), ahead + length // chunk, self.count), -1, np.int64)
        for row, (domain, window) in enumerate(zip(domain_B.tolist(), window_B.tolist(), strict=True)):
            if window >= 0 and self.shown is not Shown.none:
                before = 0 if continues_B is None else int(continues_B[row])
                chunks = before + length // chunk
                row_BCK[row, ahead - before :] = self.neighbors.read(
                    split,
                    domain,
                    window * length - before * chunk,
                    chunks,
                    count=self.count,
                    wrong=self.shown is Shown.wrong,
                )
        tokens, lengths = self.neighbors.database.read(row_BCK.reshape(-1), self.length)
        token_BCKR, length_BCK = tokens.reshape(*row_BCK.shape, self.length), lengths.reshape(row_BCK.shape)
        passages = None
        if self.in_context:
            passages = Passages(token_BCKR[:, 0, 0], length_BCK[:, 0, 0])
            # The chunks of the passage have no neighbours of their own.
            none = ((0, 0), (self.length // chunk, 0), (0, 0))
            token_BCKR = np.pad(token_BCKR[:, 1:], (*none, (0, 0)))
            length_BCK = np.pad(length_BCK[:, 1:], none)
        return Retrieved(torch.from_numpy(token_BCKR), torch.from_numpy(length_BCK)), passages
