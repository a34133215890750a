"""Replay: a fixed share of every batch is old data, while training goes on with new data.

Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models" (arXiv
2403.08763): with 5% of old data a weak shift of the distribution is forgotten little, with 25 to 50% a strong
one; the share is taken from the new data, so that the compute stays the same.

The share is hard. Of any n samples in a row n x share are old, to within a block, whatever a policy does:
it decides over the new domains only. Among the old ones the weights of `data.mixture` decide. They are read
in the order of the run that read them first, from its beginning: with that run's seed, sequence length and
corpus domain, sample k of a domain is its sample k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megafab.loss.ledger import LedgerReport
from megafab.run import Progress, StepPlan
from megafab.techniques.base import Facts, RunPlan, Technique
from megafab.techniques.config import ReplayConfig

if TYPE_CHECKING:
    from megafab.topology.mesh import Mesh


class Replay(Technique):
    """Sets the old domains' joint share in every plan."""

    name = "replay"
    writes = frozenset({"replay"})
    after = ("online_mixing", "dynamic_loading")  # whose weights it scales
    config: ReplayConfig

    def __init__(self, config: ReplayConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._old = tuple(number for number, name in enumerate(facts.domains) if name in config.domains)

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Gives old domains the order of their first run."""
        if self.config.seed is not None:
            plan.data.order_seeds |= dict.fromkeys(self.config.domains, self.config.seed)

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """Scales the old domains to their share and the others to the rest."""
        share = self.config.share
        old = sum(weight for number, weight in enumerate(plan.domain_weights) if number in self._old)
        new = sum(weight for number, weight in enumerate(plan.domain_weights) if number not in self._old)
        weights_D = tuple(
            weight * (share / old if number in self._old else (1 - share) / new)
            for number, weight in enumerate(plan.domain_weights)
        )
        return replace(plan, domain_weights=weights_D, replayed=self._old)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The share of the step's tokens that was old."""
        tokens = losses.tokens
        return {"token_share": sum(tokens[n] for n in self.config.domains) / max(1.0, sum(tokens.values()))}
