"""A Slurm for the whole session, and a corpus; without Slurm these tests are skipped, loudly, or fail."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing  # noqa: E402
from training import build_corpus  # noqa: E402

REQUIRED = "MEGAFAB_REQUIRE_SLURM"  # set by what must not pass without these tests


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Four nodes of eight cores and four GPUs that are none."""
    reason = missing()
    if reason and REQUIRED in os.environ:
        pytest.fail(f"{REQUIRED} is set, and there is no Slurm: {reason}")
    if reason:
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: sockets are in it
    with Cluster(root) as up:
        yield up
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("slurm_corpus"))
