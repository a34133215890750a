"""`megafab train`: check the configuration, then train here or start the local ranks that do."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from launch import ranks as local
from megafab.config import load, rules
from megafab.config.schema import RunConfig
from megafab.errors import ConfigError


def main(overrides: list[str]) -> int:
    """Train as `overrides` say; returns the exit code."""
    config = load.load(overrides)
    rank, local_rank, world = local.rank_environment()
    ranks = world if local.is_joining() else config.launch.ranks
    rules.check_all(config, ranks=ranks, corpus=rules.corpus_facts(config))
    if rank == 0:
        _make_run_directory(Path(config.run.dir))
    if ranks > 1 and not local.is_joining():
        command = [sys.executable, "-m", "launch.cli", "train", *overrides]
        return local.start(ranks, command, run_dir=Path(config.run.dir), threads=config.launch.threads)
    return _train(config, rank, local_rank, ranks)


def _make_run_directory(path: Path) -> None:
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


def _train(config: RunConfig, rank: int, local_rank: int, ranks: int) -> int:
    """One rank of the job. Heavy imports come after every check."""
    if config.launch.device.value != "auto":
        os.environ["MEGAFAB_DEVICE"] = config.launch.device.value
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    from megafab.platform import platform

    platform.start(local_rank, config.launch.threads)
    from megafab.build import build
    from megafab.topology.groups import shutdown
    from megafab.train import fit

    with alone(Path(config.run.dir)) if rank == 0 else nullcontext():
        run = build(config, ranks=ranks)
        fit(run)
        shutdown()
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
