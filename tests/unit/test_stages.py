"""What `stages:` of a recipe becomes: whole configurations, in order, with mistakes named by their stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli
from megafab.checkpoint.config import Carry
from megafab.config import load as loading
from megafab.config.load import load
from megafab.config.stages import Stage, check_all, of
from megafab.config.tree import to_tree
from megafab.errors import ConfigError
from megafab.optim.config import ScheduleKind

RECIPE = """\
# @package _global_
# A small model, the grown one, and another branch of the small one.
defaults:
  - override /model: llama_tiny
model:
  layers: 4
train:
  steps: 100
data:
  mixture: {code: 0.5, prose: 0.5}
stages:
  small:
    schedule: wsd
    train: {steps: 10}
    data:
      mixture: {prose: 1}
  grown:
    grow: {layers: 8, depth: zero}
    technique: [ema]
    start: {data: keep}
  branch:
    parent: small
    techniques:
      ema: {decay: 0.5}
"""
NAMES = ("small", "grown", "branch")
NAMES = ("small", "grown", "branch")
COMMAND = ("recipe=three", "data.path=nowhere", "run.dir=runs/x", "run.name=x", "tracking=none")


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`conf/` with one recipe more."""
    conf = tmp_path / "conf"
    conf.mkdir()
    for entry in loading.config_directory().iterdir():
        if entry.name != "recipe":
            (conf / entry.name).symlink_to(entry)
    (conf / "recipe").mkdir()
    (conf / "recipe" / "three.yaml").write_text(RECIPE)
    (conf / "recipe" / "one.yaml").write_text(RECIPE.partition("stages:")[0])
    monkeypatch.setattr(loading, "config_directory", lambda: conf)


def stages(*overrides: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in of([*COMMAND, *overrides])}


def test_a_stage_is_the_recipe_with_what_it_says_over_it():
    small, grown, branch = stages().values()
    assert [s.parent for s in (small, grown, branch)] == [None, "small", "small"]
    assert [s.config.run.dir for s in (small, grown, branch)] == [
        f"runs/x/{n}" for n in ("small", "grown", "branch")
    ]
    assert [s.config.run.name for s in (small, grown, branch)] == ["x-small", "x-grown", "x-branch"]
    assert {s.config.tracking.group for s in (small, grown, branch)} == {"x"}
    assert [s.config.train.steps for s in (small, grown, branch)] == [10, 100, 100]
    assert small.config.schedule.kind is ScheduleKind.wsd
    assert grown.config.schedule.kind is ScheduleKind.cosine
    assert small.config.data.mixture == {"prose": 1.0}  # replaced, not merged
    assert grown.config.data.mixture == {"code": 0.5, "prose": 0.5}
    # What it begins with: nothing, what the operation makes, the parent's run.
    assert small.config.start.checkpoint is None
    assert grown.config.start.checkpoint == "runs/x/grown/start"
    assert grown.config.start.data is Carry.keep
    assert branch.config.start.checkpoint == "runs/x/small"
    # The grown model's sizes come from the operation.
    assert (grown.config.model.layers, branch.config.model.layers) == (8, 4)
    ema = [s.config.techniques.ema for s in (small, grown, branch)]
    assert [one and one.decay for one in ema] == [None, 0.999, 0.5]


def test_the_command_line_is_over_the_file_and_a_stages_own_is_over_both():
    found = stages(
        "train.steps=50", "stages.grown.train.steps=7", "stages.grown.grow.layers=6", "schedule=linear"
    )
    assert [s.config.train.steps for s in found.values()] == [50, 7, 50]
    assert {s.config.schedule.kind for s in found.values()} == {ScheduleKind.linear}
    assert found["grown"].config.model.layers == 6
    found = stages("stages.branch.parent=grown", "stages.branch.technique=[]", "technique=[z_loss]")
    assert found["branch"].parent == "grown"
    assert [s.config.techniques.z_loss is not None for s in found.values()] == [True, True, False]
    assert found["branch"].config.model.layers == 4  # not what it begins with, as the rules say


def test_a_recipe_without_stages_is_one_run():
    single = ["recipe=one", *COMMAND[1:]]
    assert of(single) == []
    assert load(single).train.steps == 100


