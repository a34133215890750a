"""What `megafab generate` is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import MISSING

from megafab.errors import ConfigError, ConfigErrors


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """`conf/generate.yaml`."""

    checkpoint: str = MISSING  # a run directory (its newest checkpoint) or a step directory
    prompt: str = ""  # empty: start of a document
    tokens: int = 128  # most tokens to add; an end of document stops earlier
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 50  # sample among the k most likely; 0: among all
    samples: int = 1
    seed: int = 0
    # Search the database of the run for what is written; null: where the model looks at neighbours.
    retrieval: bool | None = None
    data: str | None = None  # corpus directory with the tokenizer; null: that of the run
    out: str | None = None  # also write the text there; null: sample.txt of the run directory


def check(config: GenerateConfig) -> None:
    """Refuse numbers out of range, all at once.

    Raises:
        ConfigErrors: at least one value is too small.
    """
    least = {"tokens": 1, "temperature": 0, "top_k": 0, "samples": 1, "seed": 0}
    problems = [
        ConfigError(f"{key}={value}", f"{value}", f"at least {low}", f"{key}={low} or more")
        for key, low in least.items()
        if not (math.isfinite(value := getattr(config, key)) and value >= low)
    ]
    if problems:
        raise ConfigErrors(problems)
