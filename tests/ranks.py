"""Ranks for tests: fresh processes forked from one template that has already imported torch and Megatron.

Importing torch and megatron.core takes about five seconds a process, forking a process that has them about
five milliseconds. So one template process imports them once for the whole test session, and every
`Ranks.run` forks its ranks from it. A rank lives for one job: nothing (parallel state, default dtype, random
state, environment, patches) can leak from one test to the next, and a rank that hangs or dies is replaced
for free. The template must stay single-threaded and never touch an accelerator, because a fork copies
neither threads nor device contexts; `tests/multiproc/test_pool.py` holds it to the first.

    def body(rank, world, text):          # module level: it travels by reference
        ...
        return value                      # anything that pickles

    def test_it(ranks):
        assert ranks.run(body, "x", world=4) == [...]
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import multiprocessing.connection
import multiprocessing.reduction
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
)
# What `engine=deepspeed` imports when it is built and in its first step; seconds.
PRELOAD_LATER = (
    "megafab.engine.deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)
GRACE = 5.0  # seconds the other ranks get to report, once one has failed, before they are killed
LOG_TAIL = 4000  # characters of a failed rank's output to show


class RankDied(RuntimeError):
    """A rank's process ended without reporting a result (killed, crashed, `os._exit`)."""


class RankTimeout(RuntimeError):
    """Ranks were still running at the job's time limit; the message has their Python stacks."""


@dataclass
class _Report:
    """What a rank sends back: a pickled value or exception, and when (system clock) it was made."""

    ok: bool
    when: float
    payload: bytes
    text: str = ""  # the rank's traceback


@dataclass
class _Rank:
    rank: int
    pid: int
    connection: Connection
    log: Path
    report: _Report | None = None

    def tail(self) -> str:
        output = self.log.read_text(errors="replace")[-LOG_TAIL:].strip()
        return f"\n--- output of rank {self.rank} ---\n{output}" if output else ""


