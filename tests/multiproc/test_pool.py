"""The ranks that every multi-process test runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankDied, RankTimeout

from megafab.errors import UserError


def total(rank, world, base):
    value = torch.tensor(float(base + rank))
    dist.all_reduce(value)
    return rank, value.item()


def test_results_come_back_in_rank_order_from_a_working_group(ranks):
    # 10+0 .. 10+3 sum to 46
    assert ranks.run(total, 10, world=4) == [(0, 46.0), (1, 46.0), (2, 46.0), (3, 46.0)]
    assert ranks.run(total, 1, world=1) == [(0, 1.0)]


def leave_traces(rank, world):
    os.environ["LEAK"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    return os.getpid()


def see_traces(rank, world):
    return os.environ.get("LEAK"), torch.get_default_dtype(), torch.initial_seed()


def test_nothing_leaks_from_one_job_to_the_next(ranks):
    before = ranks.run(see_traces, world=2)
    ranks.run(leave_traces, world=2)
    assert ranks.run(see_traces, world=2) == before
    assert before[0][:2] == (None, torch.float32)


def surroundings(rank, world):
    return [os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FROM_TEST")], os.getcwd()


def test_ranks_see_the_environment_and_directory_of_the_test(ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("FROM_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    assert ranks.run(surroundings, world=2) == [
        (["0", "0", "2", "yes"], str(tmp_path)),
        (["1", "1", "2", "yes"], str(tmp_path)),
    ]


def own_group(rank, world):
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value.item()


def test_without_init_a_rank_can_join_by_the_environment(ranks):
    assert ranks.run(own_group, world=3, init=False) == [3.0, 3.0, 3.0]


def one_raises(rank, world):
    print(f"rank {rank} was here")
    if rank == 1:
        raise UserError("a.key=3", "3", "2", "set it to 2")
    dist.barrier()


def test_the_first_exception_is_raised_as_itself_with_traceback_and_output(ranks):
    with pytest.raises(UserError, match="a.key=3: found 3") as caught:
        ranks.run(one_raises, world=3)
    note = "\n".join(caught.value.__notes__)
    assert "on rank 1 of 3" in note
    assert "in one_raises" in note
    assert "rank 1 was here" in note
    assert ranks.run(total, 0, world=2) == [(0, 1.0), (1, 1.0)]


class Stubborn(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")  # pickles, but does not unpickle


def raises_stubborn(rank, world):
    raise Stubborn("no", "way")


def test_an_exception_that_does_not_pickle_keeps_its_text(ranks):
    with pytest.raises(RuntimeError, match="Stubborn: no way"):
        ranks.run(raises_stubborn)


def one_dies(rank, world):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_named_and_the_others_do_not_hang(ranks):
    with pytest.raises(RankDied, match="rank 2 ended with status -9"):
        ranks.run(one_dies, world=4)
    assert ranks.run(total, 0, world=4)[0] == (0, 6.0)


def one_hangs(rank, world, pids):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(f"{pids}/{rank}", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    if rank == 0:
        time.sleep(600)


def test_a_hung_rank_is_killed_with_its_children_and_its_stack_shown(ranks, tmp_path):
    with pytest.raises(RankTimeout, match=r"still running: rank 0(.|\n)*in one_hangs"):
        ranks.run(one_hangs, str(tmp_path), world=2, init=False, timeout=2.0)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    deadline = time.monotonic() + 10  # signals arrive when the kernel gets to it
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [_alive(pid) for pid in pids] == [False] * 4


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_template_has_one_thread_so_that_forking_it_is_safe(ranks):
    ranks.run(total, 0, world=1)
    assert ranks.threads() == 1
