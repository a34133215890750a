"""Work on several processes, results in order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import TypeVar

from megafab.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 3  # tasks a worker has waiting; those of compressed files carry their data


class Interrupted(UserError):
    """The build stopped for a reason outside of it; what it finished is kept for the next try."""


class Pool:
    """`workers` processes, or this one when there is one worker.

    Processes are spawned, not forked: the parent may have threads (progress bar, Arrow). They end with
    the parent however that ends.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = (
            ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
            if workers > 1
            else None
        )

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`work(task)` for each task, in order; few tasks are taken ahead of the results.

        Raises:
            Interrupted: a process died.
            Exception: as raised by `work`.
        """
        if self._executor is None:
            yield from map(work, tasks)
            return
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(self._executor.submit(work, task))
                if len(waiting) > _AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            found, expected = "a worker process that was killed (out of memory?)", "all of them alive"
            fix = "run the same command again, it continues where it stopped; fewer workers need less memory"
            raise Interrupted(f"workers={self._workers}", found, expected, fix) from None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
