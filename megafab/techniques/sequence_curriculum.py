"""Short sequences first: sequence length warm-up, by truncation or by reshaping.

Li et al. 2021, "The stability-efficiency dilemma: investigating sequence length warmup for training GPT
models" (arXiv 2108.06084); the metrics `seqlen_truncate` and `seqlen_reshape` of Li et al. 2022, "DeepSpeed
Data Efficiency" (arXiv 2212.03597). With d the length of the step (`pacing.py`) and S that of the model

    truncate    a row keeps its first d tokens; the step computes fewer tokens
    reshape     a row becomes ceil(S / d) rows of d tokens; the step computes as many as before

A piece is a row as `data.packing.pack` makes them: it begins at position 0 in document 0, because what came
before it is not in it. When d does not divide S, the last piece of a row begins at S - d, so that all pieces
are of one shape, and the labels that the piece before it has already are masked: every label counts exactly
once.

Evaluation has whole sequences. There is no state: the length follows from the step.

Shape suffixes: B rows, L sequence length, P pieces of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megafab.loss.ledger import LedgerReport
from megafab.run import Batch, Progress, StepPlan
from megafab.techniques.base import Facts, Key, Technique
from megafab.techniques.config import SequenceCurriculumConfig, SequenceMode
from megafab.techniques.pacing import Pacing


class SequenceCurriculum(Technique):
    """Sets the length of each step's sequences, and cuts the rows to it."""

    name = "sequence_curriculum"
    writes = frozenset({"sequence_length", "batch"})
    config: SequenceCurriculumConfig

    def __init__(self, config: SequenceCurriculumConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._pacing = Pacing(config.pacing, "techniques.sequence_curriculum.pacing")
        self._length = 0

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The plan with the step's length, and its FLOPs: attention costs less in short sequences."""
        self._length = int(self._pacing.at(plan.step + 1))
        rows = 1
        if self.config.mode is SequenceMode.reshape:
            rows = -(-self.facts.shape.config.seq_len // self._length)
        plan = replace(plan, seq_len=self._length, rows_per_sample=rows)
        return replace(plan, flops=self.facts.shape.flops_per_token(self._length) * plan.tokens)

    def on_batch(self, batch: Batch, plan: StepPlan, key: Key) -> Batch:
        """The rows cut to the step's length."""
        length = batch.tokens_BL.shape[1]
        if plan.seq_len == length:
            return batch
        if self.config.mode is SequenceMode.truncate:
            return batch.positions(torch.arange(plan.seq_len))
        return reshaped(batch, plan.seq_len)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The length."""
        return {"seq_len": self._length}


def reshaped(batch: Batch, length: int) -> Batch:
    """Every row as ceil(L / length) rows in a row, which ask for each of its labels once."""
    rows, whole = batch.tokens_BL.shape
    pieces = -(-whole // length)
    start_P = torch.arange(pieces) * length
    start_P[-1] = whole - length
    where_PL = start_P[:, None] + torch.arange(length)
    first_P = torch.arange(pieces) * length  # the first label that no earlier piece has
    fresh_PL = where_PL >= first_P[:, None]

    def cut(value_BL: torch.Tensor) -> torch.Tensor:
        return value_BL[:, where_PL].reshape(rows * pieces, length)

    document_BL, position_BL = cut(batch.document_BL), cut(batch.position_BL)
    document_BL = document_BL - document_BL[:, :1]
    position_BL = torch.where(document_BL == 0, position_BL - position_BL[:, :1], position_BL)
    return Batch(
        tokens_BL=cut(batch.tokens_BL),
        labels_BL=cut(batch.labels_BL),
        loss_mask_BL=cut(batch.loss_mask_BL) * fresh_PL.repeat(rows, 1),
        position_BL=position_BL,
        document_BL=document_BL,
        domain_B=batch.domain_B.repeat_interleave(pieces),
        sample_B=batch.sample_B.repeat_interleave(pieces),
        columns={name: cut(value_BL) for name, value_BL in batch.columns.items()},
    )
