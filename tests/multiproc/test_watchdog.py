"""Jobs that stand still, for real: the rank to blame is named in time, and nothing is left of the job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RankDied
from training import SHORT_RUN, SMALL_MODEL, rows, train

from megafab.resilience.config import STALLED
from megafab.resilience.stragglers import Stragglers
from megafab.resilience.watchdog import Watchdog, interval_of
from megafab.techniques.base import Clock
from megafab.telemetry.timers import Timers
from megafab.topology import groups as topology
from megafab.topology.config import ParallelConfig
from megafab.topology.groups import Groups
from megafab.topology.mesh import Mesh

ROOT = Path(__file__).parents[2]
HOST = os.uname().nodename
STALL = 3.0  # seconds; beside other work, a step of these runs may take one
RUN = (*SMALL_MODEL, *SHORT_RUN, "model.layers=2", "model.hidden=32", "model.ffn=64", "model.seq_len=32")
ENDLESS = (*RUN, "train.steps=100000", f"resilience.stall_seconds={STALL}")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that stand still leave no sooner for being waited for."""
    monkeypatch.setattr("ranks.GRACE", 0.5)


def doze() -> None:
    while True:
        time.sleep(0.01)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def be_late() -> None:
    time.sleep(STALL / 2)


def train_but(rank: int, world: int, overrides: list[str], victim: int, act: Callable[[], None]) -> int:
    """Train, and on one rank do something at the beginning of a step, when there were beats."""
    from megafab.optim.schedules import Schedules

    plan = Schedules.at

    def at(self, progress):
        if rank == victim and progress.step == 10:
            act()
        return plan(self, progress)

    Schedules.at = at
    return train(rank, world, overrides)


def last_words(ranks, world: int, *call) -> str:
    """What the ranks said that ended the job because it stood still."""
    with pytest.raises(RankDied) as died:
        ranks.run(*call, world=world, init=False, timeout=60)
    assert f"ended with status {STALLED}" in str(died.value)
    return str(died.value)


