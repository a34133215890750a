"""What `megafab score` is told."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from megafab.data.derived import NAME
from megafab.errors import ConfigError, ConfigErrors


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """`conf/score.yaml`."""

    checkpoint: str = MISSING  # of the reference model: a run directory (its newest) or a step directory
    data: str | None = None  # corpus whose training split is scored; null: that of the reference's run
    name: str = MISSING  # of the scores, below the corpus: DATA/scores/NAME
    seq_len: int | None = None  # length of the windows that are scored; null: that of the reference
    micro_batch: int = 8  # sequences at a time
    workers: int = 1  # processes on this machine, each with the whole model; on GPUs, one for each


def check(config: ScoreConfig) -> None:
    """Refuse what cannot be, all at once.

    Raises:
        ConfigErrors: at least one value is wrong.
    """
    problems = [
        ConfigError(f"{key}={value}", f"{value}", "at least 1", f"{key}=1 or more")
        for key in ("seq_len", "micro_batch", "workers")
        if (value := getattr(config, key)) is not None and value < 1
    ]
    if not NAME.fullmatch(config.name):
        fix = "name=reference"
        problems.append(ConfigError(f"name={config.name}", "no name of a directory", "a plain name", fix))
    if problems:
        raise ConfigErrors(problems)
