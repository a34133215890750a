"""What `megafab perplexity` is told."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from megafab.errors import ConfigError, ConfigErrors


@dataclass(frozen=True, slots=True)
class PerplexityConfig:
    """`conf/perplexity.yaml`."""

    checkpoint: str = MISSING  # a run directory (its newest checkpoint) or a step directory
    data: str | None = None  # corpus directory; null: that of the run
    retrieval: str | None = (
        None  # neighbours of that corpus, a name or a path; null: the run's data.retrieval
    )
    samples: int = 64  # sequences per domain, always the same ones
    micro_batch: int = 4  # sequences per forward pass
    out: str | None = None  # the numbers as JSON; null: perplexity.json of the run directory


def check(config: PerplexityConfig) -> None:
    """Refuse numbers out of range, all at once.

    Raises:
        ConfigErrors: at least one value is too small.
    """
    problems = [
        ConfigError(f"{key}={value}", f"{value}", "at least 1", f"{key}=1 or more")
        for key in ("samples", "micro_batch")
        if (value := getattr(config, key)) < 1
    ]
    if problems:
        raise ConfigErrors(problems)
