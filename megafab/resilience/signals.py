"""Leaving cleanly: a signal sets a flag, and all ranks agree on the step after which they save and go.

A signal may reach one rank only, and ranks receive it at different times. So the loop asks `leave` after
every step, and every so many steps the ranks take the maximum of their flags over the host's network: one
message of a few bytes, a millisecond or so. The number of steps between two agreements follows from the
measured time of a step, so that one is due about every `seconds`, however short the steps: the cost is
bounded, and a signal waits no longer than that plus one step. The ranks agree on that number in the same
message.

SIGTERM (a scheduler ends the job), SIGUSR1 (a scheduler warns before its time limit) and SIGINT (Ctrl-C)
leave alike. A second SIGINT aborts at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LIMIT = 1024  # most steps between two agreements, and the base of the message


class Signals:
    """A context in which signals ask for a clean end instead of killing the process.

    Args:
        agree_max: the largest of all ranks' integers; the identity for one rank.
        seconds: how often ranks agree.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        agree_max: Callable[[int], int],
        *,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agree_max, self._seconds, self._clock = agree_max, seconds, clock
        self._received = self._agreed = 0
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}
        self._steps, self._interval = 0, 1
        self._since = clock()

    def __enter__(self) -> Signals:
        for number in HANDLED:
            self._previous[number] = signal.signal(number, self._receive)
        self._since = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def leave(self) -> bool:
        """Whether the job leaves now: the same answer on every rank. To be asked once after every step."""
        self._steps += 1
        if self._steps < self._interval:
            return False
        step_seconds = (self._clock() - self._since) / self._steps
        interval = min(_LIMIT, max(1, int(self._seconds / step_seconds))) if step_seconds > 0 else _LIMIT
        # One integer holds both: the signal, and the fewest steps any rank wants to wait.
        self._agreed, waiting = divmod(
            self._agree_max(self._received * (_LIMIT + 1) + _LIMIT - interval), _LIMIT + 1
        )
        self._steps, self._interval = 0, _LIMIT - waiting
        self._since = self._clock()
        return bool(self._agreed)

    @property
    def name(self) -> str:
        """The signal the ranks agreed to leave for, such as `SIGTERM`; empty if there was none."""
        return signal.Signals(self._agreed).name if self._agreed else ""

    @property
    def exit_code(self) -> int:
        """0 after a clean end, also one asked for by a scheduler; 130, as shells have it, after SIGINT."""
        return 130 if self._agreed == signal.SIGINT else 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self._received = number
