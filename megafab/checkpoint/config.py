"""When to save, what to keep, where to start from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """`resume`: `auto` (newest committed checkpoint of this run, else start fresh), `none`, or a path."""

    every: int = 0  # steps between saves; 0: only at the end and on a signal
    keep: int = 2  # newest checkpoints kept
    resume: str = "auto"
    save_last: bool = True  # save when training ends
