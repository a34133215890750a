"""The neighbours of windows, as tensors beside their tokens.

Shape suffixes: B windows, C chunks of a window, K neighbours of a chunk, R tokens of a neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megafab.data.retrieval import Neighbors
from megafab.errors import UserError
from megafab.run import Retrieved


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How windows of a corpus are read with their neighbours: K of each chunk, R tokens of each.

    With `wrong`, chunks of the database drawn at random stand where neighbours would.
    """

    neighbors: Neighbors
    count: int
    length: int
    wrong: bool = False

    def __post_init__(self) -> None:
        """Refuses to read more than there is.

        Raises:
            UserError: fewer neighbours were kept than are asked for.
        """
        if self.count > self.neighbors.kept:
            raise UserError(
                f"model.retro.neighbors={self.count}",
                f"{self.neighbors.kept} kept of each chunk in data.retrieval={self.neighbors.path}",
                "at least as many",
                f"model.retro.neighbors={self.neighbors.kept}, or make more: megafab data retrieval",
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a resume must find again, JSON-able."""
        return {**self.neighbors.facts, "neighbors": self.count, "retrieved": self.length}

    def read(self, split: str, domain_B: np.ndarray, window_B: np.ndarray, seq_len: int) -> Retrieved:
        """Those of windows of `seq_len` tokens, a whole number of chunks; window -1 has none."""
        chunks = seq_len // self.neighbors.chunk
        row_BCK = np.full((len(domain_B), chunks, self.count), -1, np.int64)
        for row, (domain, window) in enumerate(zip(domain_B.tolist(), window_B.tolist(), strict=True)):
            if window >= 0:
                row_BCK[row] = self.neighbors.read(
                    split, domain, window * seq_len, chunks, count=self.count, wrong=self.wrong
                )
        tokens, lengths = self.neighbors.database.read(row_BCK.reshape(-1), self.length)
        return Retrieved(
            torch.from_numpy(tokens.reshape(*row_BCK.shape, self.length)),
            torch.from_numpy(lengths.reshape(row_BCK.shape)),
        )
