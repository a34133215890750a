"""Freezing: only the parameters whose names match are trained; all others stay what they are, to the bit.

Retrofitting a pre-trained model with retrieval is done so (Borgeaud et al. 2022, arXiv 2112.04426, section
4.3, "RETRO-fitting"): its own weights are kept, and the encoder and the layers that look at neighbours learn.

A frozen parameter has no gradient, in the update and in the norm that is clipped, does not decay, and begins
without moments, which would go on to move it where freezing begins at a resume. It keeps its place in the
optimizer, so that freezing can end at a resume; memory and time of its gradient are not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megafab.loss.ledger import LedgerReport
from megafab.model.names import matches, parameter_shapes
from megafab.run import Progress
from megafab.techniques.base import Facts, RunPlan, Technique
from megafab.techniques.config import FreezingConfig
from megafab.topology.mesh import Mesh

if TYPE_CHECKING:
    from megafab.engine.base import WeightEditor


class Freezing(Technique):
    """Leaves out gradients, moments and weight decay."""

    name = "freezing"
    needs = frozenset({"weights"})
    writes = frozenset({"weights", "gradient_entries"})
    composes = frozenset({"gradient_entries"})
    config: FreezingConfig

    def __init__(self, config: FreezingConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        names = parameter_shapes(facts.shape).keys()
        self._frozen = frozenset(name for name in names if not matches(name, config.trained))
        self._trained = len(names) - len(self._frozen)

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Which parameters do not decay."""
        plan.model.frozen = self._frozen

    def on_start(self, progress: Progress, weights: WeightEditor) -> None:
        """No moments of what is frozen: a checkpoint may have had it in training."""
        for name in weights.names():
            if name in self._frozen:
                for moment in weights.moments(name).values():
                    moment.zero_()
        weights.commit()

    def on_reduced(self, gradients: Mapping[str, Tensor]) -> None:
        """No gradient for what is frozen."""
        for name, gradient in gradients.items():
            if name in self._frozen:
                gradient.zero_()

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The number of tensors that are trained."""
        return {"trained_tensors": self._trained}
