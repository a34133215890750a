"""Exponential moving average of the weights, evaluated in their place.

Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; as an exponential
average in deep learning, Kingma and Ba 2015 (Adam), section 7.2; its use in place of learning rate decay,
Morales-Brotons et al. 2024, "Exponential moving average of weights in deep learning".

    average <- decay * average + (1 - decay) * weights        every `every` steps, after the update

The average starts as the weights after the first update it sees, not as the initial weights, so that no
bias correction is needed. It is kept of the fp32 masters, slice by slice as the optimizer shards them: it
costs 4 bytes a parameter, divided by the data ranks, and no communication in training. A skipped step
leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.run import StepOutcome, StepPlan
from megafab.techniques.base import Facts, Technique
from megafab.techniques.config import EMAConfig

if TYPE_CHECKING:
    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.engine.base import WeightEditor


class EMA(Technique):
    """Keeps the average and swaps it in around evaluations."""

    name = "ema"
    needs = frozenset({"weights"})
    writes = frozenset({"evaluation_weights"})
    config: EMAConfig

    def __init__(self, config: EMAConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._averages: dict[str, Tensor] = {}
        self._updates = 0

    def on_step(
        self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor
    ) -> None:
        """Moves the average towards the new weights."""
        if not outcome.applied or (plan.step + 1) % self.config.every:
            return
        averages, masters = self._pairs(weights)
        step = 1 - self.config.decay if self._updates else 1.0
        for average, master in zip(averages, masters, strict=True):
            average.lerp_(master, step)
        self._updates += 1

    def on_eval(self, entering: bool, weights: WeightEditor, losses: LedgerReport | None = None) -> None:
        """Swaps masters and average; a second swap gives every bit back."""
        if not self.config.evaluate or not self._updates:
            return
        for average, master in zip(*self._pairs(weights), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        weights.commit()

    def state_dict(self) -> dict[str, Any]:
        """How often the average was updated."""
        return {"updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counts on from there."""
        self._updates = int(state["updates"])

    def sharded_state(self, weights: WeightEditor) -> Mapping[str, LogicalTensor]:
        """The average by parameter name."""
        averages, _ = self._pairs(weights)
        return {
            name: weights.describe(name, average)
            for name, average in zip(weights.names(), averages, strict=True)
        }

    def _pairs(self, weights: WeightEditor) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and masters in the order of names; averages begin as copies of the masters."""
        masters = [weights.master(name).detach() for name in weights.names()]
        for name, master in zip(weights.names(), masters, strict=True):
            if name not in self._averages:
                self._averages[name] = master.clone()
        return [self._averages[name] for name in weights.names()], masters
