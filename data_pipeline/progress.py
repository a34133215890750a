"""How far a build is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from data_pipeline.tokenize import Counts


class Progress:
    """Counts of one stage. `total` is in bytes of the source; None when nobody knows.

    Pieces that an earlier, interrupted build finished count as done but not as speed.
    """

    every = 5.0  # seconds between lines when the output is no terminal

    def __init__(self, stage: str, total: int | None) -> None:
        self._stage, self._total = stage, total
        self._done = self._fresh_size = 0
        self._all, self._fresh = Counts(), Counts()
        self._start = self._said = time.monotonic()
        self._bar = _bar() if sys.stdout.isatty() else None
        self._task = self._bar.add_task(stage, total=total, counts="") if self._bar else None

    def add(self, size: int, counts: Counts, fresh: bool) -> None:
        """A piece is finished; `fresh` if this run did it. `size` is bytes of the source."""
        self._done += size
        self._all.add(counts)
        if fresh:
            self._fresh_size += size
            self._fresh.add(counts)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, counts=self._counts())
        elif time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            print(self._line(), flush=True)

    def _counts(self) -> str:
        found = self._all
        return (
            f"{found.documents:,} documents, {found.bytes / 1e6:,.1f} MB, {found.tokens / 1e6:,.2f}M tokens, "
            f"{self._rate(self._fresh.bytes) / 1e6:.1f} MB/s, {self._rate(self._fresh.tokens):,.0f} tokens/s"
        )

    def _rate(self, count: int) -> float:
        return count / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> str:
        if not self._total:
            return f"{self._stage}: {self._counts()}"
        line = f"{self._stage} {100 * self._done / self._total:.0f} %: {self._counts()}"
        if not self._fresh_size:
            return line
        left = (self._total - self._done) / self._fresh_size * (time.monotonic() - self._start)
        return f"{line}, {max(0, left):.0f} s left"

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            print(f"{self._stage}: {self._counts()}", flush=True)


def _bar():
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
