"""z-loss, label smoothing and EMA against numbers made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from megafab.checkpoint.pieces import LogicalTensor, whole
from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms
from megafab.model.config import ModelConfig
from megafab.model.shape import ModelShape
from megafab.run import Batch, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Facts
from megafab.techniques.config import EMAConfig, LabelSmoothingConfig, ZLossConfig
from megafab.techniques.ema import EMA
from megafab.techniques.label_smoothing import LabelSmoothing
from megafab.techniques.z_loss import ZLoss
from megafab.topology.layout import Layout

SHAPE = ModelShape.of(ModelConfig(name="tiny", layers=2, hidden=8, heads=1, seq_len=4, vocab=128))
FACTS = Facts(1, SHAPE, ("a", "b"), (0.5, 0.5), (100, 100), (400, 400), 10)


def batch(rows: int, length: int) -> Batch:
    whole = torch.zeros(rows, length, dtype=torch.int64)
    one = torch.zeros(rows, dtype=torch.int64)
    return Batch(whole, whole, torch.ones(rows, length), whole, whole, one, one)


def terms_of(nll: list[float], log_z: list[float], mean_logit: list[float]) -> LossTerms:
    """Of one row."""
    nll_BL, log_z_BL, mean_logit_BL = (torch.tensor([values]) for values in (nll, log_z, mean_logit))
    return LossTerms(
        nll_BL=nll_BL,
        log_z_BL=log_z_BL,
        mean_logit_BL=mean_logit_BL,
        mask_BL=torch.ones_like(nll_BL),
        domain_B=torch.zeros(1, dtype=torch.int64),
    )


def test_z_loss_by_hand() -> None:
    terms = terms_of([0.0, 0.0], [math.log(10), math.log(8)], [0.0, 0.0])
    ZLoss(ZLossConfig(weight=0.01), FACTS).on_loss(terms, batch(1, 2))
    want = [0.01 * math.log(10) ** 2, 0.01 * math.log(8) ** 2]
    assert terms.values()["z_loss"][0].tolist() == pytest.approx(want)
    assert terms.total().item() == pytest.approx(sum(want))


def test_label_smoothing_by_hand() -> None:
    # Logits ln 1, ln 2, ln 3, ln 4 and the label of the last: p is 0.1, 0.2, 0.3, 0.4.
    terms = terms_of([-math.log(0.4)], [math.log(10)], [math.log(24) / 4])
    LabelSmoothing(LabelSmoothingConfig(epsilon=0.2), FACTS).on_loss(terms, batch(1, 1))
    target = [0.05, 0.05, 0.05, 0.85]
    want = -sum(t * math.log(p) for t, p in zip(target, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert terms.total().item() == pytest.approx(want)
    assert terms.values()["nll"].item() == pytest.approx(-math.log(0.4)), "what is reported is plain"


def test_a_technique_that_does_not_say_so_reads_no_normaliser() -> None:
    one = torch.ones(1, 1)
    terms = LossTerms(nll_BL=one, mask_BL=one, domain_B=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="loss_terms"):
        ZLoss(ZLossConfig(), FACTS).on_loss(terms, batch(1, 1))


class Masters:
    """A WeightEditor over plain tensors, whose model copies are bf16."""

    def __init__(self, **masters: list[float]) -> None:
        self._masters = {name: torch.tensor(values) for name, values in masters.items()}
        self.copies: dict[str, Tensor] = {}
        self.commit()

    def names(self) -> Sequence[str]:
        return list(self._masters)

    def master(self, name: str) -> Tensor:
        return self._masters[name]

    def moments(self, name: str) -> Mapping[str, Tensor]:
        return {}

    def sum(self, counts: Tensor) -> Tensor:
        return counts

    def describe(self, name: str, value: Tensor) -> LogicalTensor:
        return whole(value, Layout.whole(tuple(value.shape)), owner=True)

    def commit(self) -> None:
        self.copies = {name: master.bfloat16() for name, master in self._masters.items()}


def step(technique: EMA, weights: Masters, number: int, applied: bool = True) -> None:
    plan = StepPlan(number, 1.0, 0.0, 1, 1, 1, 1, (1.0,))
    ledger = LossLedger(("d",), (), device=torch.device("cpu"), sum_ranks=lambda sums: sums)
    technique.on_step(plan, StepOutcome(applied, Verdict(), 1.0), ledger, weights)


def averages(technique: EMA, weights: Masters) -> dict[str, list[float]]:
    return {n: t.pieces[0].tensor.tolist() for n, t in technique.sharded_state(weights).items()}


def test_ema_by_hand() -> None:
    weights = Masters(a=[0.0, 8.0], b=[-1.0])
    ema = EMA(EMAConfig(decay=0.75), FACTS)
    for number, a in enumerate(([4.0, 0.0], [8.0, 4.0], [0.0, 0.0])):
        weights.master("a").copy_(torch.tensor(a))
        step(ema, weights, number)
    # a: [4, 0]; 0.75 * [4, 0] + 0.25 * [8, 4] = [5, 1]; 0.75 * [5, 1] = [3.75, 0.75]
    assert averages(ema, weights) == {"a": [3.75, 0.75], "b": [-1.0]}
    assert ema.state_dict() == {"updates": 3}


def test_ema_leaves_out_skipped_steps_and_those_between() -> None:
    weights = Masters(a=[1.0])
    ema = EMA(EMAConfig(decay=0.5, every=2), FACTS)
    for number, (value, applied) in enumerate(
        [(9.0, True), (2.0, True), (9.0, True), (9.0, False), (9.0, True), (4.0, True)]
    ):
        weights.master("a").fill_(value)
        step(ema, weights, number, applied)
    assert averages(ema, weights) == {"a": [3.0]}  # after steps 2 and 6: 2, then (2 + 4) / 2


def test_ema_is_evaluated_and_every_bit_comes_back() -> None:
    weights = Masters(a=torch.randn(64, generator=torch.Generator().manual_seed(0)).tolist())
    ema = EMA(EMAConfig(decay=0.9), FACTS)
    for number in range(3):
        weights.master("a").mul_(1.1)
        step(ema, weights, number)
    weights.commit()
    before, copy, average = weights.master("a").clone(), weights.copies["a"], averages(ema, weights)["a"]
    ema.on_eval(True, weights)
    assert weights.master("a").tolist() == average
    assert torch.equal(weights.copies["a"], torch.tensor(average).bfloat16())
    ema.on_eval(False, weights)
    assert torch.equal(weights.master("a"), before)
    assert torch.equal(weights.copies["a"], copy)
    assert averages(ema, weights)["a"] == average


@pytest.mark.parametrize("config", [EMAConfig(evaluate=False), EMAConfig(every=5)])
def test_ema_evaluates_the_weights_themselves_when_told_or_before_it_began(config: EMAConfig) -> None:
    weights = Masters(a=[1.0, 2.0])
    ema = EMA(config, FACTS)
    step(ema, weights, 0)
    weights.master("a").mul_(2)
    ema.on_eval(True, weights)
    assert weights.master("a").tolist() == [2.0, 4.0]


@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_ema_resumes_exactly(saved_after: int) -> None:
    def advance(technique: EMA, weights: Masters, start: int, stop: int) -> None:
        for number in range(start, stop):
            weights.master("a").mul_(1.3).add_(0.1 * number)
            step(technique, weights, number)

    config = EMAConfig(decay=0.7)
    weights, whole_run = Masters(a=[0.3, -0.7]), EMA(config, FACTS)
    advance(whole_run, weights, 0, 6)

    first_weights, first = Masters(a=[0.3, -0.7]), EMA(config, FACTS)
    advance(first, first_weights, 0, saved_after)
    tensors, state = averages(first, first_weights), first.state_dict()
    second_weights, second = Masters(a=first_weights.master("a").tolist()), EMA(config, FACTS)
    for name, tensor in second.sharded_state(second_weights).items():
        tensor.pieces[0].tensor.copy_(torch.tensor(tensors[name]))
    second.load_state_dict(state)
    advance(second, second_weights, saved_after, 6)
    assert averages(second, second_weights) == averages(whole_run, weights)
