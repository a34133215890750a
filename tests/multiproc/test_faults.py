"""What a run survives: deaths at any moment, slow ranks, damaged checkpoints, disks without room.

However it was disturbed, the same command goes on from a checkpoint that verifies, and in the end every step
has the losses of the run that nobody disturbed, to the last bit: no sample was repeated or left out.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from ranks import RankDied
from training import SHORT_RUN, SMALL_MODEL, train

from megafab.checkpoint import store
from megafab.errors import UserError
from megafab.telemetry.rows import read_rows

STEPS, EVERY, WORLD = 60, 5, 2
KILLS = 8  # of one run; 25 runs make 200
RUN = (
    *SMALL_MODEL,
    *SHORT_RUN,
    *("model.layers=1", "model.hidden=32", "model.ffn=64", "model.seq_len=32"),
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "eval.samples=0",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=3",
    "optim.lr=1e-3",
)

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(corpus) -> Arguments:
    def arguments(run_dir: Path, *more: str) -> list[str]:
        return [*RUN, f"data.path={corpus}", f"run.dir={run_dir}", *more]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(ranks, arguments, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    ranks.run(train, arguments(directory), world=WORLD, init=False)
    return directory


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """What training computed at each step, bit for bit; not how long it took."""
    keys = ("step", "samples", "tokens", "loss", "grad_norm", "lr", "skipped", "domain_loss")
    return [{key: row[key] for key in keys} for row in read_rows(run_dir / "metrics.jsonl")]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def intact(run_dir: Path) -> list[Path]:
    """The checkpoints without a flaw, the last one first."""
    return [path for path in store.candidates(run_dir / "checkpoints") if not store.verify(path)]


def logged(run_dir: Path) -> int:
    """The last step whose row is on the disk."""
    file = run_dir / "metrics.jsonl"
    return max((row["step"] for row in read_rows(file)), default=0) if file.exists() else 0


def train_with(rank, world, overrides, what):
    faults.inflict(what, rank)
    return train(rank, world, overrides)


def log(run_dir: Path) -> str:
    """What the user was told so far, over all sessions."""
    file = run_dir / "log.txt"
    return file.read_text() if file.exists() else ""


def resumed_from(told: str) -> list[int]:
    """The steps from which sessions resumed, as they told."""
    return [step_of(Path(line.split()[-1])) for line in told.splitlines() if "resuming from" in line]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 200 // KILLS))]
)
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_happened(
    ranks, arguments, undisturbed, tmp_path, seed
):
    rng = random.Random(seed)
    asynchronous = seed % 3 != 1
    command = arguments(tmp_path, f"checkpoint.asynchronous={asynchronous}".lower())
    seconds = sorted(row["step_seconds"] for row in read_rows(undisturbed / "metrics.jsonl"))[STEPS // 2]
    expected, story = 0, []
    for _ in range(KILLS):
        before = log(tmp_path)
        session = faults.draw(rng, world=WORLD, after=expected, steps=2 * EVERY, step_seconds=seconds)
        story.append(f"after step {expected}: {session}")
        with pytest.raises(RankDied, match="ended with status -9"):
            ranks.run(train_with, command, session, world=WORLD, init=False)
        # It had gone on from the newest checkpoint that verified, if it came so far.
        assert resumed_from(log(tmp_path).removeprefix(before)) in ([], [expected]), story
        reached = logged(tmp_path)
        # The last interval that was begun may be lost, and with it what was still being written.
        last_begun = max(reached - 1, 0) // EVERY * EVERY
        survived = max(map(step_of, intact(tmp_path)), default=0)
        assert survived >= last_begun - EVERY * asynchronous, (reached, story)
        if rng.random() < 0.25 and len(intact(tmp_path)) > 1:
            story.append(faults.damage(rng, intact(tmp_path)[0]))
        expected = max(map(step_of, intact(tmp_path)[:1]), default=0)
    assert ranks.run(train, command, world=WORLD, init=False) == [0] * WORLD
    assert numbers(tmp_path) == numbers(undisturbed), story
    assert len(numbers(tmp_path)) == STEPS
    assert step_of(intact(tmp_path)[0]) == STEPS


# -- no room -------------------------------------------------------------------------------------------------


def train_within_a_limit(rank, world, overrides, at_step):
    if rank == 1:  # rank 0 also writes the metrics
        faults.limit_files(4096, at_step)
    return train(rank, world, overrides)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_rank_without_room_ends_the_run_and_loses_nothing(
    ranks, arguments, undisturbed, tmp_path, asynchronous
):
    command = arguments(tmp_path, f"checkpoint.asynchronous={asynchronous}")
    with pytest.raises(
        UserError, match=r"found File too large \(rank 1\).*earlier checkpoints are untouched"
    ):
        ranks.run(train_within_a_limit, command, 18, world=WORLD, init=False)
    assert step_of(intact(tmp_path)[0]) == 15
    assert [path.name for path in (tmp_path / "checkpoints").glob(".step*")] == []
    if asynchronous == "true":  # the next save was tried in place before the run gave up
        assert "File too large" in (tmp_path / "log.txt").read_text()
        assert logged(tmp_path) == 25
    ranks.run(train, command, world=WORLD, init=False)
    assert numbers(tmp_path) == numbers(undisturbed)


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[None]:
    path.mkdir()
    size = f"size={kilobytes}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk; the limit on files above needs none")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(ranks, arguments, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    size = sum(path.stat().st_size for path in intact(undisturbed)[0].rglob("*") if path.is_file())
    with small_disk(disk, int(2.5 * size / 1024)):
        with pytest.raises((UserError, OSError), match="No space left on device"):
            ranks.run(train, arguments(disk, "checkpoint.keep=9"), world=WORLD, init=False)
        assert step_of(intact(disk)[0]) == 2 * EVERY
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        ranks.run(train, arguments(disk, "checkpoint.keep=9"), world=WORLD, init=False)
        assert numbers(disk) == numbers(undisturbed)
