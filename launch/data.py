"""`megafab data`: text to a corpus, a tokenizer and shards to train on."""

from __future__ import annotations

from data_pipeline.build import build
from data_pipeline.config import BuildConfig
from megafab.config import load


def main(overrides: list[str]) -> int:
    """Build the corpus the overrides ask for, or find it finished; returns the exit code."""
    build(load.compose(BuildConfig, "data", overrides))
    return 0
