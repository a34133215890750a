"""What every technique owes: off it is not there, on it resumes exactly and is equal at every topology.

The suite runs over the catalogue, so a new technique gets it by being there; it only adds a line to
`SETTINGS`, strong enough to show in a few steps of a tiny model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import write_corpus
from ranks import Ranks

from data_pipeline import difficulty
from data_pipeline.config import DifficultyConfig
from megafab.checkpoint.config import CheckpointConfig
from megafab.config.schema import RunConfig, TrainConfig
from megafab.data.config import DataConfig, EvalConfig
from megafab.data.scores import ScoresWriter
from megafab.engine.base import WeightEditor
from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.loss.terms import LossTerms
from megafab.model.config import ModelConfig
from megafab.optim.config import OptimConfig, ScheduleConfig
from megafab.run import Action, Batch, GradStats, Progress, StepOutcome, StepPlan, Verdict
from megafab.techniques import catalogue
from megafab.techniques.base import RESOURCES
from megafab.techniques.bus import Bus
from megafab.techniques.config import (
    CurriculumConfig,
    DynamicLoadingConfig,
    EMAConfig,
    FreezingConfig,
    GradualPruningConfig,
    LabelSmoothingConfig,
    OnlineMixingConfig,
    PacingConfig,
    PacingShape,
    Population,
    Ramp,
    ReplayConfig,
    SampleReweightingConfig,
    SequenceCurriculumConfig,
    SequenceMode,
    StaticSparsityConfig,
    TechniquesConfig,
    TokenDroppingConfig,
    TokenSelectionConfig,
    ZLossConfig,
)
from megafab.telemetry.config import RunSection, TrackingConfig, TrackingKind
from megafab.telemetry.rows import METRICS_FILE, flatten, read_rows
from megafab.topology.config import ParallelConfig

pytestmark = pytest.mark.multiproc

SETTINGS: dict[str, Any] = {
    "z_loss": ZLossConfig(weight=0.05),
    "label_smoothing": LabelSmoothingConfig(epsilon=0.2),
    "ema": EMAConfig(decay=0.5),
    "online_mixing": OnlineMixingConfig(warmup_steps=1),
    "dynamic_loading": DynamicLoadingConfig(reference={"books": 3.0, "code": 4.0}),
    "replay": ReplayConfig(domains=["books"], share=0.3, seed=5),
    "sample_reweighting": SampleReweightingConfig(temperature=4.0, warmup_steps=1, over=Population.batch),
    "token_selection": TokenSelectionConfig(reference="reference", keep=0.5, warmup_steps=1),
    "token_dropping": TokenDroppingConfig(start=4, steps=5, round_to=2, layers=(0, 1)),
    # Clusters of 20, 40, ... 100 percent: they grow before and after the step of the save.
    "curriculum": CurriculumConfig("rarity-16", pacing=PacingConfig(start=1, end=100, steps=5)),
    # Lengths that all axes divide, one of which does not divide the 16 of the model.
    "sequence_curriculum": SequenceCurriculumConfig(
        SequenceMode.reshape, PacingConfig(PacingShape.step, levels=(4, 12, 16), last_steps=(2, 4))
    ),
    "static_sparsity": StaticSparsityConfig(),
    # Prunes after each of steps 2 to 5, so before and after the step of the save.
    "gradual_pruning": GradualPruningConfig(begin=0.2, end=0.75, ramp=Ramp.linear, every=1),
    "freezing": FreezingConfig(["decoder.layers.1.*"]),
}
# Layouts that a rule refuses (config/technique_rules.py).
REFUSED = {("token_dropping", "context2")}
NAMES = sorted(catalogue.CLASSES)
STEPS, HALF = 6, 3

Row = dict[str, Any]


def config_of(
    directory: Path, data: Path, name: str | None, resume: Path | None = None, **parallel: Any
) -> RunConfig:
    """A run of STEPS steps that logs, evaluates and, half way, saves."""
    return RunConfig(
        model=ModelConfig(name="tiny", layers=2, hidden=32, heads=2, seq_len=16),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(steps=STEPS, global_batch=8, micro_batch=2),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup=2),
        data=DataConfig(path=str(data), prefetch=False),
        eval=EvalConfig(every=1, samples=4),
        checkpoint=CheckpointConfig(every=HALF, keep=2, resume=str(resume or "none")),
        tracking=TrackingConfig(kind=TrackingKind.none),
        techniques=TechniquesConfig(**({name: SETTINGS[name]} if name else {})),
        run=RunSection(name="contract", dir=str(directory)),
    )


def train(rank: int, world: int, config: RunConfig, audited: bool = False) -> str:
    """Trains on one rank; the hash of every bit of this rank's state at the end."""
    from megafab.build import build
    from megafab.platform import platform
    from megafab.train import fit

    platform.start(rank, 1)
    run = build(config, ranks=world)
    fit(dataclasses.replace(run, bus=_Audit(run.bus)) if audited else run)
    digest = hashlib.sha256()
    state = {**run.engine.sharded_state(), **run.bus.sharded_state(run.engine.weights())}
    for key in sorted(state):
        for piece in state[key].pieces:
            digest.update(f"{key}{piece.offset}".encode())
            digest.update(piece.tensor.contiguous().numpy().tobytes())
    digest.update(repr((run.engine.state_dict(), run.bus.state_dict(), run.loader.state_dict())).encode())
    return digest.hexdigest()


