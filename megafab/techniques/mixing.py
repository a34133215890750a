"""What every policy that decides the mixture from losses has in common.

A policy is a technique whose weights the loader draws by. It is told unweighted mean losses by domain of the
whole job, so that reweighting the loss does not steer it, and decides between two steps: the loader draws the
domains of a step when the step is taken, so what a step has taught counts from the very next one. There is no
lag to state and none to save.

It mixes the domains that the run's mixture gives a weight and whose share nothing else fixes
(`Facts.fixed`). Shape suffix: K those domains, in the corpus' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megafab.errors import ConfigError
from megafab.run import Progress, StepPlan
from megafab.techniques.base import Facts, Technique


class MixingPolicy(Technique):
    """Keeps the weights of the domains it mixes, and gives them to every step.

    Attributes:
        names: of the domains it mixes.
        weights_K: theirs, summing to 1. Assign whole tuples.

    Raises:
        ConfigError: fewer than two domains to mix.
    """

    writes = frozenset({"mixture"})

    def __init__(self, config: Any, facts: Facts) -> None:
        super().__init__(config, facts)
        self._mixed = [
            number
            for number, (name, weight) in enumerate(zip(facts.domains, facts.weights, strict=True))
            if weight > 0 and name not in facts.fixed
        ]
        self.names = tuple(facts.domains[number] for number in self._mixed)
        if len(self.names) < 2:
            raise ConfigError(
                f"technique=[{self.name}]",
                f"{len(self.names)} domains to mix",
                "at least two domains with a weight, replayed ones not counted",
                f"give data.mixture more domains, or take {self.name} out",
            )
        self._share = sum(facts.weights[number] for number in self._mixed)
        self.weights_K = self.normalised([facts.weights[number] for number in self._mixed])

    @staticmethod
    def normalised(values_K: Sequence[float]) -> tuple[float, ...]:
        """Scaled to sum to 1."""
        total = sum(values_K)
        return tuple(value / total for value in values_K)

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The weights for the loader; what is not mixed here keeps its own."""
        weights_D = list(plan.domain_weights)
        for number, weight in zip(self._mixed, self.weights_K, strict=True):
            weights_D[number] = weight * self._share
        return replace(plan, domain_weights=tuple(weights_D))

    def tell(self, values_K: Sequence[float]) -> Mapping[str, float]:
        """Values by domain's name, for metrics."""
        return dict(zip(self.names, values_K, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The weights of the next step."""
        return {"weights": dict(zip(self.names, self.weights_K, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with them; a domain that is new begins with its share of the mixture."""
        known = state["weights"]
        if set(known) == set(self.names):
            self.weights_K = tuple(float(known[name]) for name in self.names)
        else:
            values_K = [
                known.get(name, weight) for name, weight in zip(self.names, self.weights_K, strict=True)
            ]
            self.weights_K = self.normalised(values_K)
