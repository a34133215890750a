"""Every verified cell of `engine/capabilities.py`: trained for real, and equal to one rank of Megatron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows

from megafab.engine.capabilities import MODES, Feature, Mode
from megafab.engine.config import EngineName, Offload

pytestmark = pytest.mark.multiproc

Rows = list[dict[str, Any]]
Run = Callable[..., Rows]

MOE = ("model.moe.experts=4", "model.moe.shared_ffn=64", "model.moe.z_loss=0.001")
TIED = (
    "model.norm=layernorm",
    "model.activation=gelu",
    "model.position=learned",
    "model.bias=true",
    "model.tied_embeddings=true",
    "model.kv_heads=4",
    "model.qk_norm=true",
)
TURNED_ON_BY = {
    Feature.tensor: "parallel.tensor=2",
    Feature.sequence: "parallel.sequence=true",
    Feature.pipeline: "parallel.pipeline=2",
    Feature.interleaved: "parallel.virtual_pipeline=2",
    Feature.context: "parallel.context=2",
    Feature.expert: "parallel.expert=2",
    Feature.recompute: "train.recompute=full",
    Feature.bf16: "train.precision=bf16",
}
NEEDS = {
    Feature.sequence: {Feature.tensor},
    Feature.interleaved: {Feature.pipeline},
}
# Two micro-batches a data rank, or four: enough to accumulate, and to fill a pipeline.
SMALLER = ("model.hidden=32", "model.ffn=64", "model.seq_len=32", "train.micro_batch=2", "optim.lr=2e-3")
CLIP = 0.3
VERIFIED = [mode for mode in MODES if mode.verified]
BF16, EXPERT, INTERLEAVED = Feature.bf16, Feature.expert, Feature.interleaved


def ranks_of(features: frozenset[Feature]) -> int:
    """Two along each axis, and two data ranks where that leaves four ranks or fewer."""
    axes = 2 ** len(features & {Feature.tensor, Feature.pipeline, Feature.context})
    return axes if axes > 2 else 2 * axes


def overrides_of(mode: Mode, features: frozenset[Feature]) -> list[str]:
    return [*mode.overrides, *(text for feature, text in TURNED_ON_BY.items() if feature in features)]


def name_of(features: frozenset[Feature]) -> str:
    return "+".join(feature.value for feature in Feature if feature in features) or "data"


def parts(mode: Mode) -> Iterator[frozenset[Feature]]:
    """Every set of features within the verified ones that a configuration can have."""
    seen = set[frozenset[Feature]]()
    for together in mode.verified:
        for size in range(len(together)):
            for some in map(frozenset[Feature], itertools.combinations(together, size)):
                # Megatron does not train experts on a tensor axis without sequence parallelism.
                needs = {EXPERT: {Feature.sequence}} if Feature.tensor in some else {}
                if all(more <= some for one, more in (NEEDS | needs).items() if one in some):
                    seen.add(some)
    yield from sorted(seen - set(mode.verified), key=name_of)


@pytest.fixture(scope="module")
def run(trained) -> Run:
    """The rows of a run; the same run is trained once."""
    cache: dict[tuple[Any, ...], Rows] = {}

    def run(world: int, *overrides: str) -> Rows:
        key = world, *overrides
        if key not in cache:
            fixed = [*SMALL_MODEL, *SHORT_RUN, *SMALLER, f"optim.clip={CLIP}"]
            cache[key] = rows(trained(world, *fixed, *overrides))
        return cache[key]

    return run


class Tolerance(NamedTuple):
    """Relative, of losses and of gradient norms."""

    loss: float
    norm: float


FP32 = Tolerance(1e-5, 1e-5)
# Late in a run the norm of a few small batches amplifies what bf16 rounds away.
ROUNDED = Tolerance(2e-3, 1e-1)


def assert_same_curve(found: Rows, expected: Rows, tolerance: Tolerance) -> None:
    assert len(found) == len(expected) == 20
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.3, "the reference must have learned something"
    assert min(row["grad_norm"] for row in expected) > CLIP, "clipping must have acted"
    for a, b in zip(found, expected, strict=True):
        for key, slack in (("loss", tolerance.loss), ("grad_norm", tolerance.norm)):
            assert math.isclose(a[key], b[key], rel_tol=slack), (a["step"], key, a[key], b[key])
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=tolerance.loss)


def check(run: Run, mode: Mode, features: frozenset[Feature], model: tuple[str, ...]) -> None:
    """In fp32 against one rank; in bf16, whose rounding depends on the layout, against Megatron's there."""
    world = ranks_of(features)
    found = run(world, *model, *overrides_of(mode, features))
    if BF16 in features:
        reference, tolerance = run(world, *model, *overrides_of(MODES[0], features)), ROUNDED
    else:
        reference, tolerance = run(1, *model, *MODES[0].overrides), FP32
    assert_same_curve(found, reference, tolerance)


