"""Where a checkpoint comes from: when, by which versions, out of which others."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def now() -> str:
    """The time as checkpoints write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for package in ("megafab", "torch", "megatron-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def derived_state(
    operation: str, sources: Sequence[tuple[Path, Mapping[str, Any]]], *, weights_only: bool
) -> dict[str, Any]:
    """The state of a checkpoint that `operation` made of `sources`: that of the last, with its lineage.

    With `weights_only`, a run that resumes from it starts anew from its weights (`state.py`).
    """
    path, state = sources[-1]
    entries = [
        {
            "from": str(path.resolve()),
            "step": state["progress"]["step"],
            "written_at": state["written_at"],
            "operation": operation,
        }
        for path, state in sources
    ]
    return {
        **state,
        "weights_only": weights_only or state["weights_only"],
        "versions": versions(),
        "written_at": now(),
        "lineage": [*state["lineage"], *entries],
    }
