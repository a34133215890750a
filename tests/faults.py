"""Faults for tests, drawn from a seed: kill -9 from outside at any moment, slow ranks, damage, no room.

The product knows nothing of this. A rank of a test's job calls `inflict` before it trains; what that patches
is gone with its process.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kill:
    """Kill -9 of one rank, `delay` seconds after a moment.

    `moment` is `start` (before the run is built), `step` (as the given step begins), or `save` (as the first
    save at or after that step begins to write).
    """

    victim: int
    moment: str
    step: int
    delay: float


@dataclass(frozen=True)
class Faults:
    """What happens to one session: perhaps a kill, and a rank that is late at every step and save."""

    kill: Kill | None = None
    slow_rank: int = -1
    slow_seconds: float = 0.0


def draw(rng: random.Random, *, world: int, after: int, steps: int, step_seconds: float) -> Faults:
    """The faults of a session that begins after step `after`; it is killed within the next `steps`."""
    moment = rng.choice(("start", "step", "step", "save", "save", "save"))
    delay = {"start": 1.0, "step": step_seconds, "save": 4 * step_seconds}[moment] * rng.random()
    kill = Kill(rng.randrange(world), moment, after + rng.randint(1, steps), delay)
    slow = rng.random() < 0.3
    return Faults(kill, rng.randrange(world) if slow else -1, step_seconds * rng.random())


def inflict(faults: Faults, rank: int) -> None:
    """Let this rank suffer its part of `faults`."""
    from megafab.checkpoint import store
    from megafab.optim.schedules import Schedules

    kill = faults.kill if faults.kill is not None and faults.kill.victim == rank else None
    strike = _executioner() if kill is not None else None
    lateness = faults.slow_seconds if faults.slow_rank == rank else 0.0
    plan, write = Schedules.at, store.save

    def reach(moment: str, due: bool) -> None:
        time.sleep(lateness)
        if kill is not None and strike is not None and kill.moment == moment and due:
            strike(kill.delay)

    def at(self, progress):
        reach("step", kill is not None and progress.step + 1 == kill.step)
        return plan(self, progress)

    def save(directory, step, *args, **kwargs):
        reach("save", kill is not None and step >= kill.step)
        return write(directory, step, *args, **kwargs)

    Schedules.at, store.save = at, save
    reach("start", True)


def _executioner() -> Callable[[float], None]:
    """A child that kills this process so many seconds after it is told to, whatever that is doing then."""
    read, write = os.pipe()
    victim = os.getpid()
    if os.fork() == 0:
        os.close(write)
        order = os.read(read, 8)  # nothing, if the victim ends by itself
        if order:
            time.sleep(struct.unpack("d", order)[0])
            os.kill(victim, signal.SIGKILL)
        os._exit(0)
    os.close(read)

    def strike(delay: float) -> None:
        os.write(write, struct.pack("d", delay))

    return strike


def damage(rng: random.Random, checkpoint: Path) -> str:
    """Truncate, remove or flip a bit of one file of a checkpoint; says what was done."""
    path = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    how = rng.choice(("truncated", "removed", "flipped"))
    if how == "truncated":
        os.truncate(path, rng.randrange(path.stat().st_size))
    elif how == "removed":
        path.unlink()
    else:
        flip(path, rng.randrange(path.stat().st_size))
    return f"{path.relative_to(checkpoint)} {how}"


def flip(path: Path, at: int) -> None:
    """Change one bit of the byte `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def limit_files(size: int, at_step: int) -> None:
    """From a step on, this rank may write no file beyond `size` bytes: what a full disk is like."""
    from megafab.optim.schedules import Schedules

    plan = Schedules.at

    def at(self, progress):
        if progress.step + 1 == at_step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return plan(self, progress)

    Schedules.at = at
