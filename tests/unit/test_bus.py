from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megafab.errors import ConfigError
from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms
from megafab.model.config import ModelConfig
from megafab.model.shape import ModelShape
from megafab.run import Action, Batch, GradStats, Progress, StepPlan, Verdict
from megafab.techniques import catalogue
from megafab.techniques.base import Facts, Key, Technique
from megafab.techniques.bus import Bus
from megafab.techniques.config import EMAConfig, TechniquesConfig, ZLossConfig

FINE = GradStats(1.0, True)


def plan(**changes) -> StepPlan:
    return replace(StepPlan(3, 1.0, 0.1, 2, 1, 2, 2, (1.0,)), **changes)


SHAPE = ModelShape.of(ModelConfig(name="tiny", layers=2, hidden=8, heads=1, seq_len=2, vocab=128))
FACTS = Facts(1, SHAPE, ("d",), (1.0,), (100,), (400,), 10)


def batch() -> Batch:
    rows = torch.arange(4).view(2, 2)
    one = torch.ones(2, dtype=torch.int64)
    return Batch(rows, rows, torch.ones(2, 2), rows, rows, one, one)


def ledger(*terms: str) -> LossLedger:
    return LossLedger(("d",), terms, device=torch.device("cpu"), sum_ranks=lambda sums: sums)


def alone(value: int) -> int:
    return value


def no_agreement(value: int) -> int:
    raise AssertionError("ranks must not exchange anything here")


def bus(*kinds: type[Technique], agree_max=alone, messages: list[str] | None = None, **settings) -> Bus:
    settings = {"seed": 1, "data_rank": 0, "capabilities": frozenset({"veto", "weights"}), **settings}
    said = messages if messages is not None else []
    return Bus([kind(None, FACTS) for kind in kinds], agree_max=agree_max, message=said.append, **settings)


class Halve(Technique):
    name = "halve"
    writes = frozenset({"learning_rate"})
    composes = frozenset({"learning_rate"})

    def on_schedule(self, plan, progress):
        return replace(plan, lr=plan.lr / 2)

    def state_dict(self):
        return {"seen": self.__dict__.get("seen", 7)}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Raise(Technique):
    name = "raise"
    writes = frozenset({"learning_rate"})
    composes = frozenset({"learning_rate"})
    after = ("halve", "not_on")

    def on_schedule(self, plan, progress):
        return replace(plan, lr=plan.lr + 1)


class Alone(Technique):
    name = "alone"
    writes = frozenset({"learning_rate"})


def verdict_of(verdict: Verdict) -> type[Technique]:
    class Decide(Technique):
        name = "decide"
        writes = frozenset({"gradients"})
        composes = frozenset({"gradients"})

        def on_gradients(self, stats, ledger):
            return verdict

    return Decide


def test_an_empty_bus_changes_nothing_says_nothing_and_asks_no_rank() -> None:
    said: list[str] = []
    empty = bus(agree_max=no_agreement, messages=said)
    before, rows = plan(), batch()
    assert empty.schedule(before, Progress()) is before
    assert empty.batch(rows, before) is rows
    assert empty.reduced is None
    assert empty.gradients(FINE, ledger()) == Verdict()
    assert (empty.terms, empty.state_dict(), empty.metrics(ledger().reduced())) == ((), {}, {})
    assert said == []


@pytest.mark.parametrize("kinds", [(Halve, Raise), (Raise, Halve)])
def test_order_follows_after(kinds) -> None:
    said: list[str] = []
    ordered = bus(*kinds, messages=said)
    assert ordered.schedule(plan(lr=1.0), Progress()).lr == 1.5
    assert said == ["techniques, in order: halve, raise"]


def test_order_without_after_is_as_given() -> None:
    class Other(Raise):
        name = "other"
        after = ()

    assert bus(Other, Halve).schedule(plan(lr=1.0), Progress()).lr == 1.0
    assert bus(Halve, Other).schedule(plan(lr=1.0), Progress()).lr == 1.5


@pytest.mark.parametrize("kinds", [(Halve, Alone), (Alone, Halve)])
def test_two_writers_of_one_thing_are_refused(kinds) -> None:
    first, second = (kind.name for kind in kinds)
    text = rf"technique=\[{first},{second}\]: found both change learning_rate.*Fix: leave one"
    with pytest.raises(ConfigError, match=text):
        bus(*kinds)


def test_weights_and_gradients_are_edited_in_order() -> None:
    class Double(Technique):
        name = "double"

        def on_start(self, progress, weights):
            weights.append((self.name, progress.step))

        def on_reduced(self, gradients):
            gradients["w"].mul_(2)

    class Add(Double):
        name = "add"
        after = ("double",)

        def on_reduced(self, gradients):
            gradients["w"].add_(1)

    both, started, gradient = bus(Add, Double), [], torch.tensor([3.0])
    both.start(Progress(5), started)  # type: ignore[arg-type]
    assert started == [("double", 5), ("add", 5)]
    assert both.reduced is not None
    both.reduced({"w": gradient})
    assert gradient.tolist() == [7.0]


def test_an_engine_that_lacks_something_is_named() -> None:
    class Editor(Technique):
        name = "editor"
        needs = frozenset({"weights"})

    with pytest.raises(ConfigError, match=r"technique\.editor: found an engine without weights"):
        bus(Editor, capabilities=frozenset({"veto"}))


def test_a_say_over_gradients_needs_veto() -> None:
    with pytest.raises(ConfigError, match="an engine without veto"):
        bus(verdict_of(Verdict()), capabilities=frozenset({"weights"}))


def test_gradients_that_are_not_finite_are_skipped_without_asking() -> None:
    skip = bus(agree_max=no_agreement).gradients(GradStats(float("nan"), False), ledger())
    assert skip == Verdict(Action.SKIP, reason="the gradient norm is nan")


