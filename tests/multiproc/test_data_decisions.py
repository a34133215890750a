"""What data techniques decide together: the same at every layout and engine, and after a resume anywhere.

A run with a mixing policy, replay, a curriculum, reweighting and token dropping at once notes the mixture of
each step, and the domain, tokens and weight of every sample; the run of one rank is the oracle.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from training import SHORT_RUN, SMALL_MODEL

from megafab.loss.terms import LossTerms
from megafab.run import Batch, Progress, StepPlan
from megafab.techniques.bus import Bus

pytestmark = pytest.mark.multiproc

STEPS, WARMUP = 8, 3
TECHNIQUES = (
    "technique=[online_mixing,replay,curriculum,sample_reweighting,token_dropping]",
    f"techniques.online_mixing.warmup_steps={WARMUP}",
    *("techniques.replay.domains=[prose]", "techniques.replay.share=0.25", "techniques.replay.seed=7"),
    "techniques.curriculum.difficulty=rarity-64",
    "techniques.curriculum.pacing={start: 20, end: 100, steps: 6}",
    *("techniques.sample_reweighting.over=batch", f"techniques.sample_reweighting.warmup_steps={WARMUP}"),
    *("techniques.token_dropping.start=32", "techniques.token_dropping.steps=6"),
    "techniques.token_dropping.round_to=4",
)
LAYOUTS = {  # ranks, and what differs from one
    "data2": (2, ()),
    "data4": (4, ()),
    "data2, two rows at a time": (2, ("train.micro_batch=2",)),
    "data2, all rows at once": (2, ("train.micro_batch=4",)),
    "tensor2": (2, ("parallel.tensor=2",)),
    "sequence2": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline2": (2, ("parallel.pipeline=2",)),
    "ZeRO 1, pipeline2": (2, ("engine=deepspeed", "engine.zero_stage=1", "parallel.pipeline=2")),
    "ZeRO 2, data2": (2, ("engine=deepspeed", "engine.zero_stage=2")),
    "ZeRO 3, data2": (2, ("engine=deepspeed", "engine.zero_stage=3")),
}


class Sample(NamedTuple):
    """What was read as a sample, and what it counted."""

    domain: int
    tokens: int  # a checksum


class Decisions(NamedTuple):
    """By step: the mixture, tokens kept and windows admitted; the samples; and the weights of some."""

    plans: dict[int, tuple[tuple[float, ...], int | None, tuple[int, ...] | None]]
    samples: dict[int, Sample]
    weights: dict[int, float]


class Recorder:
    """The bus, with notes of what passes through it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.decisions = Decisions({}, {}, {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        plan = self._bus.schedule(plan, progress)
        self.decisions.plans[plan.step] = plan.domain_weights, plan.kept_tokens, plan.admitted
        return plan

    def batch(self, batch: Batch, plan: StepPlan) -> Batch:
        batch = self._bus.batch(batch, plan)
        columns = batch.sample_B.tolist(), batch.domain_B.tolist(), batch.tokens_BL.numpy()
        for sample, domain, tokens in zip(*columns, strict=True):
            self.decisions.samples[sample] = Sample(domain, zlib.crc32(tokens.tobytes()))
        return batch

    def loss(self, terms: LossTerms, batch: Batch) -> None:
        self._bus.loss(terms, batch)
        weights = terms.recorded()["sample_weight"][:, 0].tolist()
        self.decisions.weights.update(zip(batch.sample_B.tolist(), weights, strict=True))


def train(rank: int, world: int, overrides: list[str]) -> Decisions:
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform
    from megafab.train import fit

    platform.start(rank, 1)
    run = build(load.load(overrides), ranks=world, message=lambda text: None)
    recorder = Recorder(run.bus)
    fit(dataclasses.replace(run, bus=recorder))
    return recorder.decisions


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory):
    """The decisions of a run, joined over its ranks, and its directory."""
    from launch.cli import main

    data = tmp_path_factory.mktemp("decisions") / "corpus"
    shutil.copytree(corpus, data)
    assert main(["data", "difficulty", f"path={data}", "seq_len=64", "metric=rarity", "workers=1"]) == 0
    base = [*SMALL_MODEL, *SHORT_RUN, *TECHNIQUES, f"train.steps={STEPS}", f"data.path={data}"]

    def run(world: int, *overrides: str) -> tuple[Decisions, Path]:
        directory = tmp_path_factory.mktemp("run")
        parts = ranks.run(train, [*base, f"run.dir={directory}", *overrides], world=world, timeout=240)
        joined = Decisions({}, {}, {})
        for part in parts:
            assert part.plans == parts[0].plans, "every rank plans the same"
            for whole, mine in zip(joined, part, strict=True):
                whole.update(mine)
        return joined, directory

    return run


@pytest.fixture(scope="module")
def alone(run) -> tuple[Decisions, Path]:
    return run(1, "checkpoint.every=1", "checkpoint.keep=20")


def assert_same(found: Decisions, want: Decisions, first: int = 0) -> None:
    """From step `first` on."""
    assert sorted(found.plans) == list(range(first, STEPS))
    for step, (weights, kept, admitted) in found.plans.items():
        want_weights, *rest = want.plans[step]
        assert [kept, admitted] == rest
        assert weights == pytest.approx(want_weights, rel=1e-5)
    assert found.samples == {n: sample for n, sample in want.samples.items() if n >= first * 8}
    # What a weight is follows from differences of losses, which are small here.
    later = {n: weight for n, weight in want.weights.items() if n >= first * 8}
    assert found.weights == pytest.approx(later, rel=1e-3)


def test_one_rank_decides_as_it_was_told(alone):
    decisions, _ = alone
    mixtures = [weights for weights, *_ in decisions.plans.values()]
    assert len(set(mixtures[: WARMUP + 1])) == 1
    assert len(set(mixtures[WARMUP + 1 :])) == STEPS - WARMUP - 1, "a decision a step"
    assert [kept for _, kept, _ in decisions.plans.values()] == [32, 36, 40, 48, 52, 56, None, None]
    assert [sum(decisions.samples[n].domain == 2 for n in range(8 * s, 8 * s + 8)) for s in range(STEPS)] == [
        2
    ] * 8
    uniform = [weight for n, weight in decisions.weights.items() if n < 8 * WARMUP]
    assert set(uniform) == {1.0}
    assert len(set(decisions.weights.values())) > 20


FAST = ("tensor2", "data2", "ZeRO 2, data2", "ZeRO 3, data2")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_decisions_do_not_depend_on_layout_or_engine(run, alone, layout: str):
    world, overrides = LAYOUTS[layout]
    assert_same(run(world, *overrides)[0], alone[0])


@pytest.mark.parametrize("step", [2, 6], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize(("world", "overrides"), [(1, ()), LAYOUTS["ZeRO 2, data2"]], ids=["same", "other"])
def test_a_resume_decides_on(run, alone, step: int, world: int, overrides: tuple[str, ...]):
    decisions, directory = alone
    resume = f"checkpoint.resume={directory}/checkpoints/step_{step:08d}"
    found, _ = run(world, resume, *overrides)
    assert_same(found, decisions, first=step)
    if world == 1:
        assert {step: found.plans[step] for step in found.plans} == {
            s: decisions.plans[s] for s in found.plans
        }
