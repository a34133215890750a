"""Random layerwise token dropping drops the same tokens at every layout and on both engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows

STEPS = 6
DROPPING = (
    "technique=[token_dropping]",
    "techniques.token_dropping.start=16",
    "techniques.token_dropping.steps=5",  # the last step computes all 64
)
RUN = (*SMALL_MODEL, *SHORT_RUN, f"train.steps={STEPS}")
GPT = (
    "model.norm=layernorm",
    "model.position=learned",
    "model.bias=true",
    "model.tied_embeddings=true",
    "model.qk_norm=true",
)
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
STAGES = "parallel.pipeline=2"
FULL = "train.recompute=full"
ZERO = "engine=deepspeed"

# name: (ranks, layout). With stages the clock is ahead of what is computed again.
LAYOUTS = {
    "micro-batch 4": (1, ["train.micro_batch=4"]),
    "pipeline 2, recompute all": (2, [STAGES, FULL]),
    "pipeline 2 interleaved, recompute all": (2, [STAGES, "parallel.virtual_pipeline=2", FULL]),
    "sequence parallel 2 x data 2, recompute attention": (4, [*SEQUENCE, "train.recompute=selective"]),
    "sequence parallel 2 x pipeline 2": (4, [*SEQUENCE, STAGES, FULL]),
    "ZeRO 1, pipeline 2 interleaved": (
        2,
        [ZERO, "engine.zero_stage=1", STAGES, "parallel.virtual_pipeline=2", FULL],
    ),
    "ZeRO 2, sequence parallel 2": (2, [ZERO, "engine.zero_stage=2", *SEQUENCE]),
    "ZeRO 3, data 2": (2, [ZERO, "engine.zero_stage=3", FULL]),
}
# Those whose ways the others take, too.
SLOW = (
    "pipeline 2, recompute all",
    "sequence parallel 2 x data 2, recompute attention",
    "ZeRO 2, sequence parallel 2",
)
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
Rows = list[dict[str, Any]]
Train = Callable[..., Rows]


@pytest.fixture(scope="module")
def run(trained) -> Train:
    """Train; the rows of its metrics."""

    def run(world: int, *overrides: str, technique: tuple[str, ...] = DROPPING) -> Rows:
        return rows(trained(world, *RUN, *technique, *overrides))

    return run


@pytest.fixture(scope="module")
def single(run: Train) -> Rows:
    return run(1)


def assert_same(found: Rows, expected: Rows, tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) == STEPS
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=tolerance), (a["step"], a["loss"], b["loss"])
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=10 * tolerance), a["step"]
        assert a["token_dropping"] == b["token_dropping"]
        assert (a["layer_tokens"], a["flops"]) == (b["layer_tokens"], b["flops"])
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=tolerance)


def test_tokens_are_dropped_and_counted(single: Rows, run: Train):
    # 16 + 48 t / 5, down to multiples of 16.
    assert [row["token_dropping"]["kept_tokens"] for row in single] == [16, 16, 32, 32, 48, 64]
    assert single[-1]["tokens"] == STEPS * 8 * 64
    assert single[-1]["layer_tokens"] == 8 * (40 + 40 + 48 + 48 + 56 + 64)
    without = run(1, technique=())
    assert all(a["loss"] != b["loss"] for a, b in zip(single, without, strict=True))
    assert 0.7 < single[-1]["flops"] / without[-1]["flops"] < 0.9


@pytest.mark.parametrize("layout", EACH)
def test_layouts_and_engines_equal_one_rank(layout: str, run: Train, single: Rows):
    world, overrides = LAYOUTS[layout]
    assert_same(run(world, *overrides), single)


def test_learned_positions_and_tied_embeddings(run: Train):
    assert_same(run(2, *GPT, STAGES), run(1, *GPT))


DROPOUT = "model.dropout=0.1"


def test_recomputation_changes_no_bit(run: Train, single: Rows):
    """Dropout, drawn anew in the layers, included."""
    for found, expected in ((run(1, FULL), single), (run(1, FULL, DROPOUT), run(1, DROPOUT))):
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in found] == [row[key] for row in expected]


def test_bf16_stays_close_to_fp32(run: Train, single: Rows):
    bf16 = run(2, "train.precision=bf16", *SEQUENCE)
    assert_same(bf16, single, tolerance=5e-3)
    assert any(a["loss"] != b["loss"] for a, b in zip(bf16, single, strict=True)), "bf16 must be bf16"


def test_a_run_measured_in_layer_tokens_ends_with_a_record_and_an_evaluation(run: Train):
    budget = 8 * 64 * 6
    overrides = [
        "train.steps=null",
        f"train.tokens={budget}",
        "train.count=layer_tokens",
        "train.log_every=4",
    ]
    found = run(1, *overrides)
    # After 6 steps 2368 of 3072 layer tokens are done, after 7 steps 2880.
    assert [row["step"] for row in found] == [4, 8]
    assert found[-1]["layer_tokens"] == 2368 + 2 * 512 >= budget
    assert "valid_loss" in found[-1]
    assert found[-1]["lr"] == pytest.approx(0.1 * 1e-3)
