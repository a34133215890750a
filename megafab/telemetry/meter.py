"""How far long work on files is: one line on a terminal, rewritten; elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Meter:
    """How much is done of how much there is to do, on stderr, where results do not go.

    Args:
        title: what is done.
        total: all there is to do, in bytes unless `show` says otherwise.
        show: an amount in words.
    """

    every = 5.0  # seconds between lines when stderr is no terminal

    def __init__(self, title: str, total: int, show: Callable[[float], str] | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._show = show or size
        self._start = self._said = time.monotonic()
        self._rewrites = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """So much more is done."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """So much is done in all."""
        self._done = done
        now = time.monotonic()
        if now - self._said >= (0.2 if self._rewrites else self.every) or (
            self._rewrites and self._done >= self._total
        ):
            self._said = now
            print(self._line(now), end="\r" if self._rewrites else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The work is over; the rewritten line goes."""
        if self._rewrites:
            print("\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(self._done, 1) * seconds
        return (
            f"{self._title} {100 * self._done / max(self._total, 1):3.0f} %: {self._show(self._done)} "
            f"of {self._show(self._total)}, {self._show(self._done / seconds)}/s, {max(left, 0):.0f} s left"
        )


def size(count: float) -> str:
    """Bytes in words: 3.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