def test_a_stopped_rank_is_named_in_time_and_nothing_is_left(corpus, tmp_path):
    """The command as a user gives it, on ranks of its own."""
    layout = ["parallel.tensor=2", "launch.ranks=4"]
    arguments = [*ENDLESS, *layout, f"data.path={corpus}", f"run.dir={tmp_path}"]
    command = [sys.executable, "-m", "launch.cli", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    report = tmp_path / "stall.txt"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not (tmp_path / "metrics.jsonl").exists() or len(rows(tmp_path)) < 10:
            assert job.poll() is None
            time.sleep(0.05)
        pids = children(job.pid)
        os.kill(pids[2], signal.SIGSTOP)
        stopped = time.monotonic()
        while not report.exists():
            assert time.monotonic() < stopped + 10 * STALL
            time.sleep(0.02)
        took = time.monotonic() - stopped
        _, errors = job.communicate(timeout=60)
    assert took < STALL + 2 * interval_of(STALL) + 1.0  # a second for other work on this machine
    assert job.returncode == STALLED
    assert sorted(pids) == [0, 1, 2, 3]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    line = errors.splitlines()[-1]
    assert line.startswith(f"rank 2 on {HOST}: found no sign of life for ")
    assert f"expected progress within resilience.stall_seconds={STALL:g}. Fix: run the same command" in line
    assert f'File "{ROOT}/megafab/train.py"' in errors  # of the stack of its last beat
    assert "rank 2 on" in (tmp_path / "log.txt").read_text().splitlines()[-1]
    told = report.read_text()
    assert line in told
    assert all(f"rank {rank} on {HOST}: step " in told for rank in range(4))


def children(parent: int) -> dict[int, int]:
    """The process of each rank that `parent` has started."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            variables = (process / "environ").read_bytes().split(b"\0") if ours else []
        except OSError:
            continue
        found |= {int(text[5:]): int(process.name) for text in variables if text.startswith(b"RANK=")}
    return found


def test_rank_zero_is_named_by_its_deputy(ranks, corpus, tmp_path):
    arguments = [*ENDLESS, "parallel.pipeline=2", f"data.path={corpus}", f"run.dir={tmp_path}"]
    words = last_words(ranks, 4, train_but, arguments, 0, stop)
    assert f"rank 3 ended with status {STALLED}" in words
    assert f"\nrank 0 on {HOST}: found no sign of life for " in words
    told = (tmp_path / "stall.txt").read_text()  # place and stack are those of its last beat
    assert re.search(
        r"\n  rank 0 on .*: step \d+, \w+, micro-batch \d, last heard of \d\.\d s ago; coll", told
    )
    assert f'File "{ROOT}/megafab/train.py"' in told.split("\nrank 3:")[0]


@pytest.mark.parametrize(("layout", "world"), [("parallel.tensor=2", 4), ("parallel.pipeline=2", 2)])
def test_a_rank_that_dozes_is_named_with_its_stack(ranks, corpus, tmp_path, layout, world):
    """It beats, the others wait for it in collectives or for its messages."""
    arguments = [*ENDLESS, layout, f"data.path={corpus}", f"run.dir={tmp_path}"]
    words = last_words(ranks, world, train_but, arguments, 1, doze)
    assert f"rank 0 ended with status {STALLED}" in words
    assert ", in doze\n" in words
    assert "; the last: gloo:" in words
    assert f"\nrank 1 on {HOST}: found " in words


def test_a_run_that_gets_on_is_left_alone(ranks, corpus, tmp_path):
    """For longer than `stall_seconds`: with a rank that is late once, with saves and evaluations."""
    arguments = [*RUN, "train.steps=30", "checkpoint.every=10", "eval.every=10"]
    arguments += [f"resilience.stall_seconds={STALL}", f"data.path={corpus}", f"run.dir={tmp_path}"]
    begin = time.monotonic()
    assert ranks.run(train_but, arguments, 1, be_late, world=2, init=False) == [0, 0]
    assert time.monotonic() - begin > STALL
    assert len(rows(tmp_path)) == 30
    assert not (tmp_path / "stall.txt").exists()


# -- without a training ------------------------------------------------------------------------------------


def job(world: int) -> Groups:
    from megafab.platform import platform

    platform.start(0, 1)
    return topology.initialize(Mesh.of(ParallelConfig(), world), seed=0)


def watched(rank: int, world: int, run_dir: Path, act: Callable[[Groups, Timers], None]) -> None:
    """`act`, watched for standing still longer than a second."""
    groups, timers = job(world), Timers()
    dog = Watchdog(1.0, groups=groups, timers=timers, clock=Clock(), run_dir=run_dir, message=print)
    try:
        with dog:
            act(groups, timers)
    except ZeroDivisionError:
        time.sleep(30.0)
    topology.shutdown()


def leave_with_an_error(groups: Groups, timers: Timers) -> None:
    assert 1 // (1 - groups.rank)
    groups.agree_max(0)


def wait_for_ever(groups: Groups, timers: Timers) -> None:
    timers.step = 5
    doze()


def close_slowly(groups: Groups, timers: Timers) -> None:
    """One has much to upload when all others have left."""
    time.sleep(2.5 * (groups.rank == 0))


def be_stopped_together(groups: Groups, timers: Timers) -> None:
    """As by a debugger: all ranks, for longer than is allowed."""
    pid = os.getpid()
    if os.fork() == 0:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    for timers.step in range(8):
        time.sleep(0.2)
        groups.agree_max(0)


def test_a_rank_that_left_with_an_error_is_named(ranks, tmp_path):
    words = last_words(ranks, 3, watched, tmp_path, leave_with_an_error)
    assert f"\nrank 1 on {HOST}: found that it left the job with ZeroDivisionError, expected " in words


def test_a_rank_alone_watches_over_itself(ranks, tmp_path):
    words = last_words(ranks, 1, watched, tmp_path, wait_for_ever)
    assert f"\nrank 0 on {HOST}: found no progress for 1." in words
    assert "at step 5, other, micro-batch 0 in doze (tests/multiproc/test_watchdog.py:" in words


@pytest.mark.parametrize("act", [close_slowly, be_stopped_together])
def test_no_alarm_where_none_is_due(ranks, tmp_path, act):
    ranks.run(watched, tmp_path, act, world=2, init=False)
    assert list(tmp_path.iterdir()) == []


# -- stragglers --------------------------------------------------------------------------------------------


def compare(rank: int, world: int, slow: int) -> tuple[list[str], dict[str, float]]:
    """Four comparisons, of which the first is not due; `slow` takes five times as long."""
    groups, timers, told = job(world), Timers(), list[str]()
    seconds = 0.005 * (5 if rank == slow else 1)
    stragglers = Stragglers(
        *(2, 1.5),
        groups=groups,
        timers=timers,
        message=told.append,
        compute=lambda: time.sleep(seconds),
    )
    for step in (1, 2, 4, 6):
        with timers("data"):
            time.sleep(10 * seconds)
        stragglers.compare(step)
    numbers = dict(stragglers.numbers()["stragglers"])
    assert not stragglers.numbers()
    topology.shutdown()
    return told, numbers


def test_a_straggler_is_told_once(ranks):
    results = ranks.run(compare, 1, world=4, init=False)
    told, numbers = results[0]
    assert all(result == results[0] for result in results)
    assert [line.split(" times")[0][:-4] for line in told] == [
        f"straggler: rank 1 on {HOST} computes",
        f"straggler: rank 1 on {HOST} waits for data",
    ]
    assert all(line.endswith(" times as long as the median rank, twice in a row") for line in told)
    assert (numbers["slowest_rank"], numbers["count"]) == (1, 1)
    assert 3 < numbers["slowest_ratio"] < 6


def test_the_own_computation_takes_little(ranks):
    (seconds,) = ranks.run(computing, init=False)
    assert 0 < seconds < 0.05


def computing(rank: int, world: int) -> float:
    stragglers = Stragglers(1, 1.5, groups=job(world), timers=Timers(), message=print)
    stragglers.compare(1)  # alone there is nothing to compare
    assert not stragglers.numbers()
    return stragglers._computing()
