"""The controller of loss spikes: by hand-computed series, decision by decision."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megafab.data.skips import Stretch
from megafab.errors import UserError
from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms
from megafab.resilience.config import SpikesConfig
from megafab.resilience.spikes import Spike, Spikes, deviation
from megafab.run import Progress, StepOutcome, Verdict

BATCH = 4
QUIET = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0]  # median 2, median absolute deviation 0.1


class Samples:
    """Goes through `BATCH` samples a step, three of the first domain and one of the second."""

    def __init__(self) -> None:
        self.steps = 0
        self.skipped: list[tuple[int, int]] = []

    @property
    def last(self) -> Stretch:
        return Stretch(BATCH * (self.steps - 1), BATCH, (3, 1))

    def skip(self, first: int, count: int) -> None:
        self.skipped.append((first, count))


def ledger(loss: float) -> LossLedger:
    whole = LossLedger(("books", "code"), (), device=torch.device("cpu"), sum_ranks=lambda sums: sums)
    value_BL = torch.full((1, 1), loss, dtype=torch.float64)
    whole.record(LossTerms(nll_BL=value_BL, mask_BL=torch.ones(1, 1), domain_B=torch.zeros(1)))
    return whole


class Story:
    """A controller, and the steps it is shown."""

    def __init__(self, file: Path | None = None, **settings: Any) -> None:
        small = {"window": 8, "min_steps": 6, "threshold": 5.0, "patience": 2, "margin": 1}
        config = SpikesConfig(**(small | settings))
        self.samples, self.messages = Samples(), list[str]()
        self.spikes = Spikes(
            config,
            loader=self.samples,
            domains=("books", "code"),
            file=file,
            message=self.messages.append,
        )

    def see(self, losses: Sequence[float], norms: Sequence[float] = ()) -> Spike | None:
        """The first spike in a series; norms are 1 unless given."""
        for number, loss in enumerate(losses):
            self.samples.steps += 1
            outcome = StepOutcome(True, Verdict(), norms[number] if norms else 1.0)
            spike = self.spikes.look(Progress(self.samples.steps), outcome, ledger(loss))
            if spike is not None:
                return spike
        return None

    def go_back(self, spike: Spike, step: int, state: dict[str, Any]) -> None:
        """As a run does: the history of a checkpoint, then the decision."""
        self.samples.steps = step
        self.spikes.rewind(state)
        self.spikes.decide(spike, Progress(step))


def test_deviation_by_hand() -> None:
    assert deviation(3.0, QUIET) == pytest.approx(1.0 / 0.14826)
    assert deviation(1.0, QUIET) == pytest.approx(-1.0 / 0.14826)
    assert deviation(3.0, [*QUIET, 99.0, math.inf]) == pytest.approx((3 - 2.05) / (1.4826 * 0.15))
    assert [deviation(x, [2.0, 2.0, 2.0]) for x in (1.0, 2.0, 3.0)] == [-math.inf, 0.0, math.inf]


def test_enough_bad_steps_in_a_row_are_a_spike() -> None:
    """One alone is none, and does not move what the next one is compared with."""
    story = Story()
    assert story.see([*QUIET, 2.7, 9.0, 2.0, 9.0, 2.0]) is None
    spike = story.see([9.0, 9.0])
    assert spike is not None
    assert (spike.first, spike.last, spike.recurs) == (12, 13, False)
    assert spike.facts["loss"] == 9.0


@pytest.mark.parametrize(("loss", "found"), [(2.75, True), (2.74, False)])
def test_the_threshold_is_where_it_is_said_to_be(loss: float, found: bool) -> None:
    assert (Story(patience=1).see([*QUIET, loss]) is not None) == found


def test_nothing_is_judged_before_there_is_a_history() -> None:
    assert Story(min_steps=7).see([*QUIET, 9.0, 2.0]) is None
    assert Story(min_steps=7, patience=1).see([*QUIET, 2.0, 9.0]) is not None


def test_what_is_older_than_the_window_is_forgotten() -> None:
    """A loss that has settled higher is what later steps are compared with."""
    story = Story(patience=3)
    assert story.see([*QUIET, 9.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0, 9.0, 9.0, 9.0]) is None


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_numbers_that_are_not_finite_are_bad_from_the_first_step(bad: tuple[float, float]) -> None:
    story = Story()
    spike = story.see([2.0, bad[0], bad[0]], [1.0, bad[1], bad[1]])
    assert spike is not None
    assert (spike.first, spike.last) == (2, 3)
    state = story.spikes.state_dict()
    assert all(map(math.isfinite, [*state["losses"], *state["norms"]])), "they are no history"


def test_norms_are_compared_where_it_is_asked_for() -> None:
    calm, wild = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0], [8.0, 8.0]
    losses = [*QUIET, 2.0, 2.0]
    assert Story().see(losses, calm + wild) is None
    spike = Story(norm_threshold=20.0).see(losses, calm + wild)
    assert spike is not None
    assert spike.facts["norm_deviation"] == pytest.approx((8 - 1.0) / (1.4826 * 0.05))
    assert Story(norm_threshold=1e3).see(losses, calm + wild) is None


# -- what becomes of it --------------------------------------------------------------------------------------


def entries(file: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "time"}
        for line in file.read_text().splitlines()
    ]


def test_a_spike_that_comes_back_is_of_the_data(tmp_path: Path) -> None:
    story = Story(tmp_path / "spikes.jsonl", margin=2)
    assert story.see(QUIET) is None
    early = story.spikes.state_dict()
    first = story.see([2.0, 2.1, 2.0, 9.0, 9.5])
    assert first is not None
    story.go_back(first, 6, early)
    again = story.see([2.0, 2.1, 2.0, 9.0, 9.5])
    assert again is not None
    assert (again.first, again.last, again.recurs) == (10, 11, True)
    assert story.samples.skipped == []
    story.go_back(again, 6, early)
    assert story.samples.skipped == [(28, 16)], "steps 8 to 11: two before the first bad one"
    number = pytest.approx((9.5 - 2.0) / (1.4826 * 0.1))
    facts = {"loss": 9.5, "grad_norm": 1.0, "deviation": number}
    where = {"step": 11, "first": 10, "back_to": 6}
    assert entries(tmp_path / "spikes.jsonl") == [
        {**where, **facts, "cause": "unknown"},
        {**where, **facts, "cause": "data", "samples": [28, 16], "domains": {"books": 12, "code": 4}},
    ]
    told = "step 11: loss 9.5 (50.6 deviations above the median), gradient norm 1: "
    assert story.messages == [
        told + "a spike since step 10; back to step 6, to see whether it comes back",
        told + "the spike of step 10 has come back, it is of the data; back to step 6, skipping samples 28 "
        "to 43 (books 12, code 4)",
    ]
    assert story.see([2.0, 2.1, 2.0, 2.0, 2.1, 2.0]) is None, "with other samples it goes on"
    assert len(story.messages) == 2


def test_a_checkpoint_within_the_margin_shortens_it() -> None:
    story = Story(margin=4)
    story.see(QUIET)
    early = story.spikes.state_dict()
    for _ in range(2):
        spike = story.see([2.0, 9.0, 9.0])
        assert spike is not None
        story.go_back(spike, 6, early)
    assert story.samples.skipped == [(24, 12)]


def test_a_spike_that_stays_away_was_numeric(tmp_path: Path) -> None:
    story = Story(tmp_path / "spikes.jsonl")
    story.see(QUIET)
    early = story.spikes.state_dict()
    spike = story.see([2.0, math.nan, math.nan])
    assert spike is not None
    story.go_back(spike, 6, early)
    assert story.see([2.0, 2.1]) is None
    assert len(story.messages) == 1, "step 8 was bad, and step 9 is still to come"
    assert story.see([2.0]) is None
    assert story.messages[-1] == (
        "step 9: the spike of step 8 has not come back: its cause was numeric, a passing fault of hardware "
        "or software; nothing is skipped"
    )
    assert [entry["cause"] for entry in entries(tmp_path / "spikes.jsonl")] == ["unknown", "numeric"]
    assert story.samples.skipped == []


def test_another_spike_in_a_replay_is_looked_into_by_itself() -> None:
    story = Story()
    story.see(QUIET)
    early = story.spikes.state_dict()
    spike = story.see([2.0, 2.0, 9.0, 9.0])
    assert spike is not None
    story.go_back(spike, 6, early)
    other = story.see([9.0, 9.0])
    assert other is not None
    assert (other.first, other.last, other.recurs) == (7, 8, False)


def test_rollbacks_that_help_nothing_come_to_an_end() -> None:
    story = Story(max_rollbacks=2)
    story.see(QUIET)
    early = story.spikes.state_dict()
    for _ in range(2):
        spike = story.see([9.0, 9.0])
        assert spike is not None
        story.go_back(spike, 6, early)
    with pytest.raises(UserError) as caught:
        story.see([9.0, 9.0])
    assert str(caught.value) == (
        "resilience.spikes.max_rollbacks=2: found a spike again at step 8 (loss 9 (47.2 deviations above the "
        "median), gradient norm 1), after as many rollbacks, expected to get past it by going back and "
        "skipping data. Fix: lower optim.lr or optim.clip and resume from an earlier checkpoint; or raise "
        "resilience.spikes.threshold, if this is no spike"
    )


def test_a_run_that_has_got_past_a_spike_may_go_back_again() -> None:
    """A window of steps after the last one, rollbacks are counted anew."""
    story = Story(max_rollbacks=1)
    story.see(QUIET)
    early = story.spikes.state_dict()
    spike = story.see([9.0, 9.0])
    assert spike is not None
    story.go_back(spike, 6, early)
    calm = [2.0, 2.1, 1.9, 2.2, 1.8, 2.0, 2.1, 2.0, 1.9]
    assert story.see([*calm, 2.1]) is None  # to step 16, that is 8 + 8
    assert story.spikes.metrics()["spikes"]["rollbacks"] == 1
    assert story.see([2.0]) is None
    assert story.spikes.metrics()["spikes"]["rollbacks"] == 0
    assert story.see([9.0, 9.0]) is not None


@pytest.mark.parametrize("seed", range(4))
def test_a_resume_at_any_step_decides_the_same(seed: int) -> None:
    """Of a series with spikes, in one go and with a controller made anew from JSON after every step."""
    rng = random.Random(seed)
    losses = [9.0 if step % 17 in (12, 13) else rng.gauss(2.0, 0.2) for step in range(60)]

    def decisions(resumed: bool) -> list[Any]:
        story, found = Story(norm_threshold=8.0), []
        for step, loss in enumerate(losses):
            if resumed:
                state = json.loads(json.dumps(story.spikes.state_dict()))
                story = Story(norm_threshold=8.0)
                story.samples.steps = step
                story.spikes.load_state_dict(state)
            spike = story.see([loss], [loss / 2])
            if spike is not None:
                story.spikes.decide(spike, Progress(spike.first - 1))
            found.append((spike, story.spikes.state_dict(), story.spikes.metrics()))
        return found

    assert decisions(resumed=True) == decisions(resumed=False)
    assert any(spike for spike, *_ in decisions(resumed=False))


def test_off_it_looks_at_nothing() -> None:
    class Unread(LossLedger):
        def __init__(self) -> None:
            """Nothing: it is not to be read."""

        def reduced(self):
            raise AssertionError("the loss was read")

    spikes = Spikes(None, loader=Samples(), domains=(), file=None, message=pytest.fail)
    outcome = StepOutcome(False, Verdict(), math.nan)
    assert spikes.look(Progress(1), outcome, Unread()) is None
    assert (spikes.on, spikes.state_dict(), spikes.metrics()) == (False, {}, {})
