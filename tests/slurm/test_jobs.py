"""Training on a real Slurm: whatever happens to a job, the run ends with the losses of one left alone."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import RUN, TRACKED, Submitted, kill, megafab, submitted
from training import SHORT_RUN, SMALL_MODEL, rows

from megafab.checkpoint import store
from megafab.data.format import Corpus
from megafab.telemetry.sessions import goodput, read_events

pytestmark = [pytest.mark.slurm, pytest.mark.multiproc, pytest.mark.timeout(600)]
TWO_BY_TWO = (*RUN, "launch.ranks=4", "launch.nodes=2", "parallel.tensor=2")
TWO_BY_ONE = (*RUN, "launch.ranks=2", "launch.nodes=2", "parallel.tensor=2")
FAULTY = ("train.steps=30", "eval.every=10", "checkpoint.every=3", "checkpoint.keep=99")


@pytest.fixture(scope="module")
def data(corpus: Path) -> str:
    return f"data.path={corpus}"


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, data: str, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """The run that others are compared with."""
    run = submitted(slurm, tmp_path_factory.mktemp("undisturbed") / "run", *TWO_BY_ONE, data, *FAULTY)
    run.finish()
    return run


def test_two_nodes_of_two_ranks_train_to_the_end(slurm: Cluster, data: str, tmp_path: Path):
    done = megafab(
        slurm, "submit", "cluster=test", *TWO_BY_TWO, data, f"run.dir={tmp_path / 'run'}", "--follow"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "topology  4 ranks on cpu: tensor 2 x data 2" in done.stdout
    assert "goodput " in done.stdout.splitlines()[-1]
    assert "completed, exit code 0" in done.stderr.splitlines()[-1]
    run_dir = tmp_path / "run"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["valid_loss"] < rows[0]["loss"]
    for name in ("report.html", "log.txt", "config.yaml", "finished.json", "wandb_id", "slurm/job.sh"):
        assert (run_dir / name).exists(), name
    assert "<th>sessions</th><td>1</td>" in (run_dir / "report.html").read_text()


def test_a_run_survives_all_that_happens_to_it(
    slurm: Cluster, data: str, undisturbed: Submitted, tmp_path: Path
):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *FAULTY)
    run.reach(4)
    slurm.run("scancel", "--signal=USR1", run.job)  # to the ranks, as a user may
    run.go_on(1)
    run.reach(8)
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)  # to the script, as Slurm warns of its limit
    run.go_on(2)
    run.reach(12)
    slurm.run("scontrol", "requeue", run.job)
    run.go_on(3)
    run.reach(16)
    kill(run.run_dir, 1, signal.SIGKILL)
    run.go_on(4)
    run.reach(20)
    node = slurm.job(run.job)["NodeList"]
    last = slurm.run("scontrol", "show", "hostnames", node).split()[-1]
    slurm.crash(last)  # with all that runs there
    run.go_on(5)
    slurm.boot(last)
    job = run.finish()
    assert int(job["Restarts"]) >= 5  # Slurm may try the node once more before it knows
    assert run.losses() == undisturbed.losses()
    assert len(run.wandb_ids()) == 1
    assert run.wandb_ids() == {(run.run_dir / "wandb_id").read_text().strip()}
    last_state = [
        store.read_state(one.run_dir / "checkpoints" / "step_00000030") for one in (run, undisturbed)
    ]
    assert last_state[0]["loader"] == last_state[1]["loader"]
    spent = goodput(run.run_dir)
    assert spent is not None
    assert spent.sessions >= 6
    assert 0 < spent.useful < spent.allocated
    assert spent.lost["repeated steps"] > 0
    assert sum(spent.lost.values()) + spent.useful == pytest.approx(spent.allocated, rel=1e-6)
    assert "goodput" in (run.run_dir / "report.html").read_text()
    causes = [event["cause"] for event in read_events(run.run_dir) if event["event"] == "released"]
    assert causes[-1] == "finished"
    assert causes.count("left") >= 2
    assert "failed" in causes


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    slurm: Cluster, data: str, undisturbed: Submitted, tmp_path: Path
):
    """Within the configured time and two beats of it; the job's own log has the stack."""
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *FAULTY, "resilience.stall_seconds=5")
    run.reach(7)
    kill(run.run_dir, 1, signal.SIGSTOP)
    stopped = time.monotonic()
    run.go_on(1)
    assert time.monotonic() - stopped < 5 + 2 * 5 / 6 + 10  # and the seconds of a requeue
    (line,) = (line for line in run.log.splitlines() if "expected progress within resilience" in line)
    assert "rank 1 on n2: found " in line
    assert "megafab/train.py" in (run.run_dir / "stall.txt").read_text()
    assert " a rank hung; back to the queue" in run.log
    run.finish()
    assert run.losses() == undisturbed.losses()
    spent = goodput(run.run_dir)
    assert spent is not None
    assert spent.lost["stalled"] > 5 * 2


