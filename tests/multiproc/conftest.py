"""Fixtures shared by the multi-process tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training import build_corpus, train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real text, built once; nobody writes to it."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(ranks, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(world, *overrides)` trains on the corpus in a fresh run directory, and returns that."""

    def trained(world: int, *overrides: str) -> Path:
        directory = tmp_path_factory.mktemp("run")
        arguments = [f"data.path={corpus}", f"run.dir={directory}", *overrides]
        assert ranks.run(train, arguments, world=world, init=False, timeout=240) == [0] * world
        return directory

    return trained
