"""Training runs as jobs of the test cluster: what is submitted, what happens to it, what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster
from training import SHORT_RUN, SMALL_MODEL, rows

ROOT = Path(__file__).parents[2]
TRACKED = ("tracking=wandb", "tracking.mode=offline")
RUN = (*SMALL_MODEL, *(text for text in SHORT_RUN if text != "tracking=none"), *TRACKED, "launch.device=cpu")


def megafab(slurm: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of megafab, as on a login node."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(
        command, env=slurm.environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def submitted(slurm: Cluster, run_dir: Path, *overrides: str) -> Submitted:
    """Queue a run."""
    done = megafab(slurm, "submit", "cluster=test", *overrides, f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = re.findall(r"submitted job (\d+)", done.stdout)
    return Submitted(slurm, run_dir, job)


@dataclass(frozen=True)
class Submitted:
    """A run that `megafab submit` has queued."""

    slurm: Cluster
    run_dir: Path
    job: str

    @property
    def state(self) -> str:
        return self.slurm.job(self.job)["JobState"]

    @property
    def log(self) -> str:
        path = self.run_dir / "slurm" / f"{self.job}.log"
        return path.read_text() if path.exists() else ""

    def reach(self, step: int, timeout: float = 180.0) -> None:
        """Wait until a step is logged."""
        deadline = time.monotonic() + timeout
        while not self._has(step):
            assert time.monotonic() < deadline, f"step {step} is not reached:\n{self.log}"
            assert self.state in ("PENDING", "RUNNING", "CONFIGURING"), self.log
            time.sleep(0.05)

    def go_on(self, restarts: int, timeout: float = 60.0) -> None:
        """Wait until the job is back in the queue for that many times, and let it begin at once."""
        deadline = time.monotonic() + timeout
        while int((job := self.slurm.job(self.job))["Restarts"]) < restarts or job["JobState"] != "PENDING":
            assert time.monotonic() < deadline, f"{job['JobState']}, restarts {job['Restarts']}:\n{self.log}"
            time.sleep(0.05)
        self.slurm.begin_soon(self.job)

    def finish(self, timeout: float = 240.0) -> Mapping[str, str]:
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        job = self.slurm.wait(self.job, *over, timeout=timeout)
        assert job["JobState"] == "COMPLETED", self.log
        return job

    def losses(self) -> dict[int, Any]:
        """What every step is judged by, validation included."""
        return {row["step"]: (row["loss"], row["grad_norm"], row.get("valid_loss")) for row in self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        return rows(self.run_dir)

    def wandb_ids(self) -> set[str]:
        return {path.name.rpartition("-")[2] for path in (self.run_dir / "wandb").glob("offline-run-*")}

    def _has(self, step: int) -> bool:
        try:
            return any(row["step"] >= step for row in self.rows())
        except (OSError, ValueError):  # not there yet, or a row is being written
            return False


def rank_process(run_dir: Path, rank: int) -> int:
    """The process of a rank of the job that trains in a directory, on whatever node."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            environment = (entry / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        is_ours = f"run.dir={run_dir}" in command and Path(command[0]).name.startswith("python")
        if is_ours and f"SLURM_PROCID={rank}" in environment:
            return int(entry.name)
    raise AssertionError(f"no rank {rank} trains in {run_dir}")


def kill(run_dir: Path, rank: int, number: signal.Signals) -> None:
    os.kill(rank_process(run_dir, rank), number)