@pytest.mark.parametrize(
    ("verdicts", "want"),
    [
        ([Verdict(), Verdict(Action.SCALE, 0.5, "half")], Verdict(Action.SCALE, 0.5, "half")),
        (
            [Verdict(Action.SCALE, 0.5, "half"), Verdict(Action.SCALE, 0.25, "quarter"), Verdict()],
            Verdict(Action.SCALE, 0.25, "quarter"),
        ),
        (
            [Verdict(Action.SKIP, reason="spike"), Verdict(Action.SCALE, 0.0, "zero")],
            Verdict(Action.SKIP, reason="spike"),
        ),
        ([Verdict(), Verdict()], Verdict()),
    ],
)
def test_the_most_severe_verdict_counts(verdicts, want) -> None:
    assert bus(*map(verdict_of, verdicts)).gradients(FINE, ledger()) == want


@pytest.mark.parametrize("mine", [Verdict(), Verdict(Action.SCALE, 0.75, "mine")])
@pytest.mark.parametrize(
    "theirs", [Verdict(Action.SCALE, 0.3, "theirs"), Verdict(Action.SKIP, 1.0, "theirs")]
)
def test_ranks_come_to_one_verdict(mine, theirs) -> None:
    """Two ranks, one after the other: the first says what it would send, the second hears it."""
    sent: list[int] = []

    def send(value: int) -> int:
        sent.append(value)
        return value

    alone_verdict = bus(verdict_of(theirs), agree_max=send).gradients(FINE, ledger())
    agreed = bus(verdict_of(mine), agree_max=lambda value: max(value, sent[0])).gradients(FINE, ledger())
    assert (agreed.action, agreed.scale) == (alone_verdict.action, alone_verdict.scale)
    assert agreed.reason == "another rank's verdict"


def test_on_batch_gets_a_key_of_its_own() -> None:
    keys = []

    class Draw(Technique):
        name = "draw"

        def on_batch(self, batch, plan, key):
            keys.append(key)
            return replace(batch, loss_mask_BL=torch.zeros(2, 2))

    changed = bus(Draw, seed=5, data_rank=3).batch(batch(), plan())
    assert changed.loss_mask_BL.sum() == 0
    assert keys == [Key((5, "draw", 3, 3))]


def test_keys_are_reproducible_and_apart() -> None:
    key = Key((5, "draw", 3, 0))
    assert key.numpy().random(4).tolist() == key.numpy().random(4).tolist()
    assert torch.equal(torch.rand(4, generator=key.torch()), torch.rand(4, generator=key.torch()))
    others = [Key((5, "draw", 3, 1)), Key((5, "draw", 4, 0)), Key((5, "drawn", 3, 0)), key.fold(0)]
    firsts = [k.numpy().random() for k in [key, *others]]
    assert len(set(firsts)) == 5
    # Neighbouring keys are independent: the mean of their first draws is that of uniform numbers.
    many = np.array([Key((5, "draw", step, 0)).numpy().random() for step in range(2000)])
    assert abs(many.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 4 / 2000**0.5


def test_state_goes_to_whom_it_belongs() -> None:
    saved = bus(Halve, Raise).state_dict()
    assert saved == {"halve": {"seen": 7}, "raise": {}}
    said: list[str] = []
    other = bus(Halve, Alone2, messages=said)
    other.load_state_dict({"halve": {"seen": 9}, "raise": {}})
    assert other.state_dict() == {"halve": {"seen": 9}, "alone2": {}}
    assert said[1:] == [
        "technique alone2 is not in the checkpoint: it starts now",
        "technique raise is off: its state in the checkpoint is left behind",
    ]


class Alone2(Technique):
    name = "alone2"


def test_metrics_have_the_terms_and_the_techniques_own() -> None:
    class Terms(Technique):
        name = "mine"
        terms = ("pull",)
        notes = ("push",)

        def on_loss(self, terms, batch):
            terms.add("pull", torch.full_like(terms.nll_BL, 3.0))
            terms.note("push", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

        def metrics(self, losses):
            return {"strength": losses.sums["push"]["d"]}

    one = bus(Terms, Alone2)
    assert (one.terms, one.notes) == (("pull",), ("push",))
    terms = LossTerms(
        nll_BL=torch.ones(2, 2),
        mask_BL=torch.ones(2, 2),
        domain_B=torch.zeros(2, dtype=torch.int64),
    )
    one.loss(terms, batch())
    assert terms.total().item() == 4 * (1 + 3), "a note is no part of the loss"
    losses = ledger(*one.terms, *one.notes)
    losses.record(terms)
    assert one.metrics(losses.reduced()) == {"mine": {"pull": 3.0, "strength": 10.0}}


def test_debug_finds_ranks_that_disagree(monkeypatch) -> None:
    monkeypatch.setenv("MEGAFAB_DEBUG", "1")
    assert bus().schedule(plan(), Progress()) == plan()
    with pytest.raises(RuntimeError, match="ranks disagree on the plan of step 3"):
        bus(agree_max=lambda value: value + 1).schedule(plan(), Progress())


def test_the_catalogue_has_every_field_and_builds_what_is_on() -> None:
    assert set(catalogue.CLASSES) == set(TechniquesConfig.__dataclass_fields__)
    assert all(catalogue.load(name).name == name for name in catalogue.CLASSES)
    assert catalogue.build(TechniquesConfig(), FACTS) == []
    on = catalogue.build(TechniquesConfig(z_loss=ZLossConfig(weight=0.5), ema=EMAConfig()), FACTS)
    assert [(t.name, t.config) for t in on] == [("z_loss", ZLossConfig(weight=0.5)), ("ema", EMAConfig())]