def test_stages_are_a_chain_of_jobs_of_their_own_sizes(slurm: Cluster, data: str, tmp_path: Path):
    recipe = ["recipe=stacking", *SMALL_MODEL[1:], *SHORT_RUN[1:-2], *TRACKED, "launch.device=cpu", data]
    small = ["model.layers=2", "stages.small.train.steps=6", "stages.small.launch.ranks=1"]
    large = ["stages.stacked.grow.layers=4", "stages.stacked.train.steps=9", "eval.samples=2"]
    sizes = [
        "stages.stacked.launch.ranks=2",
        "stages.stacked.launch.nodes=2",
        "stages.stacked.parallel.tensor=2",
    ]
    root = tmp_path / "run"
    arguments = ("submit", "cluster=test", *recipe, *small, *large, *sizes, f"run.dir={root}")
    done = megafab(slurm, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = re.findall(r"submitted job (\d+)", done.stdout)
    assert f"submitted job {second}, after job {first}" in done.stdout
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{first}")
    assert slurm.wait(first, "COMPLETED", "FAILED")["NumNodes"] == "1"
    over = slurm.wait(second, "COMPLETED", "FAILED")
    assert (over["JobState"], over["NumNodes"]) == ("COMPLETED", "2"), (root / "stacked/slurm").iterdir()
    ranks = [read_events(root / stage)[1]["ranks"] for stage in ("small", "stacked")]
    assert ranks == [1, 2]
    joined = rows(root)
    assert [row["step"] for row in joined] == list(range(1, 16))
    assert [row["stage"] for row in joined] == ["small"] * 6 + ["stacked"] * 9
    ids = {path.name.rpartition("-")[2] for path in root.glob("*/wandb/offline-run-*")}
    assert ids == {(root / "wandb_id").read_text().strip()}
    assert "all stages" in (root / "report.html").read_text()
    again = megafab(slurm, *arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("megafab submit: found no stage left to train")


def test_torchrun_starts_and_stops_the_ranks_too(slurm: Cluster, data: str, tmp_path: Path):
    overrides = (*TWO_BY_ONE, data, "train.steps=12", "checkpoint.every=100", "job.launcher=torchrun")
    run = submitted(slurm, tmp_path / "run", *overrides)
    run.reach(3)
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)
    run.go_on(1)
    run.finish()
    assert [row["step"] for row in run.rows()] == list(range(1, 13))
    assert {row["session"] for row in run.rows()} == {1, 2}


def test_where_requeues_are_not_allowed_another_job_goes_on(slurm: Cluster, data: str, tmp_path: Path):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, "train.steps=12", "job.continuation=new_job")
    run.reach(3)
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)
    assert slurm.wait(run.job, "COMPLETED", "FAILED")["ExitCode"] == "0:0"
    following = (run.run_dir / "slurm" / "job").read_text().strip()
    assert following != run.job
    slurm.wait(following, "COMPLETED")
    assert [row["step"] for row in run.rows()] == list(range(1, 13))
    assert (run.run_dir / "finished.json").exists()


