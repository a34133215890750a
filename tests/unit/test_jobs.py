"""Job scripts: what a profile and a run become, line by line, and what bash thinks of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch import cli, submit
from launch.jobs import TRAINING, Job, Task, check_names, render
from launch.ranks import check_nodes
from megafab.config import load
from megafab.config.submit import (
    ClusterConfig,
    JobConfig,
    Layout,
    SubmitConfig,
    check,
    layout,
    seconds_of,
    warning_seconds,
)
from megafab.errors import ConfigError, UserError
from megafab.topology.config import LaunchConfig

PROFILES = sorted(path.stem for path in (load.config_directory() / "cluster").glob("*.yaml"))
NEEDED = {
    "generic": ["cluster.partition=gpu"],
    "cpu": ["cluster.partition=batch"],
    "dgx_h100": ["cluster.partition=gpu"],
    "perlmutter": ["cluster.account=m1234_g"],
    "frontier": ["cluster.account=abc123"],
    "test": [],
}


def profile(name: str, *overrides: str) -> SubmitConfig:
    config = load.compose(SubmitConfig, "submit", [f"cluster={name}", *NEEDED[name], *overrides])
    check(config)
    return config


def training(place: Layout, *overrides: str, directory: Path = Path("/runs/a")) -> Job:
    return Job("a", "train", overrides, (Task(directory),), directory, place, TRAINING, directory)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("continuation", ["requeue", "new_job", "none"])
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_becomes_a_script_that_bash_understands(name: str, continuation: str, launcher: str):
    told = [f"job.continuation={continuation}", f"job.launcher={launcher}"]
    if launcher == "torchrun" and name == "frontier":
        with pytest.raises(
            ConfigError, match=r"job\.launcher=torchrun: found cluster\.srun=\[--gpus-per-task=1"
        ):
            profile(name, *told)
        return
    config = profile(name, *told)
    script = render(training(Layout(2, config.cluster.ranks_per_node)), config)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "{{" not in script
    assert "{ranks}" not in script
    assert max(map(len, script.splitlines())) < 160


def test_a_script_asks_for_what_the_profile_has():
    script = render(training(Layout(4, 8)), profile("frontier", "job.time=12:00:00"))
    assert options(script) == [
        "--job-name=a",
        "--partition=batch",
        "--account=abc123",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--time=12:00:00",
        "--signal=B:USR1@300",
        "--open-mode=append",
        f"--chdir={Path.cwd()}",
        "--output=/runs/a/slurm/%j.log",
        "--cpus-per-task=7",
        "--gpus-per-node=8",
        "--requeue",
        "--network=disable_rdzv_get",
    ]
    assert "--cpus-per-task=7 --gpus-per-task=1 --gpu-bind=closest" in script
    assert "module load rccl-net-plugin" in script
    assert "export FI_MR_CACHE_MONITOR=kdreg2" in script


def test_torchrun_is_one_task_a_node_with_all_its_cores():
    script = render(training(Layout(2, 8)), profile("dgx_h100", "job.launcher=torchrun"))
    assert {"--ntasks-per-node=1", "--cpus-per-task=112", "--gpus-per-node=8"} <= set(options(script))
    assert "--nnodes=2 --nproc-per-node=8" in script


def test_words_are_quoted_and_a_container_comes_in_front(tmp_path: Path):
    config = profile("test", "cluster.container='apptainer exec image.sif'", "cluster.env.A='b c'")
    script = render(training(Layout(1, 1), "data.mixture={a: 1}", directory=tmp_path / "a b"), config)
    assert "    'data.mixture={a: 1}'\n" in script
    assert f"run='{tmp_path}/a b'\n" in script
    assert "export A='b c'\n" in script
    assert '    apptainer exec image.sif "${command[@]}" &\n' in script
    assert f"#SBATCH '--output={tmp_path}/a b/slurm/%j.log'\n" in script


@pytest.mark.parametrize("bad", ["a'b", 'a"b', "a\\b", "a\nb"])
def test_names_that_a_script_cannot_hold_are_refused(bad: str):
    with pytest.raises(ConfigError, match=r"run\.dir=.*expected no quotes, backslashes or"):
        check_names(run_name="fine name #1 100% $(touch x)", run_dir=bad)


def test_names_are_no_code(tmp_path: Path):
    """What a shell would run or take for a comment stays a name, and Slurm's patterns stay text."""
    name = "x $(touch pwned) #1 50%u"
    directory = tmp_path / name
    job = Job(name, "train", (), (Task(directory),), directory, Layout(1, 1), TRAINING, directory)
    script = render(job, profile("test"))
    assert f"#SBATCH '--job-name={name}'\n" in script
    assert f"#SBATCH '--output={str(directory).replace('%', '%%')}/slurm/%j.log'\n" in script
    assert job.log_of("7") == directory / "slurm" / "7.log"
    head = script[: script.index("# -- what is known")]
    said = f'{head}\necho "$name|$run|$logs"'
    done = subprocess.run(["bash"], input=said, text=True, capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{name}|{directory}|{directory}/slurm\n"
    assert not (tmp_path / "pwned").exists()


def test_a_line_before_the_ranks_that_fails_is_noticed(tmp_path: Path):
    script = render(
        training(Layout(1, 1), directory=tmp_path), profile("test", "cluster.setup=[':', 'false # really']")
    )
    assert "false # really\n(($? == 0)) || broken 'false # really'\n" in script
    script = render(training(Layout(1, 1), directory=tmp_path), profile("frontier"))
    assert "module load rocm || broken 'module load rocm'\n" in script


def test_an_array_has_a_command_for_each_task():
    tasks = (Task(Path("/runs/a/x=1"), ("x=1",)), Task(Path("/runs/a/x=2"), ("x=2",)))
    job = Job("a", "train", ("y=3",), tasks, Path("/runs/a"), Layout(1, 1), TRAINING, Path("/runs/a"))
    script = render(job, profile("test", "job.parallel=1"))
    assert {"--array=0-1%1", "--output=/runs/a/slurm/%A_%a.log"} <= set(options(script))
    assert "1) run=/runs/a/x=2; command+=(x=2) ;;" in script


@pytest.mark.parametrize(
    ("saves", "time", "lead"), [("", "24:00:00", 300), ("", "10", 200), ("30.0 90.5", "24:00:00", 241)]
)
def test_the_warning_is_sized_by_the_saves_of_the_run(tmp_path: Path, saves: str, time: str, lead: int):
    lines = (f'{{"event": "saved", "time": 1, "step": 1, "seconds": {one}}}\n' for one in saves.split())
    (tmp_path / "sessions.jsonl").write_text("".join(lines))
    script = render(training(Layout(1, 1), directory=tmp_path), profile("test", f"job.time={time}"))
    assert f"--signal=B:USR1@{lead}" in options(script)
    assert f"MEGAFAB_JOB_LEAD={lead}\n" in script


def test_a_warning_longer_than_the_job_is_refused():
    with pytest.raises(ConfigError, match=r"job\.signal_seconds=3600: found a warning before the job"):
        profile("test", "job.time=60", "job.signal_seconds=3600")


def test_a_lead_that_is_given_is_taken():
    assert warning_seconds(JobConfig(signal_seconds=77), 1000.0) == 77


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("5:30", 330),
        ("12:00:00", 43200),
        ("2-0", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_as_slurm_writes_them(text: str, seconds: int):
    check(SubmitConfig(ClusterConfig(partition="a"), JobConfig(time=text)))
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("ranks", "nodes", "full", "place"),
    [
        (1, None, 8, (1, 1)),
        (8, None, 8, (1, 8)),
        (16, None, 8, (2, 8)),
        (4, 2, 8, (2, 2)),
        (12, None, 8, (2, 6)),
    ],
)
def test_where_ranks_go(ranks: int, nodes: int | None, full: int, place: tuple[int, int]):
    found = layout(LaunchConfig(ranks=ranks, nodes=nodes), ClusterConfig(ranks_per_node=full))
    assert (found.nodes, found.ranks_per_node, found.ranks) == (*place, ranks)


@pytest.mark.parametrize(
    ("ranks", "nodes", "line"),
    [
        (0, None, "launch.ranks=0: found 0, expected at least 1"),
        (1, 0, "launch.nodes=0: found 0, expected at least 1"),
        (
            9,
            None,
            "launch.ranks=9: found 9 ranks on 2 nodes, expected as many on each",
        ),
        (
            16,
            1,
            "launch.ranks=16, launch.nodes=1: found 16 ranks on a node, expected at most",
        ),
    ],
)
def test_ranks_that_do_not_fit(ranks: int, nodes: int | None, line: str):
    with pytest.raises(ConfigError) as refused:
        layout(LaunchConfig(ranks=ranks, nodes=nodes), ClusterConfig(ranks_per_node=8))
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("environment", "asked", "refused"),
    [
        ({}, None, False),
        ({}, 1, False),
        ({}, 2, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, 2, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, 4, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 2, False),
    ],
)
def test_ranks_on_another_number_of_nodes_are_refused(
    environment: dict[str, str], asked: int | None, refused: bool
):
    if not refused:
        check_nodes(asked, environment)
        return
    with pytest.raises(ConfigError, match=rf"launch\.nodes={asked}: found ranks on . node"):
        check_nodes(asked, environment)


