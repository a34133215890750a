"""Fixtures shared by the multi-process tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real text, built once; nobody writes to it."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))
