"""Online data mixing: a bandit over domains, rewarded by the losses that training computes anyway.

Albalak et al. 2023, "Efficient Online Data Mixing For Language Model Pre-Training" (arXiv 2312.02406). With
K domains, exploration e_t = min(1/K, sqrt(ln K / (K t))), mean rewards R and the losses L of the domains
drawn in step t (counted from 1):

    released   R_i <- s R_i + (1 - s) reward_i               for the drawn domains
               pi_i = (1 - K e_t) R_i / sum_j R_j + e_t
    paper      R_i <- a R_i + (1 - a) reward_i / pi_i        for the drawn domains, pi the last weights
               pi_i = (1 - K e_t) softmax(e_(t-1) R)_i + e_t

`released` is what the authors' code does, with perplexities as rewards and no division by pi. `paper` is the
algorithm as printed, with losses; as e_t falls it comes to the uniform mixture, since R stays bounded, unless
`reward_scale` makes up for it.

A loss says how hard a domain is, not what can be learnt from it: random bytes have the highest loss there is
and take the mixture over. The `excess` over a reference model's loss does not reward what cannot be learnt;
in `released` it is the perplexity over the reference's, at least 1, so that domains that have come to their
references are alike instead of compared by what noise is left.

During warm-up the mixture stays as it is; rewards are averaged all the same, since a domain without one would
start at the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.run import StepOutcome, StepPlan
from megafab.techniques.base import Facts
from megafab.techniques.config import MixingMode, OnlineMixingConfig, Reward
from megafab.techniques.mixing import MixingPolicy

if TYPE_CHECKING:
    from megafab.engine.base import WeightEditor


class OnlineMixing(MixingPolicy):
    """The weights of domains from the rewards of those drawn."""

    name = "online_mixing"
    config: OnlineMixingConfig

    def __init__(self, config: OnlineMixingConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._released = config.mode is MixingMode.released
        self._reward = config.reward or (Reward.perplexity if self._released else Reward.loss)
        self._smoothing = config.smoothing
        if self._smoothing is None:
            self._smoothing = 0.5 if self._released else 0.9
        sizes = dict(zip(facts.domains, zip(facts.tokens, facts.text_bytes, strict=True), strict=True))
        self._tokens_per_byte = {name: sizes[name][0] / max(1, sizes[name][1]) for name in self.names}
        self._rewards: dict[str, float] = {}  # of the domains that were drawn once
        self._losses: dict[str, float] = {}  # their mean losses, for `decrease`
        self._exploration = 1 / len(self.names)

    def on_step(
        self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor
    ) -> None:
        """Takes the losses of the step, and decides the next one's mixture."""
        if outcome.applied:
            self.observe(plan.step + 1, ledger.reduced().domain_loss)

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Moves the rewards of the domains drawn in step `step` (from 1), and the weights after warm-up."""
        for name, weight in zip(self.names, self.weights_K, strict=True):
            if name in losses and math.isfinite(losses[name]):
                reward = self._reward_of(name, min(losses[name], self.config.max_loss))
                if not self._released:
                    reward = self.config.reward_scale * reward / weight
                self._rewards[name] = self._mean(self._rewards.get(name), reward)
        if step > self.config.warmup_steps and step % self.config.every == 0 and self._rewards:
            self._exploration = self._exploration_at(step)
            self.weights_K = self._decide(step)

    def _reward_of(self, name: str, loss: float) -> float:
        if self._reward is Reward.perplexity:
            return math.exp(loss)
        if self._reward is Reward.bits_per_byte:
            return loss / math.log(2) * self._tokens_per_byte[name]
        if self._reward is Reward.excess:
            excess = max(0.0, loss - self.config.reference[name])
            return math.exp(excess) if self._released else excess
        if self._reward is Reward.decrease:
            before = self._losses.get(name)
            self._losses[name] = self._mean(before, loss)
            return 0.0 if before is None else max(0.0, before - loss)
        return loss

    def _mean(self, mean: float | None, value: float) -> float:
        """The moving average, which begins with its first value."""
        assert self._smoothing is not None
        return value if mean is None else self._smoothing * mean + (1 - self._smoothing) * value

    def _exploration_at(self, step: int) -> float:
        count = len(self.names)
        return min(1 / count, max(self.config.exploration_floor, exploration(count, step)))

    def _decide(self, step: int) -> tuple[float, ...]:
        seen = list(self._rewards.values())
        # A domain that was never drawn counts as the mean of the others.
        rewards_K = [self._rewards.get(name, sum(seen) / len(seen)) for name in self.names]
        now = self._exploration
        if self._released:
            return linear_weights(rewards_K, now)
        return gibbs_weights(rewards_K, self._exploration_at(step - 1) if step > 1 else now, now)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Mean rewards by domain and the exploration."""
        return {"reward": dict(self._rewards), "exploration": self._exploration}

    def state_dict(self) -> dict[str, Any]:
        """Weights, rewards, mean losses and the exploration."""
        return {
            **super().state_dict(),
            "kind": [self.config.mode.value, self._reward.value],
            "rewards": dict(self._rewards),
            "losses": dict(self._losses),
            "exploration": self._exploration,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; with rewards of another kind, the means begin again."""
        super().load_state_dict(state)
        if state["kind"] != [self.config.mode.value, self._reward.value]:
            return
        self._rewards = {name: float(value) for name, value in state["rewards"].items() if name in self.names}
        self._losses = {name: float(value) for name, value in state["losses"].items() if name in self.names}
        self._exploration = float(state["exploration"])


def exploration(domains: int, step: int) -> float:
    """e_t of `domains` domains in step `step` (from 1)."""
    return min(1 / domains, math.sqrt(math.log(domains) / (domains * step)))


def linear_weights(rewards_K: Sequence[float], explore: float) -> tuple[float, ...]:
    """pi of `released`: shares of the rewards, over a floor of `explore`."""
    total, count = math.fsum(rewards_K), len(rewards_K)
    shares_K = [reward / total if total > 0 else 1 / count for reward in rewards_K]
    return MixingPolicy.normalised([(1 - count * explore) * share + explore for share in shares_K])


def gibbs_weights(rewards_K: Sequence[float], temperature: float, explore: float) -> tuple[float, ...]:
    """pi of `paper`: softmax of temperature x rewards, over a floor of `explore`."""
    highest = max(rewards_K)
    powers_K = [math.exp(temperature * (reward - highest)) for reward in rewards_K]
    total, count = math.fsum(powers_K), len(rewards_K)
    return MixingPolicy.normalised([(1 - count * explore) * power / total + explore for power in powers_K])
