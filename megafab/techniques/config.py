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
class TechniquesConfig:
    """One optional field a technique; the field's name is the technique's name everywhere."""

    z_loss: ZLossConfig | None = None
    ema: EMAConfig | None = None
