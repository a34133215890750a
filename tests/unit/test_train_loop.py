"""What `fit` does, call by call. Its parts are stand-ins that write down their calls: the page is tested."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megafab.train
from megafab.errors import UserError
from megafab.evaluation import evaluate
from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms
from megafab.resilience.spikes import Spike
from megafab.run import Action, Cadence, GradStats, Progress, Run, StepOutcome, StepPlan, Validation, Verdict
from megafab.train import fit


class Diary:
    """A stand-in for every part of a run: notes each call, and answers as told."""

    def __init__(
        self,
        steps: int,
        *,
        start: int | Progress = 0,
        signal_at: int = 0,
        signal_between: int = 0,
        bad: frozenset[int] = frozenset(),
        spike_at: int = 0,
    ) -> None:
        self.calls: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.progress = start if isinstance(start, Progress) else Progress(start)
        self.steps, self.signal_at, self.signal_between, self.bad = steps, signal_at, signal_between, bad
        self.name, self.capabilities = "SIGTERM", frozenset[str]()
        self.asked = 0
        self.spike_at, self.margin = spike_at, 3

    def note(self, what: str) -> None:
        self.calls.append(what)

    # checkpoints, telemetry, signals
    def restore(self) -> Progress:
        self.note("restore")
        return self.progress

    def save(self, progress: Progress, *, wait: bool) -> None:
        self.note(f"save {progress.step}" + " and wait" * wait)

    def save_first(self, progress: Progress) -> None:
        self.note(f"save first {progress.step}")

    def roll_back(self, step: int, margin: int) -> Progress:
        self.note(f"roll back to {step} - {margin}")
        return Progress(step - margin)

    def discard_after(self, step: int) -> None:
        self.note(f"discard after {step}")

    def rewind(self, progress: Progress) -> None:
        self.note(f"rewind {progress.step}")

    # the controller of loss spikes
    def look(self, progress: Progress, outcome: StepOutcome, ledger: LossLedger) -> Spike | None:
        if progress.step != self.spike_at:
            return None
        self.spike_at = 0
        return Spike(progress.step - 1, progress.step, False, {}, ())

    def decide(self, spike: Spike, progress: Progress) -> None:
        self.note(f"decide {spike.first} at {progress.step}")

    def check(self, step: int, *, saving: bool) -> None:
        self.note(f"check {step}" + " before saving" * saving)

    def compare(self, step: int) -> None:
        self.note("compare")

    def numbers(self) -> dict[str, dict[str, float]]:
        return {"stragglers": {"count": 0}}

    def start(self, progress: Progress, weights: str = "") -> None:  # telemetry, bus
        self.note(f"bus.start {progress.step}" if weights else f"start {progress.step}")

    def begin(self, step: int) -> None:
        self.note(f"begin {step}")

    def due(self, step: int, last: bool) -> bool:
        return last or step % 2 == 0

    def record(self, **row: Any) -> None:
        self.note(f"record {row['progress'].step}")
        self.rows.append(row)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.note("close")

    @contextlib.contextmanager
    def timers(self, part: str) -> Iterator[None]:
        self.note(f"[{part}")
        yield
        self.note("]")

    def __enter__(self) -> Diary:
        self.note("enter")  # checkpoints
        return self

    def __exit__(self, *error: object) -> None:
        self.note("exit")

    def leave(self) -> bool:
        self.asked += 1
        return self.asked == self.signal_at

    def leave_now(self) -> bool:
        self.note("leave?")
        return self.calls.count("leave?") == self.signal_between

    def amend(self, step: int, valid: Any) -> None:
        self.note(f"amend {step} {valid['loss']}")

    # schedules, loader, bus
    def reduced(self, gradients: Any) -> None:
        raise AssertionError("the engine calls it")

    def remaining(self, progress: Progress) -> int:
        return self.steps - progress.step

    def at(self, progress: Progress) -> StepPlan:
        self.note("schedules.at")
        return StepPlan(progress.step, 0.1, 0.0, 2, 2, 1, 4, (0.25, 0.75))

    def schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        self.note("bus.schedule")
        return plan

    def limit(self, plan: StepPlan) -> StepPlan:
        self.note("limit")
        return plan

    def take(self, plan: StepPlan) -> str:
        self.note("take")
        return "rows"

    def batch(self, batch: str, plan: StepPlan) -> str:
        self.note(f"bus.batch({batch})")
        return "changed rows"

    def loss(self, terms: Any, batch: Any) -> None:
        self.note("bus.loss")

    def gradients(self, stats: GradStats, ledger: LossLedger) -> Verdict:
        self.note("bus.gradients")
        return Verdict() if stats.finite else Verdict(Action.SKIP, reason="the norm is nan")

    def step(self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: Any) -> None:
        self.note("bus.step")

    def eval(self, entering: bool, weights: Any, losses: Any = None) -> None:
        self.note(f"bus.eval({entering})")

    def metrics(self, report: Any = None) -> dict[str, dict[str, float]]:
        return {"a_technique": {"x": 1.0}} if report is not None else {"spikes": {"rollbacks": 0}}

    # engine
    def weights(self) -> str:
        return "weights"

    def forward_backward(self, batch: Any, plan: StepPlan, loss: Any) -> LossLedger:
        self.note(f"forward_backward({batch})")
        assert loss == self.loss
        return _ledger(3.0, 0)

    def gradient_stats(self, edit: Any) -> GradStats:
        self.note("gradient_stats")
        assert edit == self.reduced
        return GradStats(1.0, self.calls.count("gradient_stats") not in self.bad)

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        self.note("update")
        return StepOutcome(verdict.action is not Action.SKIP, verdict, stats.norm)

    def evaluate(self, batch: Any, micro_batch: int, loss: Any) -> LossLedger:
        self.note(f"evaluate({batch}, {micro_batch})")
        return _ledger(2.0, 0) if batch == "books" else _ledger(4.0, 1)


def _ledger(nll: float, domain: int) -> LossLedger:
    ledger = LossLedger(("books", "code"), (), device=torch.device("cpu"), sum_ranks=lambda sums: sums)
    value_BL = torch.full((2, 4), nll)
    ledger.record(
        LossTerms(
            nll_BL=value_BL,
            mask_BL=torch.ones(2, 4),
            domain_B=torch.full((2,), domain),
        )
    )
    return ledger


def run_of(diary: Diary, **cadence: Any) -> Run:
    settings = {"eval_every": 0, "evaluate": False, "save_every": 0, "save_last": False, "max_skipped": 2}
    part: Any = diary
    return Run(
        engine=part,
        loader=part,
        schedules=part,
        bus=part,
        telemetry=part,
        checkpoints=part,
        validation=Validation(("books", "code"), 2),  # type: ignore[arg-type]
        invariants=part,
        signals=part,
        spikes=part,
        watchdog=part,
        stragglers=part,
        cadence=Cadence(**{**settings, **cadence}),
    )


STEP = [
    "schedules.at",
    "bus.schedule",
    "limit",
    "[data",
    "take",
    "bus.batch(rows)",
    "]",
    "[forward_backward",
    "forward_backward(changed rows)",
    "]",
    "[gradients",
    "gradient_stats",
    "bus.gradients",
    "]",
    "[update",
    "update",
    "bus.step",
    "]",
    "compare",
]
EVALUATE = [
    "[evaluate",
    "bus.eval(True)",
    "evaluate(books, 2)",
    "leave?",
    "evaluate(code, 2)",
    "bus.eval(False)",
    "]",
]


def save(step: int, wait: bool = False) -> list[str]:
    checked = f"check {step} before saving"
    return [checked, "[checkpoint", f"save {step}" + " and wait" * wait, "]"]


END = ["exit", "close", "close"]  # checkpoints; loader, telemetry


def test_a_run_call_by_call() -> None:
    diary = Diary(3)
    progress = fit(run_of(diary, eval_every=2, evaluate=True, save_every=2, save_last=True))
    assert diary.calls == [
        *("restore", "start 0", "enter", "bus.start 0", "save first 0", "leave?"),
        *("begin 1", *STEP, "check 1"),
        *("begin 2", *STEP, *EVALUATE, "record 2", *save(2)),
        *("begin 3", *STEP, *EVALUATE, "record 3", *save(3, wait=True)),
        *END,
    ]
    assert progress == Progress(step=3, samples=6, tokens=24, layer_tokens=24)


def test_a_row_has_the_steps_numbers() -> None:
    diary = Diary(1)
    fit(run_of(diary, evaluate=True))
    (row,) = diary.rows
    assert (row["loss"], row["domain_loss"]) == (3.0, {"books": 3.0})
    assert row["domain_weight"] == {"books": 0.25, "code": 0.75}
    assert row["valid"] == {"loss": 3.0, "domain_loss": {"books": 2.0, "code": 4.0}}
    numbers = {"spikes": {"rollbacks": 0}, "stragglers": {"count": 0}}
    assert row["extra"] == {"a_technique": {"x": 1.0}, **numbers}


def test_a_run_goes_on_where_it_was() -> None:
    diary = Diary(3, start=2)
    assert fit(run_of(diary)).step == 3
    assert diary.calls.count("update") == 1


def test_a_finished_run_does_nothing() -> None:
    diary = Diary(3, start=3)
    assert fit(run_of(diary, save_last=True, evaluate=True)).step == 3
    assert diary.calls == ["restore", "start 3", "enter", "bus.start 3", "save first 3", "leave?", *END]
    assert diary.messages == [
        "nothing left to do: step 3 reaches train.steps or train.tokens; raise it to go on"
    ]


def test_a_signal_saves_and_leaves_without_an_evaluation() -> None:
    diary = Diary(10, signal_at=4)
    progress = fit(run_of(diary, eval_every=4, evaluate=True))
    assert (progress.step, progress.owes_evaluation) == (4, True)
    assert diary.calls[-10:] == ["[evaluate", "]", "record 4", *save(4, wait=True), *END]
    assert diary.messages == ["SIGTERM: saved after step 4; run the same command to go on"]


def test_a_signal_puts_an_end_to_an_evaluation() -> None:
    diary = Diary(10, signal_between=2)
    progress = fit(run_of(diary, eval_every=3, evaluate=True))
    assert (progress.step, progress.owes_evaluation) == (3, True)
    evaluation = ["[evaluate", "bus.eval(True)", "evaluate(books, 2)", "leave?", "bus.eval(False)", "]"]
    assert diary.calls[-14:] == [*evaluation, "record 3", *save(3, wait=True), *END]
    assert diary.rows[-1]["valid"] is None


def test_the_evaluation_is_made_up_for_first() -> None:
    diary = Diary(5, start=Progress(4, owes_evaluation=True))
    assert not fit(run_of(diary, eval_every=4, evaluate=True)).owes_evaluation
    begun = ["restore", "start 4", "enter", "bus.start 4", "save first 4", "leave?"]
    assert diary.calls[:15] == [*begun, *EVALUATE, "amend 4 3.0", "begin 5"]


def test_nor_is_it_forgotten_when_a_second_signal_comes() -> None:
    diary = Diary(5, start=Progress(4, owes_evaluation=True), signal_between=2)
    progress = fit(run_of(diary, eval_every=4, evaluate=True))
    assert (progress.step, progress.owes_evaluation) == (4, True)
    assert not any(call.startswith(("amend", "begin")) for call in diary.calls)


def test_a_signal_before_the_first_step_leaves_at_once() -> None:
    diary = Diary(5, start=2, signal_between=1)
    assert fit(run_of(diary)).step == 2
    assert diary.calls == ["restore", "start 2", "enter", "bus.start 2", "save first 2", "leave?", *END]
    assert diary.messages == ["SIGTERM: left before a step; run the same command to go on"]


def test_a_signal_in_the_last_step_ends_as_ever() -> None:
    diary = Diary(2, signal_at=2)
    fit(run_of(diary, save_last=True))
    assert diary.calls[-8:] == ["record 2", *save(2, wait=True), *END]
    assert diary.messages == []


def test_discarded_updates_are_told_and_few_are_survived() -> None:
    diary = Diary(5, bad=frozenset({2, 4}))
    progress = fit(run_of(diary))
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (5, 2, 0)
    assert diary.messages == [f"step {n}: update discarded, the norm is nan" for n in (2, 4)]


def test_a_spike_takes_the_run_back_before_anything_is_made_of_it() -> None:
    """What is decided is committed first, and only then are the later checkpoints gone."""
    diary = Diary(6, spike_at=5)
    assert fit(run_of(diary, eval_every=5, evaluate=True, save_every=5)).step == 6
    there = diary.calls.index("begin 5")
    assert diary.calls[there : there + len(STEP) + 10] == [
        *("begin 5", *STEP[:-1], "[checkpoint", "roll back to 3 - 3", "decide 4 at 0", "save 0 and wait"),
        *("discard after 0", "]", "rewind 0", "bus.start 0", "leave?", "begin 1"),
    ]
    assert diary.calls.count("update") == 5 + 6


def test_too_many_in_a_row_end_the_run() -> None:
    diary = Diary(9, bad=frozenset({2, 3, 4, 5}))
    with pytest.raises(
        UserError, match=r"train\.max_skipped=2: .*last 2 updates discarded, up to step 3.*Fix: lower"
    ):
        fit(run_of(diary, save_every=9, save_last=True))
    assert diary.calls[-3:] == END
    assert [call for call in diary.calls if call.startswith("save")] == ["save first 0"]


def test_evaluate_alone() -> None:
    diary = Diary(1)
    report = evaluate(run_of(diary, eval_every=1, evaluate=True), Progress(1))
    assert report is not None
    assert report.loss == 3.0
    assert diary.calls == EVALUATE[1:-1]


def test_cadence() -> None:
    cadence = Cadence(eval_every=3, evaluate=True, save_every=2, save_last=False, max_skipped=1)
    assert [s for s in range(1, 8) if cadence.evaluates(s, last=s == 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if cadence.saves(s, last=s == 7)] == [2, 4, 6]
    at_the_end = Cadence(eval_every=0, evaluate=True, save_every=0, save_last=True, max_skipped=1)
    assert [s for s in range(1, 8) if at_the_end.saves(s, last=s == 7)] == [7]
    assert [s for s in range(1, 8) if at_the_end.evaluates(s, last=s == 7)] == [7]
    never = Cadence(eval_every=1, evaluate=False, save_every=0, save_last=False, max_skipped=1)
    assert not any(never.evaluates(s, last=True) for s in range(1, 4))


def test_the_page_stays_a_page() -> None:
    source = Path(megafab.train.__file__).read_text()
    assert len(source.splitlines()) <= 150
    imported = {
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert {name for name in imported if name.startswith("megafab")} == {
        "megafab.errors",
        "megafab.evaluation",
        "megafab.loss.ledger",
        "megafab.run",
    }
