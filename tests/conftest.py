"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `ranks` and test helpers, under any import mode
sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, where it is not installed

from ranks import Ranks  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the fixture `ranks` as `multiproc`."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("multiproc")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Verbs that a test calls in this process set variables for what they start; the next test has none."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Ranks for multi-process tests: `ranks.run(fn, *args, world=4)`; see tests/ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()
