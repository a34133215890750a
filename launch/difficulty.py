"""`megafab data difficulty`: how hard each window of a corpus is, for curricula."""

from __future__ import annotations

from data_pipeline.config import DifficultyConfig
from data_pipeline.difficulty import build
from megafab.config import load


def main(overrides: list[str]) -> int:
    """Build the index the overrides ask for, or find it finished; returns the exit code."""
    build(load.compose(DifficultyConfig, "difficulty", overrides))
    return 0