def train_twice(rank: int, world: int, first: RunConfig, second: RunConfig) -> str:
    """Two runs in one process; the hash of the second."""
    from megafab.topology.groups import shutdown

    del os.environ["RANK"]  # by which a rank tells that it belongs to a job; a lone one needs no port
    train(rank, world, first)
    shutdown()
    return train(rank, world, second)


class _Audit:
    """The bus, looked over: whatever a hook changes must be among the `writes` of the techniques."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._writes = frozenset[str]().union(*(catalogue.load(name).writes for name in bus.state_dict()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        changed = self._bus.schedule(plan, progress)
        assert self._bus.schedule(plan, progress) == changed, "on_schedule must be pure"
        for field, resource in PLAN_FIELDS.items():
            if not (field == "domain_weights" and "replay" in self._writes):
                self._require(resource, getattr(changed, field) == getattr(plan, field))
        return changed

    def batch(self, batch: Batch, plan: StepPlan) -> Batch:
        changed = self._bus.batch(batch, plan)
        again = self._bus.batch(batch, plan)
        self._require("batch", changed.retrieved is batch.retrieved)
        others = {"columns", "retrieved"}
        columns = [field.name for field in dataclasses.fields(Batch) if field.name not in others]
        for column in columns:
            before, after = getattr(batch, column), getattr(changed, column)
            assert torch.equal(after, getattr(again, column)), "on_batch draws from its key only"
            self._require("batch", torch.equal(before, after))
        return changed

    def loss(self, terms: LossTerms, batch: Batch) -> None:
        before = terms.total().item()
        self._bus.loss(terms, batch)
        self._require("loss_terms", list(terms.values()) == ["nll"])
        if "loss_terms" not in self._writes:
            self._require("token_weights", terms.total().item() == before)

    def start(self, progress: Progress, weights: WeightEditor) -> None:
        before = masters(weights)
        self._bus.start(progress, weights)
        self._require("weights", masters(weights) == before)

    def reduced(self, gradients: Mapping[str, torch.Tensor]) -> None:
        before = {name: gradient.clone() for name, gradient in gradients.items()}
        if self._bus.reduced is not None:
            self._bus.reduced(gradients)
        same = all(torch.equal(gradient, before[name]) for name, gradient in gradients.items())
        self._require("gradient_entries", same)

    def gradients(self, stats: GradStats, ledger: LossLedger) -> Verdict:
        verdict = self._bus.gradients(stats, ledger)
        self._require("gradients", verdict.action is Action.APPLY)
        return verdict

    def step(self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor) -> None:
        before = masters(weights)
        self._bus.step(plan, outcome, ledger, weights)
        self._require("weights", masters(weights) == before)

    def eval(self, entering: bool, weights: WeightEditor, losses: LedgerReport | None = None) -> None:
        if entering:
            self._trained = masters(weights)
        self._bus.eval(entering, weights, losses)
        if entering:
            self._require("evaluation_weights", masters(weights) == self._trained)
        else:
            assert masters(weights) == self._trained, "every bit comes back after an evaluation"

    def _require(self, resource: str, unchanged: bool) -> None:
        assert unchanged or resource in self._writes, f"{resource} was changed but is not declared"


PLAN_FIELDS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "global_batch": "batch_size",
    "seq_len": "sequence_length",
    "domain_weights": "mixture",
    "replayed": "replay",
    "kept_tokens": "kept_tokens",
    "mean_kept_tokens": "kept_tokens",
    "admitted": "windows",
}


def masters(weights: WeightEditor) -> dict[str, bytes]:
    """The bits of this rank's master weights."""
    return {name: weights.master(name).numpy().tobytes() for name in weights.names()}


