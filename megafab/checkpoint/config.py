"""When to save, what to keep, where to start from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """`resume`: `auto` (this run's newest checkpoint that is intact, else start fresh), `none`, or a path.

    A path is a checkpoint or a run, to start from; once this run has saved since, it continues with that.
    """

    every: int = 0  # steps between saves; 0: only at the end and on a signal
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints of steps that are multiples of it are kept for ever; 0: none
    asynchronous: bool = True  # train on while a copy in host memory is written; the last save waits
    resume: str = "auto"
    allow_data_change: bool = (
        False  # resume although tokenizer, data, mixture, packing, seed or length differ
    )
    save_last: bool = True  # save when training ends


class Carry(Enum):
    """What becomes of a part of a checkpoint's state in the run that begins with it."""

    reset = "reset"
    keep = "keep"


@dataclass(frozen=True, slots=True)
class StartConfig:
    """A run that begins with the weights of another: at step 0, with a schedule and techniques of its own.

    Once it has saved, `checkpoint.resume=auto` goes on with that.
    """

    checkpoint: str | None = None  # a checkpoint, or a run for its newest; null: draw weights from train.seed
    optimizer: Carry = Carry.reset  # keep: the moments too, and the count of updates
    data: Carry = Carry.reset  # keep: every domain is read on from where it was, in its order
