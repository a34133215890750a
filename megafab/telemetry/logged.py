"""A run directory, read back: its rows, its configuration, and what they say in a few numbers.

`metrics.jsonl` and `config.yaml` must be there; the facts in `header.json`, the account of its sessions and a
text in `sample.txt` may.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any

from megafab.errors import UserError
from megafab.telemetry.charts import Series
from megafab.telemetry.rows import HEADER_FILE, METRICS_FILE, STAGES_FILE, flatten, read_rows
from megafab.telemetry.sessions import Goodput, goodput


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A run directory, read. `rows` are flat: `domain_loss/books`; `parent` names the run before it.

    `spent` is the account of its time.
    """

    name: str
    color: int
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    header: Mapping[str, str]
    sample: str
    parent: str = ""
    spent: Goodput | None = None

    def column(self, key: str) -> list[float | None]:
        """The numbers under `key`, row by row; None where there is none."""
        return [_number(row.get(key)) for row in self.rows]

    def known(self, key: str) -> list[float]:
        """The numbers under `key`, without the gaps."""
        return [value for value in self.column(key) if value is not None]

    def series(
        self,
        key: str,
        name: str,
        color: int,
        *,
        dots: bool = False,
        smooth: bool = False,
        sparse: bool = False,
    ) -> Series:
        """The curve of `key` over the whole training; `sparse` leaves out rows that do not have the key."""
        rows = [row for row in self.rows if key in row] if sparse else self.rows
        return Series(
            name,
            color,
            step=[row.get("total_steps", row["step"]) for row in rows],
            tokens=[row.get("total_tokens", row.get("tokens", 0)) for row in rows],
            values=[_number(row.get(key)) for row in rows],
            dots=dots,
            smooth=smooth,
        )

    def leaves(self, prefix: str) -> list[str]:
        """The keys below `prefix/`, without it, in the order they first appear."""
        start = prefix + "/"
        keys = (key for row in self.rows for key in row)
        return list(dict.fromkeys(key.removeprefix(start) for key in keys if key.startswith(start)))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def load_runs(paths: Sequence[Path]) -> list[LoggedRun]:
    """Read run directories; that of a training in stages stands for its stages, as far as they were begun.

    Raises:
        UserError: one is not a run directory, or has logged nothing yet.
    """
    shared = len({path.resolve().name for path in paths}) < len(paths)
    places: list[tuple[Path, str, str]] = []
    for path in paths:
        name = str(path) if shared else path.resolve().name
        listed = path / STAGES_FILE
        if not listed.exists():
            places.append((path, name, ""))
            continue
        stages = json.loads(listed.read_text(encoding="utf-8"))
        begun = {stage: entry for stage, entry in stages.items() if (path / stage / METRICS_FILE).exists()}
        if not begun:
            raise UserError(str(path), "no stage with a row", "at least one", "let the first stage run")
        for stage, entry in begun.items():
            parent = f"{name}/{entry['parent']}" if entry["parent"] else ""
            places.append((path / stage, f"{name}/{stage}", parent))
    return [load_run(path, name, color, parent) for color, (path, name, parent) in enumerate(places)]


def load_run(path: Path, name: str, color: int = 0, parent: str = "") -> LoggedRun:
    """Read a run directory.

    Raises:
        UserError: it is not one, or has logged nothing yet.
    """
    if not path.is_dir():
        raise UserError(
            str(path), "no directory", "a run directory", "name one, as in: megafab report runs/a"
        )
    rows = read_rows(path / METRICS_FILE)
    if not rows:
        raise UserError(str(path / METRICS_FILE), "no row", "at least one logged step", "let the run go on")
    header, sample = path / HEADER_FILE, path / "sample.txt"
    return LoggedRun(
        name=name,
        color=color,
        rows=[flatten(row) for row in rows],
        config=_read_config(path / "config.yaml"),
        header=json.loads(header.read_text(encoding="utf-8")) if header.exists() else {},
        sample=sample.read_text(encoding="utf-8") if sample.exists() else "",
        parent=parent,
        spent=goodput(path),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration, flat: `optim/lr`."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        found = getattr(error, "strerror", None) or "no YAML"
        raise UserError(str(path), found, "the configuration of a run", "name a run directory") from error
    if not isinstance(config, dict):
        raise UserError(str(path), type(config).__name__, "a mapping", "name a run directory")
    return flatten(config)


def summary(run: LoggedRun) -> dict[str, Any]:
    """A run in numbers: where it stands, how fast it was, what it cost. None where nothing is known."""
    last = run.rows[-1]
    valid = run.known("valid_loss")
    return {
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "layer_tokens": _unless(last.get("layer_tokens"), last.get("tokens")),
        "flops": last.get("flops"),
        "total_tokens": _unless(last.get("total_tokens"), last.get("tokens")),
        "total_flops": _unless(last.get("total_flops"), last.get("flops")),
        "train_loss": _last(run.known("loss")),
        "valid_loss": _last(valid),
        "best_valid_loss": min(valid, default=None),
        "tokens_per_second": _median(run.known("tokens_per_second")),
        "step_seconds": _median(run.known("step_seconds")),
        "mfu": _median(run.known("mfu")),
        "wall_seconds": sum(run.known("wall_seconds")),
        "evaluate_seconds": sum(run.known("evaluate_seconds")),
        "checkpoint_seconds": sum(run.known("checkpoint_seconds")),
        "goodput": None if run.spent is None else run.spent.share,
        "restarts": _sessions(run) - 1,
        "skipped": last.get("skipped", 0),
    }


def _sessions(run: LoggedRun) -> int:
    """Launches of a run, those included that never came to a row, where they are known."""
    logged = max((row.get("session", 1) for row in run.rows), default=1)
    return logged if run.spent is None else max(logged, run.spent.sessions)


def _unless(value: Any, same: Any) -> Any:
    """None where there is nothing more to say."""
    return None if value == same else value


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def config_differences(runs: Sequence[LoggedRun]) -> dict[str, list[str]]:
    """The configuration keys, dotted, whose values differ between runs; their names and places aside."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    missing = object()
    differing = [key for key in keys if len({repr(run.config.get(key, missing)) for run in runs}) > 1]
    return {
        key.replace("/", "."): ["" if key not in run.config else yaml_value(run.config[key]) for run in runs]
        for key in differing
        if not key.startswith("run/")
    }


def yaml_value(value: Any) -> str:
    """A scalar as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