@pytest.mark.slow  # eight ranks on two cores take a minute
@pytest.mark.parametrize(
    ("mode", "features"),
    [pytest.param(m, all_of, id=f"{m.name}: {name_of(all_of)}") for m in VERIFIED for all_of in m.verified],
)
def test_all_at_once_equals_one_rank(mode: Mode, features: frozenset[Feature], run: Run) -> None:
    check(run, mode, features, MOE if EXPERT in features else ())


# Stage 1 takes the ways that stage 2 takes, and so does what is offloaded in stage 3 those of the others.
QUICK = {1: (), 2: (Offload.none, Offload.optimizer), 3: (Offload.none,)}
SOME = {
    "stages": frozenset({Feature.tensor, Feature.sequence, Feature.pipeline, INTERLEAVED, Feature.recompute}),
    "experts": frozenset({Feature.context, EXPERT}),
    "tensor": frozenset({Feature.tensor, Feature.sequence, BF16}),
}


@pytest.mark.parametrize(
    ("mode", "some"),
    [
        pytest.param(
            mode,
            some,
            id=f"{mode.name}: {some}",
            marks=() if mode.offload in QUICK[mode.zero_stage] else pytest.mark.slow,
        )
        for mode in VERIFIED
        for some in SOME
        if mode.zero_stage in (1, 2, 3) and mode.refusal(SOME[some]) is None
    ],
)
def test_some_of_it_equals_one_rank(mode: Mode, some: str, run: Run) -> None:
    features = SOME[some]
    check(run, mode, features, MOE if EXPERT in features else ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "features"),
    [pytest.param(m, some, id=f"{m.name}: {name_of(some)}") for m in VERIFIED for some in parts(m)],
)
def test_any_part_of_it_equals_one_rank(mode: Mode, features: frozenset[Feature], run: Run) -> None:
    check(run, mode, features, MOE if EXPERT in features else ())


TIED_FEATURES = {
    "plain": frozenset({Feature.tensor, Feature.pipeline}),
    "interleaved": frozenset({Feature.tensor, Feature.sequence, Feature.pipeline, INTERLEAVED}),
    "without stages": frozenset({Feature.tensor, Feature.sequence}),
}


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        pytest.param(
            mode,
            layout,
            id=f"{mode.name}: {layout}",
            marks=() if mode.name in ("ZeRO 2", "ZeRO 3") and layout != "plain" else pytest.mark.slow,
        )
        for mode in VERIFIED
        if mode.engine is EngineName.deepspeed
        for layout, features in TIED_FEATURES.items()
        if mode.refusal(features) is None
    ],
)
def test_tied_embeddings_equal_one_rank(mode: Mode, layout: str, run: Run) -> None:
    check(run, mode, TIED_FEATURES[layout], TIED)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reduction_that_does_not_overlap_gives_the_same(stage: int, run: Run) -> None:
    mode = next(m for m in MODES if m.zero_stage == stage and m.offload is Offload.none)
    found = run(2, *mode.overrides, "engine.overlap_grad_reduce=false", "engine.bucket_parameters=20000")
    assert_same_curve(found, run(1, *MODES[0].overrides), FP32)


def test_stage_3_without_persistent_parameters_gives_the_same(run: Run) -> None:
    found = run(2, "engine=deepspeed", "engine.zero_stage=3", "engine.persistent_parameters=0")
    assert_same_curve(found, run(1, *MODES[0].overrides), FP32)
