"""Settings of every technique. A technique is on when its field is not null: `technique=[z_loss,ema]`.

Kept apart from the code so that a configuration is checked without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


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


class PacingShape(Enum):
    """How a difficulty gets from its start to its end."""

    linear = "linear"
    root = "root"  # fast at first: (step / steps) ^ (1 / degree)
    step = "step"  # a level until its last step, then the next
    custom = "custom"  # as a function of yours says


@dataclass(frozen=True, slots=True)
class PacingConfig:
    """`techniques/pacing.py`. Each shape needs its own keys, and takes no others."""

    shape: PacingShape = PacingShape.linear
    start: float | None = None  # difficulty of the first step
    end: float | None = None  # difficulty of the last step, and of all after it
    steps: int | None = None  # of shape=linear and root: the step at which the end is reached
    degree: float | None = None  # of shape=root; 2 is the square root
    round_to: float = 1  # a difficulty on the way is rounded down to a multiple of this
    levels: tuple[float, ...] | None = None  # of shape=step
    last_steps: tuple[int, ...] | None = None  # of shape=step: of each level but the last
    function: str | None = None  # of shape=custom: package.module:function, step (from 1) -> number


class DifficultyKind(Enum):
    """What a curriculum's difficulty is a number of."""

    percentile = "percentile"  # the easiest d percent of each domain's windows
    threshold = "threshold"  # the windows whose metric is at most d


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """`techniques/curriculum.py`."""

    difficulty: str = MISSING  # of `megafab data difficulty`: its name below the corpus, or its path
    kind: DifficultyKind = DifficultyKind.percentile
    pacing: PacingConfig = field(default_factory=PacingConfig)


class SequenceMode(Enum):
    """What becomes of a sequence that is longer than the length of the step."""

    truncate = "truncate"  # its beginning is read, the rest is left out
    reshape = "reshape"  # it is cut into several sequences


@dataclass(frozen=True, slots=True)
class SequenceCurriculumConfig:
    """`techniques/sequence_curriculum.py`."""

    mode: SequenceMode = SequenceMode.truncate
    pacing: PacingConfig = field(default_factory=PacingConfig)


@dataclass(frozen=True, slots=True)
class TechniquesConfig:
    """One optional field a technique; the field's name is the technique's name everywhere."""

    z_loss: ZLossConfig | None = None
    ema: EMAConfig | None = None
    curriculum: CurriculumConfig | None = None
    sequence_curriculum: SequenceCurriculumConfig | None = None
