"""Leaving cleanly: a signal sets a flag, and all ranks agree on the step after which they save and go.

A signal may reach one rank only, and ranks receive it at different times. So the loop asks `leave` after
every step, and every so many steps the ranks take the maximum of their flags over the host's network: one
message of a few bytes, a millisecond or so. The number of steps between two agreements follows from the
measured time of a step, so that one is due about every `seconds`, however short the steps: the cost is
bounded, and a signal waits no longer than that plus one step. The ranks agree on that number in the same
message.

SIGTERM (a scheduler ends the job), SIGUSR1 (a scheduler warns before its time limit) and SIGINT (Ctrl-C)
leave alike, and so does a job's time limit, whether or not anybody warns. A second SIGINT aborts at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TIME_IS_UP = signal.SIGALRM  # among the flags, where no signal came but the time limit is near
_LIMIT = 1024  # most steps between two agreements, and the base of the message


class Received:
    """A context in which signals are noted instead of killing the process; `number` is the last, or 0.

    It is entered before anything slow is built, so that a job which is told to leave while it starts leaves
    as cleanly as one in the middle of training.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Received:
        for number in HANDLED:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.number = number


class TimeLimit:
    """When a job must leave to have saved before its scheduler kills it.

    Args:
        ends: the time (of the system's clock) at which the job is killed.
        lead: seconds before that to leave at while no save has been measured.
    """

    def __init__(self, ends: float, lead: float) -> None:
        # What is not measured: a slow file system, the way from the last step to the end of the process.
        self._margin = min(30.0, 0.1 * max(0.0, ends - time.time()))
        self._ends, self._lead = ends, lead

    def saved(self, seconds: float) -> None:
        """A save took so long, from its call to its commit."""
        self._lead = self._margin + 1.5 * seconds

    def is_near(self, step_seconds: float) -> bool:
        """Whether the job must leave now, when the next chance comes after `step_seconds`."""
        return time.time() + self._lead + 2 * step_seconds > self._ends


class Signals:
    """Says when all ranks leave.

    Args:
        agree_max: the largest of all ranks' integers; the identity for one rank.
        received: what this process was sent.
        limit: the job's time limit; None: none.
        seconds: how often ranks agree.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        agree_max: Callable[[int], int],
        received: Received,
        *,
        limit: TimeLimit | None = None,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agree_max, self._received, self._limit = agree_max, received, limit
        self._seconds, self._clock = seconds, clock
        self._agreed = 0
        self._steps, self._interval = 0, 1
        self._since = clock()

    def leave(self) -> bool:
        """Whether the job leaves now: the same answer on every rank. To be asked once after every step."""
        self._steps += 1
        if self._steps < self._interval:
            return False
        now = self._clock()
        step_seconds = (now - self._since) / self._steps
        interval = min(_LIMIT, max(1, int(self._seconds / step_seconds))) if step_seconds > 0 else _LIMIT
        # One integer holds both: the signal, and the fewest steps any rank wants to wait.
        flag = self._flag(max(step_seconds, self._seconds))
        self._agreed, waiting = divmod(self._agree_max(flag * (_LIMIT + 1) + _LIMIT - interval), _LIMIT + 1)
        self._steps, self._interval = 0, _LIMIT - waiting
        self._since = now
        return bool(self._agreed)

    def leave_now(self) -> bool:
        """The same asked between two steps: before the first, or in an evaluation. All ranks must ask."""
        self._agreed = self._agree_max(self._flag(0.0))
        self._steps, self._since = 0, self._clock()  # what passed was no step
        return bool(self._agreed)

    def saved(self, seconds: float) -> None:
        """A save took so long: what the time limit has to leave room for."""
        if self._limit is not None:
            self._limit.saved(seconds)

    @property
    def name(self) -> str:
        """What the ranks agreed to leave for, such as `SIGTERM`; empty if there was nothing."""
        if self._agreed == _TIME_IS_UP:
            return "the time limit is near"
        return signal.Signals(self._agreed).name if self._agreed else ""

    @property
    def exit_code(self) -> int:
        """0 after a clean end, also one asked for by a scheduler; 130, as shells have it, after SIGINT."""
        return 130 if self._agreed == signal.SIGINT else 0

    def _flag(self, step_seconds: float) -> int:
        if self._received.number:
            return self._received.number
        near = self._limit is not None and self._limit.is_near(step_seconds)
        return int(_TIME_IS_UP) if near else 0
