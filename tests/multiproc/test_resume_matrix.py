"""A checkpoint resumes at every other topology and engine: ten more steps with the losses of an unbroken run.

A row of the table is one pair. Each source is trained once for twenty steps, with a checkpoint after ten;
each target resumes from there. The same layout must give the same bits; another one sums in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows

HALF, STEPS = 10, 20
RUN = (
    *SMALL_MODEL,
    *SHORT_RUN,
    *("model.hidden=32", "model.ffn=64", "model.seq_len=32"),
    f"train.steps={STEPS}",
    "train.global_batch=6",  # data parallel 1, 2, 3 and 6
    "eval.samples=2",
    f"checkpoint.every={HALF}",
    "checkpoint.keep=9",
)
MODELS = {"dense": [], "experts": ["model.moe.experts=4", "model.moe.shared_ffn=32"]}
ENGINES = {
    "megatron": [],
    "zero 1": ["engine=deepspeed", "engine.zero_stage=1"],
    "zero 2": ["engine=deepspeed", "engine.zero_stage=2"],
    "zero 3": ["engine=deepspeed", "engine.zero_stage=3"],
}
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
LAYOUTS = {
    "data 1": (1, []),
    "data 2": (2, []),
    "data 3": (3, []),
    "tensor 2": (2, TENSOR),
    "tensor 4": (4, ["parallel.tensor=4"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 4": (4, ["parallel.pipeline=4"]),
    "pipeline 2, interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tensor 2 x pipeline 2": (4, [*TENSOR, "parallel.pipeline=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "expert 2": (2, ["parallel.expert=2"]),
    "expert 2 x tensor 2": (4, ["parallel.expert=2", *TENSOR]),
}
MEGATRON = "megatron"

# model; engine and layout of the source; engine and layout of the target. Every axis grows and shrinks.
PAIRS = [
    ("dense", MEGATRON, "data 3", MEGATRON, "data 3"),
    ("dense", MEGATRON, "data 3", MEGATRON, "context 2"),
    ("dense", MEGATRON, "tensor 2 x pipeline 2", MEGATRON, "tensor 2 x pipeline 2"),
    ("dense", MEGATRON, "tensor 2 x pipeline 2", MEGATRON, "data 3"),
    ("dense", MEGATRON, "pipeline 2, interleaved", MEGATRON, "tensor 2"),
    ("dense", MEGATRON, "data 1", MEGATRON, "pipeline 2, interleaved"),
    ("experts", MEGATRON, "expert 2", MEGATRON, "data 1"),
    ("experts", MEGATRON, "expert 2", MEGATRON, "expert 2 x tensor 2"),
    ("dense", MEGATRON, "tensor 2 x pipeline 2", "zero 1", "data 3"),
    ("dense", MEGATRON, "data 3", "zero 3", "data 2"),
    ("dense", "zero 1", "data 3", "zero 1", "data 3"),
    ("dense", "zero 1", "data 3", MEGATRON, "tensor 2"),
]
MORE_PAIRS = [
    ("dense", MEGATRON, "data 1", MEGATRON, "tensor 4"),
    ("dense", MEGATRON, "data 3", MEGATRON, "data 2"),
    ("dense", MEGATRON, "data 1", MEGATRON, "data 3"),
    ("dense", MEGATRON, "tensor 2 x pipeline 2", MEGATRON, "pipeline 4"),
    ("dense", MEGATRON, "pipeline 2, interleaved", MEGATRON, "pipeline 2"),
    ("dense", MEGATRON, "context 2", MEGATRON, "pipeline 2, interleaved"),
    ("dense", MEGATRON, "context 2", MEGATRON, "data 1"),
    ("experts", MEGATRON, "expert 2", MEGATRON, "expert 2"),
    ("experts", MEGATRON, "data 3", MEGATRON, "expert 2 x tensor 2"),
    ("dense", MEGATRON, "data 3", "zero 2", "data 2"),
    ("dense", "zero 1", "data 3", "zero 1", "tensor 2 x pipeline 2"),
    ("dense", "zero 2", "data 2", "zero 2", "data 2"),
    ("dense", "zero 2", "data 2", "zero 3", "data 3"),
    ("dense", "zero 3", "data 3", "zero 3", "data 3"),
    ("dense", "zero 3", "data 3", MEGATRON, "pipeline 2"),
]
ALL_PAIRS = [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """What training computed at each step, bit for bit; not how long it took."""
    keys = ("step", "samples", "tokens", "loss", "grad_norm", "lr", "skipped", "domain_loss", "valid_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows(run_dir)]


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def run(trained) -> Train:
    """Train a model with an engine at a layout; its run directory."""

    def run(model: str, engine: str, layout: str, *more: str) -> Path:
        world, axes = LAYOUTS[layout]
        return trained(world, *RUN, *MODELS[model], *ENGINES[engine], *axes, *more)

    return run


@pytest.fixture(scope="module")
def source(run) -> Train:
    """The uninterrupted runs, each trained once."""
    cache: dict[tuple[str, ...], Path] = {}

    def source(*what: str) -> Path:
        if what not in cache:
            cache[what] = run(*what)
        return cache[what]

    return source


def name(value: str) -> str:
    return value.replace(" ", "_")


@pytest.mark.parametrize(("model", "engine", "layout", "new_engine", "new_layout"), ALL_PAIRS, ids=name)
def test_ten_more_steps(run, source, model, engine, layout, new_engine, new_layout):
    unbroken = source(model, engine, layout)
    checkpoint = unbroken / "checkpoints" / f"step_{HALF:08d}"
    resumed = run(model, new_engine, new_layout, f"checkpoint.resume={checkpoint}")
    found, expected = numbers(resumed), numbers(unbroken)[HALF:]
    assert len(expected) == STEPS - HALF
    if (engine, layout) == (new_engine, new_layout):
        assert found == expected
        return
    assert [(row["step"], row["samples"]) for row in found] == [
        (row["step"], row["samples"]) for row in expected
    ]
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), a["step"]
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3), a["step"]
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=1e-5)
