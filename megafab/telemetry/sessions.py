"""`sessions.jsonl`: when a run had its machines. With the rows of `metrics.jsonl` it tells the goodput.

Goodput is useful time over allocated time. Useful is the time of training steps that are part of the run as
it is now; a step that a later session had to repeat is not, and neither are starting up, evaluating, saving,
and what passes between the last sign of life and the end of a job. Times are weighted by the number of ranks,
so that stages and sessions of several sizes add up. Waiting in a queue is told beside it: machines that were
not allocated were not wasted.

One JSON object a line, `event` and `time` (seconds since 1970) in each:

    allocated   by the job script: job, restart, ranks
    began       by rank 0 as training begins: session, started (its process), step, ranks, and of the rows
                beyond that step, which are void now: dropped_seconds, dropped_until
    saved       a checkpoint is on the disk: step, seconds it took
    rewound     the run went back to step: dropped_seconds, of this session's rows beyond it and since then
    left        by rank 0 at the end: training, evaluate, checkpoint, seconds since the last row; kept:
                whether a checkpoint has all of it
    released    by the job script at its end: job, code, cause
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megafab.telemetry.rows import METRICS_FILE, read_rows

SESSIONS_FILE = "sessions.jsonl"
# What an event cannot be read without.
_NUMBERS = {
    "began": ("session", "started", "step", "ranks"),
    "saved": ("step", "seconds"),
    "left": ("training", "evaluate", "checkpoint"),
}


@dataclass(slots=True)
class Goodput:
    """Rank-seconds of a run so far: `useful` of `allocated`, and `lost` by cause; `queued` in seconds."""

    allocated: float = 0.0
    useful: float = 0.0
    queued: float = 0.0
    sessions: int = 0
    lost: dict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))

    @property
    def share(self) -> float:
        """Useful time over allocated time, 0 to 1."""
        return self.useful / self.allocated if self.allocated > 0 else 0.0

    def add(self, other: Goodput) -> None:
        """Also count another run's, such as the next stage's."""
        self.allocated += other.allocated
        self.useful += other.useful
        self.queued += other.queued
        self.sessions += other.sessions
        for cause, seconds in other.lost.items():
            self.lost[cause] += seconds

    def describe(self) -> str:
        """In one line: `goodput 91.2% of 12.3 rank-hours in 3 sessions; lost: start-up 4.1%, ...`."""
        unit, size = ("rank-hours", 3600.0) if self.allocated >= 3600 else ("rank-seconds", 1.0)
        sessions = f"{self.sessions} session{'s' if self.sessions != 1 else ''}"
        causes = sorted(self.lost.items(), key=lambda item: -item[1])
        lost = ", ".join(
            f"{cause} {seconds / self.allocated:.1%}" for cause, seconds in causes if seconds > 0
        )
        return (
            f"goodput {self.share:.1%} of {self.allocated / size:.1f} {unit} in {sessions}"
            + (f"; lost: {lost}" if lost else "")
            + (f"; {self.queued:.0f} s in the queue between them" if self.queued >= 1 else "")
        )


class Session:
    """Writes what this launch of a run adds to the file. On the writing rank.

    `number` is 1 for the first launch, one more for each that has come as far as training.

    Args:
        run_dir: of the run.
        ranks: of this launch.
    """

    def __init__(self, run_dir: Path, ranks: int) -> None:
        self._run_dir, self._ranks = run_dir, ranks
        self.number = 1
        self._before = Goodput()
        self._useful = 0.0
        self._started = time.time()
        self._saved_step = -1

    def begin(self, step: int) -> None:
        """Training goes on after `step`, and rows beyond are about to be dropped."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        events = read_events(self._run_dir)
        rows = self._rows()
        earlier = [
            *(event["session"] for event in events if event["event"] == "began"),
            *(row.get("session", 1) for row in rows),
        ]
        self.number = 1 + max(earlier, default=0)
        self._started = process_started()
        self._note(
            "began",
            session=self.number,
            started=self._started,
            step=step,
            ranks=self._ranks,
            **_dropped(rows, step),
        )
        events = read_events(self._run_dir)
        self._before = _of_sessions(events[:-1], [row for row in rows if row["step"] <= step], events[-1])
        self._started = _start_of(events[-2:-1], events[-1])

    def share(self, row: Mapping[str, Any]) -> float:
        """The goodput of the run up to a row that is about to be recorded."""
        self._useful += _useful(row)
        allocated = self._before.allocated + (time.time() - self._started) * self._ranks
        return (self._before.useful + self._useful * self._ranks) / allocated if allocated > 0 else 0.0

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint is committed."""
        self._saved_step = step
        self._note("saved", step=step, seconds=seconds)

    def rewind(self, step: int, seconds: Mapping[str, float]) -> None:
        """The run goes back to `step`, and rows beyond are about to be dropped; `seconds` as for `end`."""
        rows = [row for row in self._rows() if row["session"] == self.number]
        facts = _dropped(rows, step)
        void = sum(_useful(row) for row in rows if row["step"] > step)
        self._useful -= void - facts.get("kept_seconds", 0.0)
        facts["dropped_seconds"] += sum(seconds.values())
        self._note("rewound", step=step, **facts)

    def end(self, step: int, seconds: Mapping[str, float]) -> None:
        """The run is left after `step`; `seconds` since the last row: training, evaluate, checkpoint."""
        self._note("left", step=step, kept=self._saved_step >= step, **seconds)

    def account(self) -> Goodput:
        """Of the run up to now."""
        return _of_sessions(read_events(self._run_dir), self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        path = self._run_dir / METRICS_FILE
        return read_rows(path) if path.exists() else []

    def _note(self, event: str, **facts: Any) -> None:
        # One write to the end of the file: the job script adds lines too, and a kill may have torn the last.
        path = self._run_dir / SESSIONS_FILE
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps({"event": event, "time": time.time(), **facts}) + "\n")


def goodput(run_dir: Path) -> Goodput | None:
    """What a run has made of its time so far; None where nothing tells."""
    events = read_events(run_dir)
    metrics = run_dir / METRICS_FILE
    if not any(event["event"] == "began" for event in events):
        return None
    return _of_sessions(events, read_rows(metrics) if metrics.exists() else [])


def longest_save(run_dir: Path) -> float | None:
    """Seconds that the slowest of the run's saves took; None: none was measured."""
    return max(
        (event["seconds"] for event in read_events(run_dir) if event["event"] == "saved"), default=None
    )


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, without lines that a kill has torn."""
    path = run_dir / SESSIONS_FILE
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
            known = all(
                isinstance(event[key], int | float) for key in ("time", *_NUMBERS.get(event["event"], ()))
            )
        except (ValueError, TypeError, KeyError):
            continue
        if known:
            events.append(event)
    return events


def process_started() -> float:
    """When this process was started, in seconds since 1970; where that is not known, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError):
        return time.time()