class Lab:
    """Trains each setting once, however many tests ask for it."""

    def __init__(self, ranks: Ranks, root: Path) -> None:
        self.ranks, self.root, self.data = ranks, root, root / "data"
        generator = np.random.default_rng(0)

        def documents(count: int) -> list[np.ndarray]:
            lengths = generator.integers(5, 40, count)
            # Squares of uniform numbers: some tokens are frequent, so that there is something to learn.
            return [np.append(1 + (127 * generator.random(n) ** 2).astype(int), 0) for n in lengths]

        corpus = write_corpus(
            self.data,
            {"books": documents(60), "code": documents(60)},
            {"books": documents(12), "code": documents(12)},
            vocab_size=128,
        )
        scores = ScoresWriter(self.data / "scores" / "reference", corpus)
        scores.create()
        for domain, tokens in enumerate(corpus.tokens("train")):
            scores.write(domain, 0, 5 * generator.random(tokens))
        scores.finish(checkpoint="none", seq_len=16, packing="document")
        difficulty.build(DifficultyConfig(path=str(self.data), seq_len=16, workers=1))
        self._done: dict[str, tuple[list[str], list[Row], Path]] = {}

    def run(
        self, name: str | None, world: int = 1, resume: Path | None = None, **parallel: Any
    ) -> tuple[list[str], list[Row], Path]:
        """Digests of the ranks' states at the end, the rows, and the run's directory."""
        tag = f"{name}-{world}-{parallel}-{resume is not None and resume.parts[-3]}".replace(" ", "")
        if tag not in self._done:
            config = config_of(self.root / tag, self.data, name, resume=resume, **parallel)
            digests = self.ranks.run(train, config, world=world)
            self._done[tag] = digests, read_rows(self.root / tag / METRICS_FILE), self.root / tag
        return self._done[tag]

    def half_way(self, name: str, world: int = 1) -> Path:
        """The checkpoint that a run wrote after HALF steps."""
        return self.run(name, world)[2] / "checkpoints" / f"step_{HALF:08d}"


