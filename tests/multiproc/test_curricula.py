"""Both curricula in whole runs measured in tokens: engines and layouts train on the same, for as long."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch import cli

PACING = "techniques.{}.pacing={{start:{},end:{},steps:8,round_to:{}}}"
ARGUMENTS = (
    *(*SMALL_MODEL, *SHORT_RUN, "train.steps=null", "eval.samples=0", "train.log_every=3"),
    *("technique=[curriculum,sequence_curriculum]", "techniques.curriculum.difficulty=rarity-64"),
    *(PACING.format("curriculum", 10, 100, 1), PACING.format("sequence_curriculum", 16, 64, 16)),
)
# 16 + 48 * t / 8 down to multiples of 16.
LENGTHS = [16, 16, 32, 32, 32, 48, 48, 64, 64, 64]
# Settings, tokens of each step, another layout.
RUNS = {
    # 8 sequences of these lengths are 3328 tokens; 7 steps of whole sequences would be enough for as many.
    "truncate": (
        ["train.tokens=3328"],
        [8 * length for length in LENGTHS],
        ["engine=deepspeed", "engine.zero_stage=2"],
    ),
    # 7 steps, as 48 tokens do not divide 64: 96 are computed for them. Whole sequences would need 8.
    "reshape": (
        ["train.tokens=4096", "model.position=learned"],
        [8 * 64 if length != 48 else 8 * 96 for length in LENGTHS[:7]],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
}


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the corpus with an index of difficulty."""
    copy = tmp_path_factory.mktemp("curricula") / "corpus"
    shutil.copytree(corpus, copy)
    assert cli.main(["data", "difficulty", f"path={copy}", "seq_len=64", "workers=1"]) == 0
    return copy


@pytest.mark.parametrize("mode", RUNS)
def test_another_engine_or_layout_trains_on_the_same(mode: str, data: Path, ranks, tmp_path: Path) -> None:
    overrides, tokens, layout = RUNS[mode]
    arguments = [*ARGUMENTS, *overrides, f"techniques.sequence_curriculum.mode={mode}", f"data.path={data}"]
    ranks.run(train, [*arguments, f"run.dir={tmp_path}/one"], init=False)
    alone = rows(tmp_path / "one")
    assert alone[-1]["step"] == len(tokens), "the last step is logged, wherever it is"
    for row in alone:
        assert row["tokens"] == sum(tokens[: row["step"]])
        assert row["sequence_curriculum"] == {"seq_len": LENGTHS[row["step"] - 1]}
        percent = min(100, (10 + 90 * row["step"] / 8) // 1)
        assert row["curriculum"]["difficulty"] == percent
        assert row["curriculum"]["admitted"]["code"] == pytest.approx(percent / 100, abs=0.01)
    assert alone[-1]["loss"] < alone[0]["loss"]
    ranks.run(train, [*arguments, *layout, f"run.dir={tmp_path}/two"], world=2, init=False)
    for row, want in zip(rows(tmp_path / "two"), alone, strict=True):
        for key in ("step", "tokens", "flops", "lr", "sequence_curriculum", "curriculum"):
            assert row[key] == want[key]
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["domain_loss"] == pytest.approx(want["domain_loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