def test_a_sweep_is_an_array(slurm: Cluster, data: str, tmp_path: Path):
    sweep = ("optim.lr=1e-3,3e-3", "train.steps=3", "launch.ranks=1", "eval.samples=0", "job.parallel=1")
    root = tmp_path / "run"
    done = megafab(slurm, "submit", "--multirun", "cluster=test", *RUN, data, *sweep, f"run.dir={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = re.findall(r"submitted job (\d+)", done.stdout)
    for task in (0, 1):
        slurm.wait(f"{job}_{task}", "COMPLETED")
    first, second = (rows(root / f"optim.lr={lr}") for lr in ("0.001", "0.003"))
    assert first[0]["lr"] == pytest.approx(second[0]["lr"] / 3)
    assert first[0]["loss"] == second[0]["loss"]
    assert first[-1]["loss"] != second[-1]["loss"]
    assert (root / "optim.lr=0.001" / "report.html").exists()


def test_a_task_of_an_array_is_requeued_and_no_other(slurm: Cluster, data: str, tmp_path: Path):
    """Slurm calls one of the tasks by the number of the whole array."""
    told = ("train.steps=12", "launch.ranks=1", "eval.samples=0", "checkpoint.every=99", "tracking=none")
    root = tmp_path / "run"
    arguments = ("--multirun", "cluster=test", *RUN, *told, data, "train.seed=1,2", f"run.dir={root}")
    done = megafab(slurm, "submit", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = re.findall(r"submitted job (\d+)", done.stdout)
    first, second = (Submitted(slurm, root / f"train.seed={seed}", f"{job}_{seed - 1}") for seed in (1, 2))
    first.reach(2)
    second.reach(2)
    slurm.run("scancel", "--batch", "--signal=USR1", second.job)
    second.go_on(1)
    second.reach(4)
    slurm.run("scancel", "--batch", "--signal=USR1", second.job)
    second.go_on(2)
    assert (first.finish()["Restarts"], second.finish()["Restarts"]) == ("0", "2")
    assert [row["step"] for row in second.rows()] == list(range(1, 13))


def test_a_second_job_leaves_a_run_alone(slurm: Cluster, data: str, tmp_path: Path):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, "train.steps=15")
    run.reach(2)
    other = slurm.run("sbatch", "--parsable", str(run.run_dir / "slurm" / "job.sh"))
    assert slurm.wait(other, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    said = (run.run_dir / "slurm" / f"{other}.log").read_text()
    assert f"job {run.job} is at work in {run.run_dir}: nothing to do for job {other}" in said
    run.finish()


def test_what_goes_wrong_before_the_ranks_counts_too(slurm: Cluster, data: str, tmp_path: Path):
    told = ("cluster.setup=['source /nowhere/activate']", "job.max_failures=1")
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *told)
    assert slurm.wait(run.job, "FAILED", "COMPLETED")["ExitCode"] == "3:0"
    assert "; source /nowhere/activate failed. Mend" in (run.run_dir / "slurm" / "stopped").read_text()


def test_a_corpus_is_built_by_an_array(slurm: Cluster, tmp_path: Path):
    texts = [f"document {number} is about {number % 7} things\n" for number in range(500)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = [f"sources={{words: {tmp_path}/text.jsonl}}", "tokenizer.vocab=300", "workers=1"]
    out = tmp_path / "corpus"
    done = megafab(
        slurm, "submit", "data", "cluster=cpu", "cluster.partition=main", "job.parts=2", *told, f"out={out}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    array, last = re.findall(r"submitted job (\d+)", done.stdout)
    assert slurm.job(last)["Dependency"].startswith(f"afterok:{array}")
    over = slurm.wait(last, "COMPLETED", "FAILED", "CANCELLED")
    assert over["JobState"] == "COMPLETED"
    assert Corpus.open(out).manifest["domains"][0]["name"] == "words"
    logs = sorted((tmp_path / "corpus.jobs" / "parts" / "slurm").glob("*_*.log"))
    assert [f"part {part}/2 is finished" in log.read_text() for part, log in enumerate(logs)] == [True, True]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.steps=0"], "[size] train.steps=0: found 0, expected at least 1"),
        (["train.global_batch=3", "parallel.tensor=1"], "train.global_batch=3"),
        (["job.parts=2"], "job.parts=2: found a training run"),
        (["job.max_failures=0"], "job.max_failures=0: found 0, expected at least 1"),
        (["cluster.gpus='--gres=gpu:h100:{ranks}00'"], "--gres=gpu:h100:100), expected a job that"),
        (["cluster.gpus='--gres=gpu:a100:{ranks}'"], "found refused by Slurm: "),
        (["cluster.partition=null"], "cluster.partition: found neither a partition nor a qos"),
        (["cluster.partition=large"], "cluster.partition: found refused by Slurm: invalid partition"),
        (["launch.ranks=10", "launch.nodes=5", "train.global_batch=10"], "found refused by Slurm: "),
        (["launch.ranks=10", "launch.nodes=2"], "launch.ranks=10, launch.nodes=2: found 5 ranks on a node"),
        (["launch.ranks=3", "launch.nodes=2"], "launch.ranks=3, launch.nodes=2: found 3 ranks on 2 nodes"),
        (["job.time=soon"], "job.time=soon: found no time limit"),
        (["cluster.setup=['if true']"], "cluster.setup, cluster.env: found "),
        (["checkpoint.resume=none"], "checkpoint.resume=none: found a run that only begins"),
        (["train.step=3"], "train.step"),
        (["cluster=nowhere"], "cluster=nowhere: found no cluster named nowhere"),
    ],
)
def test_what_could_not_run_is_refused_before_it_is_queued(
    slurm: Cluster, data: str, tmp_path: Path, overrides: list[str], line: str
):
    before = slurm.run("squeue", "-h", "-t", "all", "-o", "%i")
    arguments = ["cluster=test", *TWO_BY_ONE, data, f"run.dir={tmp_path / 'run'}", *overrides]
    done = megafab(slurm, "submit", *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert slurm.run("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_one_job_at_a_time_works_on_a_run(slurm: Cluster, data: str, tmp_path: Path):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, "job.after=afterany:999999", "train.steps=2")
    done = megafab(slurm, "submit", "cluster=test", *TWO_BY_ONE, data, f"run.dir={run.run_dir}")
    slurm.run("scancel", run.job)
    assert done.returncode == 2
    assert f"found job {run.job} (" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_time_limit_is_no_end(slurm: Cluster, data: str, undisturbed: Submitted, tmp_path: Path):
    """With Slurm's own signal, which comes when its controller next looks, every 30 seconds."""
    faulty = [text for text in FAULTY if not text.startswith("checkpoint.every")]
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *faulty, "job.time=1")
    for restart in range(1, 9):
        job = slurm.wait(run.job, "PENDING", "COMPLETED", "FAILED", "TIMEOUT", timeout=300)
        if job["JobState"] != "PENDING":
            break
        run.go_on(restart)
        slurm.wait(run.job, "RUNNING")
    run.finish()
    assert run.losses() == undisturbed.losses()


def test_a_crash_loop_comes_to_an_end_that_says_why(slurm: Cluster, data: str, tmp_path: Path):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, "cluster.python=/bin/false")
    for restart in (1, 2):
        run.go_on(restart)
    job = slurm.wait(run.job, "FAILED", "COMPLETED")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0")
    reason = (run.run_dir / "slurm" / "stopped").read_text()
    assert reason.startswith("stopped: 3 sessions in a row without a further checkpoint (none yet)")
    assert "the last one ended with exit code 1" in reason
    assert reason.strip() in run.log


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, data: str, tmp_path: Path):
    run = submitted(slurm, tmp_path / "run", *TWO_BY_ONE, data, *FAULTY, "train.steps=2000")
    run.reach(3)
    slurm.run("scancel", run.job)
    job = slurm.wait(run.job, "CANCELLED", "PENDING", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
