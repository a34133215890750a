"""Where records go: `metrics.jsonl`, wandb, TensorBoard (and the terminal, in `terminal`).

A sink lives on the writing rank only. Tracking is a service to training, never a condition of it: what
goes wrong in wandb after the start costs one line on the terminal and the tracking, not the run.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from megafab.errors import UserError
from megafab.run import StepRecord
from megafab.telemetry.config import TrackingConfig, WandbMode
from megafab.telemetry.rows import (
    CONFIG_FILE,
    HEADER_FILE,
    METRICS_FILE,
    chain_of,
    flatten,
    read_rows,
    replace_text,
    to_line,
    truncate,
)

WANDB_START_SECONDS = 20  # to reach the server before the run goes on offline
WANDB_FINISH_SECONDS = 60  # to upload what is left; a requeued job must not hang on a dead network


class Sink(ABC):
    """Something that receives the records of a run."""

    @abstractmethod
    def open(self, step: int) -> None:
        """Begin, or go on, after `step`: what an earlier session recorded beyond it is void."""

    @abstractmethod
    def record(self, record: StepRecord) -> None:
        """Take one logged step."""

    @abstractmethod
    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Take numbers that the last record, of that step, could not have."""

    def message(self, text: str) -> None:  # noqa: B027 - only the terminal shows messages
        """Take one line for the reader."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class JsonlSink(Sink):
    """`metrics.jsonl`, flushed row by row, so that a killed run loses nothing it logged.

    `header`, facts about the run for the reader of a report, is kept beside it in `header.json`, and the
    resolved configuration in `config.yaml`: written once the run has really begun, so that a resume that
    is refused leaves the record of the run as it was.
    """

    def __init__(self, run_dir: Path, header: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self._path = run_dir / METRICS_FILE
        self._header, self._config = header, config

    def open(self, step: int) -> None:
        """Drop the rows after `step`, which this session will write again."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path.with_name(HEADER_FILE), json.dumps(dict(self._header), indent=2) + "\n")
        replace_text(self._path.with_name(CONFIG_FILE), yaml.safe_dump(dict(self._config), sort_keys=False))
        if self._path.exists():
            truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def record(self, record: StepRecord) -> None:
        """Append one row."""
        self._file.write(to_line(record.row))
        self._file.flush()

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Put the numbers into the row of that step."""
        rows = [{**row, **values} if row["step"] == step else row for row in read_rows(self._path)]
        self._file.close()
        replace_text(self._path, "".join(map(to_line, rows)))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StagesSink(Sink):
    """`metrics.jsonl` of a training in stages that follow one another, beside their directories.

    A row is that of the stage, with `step` counted from the beginning of the training, and `stage` and
    `stage_step`, its own count.

    Args:
        run_dir: of this stage.
        stages: all of them, in order.
    """

    def __init__(self, run_dir: Path, stages: Sequence[str]) -> None:
        self._path = run_dir.parent / METRICS_FILE
        self._stage, self._stages = run_dir.name, list(stages)

    def open(self, step: int) -> None:
        """Drop the rows of this stage after `step`, and of those after it."""
        mine = self._stages.index(self._stage)
        rows = read_rows(self._path) if self._path.exists() else []
        known = [row for row in rows if row["stage"] in self._stages]
        places = [(self._stages.index(row["stage"]), row["stage_step"]) for row in known]
        kept = [row for row, place in zip(known, places, strict=True) if place <= (mine, step)]
        replace_text(self._path, "".join(map(to_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")

    def record(self, record: StepRecord) -> None:
        """Append one row."""
        row = record.row
        own = {"step": row["total_steps"], "stage": self._stage, "stage_step": row["step"]}
        self._file.write(to_line({**row, **own}))
        self._file.flush()

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Put the numbers into the row of that step."""
        self._file.close()
        here = (self._stage, step)
        rows = read_rows(self._path)
        rows = [{**row, **values} if (row["stage"], row["stage_step"]) == here else row for row in rows]
        replace_text(self._path, "".join(map(to_line, rows)))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink(Sink):
    """Event files in `<run.dir>/tensorboard`.

    Raises:
        UserError: the tensorboard package is missing.
    """

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracking.tensorboard=true",
                "no tensorboard package",
                "it to be installed",
                "pip install tensorboard, or tracking.tensorboard=false",
            ) from error
        self._make_writer = SummaryWriter
        self._dir = run_dir / "tensorboard"

    def open(self, step: int) -> None:
        """Start a new event file; TensorBoard hides what older ones hold beyond `step`."""
        self._writer = self._make_writer(str(self._dir), purge_step=step + 1, flush_secs=30)

    def record(self, record: StepRecord) -> None:
        """Every number of the row as a scalar."""
        self.amend(record.row["step"], record.row)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Every number as a scalar."""
        for name, value in flatten(values).items():
            if isinstance(value, Real):
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink(Sink):
    """One wandb run per run directory, whatever the number of launches; one for stages that are a chain.

    The id is kept in `<run.dir>/wandb_id`, that of stages beside them. `step`, or `total_steps`, is the x
    axis of every plot, so that steps taken again after a crash lie over the earlier ones instead of being
    refused by the server.

    Args:
        run_dir: holds `wandb/`.
        tracking: mode, project, entity.
        name: the run's name.
        config: the resolved configuration, plain values.
        say: shows one line to the user.

    Raises:
        UserError: wandb is missing, or `tracking.mode=online` without a login.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking: TrackingConfig,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracking.kind=wandb",
                "no wandb package",
                "it to be installed",
                "pip install wandb, or tracking.kind=none",
            ) from error
        self._wandb = wandb
        self._dir = run_dir
        self._home = run_dir.parent if chain_of(run_dir) else run_dir  # of the id
        self._step = "step" if self._home == run_dir else "total_steps"
        self._tracking = tracking
        self._name = name
        self._config = config
        self._say = say
        self._mode = wandb_mode(tracking.mode)
        self._run: Any = None

    def open(self, step: int) -> None:
        """Start or continue the wandb run; offline when the server cannot be reached."""
        self._dir.mkdir(parents=True, exist_ok=True)
        for mode in dict.fromkeys((self._mode, "offline")):
            try:
                self._run = self._init(mode)
            except Exception as error:  # wandb raises a dozen kinds; none of them may stop training
                self._wandb.teardown()  # else the id stays taken by the failed attempt
                self._say(f"wandb: could not start {mode}: {_first_line(error)}")
            else:
                break

    def _init(self, mode: Any) -> Any:
        settings = self._wandb.Settings(
            silent=True, console="off", init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_FINISH_SECONDS
        )
        run = self._wandb.init(
            mode=mode,
            dir=str(self._dir),
            id=self._run_id(),
            resume="allow" if mode == "online" else None,  # offline files of one id are joined at sync
            project=self._tracking.project,
            entity=self._tracking.entity,
            group=self._tracking.group,
            name=self._name.removesuffix("" if self._home == self._dir else f"-{self._dir.name}"),
            config=dict(self._config),
            settings=settings,
        )
        run.define_metric("*", step_metric=self._step)
        where = f"offline; upload with: wandb sync {Path(run.dir).parent}" if mode == "offline" else run.url
        self._say(f"wandb: {where or mode}")
        return run

    def _run_id(self) -> str:
        """The id kept in the run directory, made on first use."""
        path = self._home / "wandb_id"
        if not path.exists():
            replace_text(path, secrets.token_hex(4) + "\n")
        return path.read_text(encoding="utf-8").strip()

    def record(self, record: StepRecord) -> None:
        """Hand the row to wandb's own process; returns at once."""
        self._log(record.row)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand the numbers over as a row with the same step."""
        self._log({"step": step, **values})

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        row = {name: value for name, value in flatten(values).items() if value is not None}
        try:
            self._run.log(row)
        except Exception as error:  # its process was killed, or its disk is full
            self._run = None
            self._say(f"wandb: stopped tracking: {_first_line(error)}; metrics.jsonl goes on")

    def close(self) -> None:
        """Upload what is left, for `WANDB_FINISH_SECONDS` at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
            self._wandb.teardown()  # waits for wandb's process, without which the file may still be unwritten
        except Exception as error:  # as in `record`
            self._say(f"wandb: could not finish: {_first_line(error)}")


def wandb_mode(mode: WandbMode) -> str:
    """The mode to start wandb in, chosen so that wandb never asks for a key.

    An explicit mode wins over `WANDB_MODE`, which wins over what `auto` would take.

    Raises:
        UserError: `online` was asked for and there is no login.
    """
    if mode is WandbMode.offline:
        return "offline"
    logged_in = wandb_logged_in()
    if mode is WandbMode.online and not logged_in:
        raise UserError(
            "tracking.mode=online", "no wandb login", "an API key", "run `wandb login`, or tracking.mode=auto"
        )
    if mode is WandbMode.online:
        return "online"
    wanted = os.environ.get("WANDB_MODE", "online")
    return wanted if logged_in or wanted == "disabled" else "offline"


def wandb_logged_in() -> bool:
    """Whether wandb finds a key in its variables, its settings or the netrc file. Asks nobody."""
    import wandb
    from wandb.errors import AuthenticationError

    wandb.setup(wandb.Settings(silent=True))  # else login asks the server for the user's name, to print it
    try:
        return wandb.login(prompt=False, verify=False)
    except AuthenticationError:
        return True  # a malformed key: the start will fail and say what is wrong with it


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
