"""`metrics.jsonl`: one JSON object a logged step, in the order of steps, each step once.

A row is a nested mapping of numbers, strings and null; its keys are listed at `megafab.run.StepRecord`.
JSON has no NaN and no infinity: such a number is written as null, and the row gets `"nonfinite": true`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megafab.errors import UserError

METRICS_FILE = "metrics.jsonl"
HEADER_FILE = "header.json"
CONFIG_FILE = "config.yaml"
STAGES_FILE = "stages.json"  # of a training in stages: their names and parents


def chain_of(run_dir: Path) -> list[str]:
    """The stages of the training that a run is one of, where each follows the one before it; else none.

    A training that branches is several runs side by side, not one that goes on.
    """
    listed = run_dir.parent / STAGES_FILE
    if not listed.exists():
        return []
    try:
        stages = json.loads(listed.read_text(encoding="utf-8"))
        parents = {name: stages[name]["parent"] for name in stages}
    except (ValueError, TypeError, KeyError):  # somebody else's file of that name
        return []
    names = list(parents)
    follows = all(parents[name] == before for before, name in itertools.pairwise(names))
    return names if follows and run_dir.name in names else []


def to_line(row: Mapping[str, Any]) -> str:
    """`row` as one line of valid JSON, newline included."""
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:  # what json raises for NaN and infinity
        return json.dumps({**_finite(row), "nonfinite": True}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of `path`. A torn last line, which a kill in mid-write leaves behind, is not a row.

    Raises:
        UserError: the file is not there, or a line before the last is not a row.
    """
    return [row for _, row in _parse(path)]


def truncate(path: Path, step: int) -> None:
    """Drop the rows after `step` and a torn last line from `path`.

    The file is replaced in one rename, so that a crash leaves the old rows or the new ones.
    """
    text = "".join(line + "\n" for line, row in _parse(path) if row["step"] <= step)
    if text.encode() != path.read_bytes():
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write `path` whole, in one rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of `path` with its line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            str(path), error.strerror or repr(error), "the metrics of a run", "name a run directory"
        ) from error
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return
            raise UserError(f"{path}:{number}", repr(line[:40]), "a row", "delete that line") from error
        yield line, row


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, keys joined by `/`: `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