def test_a_sweep_is_every_combination(tmp_path: Path):
    told = ["model=llama_tiny", "train.steps=3", f"run.dir={tmp_path}", "data.path=a,b"]
    assert load.sweep([*told, "optim.lr=1e-3,3e-4", "train.seed=range(2)"]) == [
        ("optim.lr=0.001", "train.seed=0"),
        ("optim.lr=0.001", "train.seed=1"),
        ("optim.lr=0.0003", "train.seed=0"),
        ("optim.lr=0.0003", "train.seed=1"),
    ]
    with pytest.raises(ConfigError, match="--multirun: found no sweep"):
        load.sweep(told)
    with pytest.raises(ConfigError, match=r"--multirun: found optim.lr=0.001 twice, expected runs"):
        submit.main(["cluster=test", "--multirun", *told, "optim.lr=1e-3,0.001", "--dry-run"])


def test_without_slurm_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_at: str):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = ["cluster=test", "model=llama_tiny", "train.steps=3", corpus_at, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"megafab submit: found no sbatch on this machine"):
        submit.main(told)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_script_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus_at: str
):
    told = ["cluster=test", "model=llama_tiny", "train.steps=3", corpus_at, f"run.dir={tmp_path / 'run'}"]
    assert cli.main(["submit", *told, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n# default: megafab train on 1 x 1 ranks\n")
    assert "    train.steps=3\n" in shown
    assert not (tmp_path / "run").exists()


@pytest.fixture
def corpus_at(tmp_path: Path) -> str:
    """What the rules want to know of a corpus."""
    from megafab.data.format import SPLITS

    split = {"tokens": 10_000_000, "documents": 10, "bytes": 1, "shards": []}
    domain = {"name": "a", "splits": dict.fromkeys(SPLITS, split)}
    manifest = {"domains": [domain], "tokenizer": {"vocab_size": 300}, "fingerprint": "f"}
    (tmp_path / "corpus").mkdir()
    import json

    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    return f"data.path={tmp_path / 'corpus'}"
