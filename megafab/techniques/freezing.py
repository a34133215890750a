"""Freezing: only the parameters whose names match are trained; all others stay what they are, to the bit.

Retrofitting a pre-trained model with retrieval is done so (Borgeaud et al. 2022, arXiv 2112.04426, section
4.3, "RETRO-fitting"): its own weights are kept, and the encoder and the layers that look at neighbours learn.

A frozen parameter has no gradient, in the update and in the norm that is clipped, and does not decay. It
keeps its place in the optimizer, so that freezing can end at a resume; memory and time of its gradient are
not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megafab.loss.ledger import LedgerReport
from megafab.model.names import matches, parameter_shapes
from megafab.techniques.base import Facts, RunPlan, Technique
from megafab.techniques.config import FreezingConfig
from megafab.topology.mesh import Mesh


class Freezing(Technique):
    """Leaves out gradients and weight decay."""

    name = "freezing"
    writes = frozenset({"gradient_entries"})
    composes = frozenset({"gradient_entries"})
    config: FreezingConfig

    def __init__(self, config: FreezingConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        sizes = parameter_shapes(facts.shape)
        self._frozen = frozenset(name for name in sizes if not matches(name, config.trained))

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Which parameters do not decay."""
        plan.model.frozen = self._frozen

    def on_reduced(self, gradients: Mapping[str, Tensor]) -> None:
        """No gradient for what is frozen."""
        for name, gradient in gradients.items():
            if name in self._frozen:
                gradient.zero_()

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The number of parameters that are trained."""
        return {"trained_tensors": len(parameter_shapes(self.facts.shape)) - len(self._frozen)}
