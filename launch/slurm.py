"""Slurm's commands, as a user calls them: try a job, submit it, ask for it, follow it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megafab.errors import UserError

_OVER = frozenset(
    ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
    + ("PREEMPTED", "REVOKED")
)
# What sbatch says of a job that it refuses, and the keys that are behind it.
_BEHIND = (
    (r"invalid partition", "cluster.partition"),
    (r"invalid (account|qos)", "cluster.account, cluster.qos"),
    (r"constraint|feature", "cluster.constraint"),
    (r"time limit", "job.time"),
    (r"generic resource|gres", "cluster.gpus"),
    (r"node count", "launch.nodes, launch.ranks"),
    (r"dependency", "job.after"),
    (
        r"node configuration|more processors|mem",
        "launch.ranks, launch.nodes, cluster.gpus, cluster.cpus_per_rank, cluster.memory",
    ),
)
_POLL_SECONDS = (0.5, 5.0)  # first, and at most: a controller serves many


@dataclass(frozen=True, slots=True)
class State:
    """What Slurm says of a job. `reason` is why it waits, `code` its exit code (128 + n for signal n)."""

    name: str
    reason: str = ""
    code: int = 0
    restarts: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing comes any more."""
        return self.name in _OVER


def require() -> None:
    """Refuse a machine without Slurm.

    Raises:
        UserError: no sbatch.
    """
    if shutil.which("sbatch") is None:
        fix = "submit on a login node of the cluster; --dry-run shows the script anywhere"
        raise UserError("megafab submit", "no sbatch on this machine", "Slurm's commands", fix)


def try_out(script: Path, options: Sequence[str] = ()) -> str:
    """Ask whether Slurm could ever start a job, without queueing it; what it says.

    Args:
        script: what is to be submitted.
        options: further options of sbatch.

    Raises:
        UserError: it could not.
    """
    return _sbatch(script, ["--test-only", *options])


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Queue a job; its number.

    Raises:
        UserError: Slurm refuses it.
    """
    return _sbatch(script, ["--parsable", *options]).partition(";")[0]


def state(job: str) -> State | None:
    """What Slurm says of a job, or the accounting if it has forgotten it; None where nobody knows it.

    `UNKNOWN` while its controller does not answer.
    """
    done = _run(["scontrol", "show", "job", "-o", job])
    if done.returncode != 0 and re.search("contact|timed out|refused", done.stderr):
        return State("UNKNOWN", "Slurm's controller does not answer")
    if done.returncode == 0 and done.stdout.strip():
        # Of an array, the line of the array itself is the first.
        facts: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0]))
        code, restarts = _code(facts["ExitCode"]), int(facts.get("Restarts", 0))
        return State(facts["JobState"], facts.get("Reason", ""), code, restarts)
    done = _run(["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job])
    name, bar, code = done.stdout.strip().partition("\n")[0].partition("|")
    return State(name.split()[0], code=_code(code)) if done.returncode == 0 and bar else None


def follow(job: str, log_of: Callable[[str], Path], successor: Path) -> int:
    """Show a job's states and what it prints until it is over, and of the job that goes on after it.

    Args:
        job: its number.
        log_of: the log of the job with a number.
        successor: the file where a job writes the number of the one that goes on.

    Returns:
        0, or the exit code of the job.
    """
    shown, said, wait = 0, "", _POLL_SECONDS[0]
    while True:
        now = state(job)
        shown = _tail(log_of(job), shown)
        if now is None:
            print(f"megafab: Slurm knows no job {job} any more; its log: {log_of(job)}", file=sys.stderr)
            return 1
        told = _in_words(job, now)
        if told != said:
            print(told, file=sys.stderr, flush=True)
            said, wait = told, _POLL_SECONDS[0]
        if now.is_over:
            following = successor.read_text().strip() if successor.exists() else job
            if following == job:
                return now.code if now.name == "COMPLETED" else now.code or 1
            job, shown, said = following, 0, ""
        time.sleep(wait)
        wait = min(_POLL_SECONDS[1], wait * 1.3)


def _in_words(job: str, now: State) -> str:
    again = f", restart {now.restarts}" if now.restarts else ""
    reason = f" ({now.reason})" if now.reason not in ("", "None") else ""
    code = f", exit code {now.code}" if now.is_over else ""
    return f"megafab: job {job} {now.name.lower()}{reason}{again}{code}"


def _tail(log: Path, shown: int) -> int:
    """Print what was added to a log after `shown` bytes; how many there are now."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(text)


def _sbatch(script: Path, options: Sequence[str]) -> str:
    done = _run(["sbatch", *options, str(script)])
    said = " ".join((done.stderr + done.stdout).replace("sbatch: ", "").replace("error: ", "").split())
    if done.returncode != 0:
        where = next(
            (key for pattern, key in _BEHIND if re.search(pattern, said, re.IGNORECASE)), str(script)
        )
        expected, fix = (
            "a job that this cluster can start",
            "sinfo -o '%P %D %c %m %G %f %l' lists what it has",
        )
        raise UserError(where, f"refused by Slurm: {said} (asked for: {_asked(script)})", expected, fix)
    return done.stdout.strip() or said


def _asked(script: Path) -> str:
    """What a script asks for that a cluster may not have."""
    words = ("--partition", "--nodes", "--ntasks", "--cpus", "--g", "--mem", "--constraint", "--time")
    lines = (line.removeprefix("#SBATCH ") for line in script.read_text().splitlines())
    return " ".join(line for line in lines if line.startswith(words))


def _code(text: str) -> int:
    code, _, number = text.partition(":")
    return int(code) if int(code or 0) else 128 + int(number) if int(number or 0) else 0


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: not found")
