"""A thread on every rank that tells where the rank is, and that ends a job that stands still.

Every rank sends a beat (`heartbeat.py`) to the store at which the job has met, six times in `stall_seconds`
and at least every 30 s: a few kilobytes, most of them Python stacks. Rank 0 compares the beats. Once nobody
has got on for `stall_seconds`, it names the rank to blame (`diagnosis.py`), keeps what every rank was doing
in `<run.dir>/stall.txt`, and leaves with exit code 75, upon which a scheduler may requeue the job. Whoever
started the ranks ends the others, as after any rank that fails.

The store lives with rank 0, and so nobody learns anything once that is stopped or its node is dead. The last
rank, which is on another node where there are several, is its deputy: it keeps rank 0's last beat, and when
no other follows it does the same in its place.

A rank that is stopped cannot print its stack; what is shown is the stack of its last beat.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megafab.resilience.config import STALLED
from megafab.resilience.diagnosis import Diagnosis, Vigil, diagnose, report, stacks, state
from megafab.resilience.heartbeat import WATCHING, Beat, Heart, Pulse
from megafab.techniques.base import Clock
from megafab.telemetry.timers import Timers
from megafab.topology.groups import Groups

STALL_FILE = "stall.txt"
_BEATS, _LEAST_INTERVAL, _MOST_INTERVAL = 6, 0.2, 30.0  # in `stall_seconds`; seconds
_SHOWN = 4  # ranks whose stacks are printed; the file has all
_REPORT_SECONDS = 20.0  # then the report is given up: disks and terminals may be what hangs
_LEAVE_SECONDS = 5.0  # to send a last beat
_FOREVER = datetime.timedelta(days=365)


def interval_of(stall_seconds: float) -> float:
    """Seconds between two beats of a rank."""
    return min(_MOST_INTERVAL, max(_LEAST_INTERVAL, stall_seconds / _BEATS))


def _connection() -> Store:
    """One of its own to the store where the ranks have met, which every rank is known to reach."""
    store = _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
    store.set_timeout(_FOREVER)
    return PrefixStore("watchdog", store)


class Watchdog:
    """A context in which the ranks watch over each other. Entering it is a collective.

    Args:
        stall_seconds: the job is ended when no rank has got on for so long; None: nothing is watched.
        groups: this rank's place.
        timers: know the step and the part of it.
        clock: knows the micro-batch.
        run_dir: where `stall.txt` is written.
        message: shows one line to the user and keeps it in the log; from any thread.
    """

    def __init__(
        self,
        stall_seconds: float | None,
        *,
        groups: Groups,
        timers: Timers,
        clock: Clock,
        run_dir: Path,
        message: Callable[[str], None],
    ) -> None:
        self._seconds, self._groups = stall_seconds, groups
        self._file, self._message = run_dir / STALL_FILE, message
        self._rank, self._world = groups.rank, groups.mesh.ranks
        self._heart = Heart(timers, clock, groups)
        self._done, self._left = threading.Event(), ""
        self._thread: threading.Thread | None = None
        self._sent = 0
        self._deputy = 0 < self._rank == self._world - 1
        self._first = Pulse(0, False, ""), Beat()  # of rank 0, as its deputy knows them

    def __enter__(self) -> Watchdog:
        if self._seconds is None:
            return self
        self._store = _connection()
        self._send()
        if self._world > 1:
            dist.barrier(group=self._groups.host)  # from here on there is a beat of every rank
        self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name=WATCHING, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends this rank's watch. If it leaves with an error it says so, since others may wait for it."""
        if self._thread is not None:
            self._left = "" if kind is None else f"that it left the job with {kind.__name__}"
            self._done.set()
            self._thread.join(_LEAVE_SECONDS)

    def _watch(self, stall_seconds: float) -> None:
        """What the thread does."""
        interval = interval_of(stall_seconds)
        vigil = Vigil(stall_seconds, interval)
        with contextlib.suppress(dist.DistError):  # the store has gone, and rank 0 with it
            if self._deputy:
                name = f"{WATCHING} of rank 0"
                threading.Thread(target=self._listen, args=(interval,), name=name, daemon=True).start()
            while not self._done.wait(interval):
                pulses = self._pulses(self._send())
                if any(pulse.finished for pulse in pulses.values()):
                    self._done.wait()  # training is over; closing what is open may take its time
                elif pulses:
                    vigil.look(time.monotonic(), pulses)
                    if vigil.stalled and (self._rank == 0 or 0 in vigil.silent):
                        self._end_job(vigil, stall_seconds)
            self._send(finished=not self._left)

    def _send(self, *, finished: bool = False) -> Pulse:
        beat = self._heart.beat(self._left)
        self._sent += 1
        pulse = Pulse(self._sent, finished, beat.progress)
        self._store.set(f"beat/{self._rank}", beat.to_text())
        self._store.set(f"pulse/{self._rank}", pulse.to_text())
        return pulse

    def _listen(self, interval: float) -> None:
        """Keep rank 0's last beat. On a thread of its own, which waits for ever once rank 0 is stopped."""
        store = _connection()
        with contextlib.suppress(dist.DistError):
            while not self._done.is_set():
                pulse, beat = store.multi_get(["pulse/0", "beat/0"])
                self._first = Pulse.from_text(pulse), Beat.from_text(beat)
                self._done.wait(interval)

    def _pulses(self, mine: Pulse) -> dict[int, Pulse]:
        """Of the ranks that this one watches over: rank 0 over all, its deputy over the two of them."""
        if self._rank == 0:
            found = self._store.multi_get([f"pulse/{rank}" for rank in range(self._world)])
            return {rank: Pulse.from_text(pulse) for rank, pulse in enumerate(found)}
        return {0: self._first[0], self._rank: mine} if self._deputy else {}

    def _beats(self) -> dict[int, Beat]:
        """The last of the same ranks."""
        if self._rank == 0:
            found = self._store.multi_get([f"beat/{rank}" for rank in range(self._world)])
            return {rank: Beat.from_text(beat) for rank, beat in enumerate(found)}
        return {0: self._first[1], self._rank: self._heart.beat()}

    def _end_job(self, vigil: Vigil, stall_seconds: float) -> NoReturn:
        """Say what is known and leave, whatever the other threads of this process are in."""
        beats, silent, still = self._beats(), vigil.silent, vigil.still
        found = diagnose(beats, silent, still=still, stall_seconds=stall_seconds)
        telling = threading.Thread(target=self._tell, args=(found, beats, silent, still), daemon=True)
        telling.start()
        telling.join(_REPORT_SECONDS)
        os._exit(STALLED)

    def _tell(
        self, found: Diagnosis, beats: Mapping[int, Beat], silent: Mapping[int, float], still: float
    ) -> None:
        """On stderr first, which hangs least; the line comes last, where it is looked for."""
        for rank in (found.ranks or tuple(beats))[:_SHOWN]:
            print(f"rank {rank}: {state(beats[rank], silent.get(rank))}", file=sys.stderr)
            print(*stacks(beats[rank]), sep="\n", file=sys.stderr)
        print(f"What the ranks were doing is in {self._file}.\n{found.line}", file=sys.stderr, flush=True)
        when = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        self._file.write_text("\n".join([when, *report(beats, silent, found, still=still), ""]))
        self._message(
            f"{found.line.where}: no progress for {still:.1f} s; see {self._file}; exit code {STALLED}"
        )
