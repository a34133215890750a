"""Settings of every technique. A technique is on when its field is not null: `technique=[z_loss,ema]`.

Kept apart from the code so that a configuration is checked without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ZLossConfig:
    """`techniques/z_loss.py`."""

    weight: float = 1e-4


@dataclass(frozen=True, slots=True)
class EMAConfig:
    """`techniques/ema.py`."""

    decay: float = 0.999
    every: int = 1  # steps between updates of the average
    evaluate: bool = True  # evaluate with the averaged weights


@dataclass(frozen=True, slots=True)
class TokenDroppingConfig:
    """`techniques/token_dropping.py`."""

    start: int = 128  # tokens of a sequence that a dropping layer keeps in the first step
    steps: float = 0.7  # steps until it keeps all; below 1: a share of the run
    round_to: int = 16  # in between, a multiple of this
    layers: tuple[int, ...] | None = None  # which drop, from 0; null: all but the first and the last

    def dropping(self, layers: int) -> tuple[int, ...]:
        """The layers that drop tokens in a model of so many."""
        return tuple(range(1, layers - 1)) if self.layers is None else self.layers


@dataclass(frozen=True, slots=True)
class TechniquesConfig:
    """One optional field a technique; the field's name is the technique's name everywhere."""

    z_loss: ZLossConfig | None = None
    ema: EMAConfig | None = None
    token_dropping: TokenDroppingConfig | None = None