@pytest.fixture(scope="module")
def lab(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(ranks, tmp_path_factory.mktemp("contract"))


def numbers(rows: list[Row], name: str | None = None) -> list[Row]:
    """What was computed in each step, without what was measured."""
    keys = ["step", "tokens", "layer_tokens", "flops", "loss", "grad_norm", "lr", "domain_loss"]
    keys += ["domain_weight", "valid_loss", "valid_domain_loss"]
    return [{key: row[key] for key in keys} | {"own": row.get(name or "", {})} for row in rows]


def assert_close(got: list[Row], want: list[Row], name: str) -> None:
    """Equal up to the order in which sums are taken."""
    assert len(got) == len(want)
    for one, other in zip(numbers(got, name), numbers(want, name), strict=True):
        # A term may be the small difference of numbers of some nats, of which fp32 knows 3e-7.
        assert flatten(one) == pytest.approx(flatten(other), rel=1e-5, abs=2e-8), one["step"]


def test_every_technique_has_settings_here() -> None:
    assert sorted(SETTINGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_class_declares_itself(name: str) -> None:
    kind = catalogue.load(name)
    assert kind.name == name
    assert kind.writes <= RESOURCES
    assert kind.composes <= kind.writes


@pytest.mark.parametrize("name", NAMES)
def test_off_leaves_no_trace(lab: Lab, name: str) -> None:
    """In a process where it was just on, a run without it is bit for bit the run of a fresh process."""
    on = config_of(lab.root / f"before-{name}", lab.data, name)
    off = config_of(lab.root / f"after-{name}", lab.data, None)
    digests, rows, _ = lab.run(None)
    assert lab.ranks.run(train_twice, on, off, init=False) == digests
    assert numbers(read_rows(lab.root / f"after-{name}" / METRICS_FILE)) == numbers(rows)


@pytest.mark.parametrize("name", NAMES)
def test_on_does_something(lab: Lab, name: str) -> None:
    assert numbers(lab.run(name)[1]) != numbers(lab.run(None)[1])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_declared_changes(lab: Lab, name: str) -> None:
    config = config_of(lab.root / f"audit-{name}", lab.data, name)
    assert lab.ranks.run(train, config, True) == lab.run(name)[0]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(lab: Lab, name: str, world: int) -> None:
    digests, rows, _ = lab.run(name, world)
    resumed, resumed_rows, _ = lab.run(name, world, resume=lab.half_way(name, world))
    assert resumed == digests
    assert numbers(resumed_rows, name) == numbers(rows, name)[HALF:]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data2": (2, {}),
    "data4": (4, {}),
    "tensor2": (2, {"tensor": 2}),
    "sequence2": (2, {"tensor": 2, "sequence": True}),
    "pipeline2": (2, {"pipeline": 2}),
    "context2": (2, {"context": 2}),
}


SLOW = {"data4", "sequence2"}  # much as data2 and tensor2
# Much as gradual_pruning there.
SLOW_PAIRS = {("static_sparsity", layout) for layout in ("data2", "context2", "pipeline2")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair[1] in SLOW or pair in SLOW_PAIRS else [])
        for pair in itertools.product(NAMES, LAYOUTS)
        if pair not in REFUSED
    ],
)
def test_topology_does_not_matter(lab: Lab, name: str, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    assert_close(lab.run(name, world, **parallel)[1], lab.run(name)[1], name)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, {}, id="data2"),
        pytest.param(2, {"tensor": 2}, id="tensor2", marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2}, id="pipeline2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_change_of_topology(
    lab: Lab, name: str, world: int, parallel: dict[str, Any]
) -> None:
    resumed = lab.run(name, world, resume=lab.half_way(name), **parallel)[1]
    assert_close(resumed, lab.run(name)[1][HALF:], name)


class _Spoiler:
    """The bus, with a loss that is not a number on data rank 0 in the second step."""

    def __init__(self, bus: Bus, rank: int) -> None:
        self._bus, self._rank = bus, rank
        self._step = 0
        self.changed: list[bool] = []
        self.editor: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        self._step = plan.step
        return plan

    def loss(self, terms: LossTerms, batch: Batch) -> None:
        if self._step == 1 and self._rank == 0:
            terms.weigh(torch.full_like(terms.mask_BL, float("nan")))

    def gradients(self, stats: GradStats, ledger: LossLedger) -> Verdict:
        self._before = masters(self.editor)
        return self._bus.gradients(stats, ledger)

    def step(self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor) -> None:
        self.changed.append(masters(weights) != self._before)


def train_spoiled(rank: int, world: int, config: RunConfig) -> tuple[list[bool], Progress]:
    from megafab.build import build
    from megafab.platform import platform
    from megafab.train import fit

    platform.start(rank, 1)
    run = build(config, ranks=world)
    spoiler = _Spoiler(run.bus, rank)
    spoiler.editor = run.engine.weights()
    progress = fit(dataclasses.replace(run, bus=spoiler))
    return spoiler.changed, progress


def test_gradients_that_are_not_finite_on_one_rank_are_skipped_by_all(lab: Lab) -> None:
    config = config_of(lab.root / "spoiled", lab.data, None)
    for changed, progress in lab.ranks.run(train_spoiled, config, world=2):
        assert changed == [True, False, True, True, True, True]
        assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (STEPS, 1, 0)
    rows = read_rows(lab.root / "spoiled" / METRICS_FILE)
    assert [row["verdict"]["action"] if "verdict" in row else None for row in rows][:3] == [
        None,
        "SKIP",
        None,
    ]
    assert rows[1]["loss"] is not None, "the reported loss is unweighted, and was fine"
    assert all(np.isfinite(row["grad_norm"]) for row in rows[2:])
