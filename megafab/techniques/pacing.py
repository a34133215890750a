"""How difficulty grows over a run: a pure function of the step, the pacing of curriculum learning.

With steps t counted from 1, T = `steps`, q = `round_to` and p = `degree`

    linear   d(t) = start + (end - start) * t / T
    root     d(t) = start + (end - start) * (t / T)^(1/p)
    custom   d(t) = what the user's function says
    step     d(t) = levels[i], i the first level whose last step is not before t

where the first three are rounded down to a multiple of q and kept between `start` and `end`, which is
reached exactly at T and kept from then on. These are the functions of Li et al. 2022, "DeepSpeed Data
Efficiency" (arXiv 2212.03597), and of its released code (fixed_linear, fixed_root, fixed_discrete,
custom); there, an `end` that is no multiple of q is never reached.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from numbers import Real

from megafab.errors import UserError
from megafab.function import load_function
from megafab.techniques.config import PacingConfig, PacingShape


class Pacing:
    """The difficulty of every step.

    Args:
        config: has passed the rules: what its shape needs is there.
        key: of `config`, for messages.

    Raises:
        UserError: there is no such function of the user's.
    """

    def __init__(self, config: PacingConfig, key: str) -> None:
        self._config, self._key = config, key
        self._custom: Callable[[int], float] | None = None
        if config.shape is PacingShape.custom:
            assert config.function is not None
            self._custom = load_function(f"{key}.function", config.function)

    def at(self, step: int) -> float:
        """The difficulty of a step, counted from 1.

        Raises:
            UserError: the user's function gave something else than a number.
        """
        config = self._config
        if config.shape is PacingShape.step:
            assert config.levels is not None
            assert config.last_steps is not None
            return config.levels[bisect.bisect_left(config.last_steps, step)]
        assert config.start is not None
        assert config.end is not None
        value = self._value(step, config.start, config.end)
        if value >= config.end:
            return config.end
        # A little more, since 29 / 100 x 100 is a little less than 29.
        return max(config.start, math.floor(value / config.round_to + 1e-9) * config.round_to)

    def _value(self, step: int, start: float, end: float) -> float:
        """Before rounding; `end` itself at the last step of the pacing."""
        if self._custom is not None:
            return self._ask(self._custom, step)
        steps, degree = self._config.steps, self._config.degree or 1.0
        assert steps is not None
        return end if step >= steps else start + (end - start) * (step / steps) ** (1 / degree)

    def _ask(self, custom: Callable[[int], float], step: int) -> float:
        value = custom(step)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            where, found = f"{self._key}.function={self._config.function}", f"{value!r} for step {step}"
            raise UserError(where, found, "a finite number for every step", "correct the function")
        return float(value)