class Ranks:
    """Runs functions on several ranks. Use through the `ranks` fixture; `close` ends the template."""

    def __init__(self) -> None:
        self._template: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._jobs = 0
        self._directory = tempfile.TemporaryDirectory(prefix="megafab-ranks-")

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world: int = 1,
        init: bool = True,
        timeout: float = 120.0,
    ) -> list[Any]:
        """`fn(rank, world, *args)` on `world` ranks; the results in rank order.

        The ranks see this process's environment, working directory and import path, plus RANK, WORLD_SIZE,
        LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. With `init` a gloo process group is up
        before `fn` and taken down after it; without, `fn` makes its own (as `megafab train` does).

        Raises: the earliest exception of any rank, with its traceback as a note; `RankDied`; `RankTimeout`.
        """
        self._jobs += 1
        directory = Path(self._directory.name) / f"job_{self._jobs:04d}"
        directory.mkdir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        job = {
            "path": sys.path,
            "cwd": os.getcwd(),
            "env": environment,
            "world": world,
            "store": str(directory / "store") if init else None,
            "timeout": timeout,
            "call": pickle.dumps((fn, args)),
        }
        members: list[_Rank] = []
        try:
            for rank in range(world):
                members.append(self._fork(rank, fn.__module__, directory / f"rank{rank}.log"))
            for member in members:
                member.connection.send({**job, "rank": member.rank})
            late = self._collect(members, timeout)
        finally:
            statuses = self._end(members)
        self._raise_failure(members, late, statuses, timeout)
        return [pickle.loads(m.report.payload) for m in members if m.report is not None]

    def close(self) -> None:
        """End the template (its ranks have ended already) and remove the logs."""
        if self._template is not None and self._channel is not None:
            self._channel.close()
            self._template.wait(timeout=10)
        self._template = self._channel = None
        self._directory.cleanup()

    def threads(self) -> int:
        """How many threads the template has; more than one makes its forks unsafe."""
        template, _ = self._started()
        return len(os.listdir(f"/proc/{template.pid}/task"))

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._template is None or self._channel is None:
            ours, theirs = socket.socketpair()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether CUDA exists must not initialise it
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            }
            self._template = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
            theirs.close()
            self._channel = Connection(ours.detach())
        return self._template, self._channel

    def _fork(self, rank: int, module: str, log: Path) -> _Rank:
        template, channel = self._started()
        ours, theirs = socket.socketpair()
        try:
            channel.send(("fork", sys.path, module, sys.modules[module].__file__, str(log)))
            multiprocessing.reduction.send_handle(channel, theirs.fileno(), template.pid)
            answer = channel.recv()
        except (EOFError, OSError) as error:
            raise RankDied(f"the template of the ranks ended with status {template.poll()}") from error
        finally:
            theirs.close()
        if isinstance(answer, str):
            raise RuntimeError(f"the ranks cannot import {module}:\n{answer}")
        return _Rank(rank, answer, Connection(ours.detach()), log)

    def _collect(self, members: list[_Rank], timeout: float) -> list[_Rank]:
        """Wait for reports; the ranks that were still running when the time was up, if any."""
        deadline = time.monotonic() + timeout
        failed = False
        waiting = {m.connection: m for m in members}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                member = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    member.report = member.connection.recv()
                except (EOFError, ConnectionResetError):
                    member.report = None
                if not failed and (member.report is None or not member.report.ok):
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE)
        late = list(waiting.values())
        for member in late:
            os.kill(member.pid, signal.SIGUSR2)  # faulthandler writes the stacks to the rank's log
        if late:
            time.sleep(0.3)
        return late

    def _end(self, members: list[_Rank]) -> dict[int, int]:
        """Kill what is left of the ranks and their children; exit status by rank (minus a signal)."""
        statuses = {}
        for member in members:
            if member.report is None:
                _kill_group(member.pid)
            member.connection.close()
        for member in members:
            _, channel = self._started()
            channel.send(("wait", member.pid))
            statuses[member.rank] = channel.recv()
            _kill_group(member.pid)  # children the rank left behind
        return statuses

    def _raise_failure(
        self, members: list[_Rank], late: list[_Rank], statuses: dict[int, int], timeout: float
    ) -> None:
        dead = [m for m in members if m.report is None and m not in late]
        if dead:
            what = ", ".join(f"rank {m.rank} ended with status {statuses[m.rank]}" for m in dead)
            raise RankDied(what + "".join(m.tail() for m in dead))
        raised = [m for m in members if m.report is not None and not m.report.ok]
        if raised:
            first = min(raised, key=lambda m: m.report.when if m.report else 0.0)
            assert first.report is not None
            error = pickle.loads(first.report.payload)
            error.add_note(f"on rank {first.rank} of {len(members)}:\n{first.report.text}{first.tail()}")
            raise error
        if late:
            who = ", ".join(str(m.rank) for m in late)
            what = f"after {timeout} s still running: rank {who}"
            raise RankTimeout(what + "".join(m.tail() for m in late))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _kill_group(pid: int) -> None:
    """Kill the process group that a rank leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# What follows runs in the template and in the ranks.


def _serve(channel: Connection) -> None:
    """The template: import once, then fork a rank or reap one at the parent's word, until it hangs up."""
    _die_with_parent()
    for name in PRELOAD:
        importlib.import_module(name)
    importlib.import_module("megafab.platform").platform.install()  # before anything imports Megatron-core
    importlib.import_module("megafab.build")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in PRELOAD_LATER:
        importlib.import_module(name)
    while True:
        try:
            request = channel.recv()
        except EOFError:
            os._exit(0)  # tearing down that many modules takes seconds
        if request[0] == "wait":
            channel.send(os.waitstatus_to_exitcode(os.waitpid(request[1], 0)[1]))
            continue
        _, path, module, file, log = request
        handle = multiprocessing.reduction.recv_handle(channel)
        _adopt(path)
        try:
            _import(module, file)  # here, so that the module and what it needs are warm next time
        except BaseException:
            os.close(handle)
            channel.send(traceback.format_exc())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            _rank(Connection(handle), log)
        os.close(handle)
        channel.send(pid)


def _adopt(path: list[str]) -> None:
    sys.path += [entry for entry in path if entry not in sys.path]


def _import(name: str, file: str) -> None:
    """Import a test module by the name that pytest gave it, whatever else the path has under that name."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _rank(connection: Connection, log: str) -> None:
    """A rank, right after the fork: do the job, report, leave without an interpreter shutdown."""
    os.setsid()
    _die_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    try:
        report = _do(connection.recv())
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(report)
    finally:
        os._exit(0)


def _do(job: dict[str, Any]) -> _Report:
    try:
        return _Report(True, 0.0, pickle.dumps(_call(job)))
    except BaseException as error:
        when, text = time.monotonic(), traceback.format_exc()
        try:
            payload = pickle.dumps(error)
            pickle.loads(payload)
        except Exception:
            payload = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return _Report(False, when, payload, text)


def _call(job: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    rank, world = job["rank"], job["world"]
    os.environ.clear()
    os.environ.update(job["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(job["cwd"])
    torch.set_num_threads(1)
    fn, args = pickle.loads(job["call"])
    if job["store"] is None:
        return fn(rank, world, *args)
    store = dist.FileStore(job["store"], world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=job["timeout"])
    )
    result = fn(rank, world, *args)
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    # Exceptions and reports pickle by module name: be `ranks`, as the tests import it, not `__main__`.
    sys.path.insert(0, str(Path(__file__).parent))
    importlib.import_module("ranks")._serve(Connection(int(sys.argv[1])))
