"""`megafab generate`, on a checkpoint that `megafab train` wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training import SHORT_RUN, SMALL_MODEL, build_corpus

from launch.cli import main

ROOT = Path(__file__).parents[2]


def megafab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run whose embedding has 1024 rows beyond the 512 ids of its tokenizer."""
    root = tmp_path_factory.mktemp("generate")
    corpus, run_dir = build_corpus(root), root / "run"
    arguments = [*SMALL_MODEL, *SHORT_RUN, "model.layers=2", "model.vocab=1536", "train.steps=2"]
    done = megafab("train", *arguments, "checkpoint.every=1", f"data.path={corpus}", f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_padding_of_the_vocabulary_is_never_sampled(run_dir: Path):
    done = megafab("generate", f"checkpoint={run_dir}", "tokens=40", "temperature=50", "top_k=0", "samples=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run_dir}/checkpoints/step_00000002, temperature 50.0:")
    assert len((run_dir / "sample.txt").read_text()) > 40


def test_the_same_seed_gives_the_same_text_in_the_file_named(run_dir: Path, tmp_path: Path):
    arguments = ["generate", f"checkpoint={run_dir}", "prompt=def f(", "tokens=9"]
    calls = "; ".join(f"main({[*arguments, f'out={tmp_path / name}']!r})" for name in ("a", "b"))
    command = [sys.executable, "-c", f"from launch.cli import main; {calls}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text().startswith("def f(")


def test_a_damaged_checkpoint_is_passed_over_and_told(run_dir: Path, tmp_path: Path):
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_00000002" / "state.json").write_text("{")
    done = megafab("generate", f"checkpoint={tmp_path}", "tokens=1", "temperature=0")
    assert done.returncode == 0, done.stderr
    assert (
        f"passing over a damaged checkpoint: {tmp_path}/checkpoints/step_00000002: state.json" in done.stderr
    )
    assert done.stdout.startswith(f"{tmp_path}/checkpoints/step_00000001")


def test_a_file_that_cannot_be_written_costs_no_text(run_dir: Path, tmp_path: Path):
    out = tmp_path / "none" / "sample.txt"
    done = megafab("generate", f"checkpoint={run_dir}", "prompt=import", "tokens=1", f"out={out}")
    assert done.returncode == 2
    assert "\nimport" in done.stdout
    assert done.stderr == (
        f"out={out}: found No such file or directory, expected a file to write. Fix: choose another out=\n"
    )


def test_numbers_out_of_range_are_refused_together(capsys: pytest.CaptureFixture[str]):
    wrong = ["tokens=0", "temperature=-1", "top_k=-1", "samples=0", "seed=-1"]
    assert main(["generate", "checkpoint=nowhere", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "tokens=0", "temperature=-1.0", "top_k=-1", "samples=0", "seed=-1",
    ]  # fmt: skip
    assert lines[0] == "tokens=0: found 0, expected at least 1. Fix: tokens=1 or more"


def test_a_missing_checkpoint_is_named_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", f"checkpoint={tmp_path / 'gone'}"]) == 2
    assert capsys.readouterr().err == (
        f"checkpoint={tmp_path / 'gone'}: found no such directory, expected a directory `step_XXXXXXXX` "
        "with a manifest.json, or a run directory that has checkpoints. Fix: correct the path\n"
    )
