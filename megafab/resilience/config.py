"""What is watched while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

# Exit code of a job that stood still: EX_TEMPFAIL of sysexits.h, "the user is invited to retry". A script
# that requeues jobs can tell it from a mistake (2) and a bug (1).
STALLED = 75


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
    """What is compared, watched and measured beside training."""

    check_every: int = 100  # steps between two comparisons of what several ranks hold alike; 0: never
    # A job that moves nothing for so long names the rank at fault and ends with exit code 75; null: never.
    stall_seconds: float | None = 600.0
    straggler_every: int = 100  # steps between two comparisons of the ranks' speed; 0: never
    straggler_ratio: float = 1.5  # times slower than the median rank, twice in a row, is told
    spikes: SpikesConfig | None = None  # {}: go back when the loss spikes, and skip what it spiked over
