"""Interrupted runs go on as if nothing had happened: signals, deaths, damage, other topologies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch.train import alone
from megafab.data.format import Corpus
from megafab.errors import UserError

ROOT = Path(__file__).parents[2]
STEPS = 40
RUN = (
    *SMALL_MODEL,
    *SHORT_RUN,
    "model.layers=2",
    "model.seq_len=32",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "checkpoint.every=10",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="module")
def arguments(corpus) -> Callable[..., list[str]]:
    def arguments(run_dir: Path, *overrides: str) -> list[str]:
        return [*RUN, f"data.path={corpus}", f"run.dir={run_dir}", *overrides]

    return arguments


@pytest.fixture(scope="module")
def unbroken(ranks, arguments, tmp_path_factory) -> Path:
    """The run directory of two data parallel ranks that nobody disturbed."""
    directory = tmp_path_factory.mktemp("unbroken")
    ranks.run(train, arguments(directory), world=2, init=False)
    return directory


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """What training computed at each step, bit for bit; not how long it took."""
    keys = ("step", "samples", "tokens", "loss", "grad_norm", "lr", "skipped", "domain_loss", "valid_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


# -- real processes ------------------------------------------------------------------------------------------

# Steps of a tenth of a second or so: ranks agree on a signal about once a second, and the run must not
# be over by then.
PATIENT = "train.global_batch=24"


@pytest.fixture(scope="module")
def patient(ranks, arguments, tmp_path_factory) -> Path:
    """The run directory that the interrupted runs are compared with."""
    directory = tmp_path_factory.mktemp("patient")
    ranks.run(train, arguments(directory, PATIENT), world=2, init=False)
    return directory


class Job:
    """`megafab train` on two ranks of its own."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "launch.cli", "train", *arguments, "launch.ranks=2"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for child in map(int, children.split()):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found.update({int(e[5:]): child for e in environment if e.startswith(b"RANK=")})
        return found

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        file = run_dir / "metrics.jsonl"
        wait_for(lambda: file.exists() and len(file.read_bytes().splitlines()) >= step, f"step {step}", self)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture
def start():
    """Start jobs; none of them is left behind."""
    jobs = []

    def start(arguments: list[str]) -> Job:
        jobs.append(Job(arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.communicate()


def wait_for(condition: Callable[[], bool], what: str, job: Job | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if job is not None and job.process.poll() is not None:
            raise AssertionError(f"the job ended before {what}: {job.end()}")
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sigterm_saves_leaves_and_the_same_command_goes_on(ranks, start, arguments, patient, tmp_path):
    job = start(arguments(tmp_path, PATIENT))
    job.wait_for_step(tmp_path, 3)
    members = job.ranks()
    assert sorted(members) == [0, 1]
    job.process.send_signal(signal.SIGTERM)
    code, out, err = job.end()
    assert code == 0, err
    (stopped,) = map(int, re.findall(r"SIGTERM: saved after step (\d+); run the same command to go on", out))
    assert 3 <= stopped < STEPS
    assert stopped in checkpoints(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, stopped + 1))
    assert not any(map(alive, members.values()))

    ranks.run(train, arguments(tmp_path, PATIENT, "launch.ranks=2"), world=2, init=False)
    assert numbers(tmp_path) == numbers(patient)
    assert [row["session"] for row in rows(tmp_path)] == [1] * stopped + [2] * (STEPS - stopped)


def test_a_run_directory_takes_one_run_at_a_time(ranks, arguments, tmp_path):
    short = arguments(tmp_path, "train.steps=2")
    with alone(tmp_path), pytest.raises(UserError, match=rf"^run\.dir={tmp_path}: found another run at work"):
        ranks.run(train, short, world=1, init=False)
    assert not (tmp_path / "metrics.jsonl").exists()
    ranks.run(train, short, world=1, init=False)
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(start, arguments, patient, tmp_path):
    job = start(arguments(tmp_path, PATIENT))
    job.wait_for_step(tmp_path, 13)
    members = job.ranks()
    os.kill(members[1], signal.SIGKILL)
    code, _, err = job.end()
    assert code == 128 + signal.SIGKILL
    assert "megafab: rank 1 was killed by SIGKILL; the job ends with exit code 137." in err
    assert not alive(members[0])
    last = checkpoints(tmp_path)[-1]
    assert 10 <= last < STEPS

    code, out, err = start(arguments(tmp_path, PATIENT)).end()
    assert code == 0, err
    assert f"resuming from {tmp_path}/checkpoints/step_{last:08d}" in out
    assert numbers(tmp_path) == numbers(patient)


def test_no_rank_outlives_a_killed_launcher(start, arguments, tmp_path):
    job = start(arguments(tmp_path, PATIENT))
    job.wait_for_step(tmp_path, 1)
    members = job.ranks()
    assert len(members) == 2
    job.process.kill()
    wait_for(lambda: not any(map(alive, members.values())), "the ranks' end")


def test_ctrl_c_saves_and_says_so_with_130(start, arguments, tmp_path):
    job = start(arguments(tmp_path, PATIENT))
    job.wait_for_step(tmp_path, 2)
    job.process.send_signal(signal.SIGINT)
    code, out, err = job.end()
    assert (code, err) == (130, "")
    (stopped,) = map(int, re.findall(r"SIGINT: saved after step (\d+)", out))
    assert checkpoints(tmp_path)[-1] == stopped == len(rows(tmp_path))


# -- what a run starts from ----------------------------------------------------------------------------------


@pytest.fixture
def finished(unbroken, tmp_path) -> Path:
    """A copy of the unbroken run, to be damaged."""
    subprocess.run(["cp", "-r", f"{unbroken}/.", tmp_path], check=True)
    return tmp_path


def told(run_dir: Path, unbroken: Path) -> str:
    """What the second session in a copy of the unbroken run has told its user."""
    return (run_dir / "log.txt").read_text().removeprefix((unbroken / "log.txt").read_text())


def test_a_finished_run_has_nothing_left_to_do(ranks, arguments, finished, unbroken):
    ranks.run(train, arguments(finished), world=2, init=False)
    assert f"nothing left to do: step {STEPS} reaches train.steps" in told(finished, unbroken)
    assert numbers(finished) == numbers(unbroken)


def test_a_truncated_checkpoint_is_passed_over(ranks, arguments, finished, unbroken):
    for name, file in (
        (f"step_{STEPS:08d}", "tensors/__1_0.distcp"),
        (f"step_{STEPS - 10:08d}", "state.json"),
    ):
        path = finished / "checkpoints" / name / file
        os.truncate(path, path.stat().st_size // 2)
    ranks.run(train, arguments(finished), world=2, init=False)
    text = told(finished, unbroken)
    assert re.search(rf"passing over a damaged checkpoint: .*step_{STEPS:08d}: tensors/__1_0.distcp", text)
    assert re.search(rf"passing over a damaged checkpoint: .*step_{STEPS - 10:08d}: state.json", text)
    assert f"resuming from {finished}/checkpoints/step_{STEPS - 20:08d}" in text
    assert numbers(finished) == numbers(unbroken)
    assert checkpoints(finished)[-1] == STEPS


def test_resume_none_is_refused_where_there_is_a_run(ranks, arguments, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=rf"run\.dir={finished}: found a run there already, step_{STEPS:08d} its"
    ):
        ranks.run(train, arguments(finished, "checkpoint.resume=none"), world=2, init=False)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_data_are_refused_with_what_differs(ranks, arguments, corpus, finished, tmp_path_factory):
    from launch import data

    other = tmp_path_factory.mktemp("other") / "corpus"
    data.main([f"out={other}", "stdlib_bytes=150000", "tokenizer.vocab=512", "workers=1"])
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        ranks.run(train, arguments(finished, f"data.path={other}"), world=2, init=False)
    there, here = (Corpus.open(path) for path in (corpus, other))
    text = str(caught.value)
    for name, then, now in zip(there.domains, there.tokens("train"), here.tokens("train"), strict=True):
        assert f"domain {name} had {then:,} tokens and has {now:,}" in text
    digests = [one.tokenizer_fingerprint[:12] for one in (there, here)]
    assert "tokenizer {} (512 ids) is now {} (512 ids)".format(*digests) in text
    assert text.endswith("accept it: checkpoint.allow_data_change=true")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_mixture_is_taken_when_allowed(ranks, arguments, corpus, finished, unbroken):
    name, *others = Corpus.open(corpus).domains
    more = [f"data.mixture={{{name}: 1.0}}", f"train.steps={STEPS + 5}"]
    with pytest.raises(
        UserError, match=rf"the weight of {name} was .* and is 1; the weight of {others[0]} was"
    ):
        ranks.run(train, arguments(finished, *more), world=2, init=False)
    ranks.run(train, arguments(finished, *more, "checkpoint.allow_data_change=true"), world=2, init=False)
    assert f"the data changed: the weight of {name} was" in told(finished, unbroken)
    assert numbers(finished)[:STEPS] == numbers(unbroken)
    assert [sorted(row["domain_loss"]) for row in rows(finished)[STEPS:]] == [[name]] * 5


def test_the_declared_schedule_wins_over_the_optimizers_state(ranks, arguments, unbroken, tmp_path):
    """Nothing of the old learning rate is left: at 1e-12, weights no longer move."""
    source = unbroken / "checkpoints" / "step_00000010"
    more = ["optim.lr=1e-12", "schedule=constant", "schedule.warmup=0", f"checkpoint.resume={source}"]
    ranks.run(train, arguments(tmp_path, *more, "train.steps=20"), world=2, init=False)
    assert [row["lr"] for row in rows(tmp_path)] == [1e-12] * 10
    assert "optim.lr from 0.001 to 1e-12, schedule.kind from cosine to constant" in told(tmp_path, unbroken)
    (before,) = ranks.run(tensors, str(source))
    (after,) = ranks.run(tensors, str(tmp_path / "checkpoints" / "step_00000020"))
    for name in (name for name in before if name.startswith("weight/")):
        assert (before[name] - after[name]).abs().max() < 1e-9, name
    assert any(not before[name].equal(after[name]) for name in before if name.startswith("adam_m/"))


def test_the_weights_survive_a_change_of_topology_bit_for_bit(ranks, arguments, unbroken, tmp_path):
    """Read at tensor 2 x pipeline 2 and saved again, a checkpoint has the same bytes in every tensor."""
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    directory = tmp_path / "reshaped"
    source = unbroken / "checkpoints" / f"step_{STEPS:08d}"
    ranks.run(resave, arguments(directory, *layout, f"checkpoint.resume={source}"), world=4, init=False)
    (first,) = ranks.run(tensors, str(source))
    (second,) = ranks.run(tensors, str(directory / "checkpoints" / source.name))
    assert first.keys() == second.keys()
    assert {name for name in first if not first[name].equal(second[name])} == set()
    assert {name.split("/")[0] for name in first} == {"weight", "adam_m", "adam_v"}


def resave(rank, world, overrides):
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform

    platform.start(0)
    run = build(load.load(overrides), ranks=world)
    run.checkpoints.save(run.checkpoints.restore(), wait=True)
    run.close()


def tensors(rank, world, path):
    """All tensors of a checkpoint, read with torch's own reader."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    where = Path(path) / "tensors"
    metadata = FileSystemReader(where).read_metadata().state_dict_metadata
    found = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    load(found, checkpoint_id=where)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_resumes_bit_for_bit(ranks, arguments, tmp_path, world):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["model.dropout=0.2", "train.steps=20"]
    ranks.run(train, arguments(whole, *common), world=world, init=False)
    source = whole / "checkpoints" / "step_00000010"
    ranks.run(train, arguments(parts, *common, f"checkpoint.resume={source}"), world=world, init=False)
    assert numbers(parts) == numbers(whole)[10:]


# -- bad gradients -------------------------------------------------------------------------------------------


def test_a_run_that_only_discards_updates_ends(ranks, arguments, tmp_path):
    more = ["optim.lr=1e30", "optim.clip=0", "schedule=constant", "schedule.warmup=0", "train.max_skipped=4"]
    with pytest.raises(UserError) as caught:
        ranks.run(train, arguments(tmp_path, *more, "eval.samples=0"), world=2, init=False)
    found = rows(tmp_path)
    bad = next(i for i, row in enumerate(found) if row["skipped"])
    assert bad >= 1, "the first step is sound"
    assert len(found) == bad + 4
    assert [row["skipped"] for row in found[bad:]] == [1, 2, 3, 4]
    assert re.fullmatch(
        rf"train.max_skipped=4: found the last 4 updates discarded, up to step {bad + 4} \(the gradient norm "
        r"is (nan|inf)\), expected finite gradients. Fix: lower optim.lr or lengthen schedule.warmup, and "
        "resume from an earlier checkpoint",
        str(caught.value),
    )
    log = (tmp_path / "log.txt").read_text()
    for step in range(bad + 1, bad + 5):
        assert f"step {step}: update discarded, the gradient norm is" in log


def hears_while_evaluating(rank: int, world: int, overrides: list[str], deaf: int) -> int:
    """As a rank whose scheduler ends the job in its first evaluation; only rank 1 hears of it."""
    from megafab.engine.megatron import MegatronEngine

    evaluate, calls = MegatronEngine.evaluate, []

    def evaluate_and_hear(self, *arguments):
        calls.append(None)
        if len(calls) == deaf and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    MegatronEngine.evaluate = evaluate_and_hear
    return train(rank, world, overrides)


def test_an_evaluation_gives_way_and_is_made_up_for(ranks, arguments, tmp_path):
    """By a technique too that is told the losses of an evaluation and acts on them."""
    common = ["eval.every=10", "eval.samples=24", "train.log_every=4", "technique=[dynamic_loading]"]
    common += ["techniques.dynamic_loading.reference={code: 1.0, tests: 2.0, prose: 1.5}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks.run(train, arguments(whole, *common), world=2, init=False)
    ranks.run(hears_while_evaluating, arguments(broken, *common), 2, world=2, init=False)
    last = rows(broken)[-1]
    assert (last["step"], "valid_loss" in last) == (10, False)
    assert "SIGTERM: saved after step 10" in (broken / "log.txt").read_text()
    # The second time it comes in what is made up for.
    ranks.run(hears_while_evaluating, arguments(broken, *common), 2, world=2, init=False)
    assert [row["step"] for row in rows(broken)][-1] == 10
    assert not (broken / "finished.json").exists()
    ranks.run(train, arguments(broken, *common), world=2, init=False)
    assert numbers(broken) == numbers(whole)
    assert (broken / "finished.json").exists()