def _dropped(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What is void of the rows beyond `step`, and when the last of them was written."""
    void = [row for row in rows if row["step"] > step]
    if not void:
        return {"dropped_seconds": 0.0}
    last_kept = max((row["step"] for row in rows if row["step"] <= step), default=0)
    # The first of them may tell of steps up to `step` too, which are kept.
    first = void[0]
    kept = (step - last_kept) / (first["step"] - last_kept)
    seconds = sum(row["wall_seconds"] for row in void)
    return {
        "dropped_seconds": seconds - kept * first["wall_seconds"],
        "kept_seconds": kept * _useful(first),
        "kept_pause_seconds": kept * (first["wall_seconds"] - _useful(first)),
        "dropped_until": void[-1]["time"],
    }


def _of_sessions(
    events: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    next_began: Mapping[str, Any] | None = None,
) -> Goodput:
    """The account of all sessions in `events`; `next_began` is of the session after them."""
    total = Goodput()
    by_session: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_session[row.get("session", 1)].append(row)
    parts = list(_split(events))
    begans = [next((e for e in part if e["event"] == "began"), None) for part in parts]
    previous_end = None
    for number, part in enumerate(parts):
        following = next((b for b in begans[number + 1 :] if b is not None), next_began)
        began = begans[number]
        mine = by_session[began["session"]] if began is not None else []
        start = _start_of(part, began)
        end = _end_of(part, mine, following)
        if previous_end is not None:
            total.queued += max(0.0, start - previous_end)
        previous_end = end
        one = _of_session(part, began, mine, following, start, end)
        ranks = next((event["ranks"] for event in part if "ranks" in event), 1)
        total.allocated += one.allocated * ranks
        total.useful += one.useful * ranks
        total.sessions += 1
        for cause, seconds in one.lost.items():
            total.lost[cause] += seconds * ranks
    return total


def _split(events: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """The events of each session: it begins with an allocation, or without one as its training begins."""
    part: list[Mapping[str, Any]] = []
    for event in events:
        opened = {one["event"] for one in part}
        if part and (event["event"] == "allocated" or (event["event"] == "began" and "began" in opened)):
            yield part
            part = []
        part.append(event)
    if part:
        yield part


def _start_of(part: Sequence[Mapping[str, Any]], began: Mapping[str, Any] | None) -> float:
    if part and part[0]["event"] == "allocated":
        return part[0]["time"]
    return began["started"] if began is not None else part[0]["time"]


def _end_of(
    part: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    following: Mapping[str, Any] | None,
) -> float:
    """When the session ended: as it said, or at the last sign of life."""
    signs = [*(event["time"] for event in part), *(row["time"] for row in rows)]
    if following is not None and "dropped_until" in following and part[-1]["event"] != "released":
        signs.append(following["dropped_until"])
    return max(signs)


def _of_session(
    part: Sequence[Mapping[str, Any]],
    began: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    following: Mapping[str, Any] | None,
    start: float,
    end: float,
) -> Goodput:
    """The account of one session, in seconds. Its parts add up to what was allocated."""
    one = Goodput(allocated=max(0.0, end - start))
    if began is None:
        one.lost["start-up"] = one.allocated
        return one
    one.lost["start-up"] = max(0.0, began["time"] - start)
    for row in rows:
        one.useful += _useful(row)
        one.lost["evaluation"] += row.get("evaluate_seconds", 0.0)
        one.lost["checkpoints"] += row.get("checkpoint_seconds", 0.0)
    for event in (following or {}, *(event for event in part if event["event"] == "rewound")):
        one.lost["repeated steps"] += event.get("dropped_seconds", 0.0)
        one.useful += event.get("kept_seconds", 0.0)
        one.lost["checkpoints"] += event.get("kept_pause_seconds", 0.0)
    left = next((event for event in part if event["event"] == "left"), None)
    if left is not None:
        one.lost["evaluation"] += left["evaluate"]
        one.lost["checkpoints"] += left["checkpoint"]
        if left.get("kept"):
            one.useful += left["training"]
        else:
            one.lost["repeated steps"] += left["training"]
    cause = next((event.get("cause", "") for event in part if event["event"] == "released"), "")
    tail = "shutdown" if left is not None else "stalled" if cause == "stalled" else "interrupted"
    one.lost[tail] += max(0.0, one.allocated - one.useful - sum(one.lost.values()))
    return one


def _useful(row: Mapping[str, Any]) -> float:
    return row["wall_seconds"] - row.get("evaluate_seconds", 0.0) - row.get("checkpoint_seconds", 0.0)
