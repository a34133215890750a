"""What a person reads while a run goes on: one line a logged step, and a live bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

from megafab.run import StepRecord
from megafab.telemetry.sinks import Sink

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LOG_FILE = "log.txt"


class Terminal(Sink):
    """Lines to `stream` and, with the time of day, to `<run.dir>/log.txt`; a progress bar on a terminal.

    Args:
        run_dir: where `log.txt` grows, over all sessions of the run.
        total_steps: the length of the run; more steps may come, where they turn out to hold fewer tokens.
        header: facts shown once before the first step, label by label.
        preface: lines shown after them.
        stream: standard output unless given.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        header: Mapping[str, str],
        stream: TextIO | None = None,
        preface: Sequence[str] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._header, self._preface = header, preface
        self._bar: Bar | None = None
        self._speaking = Lock()

    def open(self, step: int) -> None:
        """Show the header and where the run stands, then start the bar."""
        for line in (*header_lines(self._header), *self._preface):
            self.message(line)
        if step:
            self.message(f"resumed after step {step}")
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._bar.add_task("train", total=self._total, completed=step, numbers="")
            self._bar.start()

    def record(self, record: StepRecord) -> None:
        """One line, and the bar moves on."""
        self.message(step_line(record.row, self._total))
        if self._bar is not None:
            row = record.row
            numbers = f"loss {row['loss']:.4f}  {short(row['tokens_per_second'])} tok/s"
            total = max(self._total, row["step"])
            self._bar.update(self._bar.task_ids[0], total=total, completed=row["step"], numbers=numbers)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """One line."""
        self.message(f"step {step}/{self._total} | valid {values['valid_loss']:.4f}")

    def message(self, text: str) -> None:
        """One line, above the bar; from any thread."""
        with self._speaking:
            try:
                if self._bar is not None:
                    self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
                else:
                    print(text, file=self._stream, flush=True)
            except OSError:  # whoever read along is gone (a closed pipe, a lost terminal); the run goes on
                _discard(self._stream)
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
            self._log.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._log.close()


def _discard(stream: TextIO) -> None:
    """Send what is written to `stream` from now on, and what it still holds, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _make_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream),
        refresh_per_second=2,
        speed_estimate_period=600,  # logged steps may be minutes apart
    )


def header_lines(header: Mapping[str, str]) -> list[str]:
    """The header as aligned lines."""
    width = max(map(len, header), default=0)
    return [f"{label:<{width}}  {value}" for label, value in header.items()]


def step_line(row: Mapping[str, Any], total_steps: int) -> str:
    """A logged step in one line; MFU, skipped steps and validation loss only where there are any.

    A step beyond `total_steps`, which was an estimate then, does not quote it.
    """
    step = f"{row['step']:>{len(str(total_steps))}}"
    parts = [
        f"step {step}/{total_steps}" if row["step"] <= total_steps else f"step {step}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"norm {row['grad_norm']:.3f}",
        f"{short(row['tokens_per_second'])} tok/s",
        f"{row['step_seconds']:.3f} s/step",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    if "valid_loss" in row:
        parts.append(f"valid {row['valid_loss']:.4f}")
    return " | ".join(parts)


def short(number: float) -> str:
    """Three digits and a unit: 12345 is `12.3k`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
