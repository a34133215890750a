"""What is watched while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpikesConfig:
    """When a loss counts as a spike, and what is undone for it (`resilience/spikes.py`).

    A step is bad when its loss or its gradient norm is not finite, or so many deviations above the median of
    the last `window` steps; one deviation is 1.4826 x the median absolute deviation, that of a normal
    distribution. `patience` bad steps in a row are a spike.
    """

    window: int = 128  # steps of history
    min_steps: int = 64  # of them, before anything but a number that is not finite counts as bad
    threshold: float = 6.0  # of the loss, in deviations
    norm_threshold: float | None = None  # of the gradient norm, in deviations; null: it only has to be finite
    patience: int = 3
    margin: int = 100  # steps before the first bad one whose samples are skipped with it, as PaLM did
    max_rollbacks: int = 6  # within `window` steps of each other; the next one ends the run


@dataclass(frozen=True, slots=True)
class ResilienceConfig:
    """`check_every`: steps between two comparisons of what several ranks hold alike."""

    check_every: int = 100  # 0: never
    spikes: SpikesConfig | None = None  # {}: go back when the loss spikes, and skip what it spiked over
