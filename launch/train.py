"""`megafab train`: check the configuration, then train here or start the local ranks that do.

A recipe with stages is run stage by stage, each by ranks of its own that are told `stage=NAME`. In a job that
something else started (srun, torchrun) a command is one stage, since stages may differ in their ranks.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from launch import ranks as local
from launch.job import time_limit
from launch.operation import operate
from megafab import stages as staged
from megafab.config import load, rules
from megafab.config import stages as declared
from megafab.config.schema import RunConfig
from megafab.config.stages import Stage
from megafab.errors import ConfigError
from megafab.resilience.signals import Received

_STAGE = "stage="
_COMMAND = (sys.executable, "-m", "launch.cli", "train")


def main(overrides: list[str]) -> int:
    """Train as `overrides` say; returns the exit code."""
    name, rest = split_stage(overrides)
    stages = declared.of(rest)
    if name is None and not stages:
        return _train(load.load(rest), rest)
    if name is None and not local.is_joining():
        declared.check_all(stages)
        return _train_stages(stages, rest)
    stage = declared.named(stages, name)
    declared.check_inheritance(stages)
    if local.rank_environment().rank == 0 and not local.is_launched():
        _prepare(stage, stages)
    while not staged.is_prepared(stage):  # by rank 0; whoever started the ranks ends them should it fail
        time.sleep(0.5)
    return _train(staged.started(stage, stages), overrides)


def split_stage(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name in `stage=NAME`, if any, and the other overrides."""
    chosen = [text for text in overrides if text.startswith(_STAGE)]
    if len(chosen) > 1:
        raise ConfigError(" ".join(chosen), f"{len(chosen)} stages", "one", "choose one stage")
    rest = [text for text in overrides if not text.startswith(_STAGE)]
    return (chosen[0].removeprefix(_STAGE) if chosen else None), rest


def _train_stages(stages: Sequence[Stage], overrides: Sequence[str]) -> int:
    """What is left of the stages, each on ranks of its own."""
    heard: list[int] = []

    def train(stage: Stage) -> int:
        _prepare(stage, stages)
        command = [*_COMMAND, *overrides, f"{_STAGE}{stage.name}"]
        run_dir, launch = Path(stage.config.run.dir), stage.config.launch
        return local.start(launch.ranks, command, run_dir=run_dir, threads=launch.threads, heard=heard)

    root = Path(stages[0].config.run.dir).parent
    make_run_directory(root)
    with alone(root):
        return staged.run(stages, train, lambda: bool(heard), lambda text: print(text, flush=True))


def _prepare(stage: Stage, stages: Sequence[Stage]) -> None:
    """What the stage begins with, made while nobody else works in its directory."""
    for other in stages:
        staged.is_done(other, stages)  # or says what changed under the others
    run_dir = Path(stage.config.run.dir)
    make_run_directory(run_dir)
    with alone(run_dir):
        staged.prepare(stage, stages, operate)


def _train(config: RunConfig, overrides: Sequence[str]) -> int:
    """One run: as one of its ranks, or by starting them with the same `overrides`."""
    rank, local_rank, world = local.rank_environment()
    local.check_nodes(config.launch.nodes)
    ranks = world if local.is_joining() else config.launch.ranks
    rules.check_all(config, ranks=ranks, corpus=rules.corpus_facts(config))
    if rank == 0:
        make_run_directory(Path(config.run.dir))
    if ranks > 1 and not local.is_joining():
        command = [*_COMMAND, *overrides]
        return local.start(ranks, command, run_dir=Path(config.run.dir), threads=config.launch.threads)
    return _train_rank(config, rank, local_rank, ranks)


def make_run_directory(path: Path) -> None:
    """Make it, or find out that it cannot be written before ranks and torch start."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError as error:
        found = error.strerror or type(error).__name__
    else:
        if writable:
            return
        found = "a directory that cannot be written"
    raise ConfigError(f"run.dir={path}", found, "a directory for the run", "give run.dir another place")


def _train_rank(config: RunConfig, rank: int, local_rank: int, ranks: int) -> int:
    """One rank of the job. Heavy imports come after every check, and once signals are noted."""
    with Received() as received:
        return _train_noting(config, rank, local_rank, ranks, received)


def _train_noting(config: RunConfig, rank: int, local_rank: int, ranks: int, received: Received) -> int:
    if config.launch.device.value != "auto":
        os.environ["MEGAFAB_DEVICE"] = config.launch.device.value
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    from megafab.platform import platform

    platform.start(local_rank, config.launch.threads)
    from megafab.build import build
    from megafab.topology.groups import shutdown
    from megafab.train import fit

    with alone(Path(config.run.dir)) if rank == 0 else nullcontext():
        run = build(config, ranks=ranks, received=received, limit=time_limit())
        if rank == 0:
            staged.begin(config)
        with run.watchdog:
            progress = fit(run)
        shutdown()
        if rank == 0 and not run.schedules.remaining(progress) and not progress.owes_evaluation:
            staged.finish(config, progress)
    return run.signals.exit_code


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, so that no two runs mix their metrics and delete each other's checkpoints.

    The kernel lets go when this process ends, however it ends.

    Raises:
        ConfigError: somebody else holds it.
    """
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found, fix = "another run at work there", "wait for it or stop it, or give run.dir another place"
            raise ConfigError(f"run.dir={run_dir}", found, "one at a time", fix) from None
        except OSError as error:
            logging.warning("run.dir=%s cannot be locked against a second run: %s", run_dir, error.strerror)
        yield
