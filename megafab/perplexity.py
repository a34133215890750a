"""The loss of a checkpoint on held-out text, and what its neighbours are worth.

For a model with retrieval the same sequences are evaluated three times: with their neighbours, without, and
with wrong ones, drawn at random from the database. A gain may be text that the database simply has: of each
chunk of M tokens and its own neighbours [N, F] the longest run of tokens that they share, over M, is the
chunk's overlap (Borgeaud et al. 2022, arXiv 2112.04426, section 2.6), and losses are also given for chunks
below some overlaps.

Shape suffixes: B sequences, L tokens of each, C chunks of a sequence, K neighbours, M and R tokens of a chunk
and of a neighbour, P pairs of a chunk and a neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megafab import retrieval
from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.data.loader import validation_batches
from megafab.data.retrieved import Retrieval, Shown
from megafab.generate import load_model
from megafab.loss.head import LossHead
from megafab.model.inputs import ModelInputs
from megafab.run import Batch
from megafab.topology import groups as topology
from megafab.topology.mesh import Mesh

OVERLAPS = (0.125, 0.25, 0.5, 1.0)  # shares of a chunk's tokens; all chunks are below the last or at it
MODES = ("on", "wrong", "off")  # as `Shown` has them


@dataclass(slots=True)
class Sums:
    """Predictions and the sum of their losses, in nats."""

    tokens: int = 0
    nll: float = 0.0

    def add(self, nll: torch.Tensor, asked: torch.Tensor) -> None:
        """Adds those that are asked for."""
        self.tokens += int(asked.sum())
        self.nll += float(nll[asked].double().sum())

    @property
    def loss(self) -> float | None:
        """The mean; None of nothing."""
        return self.nll / self.tokens if self.tokens else None


@dataclass(slots=True)
class Domain:
    """What was measured on one domain.

    `modes` has the loss with neighbours (`on`), without (`off`), and with wrong ones; a model without
    retrieval has `off` alone. `below` has the first two on chunks with at most the overlaps of `OVERLAPS`.
    """

    modes: dict[str, Sums] = field(default_factory=dict[str, Sums])
    below: dict[tuple[str, float], Sums] = field(default_factory=dict[tuple[str, float], Sums])

    @property
    def rows(self) -> dict[str, Any]:
        """As JSON has it: losses in nats a token, and tokens."""
        found: dict[str, Any] = {"tokens": self.modes["off"].tokens}
        found["loss"] = {mode: sums.loss for mode, sums in self.modes.items()}
        found["overlap"] = [
            {
                "at_most": limit,
                "tokens": self.below["on", limit].tokens,
                **{mode: self.below[mode, limit].loss for mode in ("on", "off")},
            }
            for limit in OVERLAPS
            if ("on", limit) in self.below
        ]
        return found


def measure(
    config: RunConfig, checkpoint: Path, corpus: Corpus, *, samples: int, micro_batch: int
) -> dict[str, Domain]:
    """Evaluates a checkpoint on this one process, in fp32; the result by domain.

    Args:
        config: of the run.
        checkpoint: its weights.
        corpus: whose validation split is read.
        samples: sequences of each domain.
        micro_batch: sequences of a forward pass.

    Raises:
        UserError: the neighbours of the corpus cannot be used.
    """
    sources: dict[str, Retrieval | None] = {"off": None}
    right = retrieval.of(config, corpus)
    if right is not None:
        sources = {mode: replace(right, shown=shown) for mode, shown in zip(MODES, Shown, strict=True)}
    groups = topology.initialize(Mesh(1), seed=config.train.seed)
    head = LossHead(groups.tensor, config.train.head_chunk)
    model = load_model(config, checkpoint, corpus.vocab_size, groups=groups)

    def batches(source: Retrieval | None) -> Mapping[str, tuple[Batch, ...]]:
        return validation_batches(
            corpus,
            samples_per_domain=samples,
            seq_len=retrieval.window(config),
            packing=config.data.packing,
            data_rank=0,
            data_ranks=1,
            micro_batch=micro_batch,
            retrieval=source,
        )

    @torch.no_grad()
    def losses(batch: Batch) -> torch.Tensor:
        inputs = ModelInputs.of(batch, groups, config.parallel.context_method)
        labels_LB = inputs.labels_BL.t()
        output = inputs.run(model, head.layer(labels_LB))
        return head.losses(output, labels_LB).nll.t().cpu()

    found: dict[str, Domain] = {name: Domain() for name in corpus.domains}
    read = {mode: batches(source) for mode, source in sources.items()}
    # With the right neighbours, where there are any.
    overlapping = {name: [overlaps(b) for b in rows] for name, rows in next(iter(read.values())).items()}
    for mode, by_domain in read.items():
        for name, rows in by_domain.items():
            sums = found[name].modes.setdefault(mode, Sums())
            for batch, overlap_BC in zip(rows, overlapping[name], strict=True):
                nll_BL, asked_BL = losses(batch), batch.loss_mask_BL != 0
                sums.add(nll_BL, asked_BL)
                if right is None or mode == "wrong":
                    continue
                overlap_BL = torch.from_numpy(overlap_BC).repeat_interleave(right.neighbors.chunk, 1)
                for limit in OVERLAPS:
                    below = found[name].below.setdefault((mode, limit), Sums())
                    below.add(nll_BL, asked_BL & (overlap_BL <= limit))
    return {name: domain for name, domain in found.items() if domain.modes and domain.modes["off"].tokens}


def overlaps(batch: Batch) -> np.ndarray:
    """The share of each chunk's tokens that one of its neighbours has in one run: float64 [B, C].

    Zero without retrieval.
    """
    if batch.retrieved is None:
        return np.zeros((len(batch.tokens_BL), 1))
    token_BCKR = batch.retrieved.tokens_BCKR.numpy()
    there_BCKR = np.arange(token_BCKR.shape[-1]) < batch.retrieved.length_BCK.numpy()[..., None]
    chunks = token_BCKR.shape[1]
    token_BCM = batch.tokens_BL.numpy().reshape(len(token_BCKR), chunks, -1)
    runs_BCK = longest_runs(token_BCM[:, :, None], np.where(there_BCKR, token_BCKR, -1))
    return runs_BCK.max(axis=-1) / token_BCM.shape[-1]


def longest_runs(token_PM: np.ndarray, token_PR: np.ndarray) -> np.ndarray:
    """The length of the longest run of tokens that two sequences share, over leading axes: int64 [P].

    The table of longest common suffixes, a row at a time.
    """
    shape = np.broadcast_shapes(token_PM.shape[:-1], token_PR.shape[:-1])
    run_PR = np.zeros((*shape, token_PR.shape[-1]), np.int64)
    longest_P = np.zeros(shape, np.int64)
    for place in range(token_PM.shape[-1]):
        before_PR = np.roll(run_PR, 1, axis=-1)
        before_PR[..., 0] = 0
        run_PR = np.where(token_PR == token_PM[..., place, None], before_PR + 1, 0)
        np.maximum(longest_P, run_PR.max(axis=-1), out=longest_P)
    return longest_P


def perplexity(loss: float | None) -> str:
    """exp(loss), as a table shows it."""
    return "-" if loss is None else f"{math.exp(min(loss, 99.0)):,.2f}"
