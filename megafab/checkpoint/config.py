"""When to save, what to keep, where to start from."""

from __future__ import annotations

from dataclasses import dataclass


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
