"""Trainings in stages on real ranks: killed anywhere, the same command comes to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch.operation import operate
from megafab import stages as staged
from megafab.checkpoint import store
from megafab.checkpoint.reader import Reader
from megafab.config import rules
from megafab.config.load import config_directory, load
from megafab.config.stages import check_all, of
from megafab.data.derived import NEIGHBORS
from megafab.data.format import Corpus

ROOT = Path(__file__).parents[2]
CONF = config_directory()
SMALL_STEPS, GROWN_STEPS = 8, 12
RECIPE = (
    "recipe=stacking",
    *SMALL_MODEL[1:],
    *SHORT_RUN[1:],
    "model.layers=2",
    "model.seq_len=32",
    "train.global_batch=4",
    "eval.every=4",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    f"stages.small.train.steps={SMALL_STEPS}",
    f"stages.stacked.train.steps={GROWN_STEPS}",
    "stages.stacked.grow.layers=4",
    "stages.small.launch.ranks=2",
    "stages.stacked.launch.ranks=2",
    "stages.stacked.parallel.tensor=2",
)


class Training:
    """`megafab train` of the recipe, in a process that starts its ranks."""

    def __init__(self, corpus: Path, run_dir: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "launch.cli", "train", *RECIPE, f"data.path={corpus}"]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = run_dir.parent / f"{run_dir.name}.txt"
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*command, f"run.dir={run_dir}", *overrides],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def end(self) -> str:
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        return self.log.read_text()

    def refused(self) -> str:
        """The line that it ends with."""
        assert self.process.wait(timeout=120) == 2, self.log.read_text()
        return self.log.read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "training"
    Training(corpus, run_dir).end()
    return run_dir


def numbers(run_dir: Path) -> list[list[Any]]:
    """What training computed at each step of each stage, bit for bit."""
    keys = ("step", "tokens", "total_steps", "total_tokens", "total_flops", "loss", "grad_norm", "valid_loss")
    return [[row.get(key) for key in keys] for name in ("small", "stacked") for row in rows(run_dir / name)]


def last(run_dir: Path) -> Path:
    return store.candidates(run_dir / "checkpoints")[0]


def assert_same_end(run_dir: Path, unbroken: Path) -> None:
    assert numbers(run_dir) == numbers(unbroken)
    ours, theirs = (Reader(last(one / "stacked")) for one in (run_dir, unbroken))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(ours.read(name).equal(theirs.read(name)) for name in ours.tensors)
    for key in ("progress", "loader", "techniques", "engine"):
        assert ours.state[key] == theirs.state[key]


def test_a_stage_begins_with_what_its_operation_made(unbroken: Path):
    small, start, stacked = (Reader(last(unbroken / name)) for name in ("small", "stacked/start", "stacked"))
    for layer in range(4):
        for name in (n for n in start.weights if n.startswith(f"decoder.layers.{layer}.")):
            source = name.replace(f"layers.{layer}.", f"layers.{layer % 2}.")
            assert start.read(f"weight/{name}").equal(small.read(f"weight/{source}"))
    # A new schedule and optimizer; counters and data run on.
    first, *_ = rows(unbroken / "stacked")
    assert (first["step"], first["total_steps"]) == (1, SMALL_STEPS + 1)
    before = rows(unbroken / "small")[-1]
    assert first["total_tokens"] == before["total_tokens"] + 4 * 32
    assert first["total_flops"] == before["flops"] + first["flops"]
    assert stacked.state["loader"]["samples"] == 4 * (SMALL_STEPS + GROWN_STEPS)
    assert stacked.state["engine"]["updates"] == GROWN_STEPS
    operations = [entry.get("operation", "begun") for entry in stacked.state["lineage"]]
    assert operations == ["grow", "begun"]


def test_the_same_command_again_has_nothing_to_do(corpus: Path, unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken, tmp_path / "training")
    told = Training(corpus, tmp_path / "training").end()
    assert told.splitlines()[-2:] == ["stage small (1 of 2): finished", "stage stacked (2 of 2): finished"]
    assert numbers(tmp_path / "training") == numbers(unbroken)


# Where the launcher, and with it all ranks, is killed: what is there by then, in the order of the run.
MOMENTS = {
    "in the first stage": "small/checkpoints/step_00000004",
    "at its end": "small/finished.json",
    "in the second stage": "stacked/checkpoints/step_00000004",
}


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=pytest.mark.slow if "second" not in m else ()) for m in MOMENTS]
)
def test_killed_anywhere_the_same_command_comes_to_the_same_end(
    corpus: Path, unbroken: Path, tmp_path: Path, moment: str
):
    run_dir = tmp_path / "training"
    if "second" in moment:  # no need to do the first again
        shutil.copytree(unbroken / "small", run_dir / "small")
    killed = Training(corpus, run_dir)
    killed.wait_for(run_dir / MOMENTS[moment])
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    assert not (run_dir / "stacked" / "finished.json").exists()
    Training(corpus, run_dir).end()
    assert_same_end(run_dir, unbroken)


@pytest.mark.parametrize("remains", ["a draft", "the product of another operation", "nothing"])
def test_what_a_stage_begins_with_is_what_it_says(
    corpus: Path, unbroken: Path, tmp_path: Path, remains: str, capfd: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "training"
    shutil.copytree(unbroken / "small", run_dir / "small")
    stacked = run_dir / "stacked"
    stacked.mkdir()
    if remains == "a draft":
        (stacked / ".start.tmp-abc123" / "checkpoints").mkdir(parents=True)
    elif remains != "nothing":
        shutil.copytree(unbroken / "stacked" / "start", stacked / "start")
        shutil.copy(unbroken / "stacked" / "start.json", stacked)
    depth = "zero" if "another" in remains else "stack"
    stages = of([*RECIPE, f"data.path={corpus}", f"run.dir={run_dir}", f"stages.stacked.grow.depth={depth}"])
    staged.prepare(stages[1], stages, operate)
    assert [path.name for path in stacked.glob(".start*")] == []
    state = Reader(last(stacked / "start")).state
    assert state["lineage"][-1]["growth"]["depth"] == depth
    if remains == "nothing":  # a second time there is nothing to do
        made = last(stacked / "start").stat().st_ino
        staged.prepare(stages[1], stages, operate)
        assert last(stacked / "start").stat().st_ino == made


def test_a_stage_that_was_trained_keeps_its_beginning(corpus: Path, unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken, tmp_path / "training")
    changed = Training(corpus, tmp_path / "training", "stages.stacked.start.data=reset")
    assert changed.refused() == (
        "stages.stacked: found another beginning than it had: data from keep to reset, expected the same "
        "one: it has been trained from there. Fix: undo the change, or give run.dir another place"
    )


def test_a_stage_is_one_job_of_ranks_that_something_else_started(
    ranks, corpus: Path, unbroken: Path, tmp_path
):
    run_dir = tmp_path / "training"
    shutil.copytree(unbroken / "small", run_dir / "small")
    command = [*RECIPE, f"data.path={corpus}", f"run.dir={run_dir}", "stages.stacked.launch.ranks=1"]
    assert ranks.run(train, [*command, "stage=stacked"], world=2, init=False, timeout=240) == [0, 0]
    assert_same_end(run_dir, unbroken)
    assert json.loads((run_dir / "stages.json").read_text()) == {
        "small": {"parent": None},
        "stacked": {"parent": "small"},
    }


@pytest.mark.slow
def test_a_signal_leaves_and_the_same_command_goes_on(corpus: Path, unbroken: Path, tmp_path: Path):
    run_dir = tmp_path / "training"
    asked = Training(corpus, run_dir)
    asked.wait_for(run_dir / "small" / "checkpoints" / "step_00000004")
    asked.process.send_signal(signal.SIGTERM)
    told = asked.end()
    assert told.splitlines()[-1].startswith("stage small (1 of 2): ")
    assert "the same command goes on" in told.splitlines()[-1]
    Training(corpus, run_dir).end()
    assert numbers(run_dir) == numbers(unbroken)


def test_a_finished_stage_keeps_its_settings(corpus: Path, unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken, tmp_path / "training")
    changed = Training(corpus, tmp_path / "training", "stages.small.optim.lr=2e-3")
    assert changed.refused() == (
        "stages.small: found other settings than it was finished with: optim.lr from 0.001 to 0.002, "
        "expected the same ones, since stage stacked was begun with its checkpoint. Fix: undo the change, or "
        "give run.dir another place"
    )


def test_a_damaged_parent_is_not_built_upon(corpus: Path, unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken / "small", tmp_path / "training" / "small")
    file = next((last(tmp_path / "training" / "small") / "tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    broken = Training(corpus, tmp_path / "training")
    assert f"tensors/{file.name}: XXH3" in broken.refused()
    assert not (tmp_path / "training" / "stacked" / "start").exists()


# Where recipes name the neighbours of chunks, and the chunks' length.
RETRIEVING = {
    "retro": ("data.retrieval", 16),
    "retro_1_6b": ("data.retrieval", 64),
    "retrofit": ("stages.retrofit.data.retrieval", 16),
}


@pytest.mark.parametrize("path", sorted(CONF.glob("recipe/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_passes_the_rules(corpus: Path, path: Path, tmp_path: Path):
    ranks = 8 if "tensor: 8" in path.read_text() else 4
    command = [f"recipe={path.stem}", f"data.path={corpus}", f"launch.ranks={ranks}"]
    if path.stem in RETRIEVING:
        key, chunk = RETRIEVING[path.stem]
        facts = {"corpus": Corpus.open(corpus).fingerprint, "chunk": chunk, "neighbors": 20}
        NEIGHBORS.write(tmp_path, dict.fromkeys(NEIGHBORS.keys, "") | facts)
        command.append(f"{key}={tmp_path}")
    stages = of(command)
    check_all(stages)
    if not stages:
        config = load(command)
        rules.check_all(config, ranks=ranks, corpus=rules.corpus_facts(config))


def test_one_report_over_all_stages(unbroken: Path, tmp_path: Path):
    from launch import report

    assert report.main([str(unbroken), f"out={tmp_path / 'report.html'}"]) == 0
    page = (tmp_path / "report.html").read_text()
    start = page.index('id="summary">') + len('id="summary">')
    numbers = json.loads(page[start : page.index("</script>", start)])
    assert [one["name"] for one in numbers] == ["training/small", "training/stacked"]
    assert [one["total_tokens"] for one in numbers] == [None, 4 * 32 * (SMALL_STEPS + GROWN_STEPS)]
    assert "Validation loss by domain: training/stacked after training/small" in page
