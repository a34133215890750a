"""Loss-based sample reweighting: samples count by where their loss lies among those of the batch.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining" (arXiv
2502.06733). For M samples with mean token losses l_i, in nats and without gradient:

    h_i = (2 l_i - (max l + min l)) / max(max l - min l, 1e-6)              in [-1, 1]
    f   = min(h + 1, 1)   linupper        1 - h^2   quadratic        |h|   extremes
    w_i = exp(f_i / r) / sum_k exp(f_k / r)

The loss of a sample is multiplied by M w_i: with equal weights nothing changes, and the mean size of the
gradient stays. The largest weight is at most exp(1 / r) times the smallest. Reported losses are unweighted.

One outlier pushes all others to h = -1, and gets exp(1 / r) times their weight. With `quantile` q, max and
min become the quantiles 1 - q and q of the losses, and h is cut to [-1, 1].

The M samples are those of one micro-batch of all data ranks, as in the paper, or of the global batch. A
sample is a row of the batch. Samples without a valid token take no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megafab.loss.ledger import LedgerReport
from megafab.loss.terms import LossTerms
from megafab.run import Batch, Progress, StepPlan
from megafab.techniques.base import Clock, Technique
from megafab.techniques.config import Population, SampleReweightingConfig, Strategy


class SampleReweighting(Technique):
    """Weighs every row by its loss."""

    name = "sample_reweighting"
    writes = frozenset({"token_weights"})
    composes = frozenset({"token_weights"})
    after = ("token_dropping",)  # it must know whether tokens are dropped
    notes = ("sample_weight", "sample_weight_squared", "largest_sample_weight")
    config: SampleReweightingConfig

    def on_build(self, stages: Sequence[torch.nn.Module], clock: Clock) -> None:
        """Keeps the clock, for the step's number."""
        self._clock = clock

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """Asks for the losses of the whole batch where they are what counts and are not at hand."""
        if self.config.over is not Population.batch or self._temperature(plan.step) is None:
            return plan
        # The losses of a single micro-batch are those of the whole batch, and the same as those of a pass
        # before it where nothing is left to chance.
        at_hand = plan.micro_batches == 1 and not self.facts.shape.config.dropout and plan.kept_tokens is None
        return plan if at_hand else replace(plan, losses_first=True)

    def on_loss(self, terms: LossTerms, batch: Batch) -> None:
        """The weights of this micro-batch's rows."""
        assert self._clock.plan is not None
        temperature = self._temperature(self._clock.plan.step)
        if temperature is None:
            weight_M = None
            weight_B = torch.ones_like(terms.nll_BL[:, 0])
        else:
            loss_M, place_B = terms.population()
            weight_M = sample_weights(loss_M, self.config.strategy, temperature, self.config.quantile)
            weight_B = weight_M[place_B]
            terms.weigh(weight_B.unsqueeze(1).expand_as(terms.nll_BL))
        largest = weight_B.new_ones(()) if weight_M is None else weight_M.max()
        for note, value in zip(
            self.notes, (weight_B, weight_B.square(), largest.expand_as(weight_B)), strict=True
        ):
            terms.note(note, value.unsqueeze(1).expand_as(terms.nll_BL))

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Mean weight by domain; the effective share of samples, (sum w)^2 / (M sum w^2); the largest weight.

        The largest is that of a micro-batch, in the mean over micro-batches.
        """
        mean, square, largest = (losses.term(note) for note in self.notes)
        weight = losses.sums[self.notes[0]]
        return {
            "weight": {name: weight[name] / count for name, count in losses.tokens.items() if count > 0},
            "effective_share": mean**2 / square,
            "largest_weight": largest,
        }

    def _temperature(self, step: int) -> float | None:
        """r in step `step` (from 0); None while weights are uniform."""
        config = self.config
        since = step - config.warmup_steps
        if since < 0:
            return None
        if config.start_temperature is None or since >= config.temperature_steps:
            return config.temperature
        done = since / config.temperature_steps
        return config.start_temperature ** (1 - done) * config.temperature**done


def sample_weights(loss_M: Tensor, strategy: Strategy, temperature: float, quantile: float = 0.0) -> Tensor:
    """M w [M], whose mean is 1; a sample whose loss is no number gets 1 and takes no part."""
    valid_M = loss_M.isfinite()
    found = loss_M[valid_M]
    if len(found) == 0:
        return torch.ones_like(loss_M)
    if quantile > 0:
        low, high = torch.quantile(found, found.new_tensor([quantile, 1 - quantile])).unbind()
    else:
        low, high = found.aminmax()
    h = ((2 * found - (high + low)) / (high - low).clamp(min=1e-6)).clamp(-1, 1)
    if strategy is Strategy.linupper:
        f = (h + 1).clamp(max=1)
    elif strategy is Strategy.quadratic:
        f = 1 - h.square()
    else:
        f = h.abs()
    weight_M = torch.ones_like(loss_M)
    weight_M[valid_M] = len(found) * torch.softmax((f - f.max()) / temperature, dim=0)
    return weight_M
