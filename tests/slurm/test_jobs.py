"""Training on a real Slurm: whatever happens to a job, the run ends with the losses of one left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import RUN, Submitted, kill, megafab

from megafab.checkpoint import store
from megafab.telemetry.sessions import goodput, read_events

pytestmark = [pytest.mark.slurm, pytest.mark.multiproc, pytest.mark.timeout(600)]
TWO_BY_TWO = (*RUN, "launch.ranks=4", "launch.nodes=2", "parallel.tensor=2")
TWO_BY_ONE = (*RUN, "launch.ranks=2", "launch.nodes=2", "parallel.tensor=2")
FAULTY = ("train.steps=60", "eval.every=10", "checkpoint.every=5", "checkpoint.keep=99")


@pytest.fixture(scope="module")
def data(corpus: Path) -> str:
    return f"data.path={corpus}"


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, data: str, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """The run that others are compared with."""
    run = Submitted(slurm, tmp_path_factory.mktemp("undisturbed") / "run", *TWO_BY_ONE, data, *FAULTY)
    run.finish()
    return run


def test_two_nodes_of_two_ranks_train_to_the_end(slurm: Cluster, data: str, tmp_path: Path):
    done = megafab(
        slurm, "submit", "cluster=test", *TWO_BY_TWO, data, f"run.dir={tmp_path / 'run'}", "--follow"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "topology  4 ranks on cpu: tensor 2 x data 2" in done.stdout
    assert "goodput " in done.stdout.splitlines()[-1]
    assert "job 1 completed" in done.stderr or "completed, exit code 0" in done.stderr
    run_dir = tmp_path / "run"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["valid_loss"] < rows[0]["loss"]
    for name in ("report.html", "log.txt", "config.yaml", "finished.json", "wandb_id", "slurm/job.sh"):
        assert (run_dir / name).exists(), name
    assert "2 session" not in (run_dir / "report.html").read_text()


def test_a_run_survives_all_that_happens_to_it(
    slurm: Cluster, data: str, undisturbed: Submitted, tmp_path: Path
):
    run = Submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *FAULTY)
    run.reach(7)
    slurm.run("scancel", "--signal=USR1", run.job)  # to the ranks, as a user may
    run.go_on(1)
    run.reach(14)
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)  # to the script, as Slurm warns of its limit
    run.go_on(2)
    run.reach(22)
    slurm.run("scontrol", "requeue", run.job)
    run.go_on(3)
    run.reach(32)
    kill(run.run_dir, 1, signal.SIGKILL)
    run.go_on(4)
    run.reach(42)
    node = slurm.job(run.job)["NodeList"]
    last = slurm.run("scontrol", "show", "hostnames", node).split()[-1]
    slurm.crash(last)  # with all that runs there
    run.go_on(5)
    slurm.boot(last)
    job = run.finish()
    assert job["Restarts"] == "5"
    assert run.losses() == undisturbed.losses()
    assert len(run.wandb_ids()) == 1
    assert run.wandb_ids() == {(run.run_dir / "wandb_id").read_text().strip()}
    last_state = [store.read_state(one.run_dir / "checkpoints" / "step_00000060") for one in (run, undisturbed)]
    assert last_state[0]["loader"] == last_state[1]["loader"]
    spent = goodput(run.run_dir)
    assert spent is not None
    assert spent.sessions == 6
    assert 0 < spent.useful < spent.allocated
    assert spent.lost["repeated steps"] > 0
    assert sum(spent.lost.values()) + spent.useful == pytest.approx(spent.allocated, rel=1e-6)
    assert "goodput" in (run.run_dir / "report.html").read_text()
    causes = [event["cause"] for event in read_events(run.run_dir) if event["event"] == "released"]
    assert causes[-1] == "finished"
    assert causes.count("left") >= 2
    assert "failed" in causes


def test_a_crash_loop_comes_to_an_end_that_says_why(slurm: Cluster, data: str, tmp_path: Path):
    run = Submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, "cluster.python=/bin/false")
    for restart in (1, 2):
        run.go_on(restart)
    job = slurm.wait(run.job, "FAILED", "COMPLETED")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0")
    reason = (run.run_dir / "slurm" / "stopped").read_text()
    assert reason.startswith("stopped: 3 sessions in a row without a further checkpoint (none yet)")
    assert "the last one ended with exit code 1" in reason
    assert reason.strip() in run.log


def test_a_mistake_found_in_the_job_ends_it_at_once(slurm: Cluster, data: str, tmp_path: Path):
    crooked = "cluster.setup=['rm -rf $run/gone']"
    moved = tmp_path / "corpus"
    moved.symlink_to(data.partition("=")[2])
    run = Submitted(slurm, tmp_path / "run", *TWO_BY_ONE, f"data.path={moved}", crooked, "job.after=afterok:1")
    assert run.state == "PENDING" or run.state == "RUNNING"


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, data: str, tmp_path: Path):
    run = Submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *FAULTY, "train.steps=2000")
    run.reach(3)
    slurm.run("scancel", run.job)
    job = slurm.wait(run.job, "CANCELLED", "PENDING", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
