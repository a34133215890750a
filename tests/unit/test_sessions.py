"""Goodput by hand: every second of what was allocated is useful or lost to one cause."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megafab.telemetry.sessions import Goodput, Session, goodput, longest_save, process_started, read_events


def row(step: int, session: int, wall: float, at: float, **pauses: float) -> dict[str, Any]:
    return {"step": step, "session": session, "wall_seconds": wall, "time": at, **pauses}


def write(run_dir: Path, events: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    for name, lines in (("sessions.jsonl", events), ("metrics.jsonl", rows)):
        (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def event(name: str, at: float, **facts: Any) -> dict[str, Any]:
    return {"event": name, "time": at, **facts}


def began(at: float, session: int, step: int, ranks: int, **facts: Any) -> dict[str, Any]:
    known = {"started": at - 5.0, "dropped_seconds": 0.0, **facts}
    return event("began", at, session=session, step=step, ranks=ranks, **known)


def test_an_undisturbed_job(tmp_path: Path):
    write(
        tmp_path,
        [
            event("allocated", 1000.0, job="7", restart=0, ranks=4),
            began(1010.0, 1, 0, 4),
            event("saved", 1095.0, step=20, seconds=2.0),
            event("left", 1096.0, step=20, kept=True, training=1.0, evaluate=0.0, checkpoint=3.0),
            event("released", 1100.0, job="7", code=0, cause="finished"),
        ],
        [
            row(10, 1, 40.0, 1050.0, evaluate_seconds=5.0, checkpoint_seconds=0.0),
            row(20, 1, 42.0, 1092.0, evaluate_seconds=0.0, checkpoint_seconds=2.0),
        ],
    )
    spent = goodput(tmp_path)
    assert spent is not None
    # 100 s of 4 ranks: 35 + 40 + 1 useful.
    assert (spent.allocated, spent.useful, spent.sessions) == (400.0, 4 * 76.0, 1)
    lost = {"start-up": 40.0, "evaluation": 20.0, "checkpoints": 20.0, "shutdown": 16.0}
    assert {cause: seconds for cause, seconds in spent.lost.items() if seconds} == lost
    assert spent.share == 0.76
    assert spent.describe() == (
        "goodput 76.0% of 400.0 rank-seconds in 1 session; "
        "lost: start-up 10.0%, evaluation 5.0%, checkpoints 5.0%, shutdown 4.0%"
    )
    assert longest_save(tmp_path) == 2.0


def test_a_job_that_was_killed_and_requeued(tmp_path: Path):
    """Rows every 10 steps, saved after 15, killed after 32: 15 to 32 are done again, 10 to 15 are not."""
    first = [
        event("allocated", 0.0, job="7", restart=0, ranks=2),
        began(10.0, 1, 0, 2),
        event("saved", 26.0, step=15, seconds=1.0),
        event("released", 50.0, job="7", code=137, cause="failed"),
    ]
    target = Session(tmp_path, ranks=2)
    write(tmp_path, first, [row(10, 1, 10.0, 20.0), row(20, 1, 12.0, 32.0), row(30, 1, 10.0, 42.0)])
    target.begin(15)
    (again,) = read_events(tmp_path)[len(first) :]
    assert (again["session"], again["step"], again["ranks"]) == (2, 15, 2)
    assert again["kept_seconds"] == 6.0  # 5 of the 10 steps of the second row
    assert again["dropped_seconds"] == 16.0
    assert again["dropped_until"] == 42.0
    write(
        tmp_path,
        [
            *first,
            event("allocated", 170.0, job="7", restart=1, ranks=2),
            {**again, "time": 180.0},
            event("left", 200.0, step=35, kept=True, training=20.0, evaluate=0.0, checkpoint=0.0),
        ],
        [row(10, 1, 10.0, 20.0)],
    )
    spent = goodput(tmp_path)
    assert spent is not None
    assert spent.allocated == 2 * (50.0 + 30.0)
    assert spent.useful == 2 * (10.0 + 6.0 + 20.0)
    lost = {"start-up": 2 * 20.0, "repeated steps": 2 * 16.0, "interrupted": 2 * 8.0}
    assert {cause: seconds for cause, seconds in spent.lost.items() if seconds} == lost
    assert spent.queued == 120.0
    assert spent.describe().endswith("; 120 s in the queue between them")


def test_a_run_without_a_job_script_begins_with_its_process(tmp_path: Path):
    write(tmp_path, [began(10.0, 1, 0, 1)], [row(1, 1, 4.0, 14.0)])
    spent = goodput(tmp_path)
    assert spent is not None
    assert (spent.allocated, spent.useful, spent.lost["start-up"]) == (9.0, 4.0, 5.0)


def test_steps_that_no_checkpoint_has_are_lost_when_a_run_fails(tmp_path: Path):
    left = event("left", 20.0, step=9, kept=False, training=6.0, evaluate=0.0, checkpoint=0.0)
    write(tmp_path, [began(10.0, 1, 0, 1), left], [row(5, 1, 4.0, 14.0)])
    spent = goodput(tmp_path)
    assert spent is not None
    assert (spent.useful, spent.lost["repeated steps"]) == (4.0, 6.0)


@pytest.mark.parametrize("cause", ["stalled", "failed"])
def test_what_a_hang_costs_is_called_so(tmp_path: Path, cause: str):
    events = [began(10.0, 1, 0, 1), event("released", 99.0, job="1", code=75, cause=cause)]
    write(tmp_path, events, [row(5, 1, 4.0, 14.0)])
    spent = goodput(tmp_path)
    assert spent is not None
    assert spent.lost["stalled" if cause == "stalled" else "interrupted"] == 85.0


def test_what_a_run_went_back_over_is_done_again(tmp_path: Path):
    write(tmp_path, [], [])
    target = Session(tmp_path, ranks=1)
    target.begin(0)
    rows = [row(10, 1, 10.0, 20.0), row(20, 1, 10.0, 30.0)]
    write(tmp_path, read_events(tmp_path), rows)
    target.rewind(15, {"training": 2.0, "evaluate": 0.0, "checkpoint": 1.0})
    events = read_events(tmp_path)
    assert {key: events[-1][key] for key in ("step", "dropped_seconds", "kept_seconds")} == {
        "step": 15,
        "dropped_seconds": 5.0 + 3.0,
        "kept_seconds": 5.0,
    }
    begun = {**events[0], "time": 10.0, "started": 10.0}
    write(tmp_path, [begun, {**events[-1], "time": 33.0}], [rows[0], row(25, 1, 12.0, 45.0)])
    spent = goodput(tmp_path)
    assert spent is not None
    assert (spent.allocated, spent.useful) == (35.0, 10.0 + 5.0 + 12.0)
    assert {cause: seconds for cause, seconds in spent.lost.items() if seconds} == {"repeated steps": 8.0}


def test_a_session_that_never_trained_counts(tmp_path: Path):
    events = [
        event("allocated", 0.0, job="1", restart=0, ranks=4),
        event("released", 10.0, job="1", code=1, cause="failed"),
        event("allocated", 20.0, job="1", restart=1, ranks=4),
        began(25.0, 1, 0, 4),
    ]
    write(tmp_path, events, [row(5, 1, 5.0, 30.0)])
    spent = goodput(tmp_path)
    assert spent is not None
    assert (spent.sessions, spent.allocated, spent.useful) == (2, 4 * 20.0, 4 * 5.0)
    assert spent.lost["start-up"] == 4 * 15.0


def test_a_session_knows_its_share_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(
        tmp_path,
        [
            event("allocated", 0.0, job="1", restart=0, ranks=2),
            began(10.0, 1, 0, 2),
            event("released", 20.0, job="1", code=0, cause="left"),
            event("allocated", 100.0, job="1", restart=1, ranks=2),
        ],
        [row(5, 1, 10.0, 20.0)],
    )
    now = 110.0
    monkeypatch.setattr("megafab.telemetry.sessions.time.time", lambda: now)
    target = Session(tmp_path, ranks=2)
    target.begin(5)
    now = 120.0
    assert target.number == 2
    assert target.share(row(10, 2, 10.0, 120.0)) == 20.0 / 40.0


def test_torn_lines_are_passed_over(tmp_path: Path):
    (tmp_path / "sessions.jsonl").write_text('{"event": "saved", "time": 1.0, "step": 1, "seconds": 2}\n{"ev')
    assert [one["event"] for one in read_events(tmp_path)] == ["saved"]
    assert goodput(tmp_path) is None
    target = Session(tmp_path, ranks=1)
    target.begin(0)  # after the torn line, on one of its own
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write('{"event": "began", "time": 1}\n{"event": "saved", "time": 1}\n')
    assert [one["event"] for one in read_events(tmp_path)] == ["saved", "began"]
    assert longest_save(tmp_path) == 2
    assert longest_save(tmp_path / "nowhere") is None


def test_runs_add_up():
    total = Goodput()
    total.add(Goodput(allocated=10.0, useful=5.0, sessions=1, lost={"start-up": 5.0}))
    total.add(Goodput(allocated=30.0, useful=25.0, queued=60.0, sessions=2, lost={"start-up": 5.0}))
    assert (total.share, total.sessions, total.lost["start-up"], total.queued) == (0.75, 3, 10.0, 60.0)


def test_a_process_knows_when_it_was_started():
    assert 0 < time.time() - process_started() < 24 * 3600
