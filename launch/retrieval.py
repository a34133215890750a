"""`megafab data retrieval`: chunks of a corpus to retrieve, and which are near each chunk of a corpus."""

from __future__ import annotations

from data_pipeline.retrieval import build
from data_pipeline.retrieval_config import RetrievalConfig
from megafab.config import load


def main(overrides: list[str]) -> int:
    """Build what the overrides ask for, or find it finished; returns the exit code."""
    build(load.compose(RetrievalConfig, "retrieval", overrides))
    return 0
