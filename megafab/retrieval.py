"""Retrieval as a run is configured: the neighbours its windows are read with, and those of new text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megafab.config.schema import RunConfig
from megafab.data.config import Packing
from megafab.data.format import Corpus
from megafab.data.packing import Passages, pack, put_in_front
from megafab.data.retrieval import Neighbors
from megafab.data.retrieved import Retrieval
from megafab.model.attention import attention_mask
from megafab.model.retro import retrieval_mask
from megafab.platform import platform
from megafab.run import Retrieved


def of(config: RunConfig, corpus: Corpus) -> Retrieval | None:
    """What a run reads beside windows of a corpus; None for a model that looks at no neighbours.

    Args:
        config: of the run; its rules have passed.
        corpus: the corpus whose windows are read.

    Raises:
        UserError: the neighbours cannot be used.
    """
    retro = config.model.retro
    if not retro.chunk:
        return None
    assert config.data.retrieval is not None, "the rules have passed"
    neighbors = Neighbors.open(config.data.retrieval, corpus, retro.chunk)
    return Retrieval(neighbors, retro.neighbors, retro.length, retro.in_context)


def window(config: RunConfig) -> int:
    """Tokens of a window: of a row what is not retrieved."""
    retro = config.model.retro
    return config.model.seq_len - (retro.length if retro.in_context else 0)


class LiveRetrieval:
    """A model's neighbours of text as it is written.

    A window is whole chunks: what is missing of the last one is filled up, seen by nothing before it. It
    begins with a chunk's first token, so that each chunk is searched for once.

    Args:
        retrieval: how the model's windows are read; its database is searched.
        seq_len: the longest window.
        prompt: ids that the text begins with; what is retrieved for their end stands in front of the window,
            for a model with passages in its context.
    """

    def __init__(self, retrieval: Retrieval, seq_len: int, prompt: Sequence[int]) -> None:
        self._retrieval, self._chunk = retrieval, retrieval.neighbors.chunk
        self._database = retrieval.neighbors.database
        self._seq_len = seq_len - retrieval.passage
        self._rows: list[np.ndarray] = []  # of each whole chunk of the text [K]
        self._passage: Passages | None = None
        if retrieval.in_context:
            row = self._search(prompt[-self._chunk :])[:1]
            tokens, lengths = self._database.read(row, retrieval.length)
            self._passage = Passages(tokens, lengths)

    def logits(self, model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
        """Of the token after `ids`: [V]. `ids` begin with those of the call before."""
        chunk, length = self._chunk, self._retrieval.length
        for begin in range(len(self._rows) * chunk, len(ids) - chunk + 1, chunk):
            self._rows.append(self._search(ids[begin : begin + chunk]))
        first = max(0, -(-(len(ids) - self._seq_len) // chunk))
        window = list(ids[first * chunk :])
        last = len(window) - 1 + self._retrieval.passage
        window += [self._database.corpus.eod] * (-len(window) % chunk)
        packed = pack(np.array([[*window, 0]]), np.zeros((1, len(window) + 1), bool), Packing.concatenate)
        row_CK = np.full((len(window) // chunk, self._retrieval.count), -1, np.int64)
        row_CK[: len(self._rows) - first] = self._rows[first:] or row_CK[:0]
        if self._passage is not None:
            packed = put_in_front(self._passage, packed)
            row_CK = np.pad(row_CK, ((length // chunk, 0), (0, 0)), constant_values=-1)
        tokens, lengths = self._database.read(row_CK.reshape(-1), length)
        retrieved = Retrieved(
            torch.from_numpy(tokens.reshape(1, *row_CK.shape, length)).to(platform.device),
            torch.from_numpy(lengths.reshape(1, *row_CK.shape)).to(platform.device),
        )
        document_BL = torch.from_numpy(packed.document_BL).to(platform.device)
        mask = attention_mask(document_BL) if self._passage is not None else None
        found = model(
            torch.from_numpy(packed.tokens_BL).to(platform.device),
            torch.from_numpy(packed.position_BL).to(platform.device),
            mask,
            retrieved=retrieved,
            retrieval_mask=retrieval_mask(document_BL, retrieved),
        )
        return found[0, last]

    def _search(self, ids: Sequence[int]) -> np.ndarray:
        return self._database.search([np.array(ids, np.int64)], self._retrieval.count)[0]
