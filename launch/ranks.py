"""Ranks of one job: started here on one machine, or found in what torchrun or srun set.

`start` runs the same command once a rank and stays behind to look after them: signals reach every rank
once, a rank that dies takes the others with it, and none outlives this process. `rank_environment` is
what each of those processes calls: it makes torchrun's and srun's environments look the same to
torch.distributed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from megafab.errors import ConfigError
from megafab.resilience.config import STALLED

LAUNCHED = "MEGAFAB_LAUNCHED"  # set in the environment of ranks that `start` started
GRACE = 5.0  # seconds the other ranks get to leave by themselves once one has died
_TAIL = 20  # lines of a dead rank's log to show
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
# Exit codes of ranks that have said themselves why they left: what the user must change, Ctrl-C, a stall.
_EXPLAINED = (2, 130, STALLED)


class RankEnvironment(NamedTuple):
    """Who this process is among the ranks of its job."""

    rank: int
    local_rank: int
    world: int


def is_joining(env: Mapping[str, str] = os.environ) -> bool:
    """Whether `start`, torchrun or srun started this process as one rank of a job."""
    return _started_as(env) is not None


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether `start` started this process."""
    return LAUNCHED in env


def rank_environment(env: MutableMapping[str, str] = os.environ) -> RankEnvironment:
    """This process' place, and in `env` what torch.distributed's `env://` needs to meet the others.

    The place comes from torchrun (or `start`), else from srun. A process that nobody started as a rank is
    rank 0 of 1 and gets no address, having nobody to meet.
    """
    place = _started_as(env)
    if place is None:
        return RankEnvironment(0, 0, 1)
    env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"] = map(str, place)
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        env["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_PORT" not in env:
        # Every rank computes the same port; jobs, steps of a job and its restarts get different ones.
        numbers = ("SLURM_JOB_ID", 7), ("SLURM_STEP_ID", 1), ("SLURM_RESTART_COUNT", 1)
        env["MASTER_PORT"] = str(10000 + sum(int(env.get(name, 0)) * n for name, n in numbers) % 20000)
    return place


def check_nodes(asked: int | None, env: Mapping[str, str] = os.environ) -> None:
    """Refuse another number of nodes than the ranks are on.

    Raises:
        ConfigError: there are others, or this command would start all ranks on this machine.
    """
    if asked is None:
        return
    nodes = 1
    if is_joining(env):
        told = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES")
        if told is None:  # started by torchrun without Slurm, which does not tell
            return
        nodes = int(told)
    if nodes != asked:
        found = f"ranks on {nodes} node{'s' if nodes != 1 else ''}"
        fix = "megafab submit cluster=NAME, or leave launch.nodes out"
        raise ConfigError(f"launch.nodes={asked}", found, f"ranks on {asked} nodes", fix)


def _started_as(env: Mapping[str, str]) -> RankEnvironment | None:
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankEnvironment(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
    # In a batch script outside srun, SLURM_NTASKS speaks of the job and SLURM_PROCID is 0: not a rank.
    in_step = "SLURM_STEP_NODELIST" in env or "SLURM_STEP_ID" in env
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS", "1") if in_step else "1"))
    if "SLURM_PROCID" in env and tasks > 1:
        return RankEnvironment(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), tasks)
    return None


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: `n[03-05,9],m1` is n03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def start(
    ranks: int,
    argv: Sequence[str],
    *,
    run_dir: Path,
    threads: int | None = None,
    heard: list[int] | None = None,
) -> int:
    """Run `argv` as `ranks` local processes and wait for them.

    Rank 0 writes to this process' own output, rank r to `run_dir/logs/rank_0000r.log` (appended). SIGTERM,
    SIGINT and SIGUSR1 are passed on to every rank once, which then may save and leave; a second SIGINT
    kills them. When a rank fails, the others get a few seconds and are killed with everything they
    started. Ranks die with this process, however it ends (Linux).

    Args:
        ranks: processes to start.
        argv: the command, the same for all; it reads its rank from the environment (`rank_environment`).
        run_dir: where `logs/` is made.
        threads: OMP_NUM_THREADS of each; None shares the cores out.
        heard: gets the signals that were passed on.

    Returns:
        0, or the exit code of the rank that failed first (128 + n when signal n killed it).
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with _reserved_port() as port, _Ranks(logs, heard) as job:
        job.start(ranks, argv, _environment(ranks, port, threads))
        return job.wait()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(ranks: int, port: int, threads: int | None) -> dict[str, str]:
    return {
        **os.environ,
        LAUNCHED: "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads or max(1, cores() // ranks)),
    }


class _reserved_port:
    """A free port, kept until the job ends.

    The socket is bound and never listens. Linux lets rank 0's store listen on the port all the same, since
    both set SO_REUSEADDR, and gives the port to nobody who asks for a free one in the meantime.
    """

    def __enter__(self) -> int:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        return self._socket.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when `parent` dies. Runs in the child, before the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


class _Ranks:
    """The processes of one job; leaving the context leaves none of them behind."""

    def __init__(self, logs: Path, heard: list[int] | None) -> None:
        self._logs = logs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._exits: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (rank, code), in order
        self._received = [] if heard is None else heard
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Ranks:
        for number in _FORWARDED:
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for process in self._processes:
            process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, ranks: int, argv: Sequence[str], env: Mapping[str, str]) -> None:
        for rank in range(ranks):
            if self._received:
                break
            with contextlib.nullcontext() if rank == 0 else open(self._log(rank), "ab") as output:
                process = subprocess.Popen(
                    argv,
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output and subprocess.STDOUT,
                    start_new_session=True,  # a group to kill, and Ctrl-C comes through us alone
                    preexec_fn=functools.partial(_die_with, os.getpid()),
                )
            self._processes.append(process)
        for number in self._received:
            self._forward(number)
        # Only now, because a child forked while threads run may inherit a lock that nobody releases.
        for rank, process in enumerate(self._processes):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._exits.put((rank, process.wait()))

    def wait(self) -> int:
        """Until all ranks have left; the first failure starts the clock for the others."""
        if not self._processes:
            return _exit_code(-self._received[0])
        codes: dict[int, int] = {}
        failed: int | None = None
        deadline: float | None = None
        while len(codes) < len(self._processes):
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                rank, code = self._exits.get(timeout=left)
            except queue.Empty:
                self._kill()
                deadline = None
                continue
            codes[rank] = code
            if code != 0 and failed is None:
                failed, deadline = rank, time.monotonic() + GRACE
        if failed is None:
            return 0
        # A rank that ends a stalled job may be slow to go, and those that it was talking to fail meanwhile.
        failed = next((rank for rank, code in codes.items() if code == STALLED), failed)
        self._explain(failed, codes)
        return _exit_code(codes[failed])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            self._kill()
        elif number not in self._received:
            self._received.append(number)
            self._forward(number)

    def _forward(self, number: int) -> None:
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _kill(self) -> None:
        """Kill every rank and whatever it started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank_{rank:05d}.log"

    def _explain(self, rank: int, codes: Mapping[int, int]) -> None:
        code = codes[rank]
        if codes[0] == code and code in _EXPLAINED:
            return  # rank 0 has printed the line
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"megafab: rank {rank} {how}; the job ends with exit code {_exit_code(code)}.", file=sys.stderr)
        if rank != 0:
            lines = self._log(rank).read_text(errors="replace").splitlines()[-_TAIL:]
            print(f"The last lines of {self._log(rank)}:", *lines, sep="\n  ", file=sys.stderr)
        sys.stderr.flush()


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
