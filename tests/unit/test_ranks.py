"""Local ranks as real processes: environment, logs, signals, deaths, orphans; torchrun's and srun's marks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import ranks
from launch.ranks import LAUNCHED, RankEnvironment, first_host, is_joining, rank_environment, start

pytestmark = pytest.mark.multiproc

# A parent that only calls `start`, as `megafab train` does. Arguments: run_dir, ranks, child program.
PARENT = """
import sys
from pathlib import Path
from launch import ranks
ranks.GRACE = 0.3
sys.exit(ranks.start(int(sys.argv[2]), [sys.executable, "-c", sys.argv[3]], run_dir=Path(sys.argv[1])))
"""
ROOT = Path(__file__).parents[2]


def parent(run_dir: Path, world: int, child: str, **options) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(run_dir), str(world), child]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def pids(run_dir: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(run_dir.glob("pid*")) if path.read_text()]


# Writes its pid, so that tests can see whether it lives.
NOTE_PID = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
out = Path(os.environ["OUT"])
(out / f"pid{rank}").write_text(str(os.getpid()))
"""


@pytest.fixture(autouse=True)
def _out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OUT", str(tmp_path))


def test_each_rank_gets_its_environment(tmp_path: Path):
    child = """
import json, os
from pathlib import Path
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS MEGAFAB_LAUNCHED".split()
Path(os.environ["OUT"], os.environ["RANK"]).write_text(json.dumps({name: os.environ[name] for name in names}))
"""
    assert start(3, [sys.executable, "-c", child], run_dir=tmp_path, threads=5) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in seen] == [
        *(("0", "0", "3"), ("1", "1", "3"), ("2", "2", "3")),
    ]
    assert {one["MASTER_ADDR"] for one in seen} == {"127.0.0.1"}
    assert len({one["MASTER_PORT"] for one in seen}) == 1
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"5"}
    assert LAUNCHED not in os.environ


def test_threads_are_the_cores_shared_out(tmp_path: Path):
    child = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert start(2, [sys.executable, "-c", child], run_dir=tmp_path) == 0
    cores = len(os.sched_getaffinity(0))
    assert (tmp_path / "logs/rank_00001.log").read_text() == f"{max(1, cores // 2)}\n"


def test_rank_zero_speaks_and_the_others_write_logs(tmp_path: Path):
    child = (
        "import os, sys; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr)"
    )
    process = parent(tmp_path, 2, child)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "out 0\n", "err 0\n")
    assert sorted((tmp_path / "logs/rank_00001.log").read_text().splitlines()) == ["err 1", "out 1"]
    assert not (tmp_path / "logs/rank_00000.log").exists()


def test_the_rank_that_dies_first_is_named_with_its_last_words(tmp_path: Path):
    child = NOTE_PID + "if rank == '1':\n    print('the reason')\n    sys.exit(3)\ntime.sleep(600)"
    process = parent(tmp_path, 3, child)
    _, err = process.communicate(timeout=60)
    log = tmp_path / "logs/rank_00001.log"
    assert process.returncode == 3
    assert err == (
        "megafab: rank 1 ended with exit code 3; the job ends with exit code 3.\n"
        f"The last lines of {log}:\n  the reason\n"
    )
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_death_by_signal_is_reported_as_such(tmp_path: Path):
    child = NOTE_PID + "if rank == '0':\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    process = parent(tmp_path, 2, child)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "megafab: rank 0 was killed by SIGKILL; the job ends with exit code 137.\n"


def test_a_users_error_is_not_commented_on(tmp_path: Path):
    process = parent(tmp_path, 2, "import sys; print('key: fix it', file=sys.stderr); sys.exit(2)")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "key: fix it\n")


def test_ranks_that_leave_within_the_grace_are_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "GRACE", 30.0)
    child = NOTE_PID + (
        "if rank == '0':\n    sys.exit(7)\n"
        "time.sleep(0.5)  # noticing that rank 0 is gone\n"
        "(out / 'left').write_text('by itself')"
    )
    assert start(2, [sys.executable, "-c", child], run_dir=tmp_path) == 7
    assert (tmp_path / "left").read_text() == "by itself"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_they_may_finish(tmp_path: Path, number: signal.Signals):
    child = f"""
import signal
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
{NOTE_PID}
while not got:
    time.sleep(0.01)
time.sleep(0.2)  # saving; a second copy of the signal would arrive now
(out / f"saved{{rank}}").write_text(str(len(got)))
"""
    process = parent(tmp_path, 2, child, start_new_session=True)
    wait_for(lambda: len(pids(tmp_path)) == 2, "two ranks")
    process.send_signal(number)
    process.send_signal(number) if number != signal.SIGINT else None
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_second_interrupt_kills_ranks_that_do_not_leave(tmp_path: Path):
    child = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + NOTE_PID + "time.sleep(600)"
    process = parent(tmp_path, 2, child, start_new_session=True)
    wait_for(lambda: len(pids(tmp_path)) == 2, "two ranks")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_what_a_rank_started_dies_with_the_job(tmp_path: Path):
    grandchild = "import time; time.sleep(600)"
    child = NOTE_PID + (
        "import subprocess\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
        "(out / f'pid_worker{rank}').write_text(str(worker.pid))\n"
        "if rank == '1':\n"
        "    while not (out / 'pid_worker0').exists():\n        time.sleep(0.01)\n"
        "    os._exit(9)\n"
        "time.sleep(600)"
    )
    process = parent(tmp_path, 2, child)
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert len(pids(tmp_path)) == 4
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), "the workers to die")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path):
    process = parent(tmp_path, 2, NOTE_PID + "time.sleep(600)")
    wait_for(lambda: len(pids(tmp_path)) == 2, "two ranks")
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), "the ranks to die")


def test_ranks_meet_at_the_reserved_port(tmp_path: Path):
    child = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([10 ** dist.get_rank()])
dist.all_reduce(value)
assert int(value) == 11, value
dist.barrier()
dist.destroy_process_group()
"""
    process = parent(tmp_path, 2, child)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_two_jobs_get_different_ports():
    with ranks._reserved_port() as one, ranks._reserved_port() as other:
        assert one != other


def test_the_port_is_kept_from_others_while_the_job_runs():
    with ranks._reserved_port() as port:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen()  # what rank 0's store does
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


def test_handlers_are_given_back(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    start(1, [sys.executable, "-c", ""], run_dir=tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_process_that_nobody_started_is_alone():
    env: dict[str, str] = {}
    assert rank_environment(env) == RankEnvironment(rank=0, local_rank=0, world=1)
    assert env == {}
    assert not is_joining(env)


def test_torchrun_is_taken_at_its_word():
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    before = dict(env)
    assert rank_environment(env) == (5, 1, 8)
    assert env == before
    assert is_joining(env)


SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}


def test_srun_is_made_to_look_like_torchrun():
    env = dict(SRUN)
    assert rank_environment(env) == (3, 1, 4)
    assert {key: env[key] for key in env.keys() - SRUN.keys()} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(10000 + 71 * 7 + 2),
    }
    assert is_joining(SRUN)


def test_a_batch_script_outside_srun_is_alone():
    batch = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0"}
    assert not is_joining(batch)
    assert rank_environment(batch) == (0, 0, 1)


def test_an_interactive_step_of_one_task_is_alone():
    assert not is_joining(SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n7", "n7"),
        ("n1,n2", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("n[5,7-9]", "n5"),
        ("rack[2-3]node[08-09],x", "rack2node08"),
        ("a-b.c[1-2].d", "a-b.c1.d"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str):
    assert first_host(nodes) == host
