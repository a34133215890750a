"""What techniques may ask of the loader before it exists: other orders of windows, and more to read.

Shape suffixes: N consecutive positions of a token stream, W windows of a domain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megafab.data.format import Corpus
from megafab.data.retrieved import Retrieval


class Column(Protocol):
    """Values that lie beside the tokens of the training split, one for each position."""

    def read(self, domain: int, start: int, count: int) -> np.ndarray:
        """The values [N] of positions `start:start + count` of a domain's token stream.

        The value of a position belongs to what is predicted there: the token after it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Windows of every domain from the easiest to the hardest, each int64 [W], and what identifies them."""

    fingerprint: str
    windows: tuple[np.ndarray, ...]


@dataclass(slots=True)
class DataPlan:
    """How the training split is going to be read: edit it in `Technique.on_plan`.

    `order_seeds` gives domains the order that another run's seed gave them, `columns` are read with every
    sample into `Batch.columns`, `difficulty` is what `StepPlan.admitted` counts in. `retrieval` reads the
    neighbours of each chunk.
    """

    corpus: Corpus
    order_seeds: dict[str, int] = field(default_factory=dict[str, int])
    columns: dict[str, Column] = field(default_factory=dict[str, Column])
    difficulty: Difficulty | None = None
    retrieval: Retrieval | None = None
