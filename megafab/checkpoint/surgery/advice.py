"""How long to train a small model before it is stacked, and how often: Du et al. 2024 (arXiv 2405.15319).

Their fit of the best tokens d of the base to the parameters N of the target and the FLOPs C of its training
is

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74

It was fitted near N of 0.4e9 and more and C of 1e20 and more, and grows without bound where C is smaller: a
target of 5e6 parameters and 1e8 tokens would get a base of 5e10. So it counts only from `TRUSTED` FLOPs on,
and never gives a base that costs more than a tenth of the target. A token of the base costs 1/g of the
target's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megafab.checkpoint.config import GrowConfig
from megafab.checkpoint.reader import Reader
from megafab.checkpoint.surgery.grow import sizes
from megafab.config import growth
from megafab.model.shape import ModelShape
from megafab.run import Progress

G = 4  # the best factors are between 2 and 4, and 4 is what they recommend
_BEST = (2, 4)
TRUSTED = 1e20  # FLOPs, the smallest of the fit
_LARGEST = 0.1  # share of the target's budget for the base, at most
_SMALL = 0.075  # the same where the fit does not reach: the middle of 5 to 10 %


def fitted(parameters: float, flops: float) -> float:
    """d(N, C), in tokens, unclamped."""
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


@dataclass(frozen=True, slots=True)
class Advice:
    """When to stack, and how often.

    `tokens` is d, for the base; `target_tokens` D, for the target; `fitted` is the fit's answer and
    `reason` says why `tokens` is not, where it is not.
    """

    parameters: int
    flops: float
    g: float
    tokens: float
    target_tokens: float
    fitted: float
    reason: str = ""

    @property
    def share(self) -> float:
        """What the base costs of the target's budget."""
        return self.tokens / self.g / self.target_tokens


def advise(parameters: int, *, g: float, tokens: float | None = None, flops: float | None = None) -> Advice:
    """Advice for a target of so many parameters.

    Args:
        parameters: N.
        g: layers of the target / layers of the base.
        tokens, flops: D or C of the target; one of them, C = 6 N D.
    """
    assert (tokens is None) != (flops is None)
    budget = tokens if tokens is not None else (flops or 0.0) / (6 * parameters)
    cost = 6.0 * parameters * budget
    found, most = fitted(parameters, cost), _LARGEST * budget * g
    if cost < TRUSTED:
        reason = f"the fit begins at {TRUSTED:.0e} FLOPs; for less, 5 to 10 % of the target's budget"
        return Advice(parameters, cost, g, _SMALL * budget * g, budget, found, reason)
    if found > most:
        return Advice(parameters, cost, g, most, budget, found, "at most 10 % of the target's budget")
    return Advice(parameters, cost, g, found, budget, found)


def lines(advice: Advice, *, had: int) -> Iterator[str]:
    """The advice in words; `had` are the tokens that the base has been trained on."""
    budget = f"{advice.target_tokens:.3g} tokens, {advice.flops:.3g} FLOPs"
    yield f"target    {advice.parameters:,} parameters, {budget}"
    low, high = _BEST
    usual = low <= advice.g <= high
    beyond = "" if usual else f": outside {low} to {high}, where the paper found the best (it recommends {G})"
    yield f"g         {advice.g:g}{beyond}"
    yield f"fit       d = {advice.fitted:.4g} tokens (Du et al. 2024)"
    clamped = f": {advice.reason}" if advice.reason else ""
    yield f"d         {advice.tokens:.4g} tokens for the base, {advice.share:.1%} of the budget{clamped}"
    left = advice.tokens - had
    yield f"base      has had {had:,} tokens: " + (
        f"train it on {left:.3g} more, then grow" if left > 0 else "grow it now"
    )


def of_checkpoint(path: Path, config: GrowConfig, tokens: float | None, flops: float | None) -> Iterator[str]:
    """The advice for the checkpoint at `path` as the base, in words.

    Args:
        path: a step directory.
        config: what it will become; without a size, `G` times its layers.
        tokens, flops: of the grown model's training; one of them.

    Raises:
        ConfigErrors: the model cannot grow so.
    """
    reader = Reader(path)
    base, ids = sizes(reader)
    if all(getattr(config, key) is None for key in growth.SIZES):
        config = replace(config, layers=G * base.config.layers)
    grown = ModelShape.of(growth.grown(base, config, ids=ids), base.vocab)
    advice = advise(grown.parameters, g=grown.config.layers / base.config.layers, tokens=tokens, flops=flops)
    return lines(advice, had=Progress.from_state(reader.state["progress"]).totals.tokens)
