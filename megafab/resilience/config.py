"""What is watched while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

# Exit code of a job that stood still: EX_TEMPFAIL of sysexits.h, "the user is invited to retry". A script
# that requeues jobs can tell it from a mistake (2) and a bug (1).
STALLED = 75


@dataclass(frozen=True, slots=True)
class ResilienceConfig:
    """What is compared, watched and measured beside training."""

    check_every: int = 100  # steps between two comparisons of what several ranks hold alike; 0: never
    # A job that moves nothing for so long names the rank at fault and ends with exit code 75; null: never.
    stall_seconds: float | None = 600.0
    straggler_every: int = 100  # steps between two comparisons of the ranks' speed; 0: never
    straggler_ratio: float = 1.5  # times slower than the median rank, twice in a row, is told