MISTAKES = {
    "stages.smal.train.steps=3": (
        "stages.smal.train.steps=3: found no stage smal, expected one of small, grown, branch. Fix: "
        "did you mean small?"
    ),
    "stages.grown.train.stpes=3": (
        "stages.grown: train.stpes=3: found an unknown key, expected a key of the configuration. Fix: "
        "did you mean train.steps?"
    ),
    "stages.small.train.steps=x": (
        "stages.small: train.steps=x: found text x, expected a whole number or null. Fix: give "
        "train.steps a whole number"
    ),
    "stages.grown.schedule=wdd": (
        "stages.grown: schedule=wdd: found no schedule named wdd, expected one of constant, cosine, "
        "infinite, inverse_sqrt, linear, rewarm, wsd. Fix: did you mean schedule=wsd?"
    ),
    "stages.branch.parent=grow": (
        "stages.branch: parent=grow: found no earlier stage, expected one of small, grown, scratch. "
        "Fix: did you mean grown?"
    ),
    "stages.grown.parent=scratch": (
        "stages.grown: grow: found a stage that begins with random weights, expected a parent whose "
        "checkpoint it changes. Fix: leave it out, or name a parent"
    ),
    "stages.grown.densify=true": (
        "stages.grown: grow, densify: found two operations, expected one operation a stage. Fix: "
        "densify in a stage of its own"
    ),
    "stages.grown.model.layers=9": (
        "stages.grown: model.layers=9: found set beside grow, expected the model that grow makes of "
        "the parent's. Fix: give its sizes in grow only"
    ),
    "stages.grown.grow.layers=3": (
        "stages.grown: layers=3: found 3, expected at least 5: the parent has 4. Fix: layers=5 or "
        "more, or leave it out"
    ),
    "stages.small.run.dir=a": (
        "stages.small: run.dir=a: found set for one stage, expected run.name and run.dir of them all. "
        "Fix: set them without stages.NAME"
    ),
    "checkpoint.resume=none": (
        "stages.small: checkpoint.resume=none: found not auto, expected a stage that goes on with its own "
        "checkpoints. Fix: leave it out"
    ),
    "stages.small=3": (
        "stages.small=3: found no key of the stage, expected stages.NAME.KEY=VALUE. Fix: "
        "stages.small.train.steps=100, for example"
    ),
    "recipe=one": (
        "stages.x.y=1: found a single run, expected a recipe that has stages. Fix: leave stages. out, "
        "or choose a recipe: recipe=..."
    ),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_name_their_stage(override: str):
    more = ["stages.x.y=1"] if override == "recipe=one" else []
    command = [text for text in COMMAND if text.partition("=")[0] != override.partition("=")[0]]
    with pytest.raises(ConfigError) as caught:
        of([*command, override, *more])
    assert str(caught.value) == MISTAKES[override]


def lines(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_all(of([*COMMAND, *overrides]))
    return [line for line in str(caught.value).splitlines() if "[corpus]" not in line]


def test_every_rule_is_tried_on_every_stage_before_the_first_begins():
    found = lines("stages.grown.optim.lr=0", "stages.branch.train.global_batch=0")
    assert [line.partition(" ")[0] for line in found] == ["stages.grown:", "stages.branch:"]


INHERITED = {
    "optim=muon": (
        "stages.grown: start.optimizer=keep: found optim.name=muon, expected optim.name=adamw, whose moments "
        "they are. Fix: start.optimizer=reset"
    ),
    "densify=true": (
        "stages.branch: densify=true: found a dense parent, expected a parent with static_sparsity or "
        "gradual_pruning. Fix: leave densify out"
    ),
    "model.layers=6": (
        "stages.branch: model.layers=6: found model.layers=4 in stage small, expected the model of "
        "the parent. Fix: the same value, or grow: {...}"
    ),
    "start.optimizer=keep": (
        "stages.grown: start.optimizer=keep: found grow.optimizer=reset, expected moments in what it "
        "begins with. Fix: grow.optimizer=copy, where it is defined"
    ),
    "grow.optimizer=copy": (
        "stages.grown: grow.optimizer=copy: found start.optimizer=reset, expected "
        "start.optimizer=keep, for them to be used. Fix: set both, or leave both out"
    ),
    "checkpoint.save_last=false": (
        "stages.grown: stages.small.checkpoint.save_last=false: found no last checkpoint, expected "
        "one for stage grown. Fix: leave it out"
    ),
}


@pytest.mark.parametrize("override", INHERITED)
def test_a_stage_must_be_able_to_begin_with_its_parents_checkpoint(override: str):
    stage = INHERITED[override].partition(":")[0].removeprefix("stages.")
    stage = "small" if "save_last" in override else stage
    more = ["stages.grown.start.optimizer=keep"] if "muon" in override else []
    assert INHERITED[override] in lines(f"stages.{stage}.{override}", *more)


def test_the_first_stage_may_begin_with_a_checkpoint():
    found = [stage.config.start.checkpoint for stage in stages("start.checkpoint=runs/a").values()]
    assert found == ["runs/a", "runs/x/grown/start", "runs/x/small"]


def test_stages_are_refused_where_one_run_is_meant():
    with pytest.raises(ConfigError, match="recipe: found stages small, grown, branch, expected a single run"):
        load(list(COMMAND))


def test_cfg_shows_every_stage(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", *COMMAND, "--cfg", "job"]) == cli.USER_ERROR  # there is no corpus
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("# stage")] == [
        f"# stage {name}" for name in ("small", "grown", "branch")
    ]
    assert err.splitlines()[0].startswith("stages.small: [corpus] data.path=nowhere")


def test_cfg_shows_one_stage(capsys: pytest.CaptureFixture[str]):
    cli.main(["train", *COMMAND, "stage=grown", "--cfg", "job"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("# stage")] == ["# stage grown"]


def test_a_stage_of_a_job_must_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert cli.main(["train", *COMMAND, "stage=grwn"]) == cli.USER_ERROR
    assert "stage=grwn: found no stage grwn" in capsys.readouterr().err
    assert cli.main(["train", *COMMAND, "stage=small", "stage=grown"]) == cli.USER_ERROR
    assert "stage=small stage=grown: found 2 stages, expected one" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", *COMMAND]) == cli.USER_ERROR
    assert capsys.readouterr().err == (
        "stage: found no choice, expected one of small, grown, branch. Fix: add stage=small\n"
    )


def test_a_stage_waits_for_its_parent(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    command = [text for text in COMMAND if not text.startswith("run.dir")]
    assert cli.main(["train", *command, f"run.dir={tmp_path}", "stage=grown"]) == cli.USER_ERROR
    assert "stage=grown: found no finished stage small" in capsys.readouterr().err


def test_what_a_stage_resolves_to_is_a_whole_configuration():
    for stage in stages().values():
        tree = to_tree(stage.config)
        assert "stages" not in tree
        assert tree["data"]["path"] == "nowhere"
