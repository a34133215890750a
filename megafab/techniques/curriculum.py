"""Curriculum learning: easy samples first, and a difficulty that grows until all are admitted.

Bengio et al. 2009, "Curriculum learning"; for language models Li et al. 2022, "DeepSpeed Data Efficiency"
(arXiv 2212.03597), section 3.1, whose metrics `megafab data difficulty` computes. With d(t) the difficulty of
step t (`pacing.py`), a domain of W windows sorted from easy to hard admits

    percentile    its easiest ceil(W * d(t) / 100)
    threshold     those whose metric is at most d(t)

and the samples of the step are drawn uniformly from them, without repetition inside what was admitted at one
time (`data/clusters.py`). Each domain has a curriculum of its own: the mixture, which decides which domain a
sample comes from, comes first and keeps its shares. Replayed domains have none: they keep their first order.

There is no state here: what is admitted follows from the step, what was drawn is the loader's.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megafab.data.difficulty import DifficultyIndex
from megafab.errors import UserError
from megafab.loss.ledger import LedgerReport
from megafab.run import Progress, StepPlan
from megafab.techniques.base import Facts, RunPlan, Technique
from megafab.techniques.config import CurriculumConfig, DifficultyKind
from megafab.techniques.pacing import Pacing

if TYPE_CHECKING:
    from megafab.topology.mesh import Mesh


class Curriculum(Technique):
    """Gives the loader the order of difficulty, and each step the number of windows it may draw from."""

    name = "curriculum"
    writes = frozenset({"windows"})
    config: CurriculumConfig

    def __init__(self, config: CurriculumConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._pacing = Pacing(config.pacing, "techniques.curriculum.pacing")
        self._index: DifficultyIndex | None = None
        self._at: tuple[float, tuple[int, ...]] = (math.nan, ())  # the last difficulty, what it admits

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Opens the index and tells the loader of it."""
        length = self.facts.shape.config.seq_len
        self._index = DifficultyIndex.open(self.config.difficulty, plan.data.corpus, length)
        plan.data.difficulty = self._index.order

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The plan with what the difficulty of the step admits.

        Raises:
            UserError: nothing of a domain that has a weight.
        """
        difficulty = self._pacing.at(plan.step + 1)
        if self._at[0] != difficulty:
            self._at = difficulty, self._admitted(difficulty)
        admitted = self._at[1]
        for domain, weight in enumerate(plan.domain_weights):
            replayed = self.facts.domains[domain] in self.facts.fixed
            if weight > 0 and admitted[domain] == 0 and not replayed:
                self._refuse_empty(domain, difficulty)
        return replace(plan, admitted=admitted)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The difficulty, and the share of each domain's windows that it admits."""
        assert self._index is not None
        difficulty, admitted = self._at
        pairs = zip(admitted, self._index.windows, strict=True)
        shares = (count / max(1, len(windows)) for count, windows in pairs)
        return {"difficulty": difficulty, "admitted": dict(zip(self.facts.domains, shares, strict=True))}

    def _admitted(self, difficulty: float) -> tuple[int, ...]:
        assert self._index is not None
        if self.config.kind is DifficultyKind.percentile:
            return tuple(math.ceil(len(windows) * difficulty / 100) for windows in self._index.windows)
        # Plain bisection: searchsorted would first copy all of a mapped array to the type of the number.
        return tuple(bisect.bisect_right(values, difficulty) for values in self._index.values)

    def _refuse_empty(self, domain: int, difficulty: float) -> None:
        assert self._index is not None
        values, name = self._index.values[domain], self.facts.domains[domain]
        if len(values) == 0:
            return  # the loader refuses a domain without windows
        raise UserError(
            f"techniques.curriculum, domain {name}",
            f"no window whose {self._index.manifest['metric']} is at most {difficulty:g}",
            f"one at least, as {name} has a weight; its easiest has {float(values[0]):g}",
            "begin the pacing there, leave the domain out of data.mixture, or kind=percentile",
        )
