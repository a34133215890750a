"""What is watched while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResilienceConfig:
    """`check_every`: steps between two comparisons of what several ranks hold alike."""

    check_every: int = 100  # 0: never
