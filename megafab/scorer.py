"""A reference model in one process, and the losses it gives (`score.py`).

Shape suffixes: B windows, L their length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megafab import retrieval
from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.data.loader import WindowReader
from megafab.data.scores import ScoresWriter
from megafab.generate import load_model
from megafab.loss.head import LossHead
from megafab.model.inputs import ModelInputs
from megafab.topology import groups as topology
from megafab.topology.mesh import Mesh


class Scorer:
    """Scores windows of a corpus with the model of a run in fp32.

    Args:
        run: the reference's configuration.
        checkpoint: its weights.
        corpus: what is scored, cut into windows of `seq_len` and packed as the run's data were.
        out: the directory of the scores, already made.
        seq_len: L.
        micro_batch: B at most.
    """

    def __init__(
        self, run: RunConfig, checkpoint: Path, corpus: Corpus, out: Path, *, seq_len: int, micro_batch: int
    ) -> None:
        self._method = run.parallel.context_method
        self._seq_len, self._micro_batch = seq_len, micro_batch
        self._groups = topology.initialize(Mesh(1), seed=run.train.seed)
        self._head = LossHead(self._groups.tensor, run.train.head_chunk)
        self._model = load_model(run, checkpoint, corpus.vocab_size, groups=self._groups)
        self._reader = WindowReader(
            corpus, "train", seq_len, run.data.packing, retrieval=retrieval.of(run, corpus)
        )
        self._writer = ScoresWriter(out, corpus)

    def run(self, domain: int, start: int, count: int) -> tuple[int, float]:
        """Scores `count` windows from `start` on and has them on the disk.

        Returns: the number of predictions, and the sum of their losses in nats.
        """
        predictions, nll, end = 0, 0.0, start + count
        for first in range(start, end, self._micro_batch):
            window_B = np.arange(first, min(first + self._micro_batch, end))
            nll_BL, asked_BL = self._losses(domain, window_B)
            predictions += int(asked_BL.sum())
            nll += float(nll_BL[asked_BL].double().sum())
            values_BL = torch.where(asked_BL, nll_BL, torch.nan).cpu().numpy()
            self._writer.write(domain, first * self._seq_len, values_BL.reshape(-1))
        self._writer.flush()
        return predictions, nll

    @torch.no_grad()
    def _losses(self, domain: int, window_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The nll of every token [B, L], and where it is a prediction that is asked for."""
        rows = self._reader.read(np.full(len(window_B), domain), window_B, window_B)
        inputs = ModelInputs.of(rows, self._groups, self._method)
        labels_LB = inputs.labels_BL.t()
        output = inputs.run(self._model, self._head.layer(labels_LB))
        return self._head.losses(output, labels_LB).nll.t(), inputs.loss_mask_BL != 0
