"""The command line as a user meets it: exit codes, one-line errors, help, --cfg job, doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch.cli import VERBS, main
from megafab.config.load import from_yaml, load
from megafab.techniques import catalogue

ROOT = Path(__file__).parents[2]
WITH_CONFIG = [name for name, verb in VERBS.items() if verb.schema]


def megafab(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, text=True, capture_output=True, timeout=120
    )


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", out, re.MULTILINE)
    assert main([]) == 0


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"megafab {name}: {VERBS[name].summary}\n")
    assert len(out.splitlines()) > 3


def test_help_of_train_lists_presets_and_keys(capsys: pytest.CaptureFixture[str]):
    main(["train", "--help"])
    out = capsys.readouterr().out
    assert "  schedule=constant|cosine|infinite|inverse_sqrt|linear|rewarm|wsd\n" in out
    names = "|".join(sorted(catalogue.CLASSES))
    assert f"  technique={names} (several: [a,b])\n" in out
    assert re.search(
        r"^  optim\.clip=1\.0 +float  global gradient norm; 0 turns clipping off$", out, re.MULTILINE
    )


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_verb_with_a_configuration_refuses_unknown_keys(name: str, capsys: pytest.CaptureFixture[str]):
    chosen = ["cluster=test"] if name == "submit" else []  # the rest is for megafab train
    assert main([*name.split(), *chosen, "zzzzzz=1"]) == 2
    captured = capsys.readouterr()
    assert "zzzzzz=1: found an unknown key" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "trian: found an unknown word where a verb belongs, expected one of "),
        (
            ["train", "--cgf"],
            "--cgf: found an unknown word where a flag belongs, expected one of --help, --cfg. ",
        ),
        (
            ["train", "--cfg", "all"],
            "--cfg: found all, expected job, the one configuration there is. Fix: --cfg job",
        ),
        (["doctor", "x"], "x: found an argument, expected none. Fix: megafab doctor"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_nearest_verb_is_named(capsys: pytest.CaptureFixture[str]):
    main(["trian"])
    assert capsys.readouterr().err.endswith("Fix: did you mean train?\n")


def test_cfg_job_prints_what_load_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["model=llama_tiny", "data.path=nowhere", "train.steps=20", "run.name=a"]
    assert main(["train", *overrides[:2], "--cfg", "job", *overrides[2:]]) == 2
    captured = capsys.readouterr()
    (tmp_path / "config.yaml").write_text(captured.out)
    assert from_yaml(tmp_path / "config.yaml") == load(overrides)
    assert captured.err.startswith("[corpus] data.path=nowhere: found no such directory")
    assert captured.err.count("\n") == 1


def test_cfg_job_of_another_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "checkpoint=runs/x", "prompt=def f(x, y=1):", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["checkpoint"], shown["prompt"]) == ("runs/x", "def f(x, y=1):")


def test_cfg_job_counts_the_ranks_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["train", "recipe=quickstart", "--cfg", "job"]) == 2
    err = capsys.readouterr().err
    assert "[launcher] launch.ranks=4: found 3 ranks started by torchrun or srun" in err


def test_interrupted(monkeypatch: pytest.MonkeyPatch):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main([]) == 130


def test_from_the_shell_errors_go_to_stderr_without_a_traceback():
    done = megafab("train", "model=llama_tiny", "data.path=x", "train.stepz=20")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "train.stepz=20: found an unknown key, expected a key of the configuration. "
        "Fix: did you mean train.steps?\n"
    )


def test_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "launch.cli", "data", "out=x", "--cfg", "job"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("output: found No space left on device, expected room to write.")
    assert len(done.stderr.splitlines()) == 1


def test_configuration_and_rules_do_without_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "launch.cli",
            "train",
            "recipe=quickstart",
            "--cfg",
            "job",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "megafab.config.rules" in imported
    heavy = {"torch", "numpy", "megatron", "wandb", "datasets", "rich"}
    assert not imported & heavy


def test_doctor_judges_this_node():
    done = megafab("doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert lines[-1] == "this node can train: yes"
    assert any(re.match(r"  megatron-core +\d+\.\d+", line) for line in lines)
    assert any(re.match(r"  one step +matrix product, gradient and all-reduce over ", line) for line in lines)


def test_doctor_says_no_and_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from launch import doctor

    missing = doctor.Part("no-such-package", "nothing", "pip install no-such-package")
    monkeypatch.setattr(doctor, "REQUIRED", (missing,))
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "  no-such-package      missing: nothing. To get it: pip install no-such-package\n" in out
    assert out.endswith("this node can train: no (no-such-package is missing)\n")


def test_a_check_that_fails_is_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from launch import doctor

    def one_step() -> str:
        raise RuntimeError("no such device\nand much more")

    monkeypatch.setattr(doctor, "CHECKS", (one_step,))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith("this node can train: no (one step: no such device)\n")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_directory_that_cannot_be(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    domain = {"name": "web", "splits": {"train": {"tokens": 100_000}, "valid": {"tokens": 9}}}
    manifest = {"tokenizer": {"vocab_size": 512}, "domains": [domain]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    run = tmp_path / "manifest.json"
    arguments = ["model=llama_tiny", f"data.path={tmp_path}", "train.steps=1", f"launch.ranks={ranks}"]
    assert main(["train", *arguments, f"run.dir={run}"]) == 2
    assert capsys.readouterr().err == (
        f"run.dir={run}: found File exists, expected a directory for the run. "
        "Fix: give run.dir another place\n"
    )
