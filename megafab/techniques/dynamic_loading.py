"""Dynamic batch loading: domains that are behind a reference loss get more of the data.

Xia et al. 2023, "Sheared LLaMA" (arXiv 2310.06694), section 2.2 and algorithm 1. After every evaluation, with
the validation losses l, the reference losses l_ref and the weights w:

    excess_i = max(0, l_i - l_ref,i)            clamp_excess=false, as the released code: without the max
    w_i     <- w_i exp(excess_i) / sum_j w_j exp(excess_j)
    w_i     <- (1 - c) w_i + c / K              c = smoothing; 0 in the paper, 1e-4 in the code

A reference is a loss that a model of this size can reach in this domain. It is given, or predicted from the
losses of three models of other sizes by l(N) = E + A / N^b (the paper's appendix), at this model's number of
parameters.

An update multiplies and nothing pulls back: with a noisy validation loss the weights wander, so evaluate on
enough samples. `eval.every` is the number of steps between two updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megafab.errors import ConfigError
from megafab.loss.ledger import LedgerReport
from megafab.techniques.base import Facts
from megafab.techniques.config import DynamicLoadingConfig
from megafab.techniques.mixing import MixingPolicy

if TYPE_CHECKING:
    from megafab.engine.base import WeightEditor


class DynamicLoading(MixingPolicy):
    """The weights of domains from how far they are above their references."""

    name = "dynamic_loading"
    config: DynamicLoadingConfig

    def __init__(self, config: DynamicLoadingConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._references = dict(config.reference)
        for name, losses in config.fit_losses.items():
            self._references[name] = predicted(name, config.fit_sizes, losses, facts.shape.parameters)
        missing = [name for name in self.names if name not in self._references]
        if missing:
            raise ConfigError(
                "techniques.dynamic_loading.reference",
                f"no loss for {', '.join(missing)}",
                "one for every domain that is mixed",
                "give it in reference={...}, or in fit_losses={...} with fit_sizes=[...]",
            )
        self._excess_K = (0.0,) * len(self.names)

    def on_eval(self, entering: bool, weights: WeightEditor, losses: LedgerReport | None = None) -> None:
        """Decides the mixture of the steps up to the next evaluation."""
        if losses is not None:
            self.observe(losses.domain_loss)

    def observe(self, losses: Mapping[str, float]) -> None:
        """One update; a loss that is no number counts as at its reference."""
        self._excess_K = tuple(self._excess(name, losses.get(name, math.nan)) for name in self.names)
        lowest = 0.0 if self.config.clamp_excess else -math.inf
        counted_K = [max(lowest, excess) for excess in self._excess_K]
        most = max(counted_K)
        grown_K = [w * math.exp(x - most) for w, x in zip(self.weights_K, counted_K, strict=True)]
        c, count = self.config.smoothing, len(self.names)
        self.weights_K = tuple((1 - c) * weight + c / count for weight in self.normalised(grown_K))

    def _excess(self, name: str, loss: float) -> float:
        return loss - self._references[name] if math.isfinite(loss) else 0.0

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Loss above the reference by domain, at the last evaluation."""
        return {
            "excess": self.tell(self._excess_K),
            "reference": {n: self._references[n] for n in self.names},
        }

    def state_dict(self) -> dict[str, Any]:
        """The weights, and the excess for the reader."""
        return {**super().state_dict(), "excess": dict(self.tell(self._excess_K))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        super().load_state_dict(state)
        self._excess_K = tuple(float(state["excess"].get(name, 0.0)) for name in self.names)


def predicted(domain: str, sizes: Sequence[float], losses: Sequence[float], parameters: float) -> float:
    """l(N) = E + A / N^b through three points, at N = `parameters`.

    Raises:
        ConfigError: not three points, or none of these curves passes through them.
    """
    where = f"techniques.dynamic_loading.fit_losses.{domain}={list(losses)}"
    points = sorted(zip(sizes, losses, strict=False))
    if len(sizes) != 3 or len(losses) != 3 or points[0][0] <= 0 or len({size for size, _ in points}) < 3:
        fix = "give fit_sizes three parameter counts, and each domain of fit_losses their three losses"
        raise ConfigError(where, f"{len(losses)} losses for sizes {list(sizes)}", "three of each", fix)
    (n1, l1), (n2, l2), (n3, l3) = points
    # The ratio of the two drops depends on b alone and rises with it: bisection.
    drop = (l1 - l2) / (l2 - l3) if l1 > l2 > l3 else math.nan

    def ratio(b: float) -> float:
        return (n1**-b - n2**-b) / (n2**-b - n3**-b)

    low, high = 1e-6, 8.0
    if not ratio(low) < drop < ratio(high):
        expected = "losses that fall with size, each time by less than a power law of exponent 0 would"
        raise ConfigError(where, "no curve E + A / N^b through them", expected, "give the reference itself")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < drop else (low, middle)
    scale = (l1 - l3) / (n1**-low - n3**-low)
    return l1 + scale * (parameters**-low - n1**-low)
