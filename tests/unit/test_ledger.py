from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms


def alone(sums: Tensor) -> Tensor:
    return sums


def ledger(*terms: str, sum_ranks=alone) -> LossLedger:
    return LossLedger(("books", "code", "web"), terms, device=torch.device("cpu"), sum_ranks=sum_ranks)


def micro_batch(nll, mask, domain) -> LossTerms:
    nll_BL = torch.tensor(nll, dtype=torch.float32)
    return LossTerms(
        nll_BL=nll_BL,
        mask_BL=torch.tensor(mask, dtype=torch.float32),
        domain_B=torch.tensor(domain),
    )


def test_means_by_hand() -> None:
    losses = ledger("extra")
    first = micro_batch([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[1, 1, 0], [1, 1, 1]], [0, 2])
    first.add("extra", torch.full((2, 3), 0.5))
    losses.record(first)
    second = micro_batch([[7.0, 8.0, 9.0]], [[0, 0, 1]], [0])
    second.add("extra", torch.full((1, 3), 2.0))
    losses.record(second)
    report = losses.reduced()
    assert report.tokens == {"books": 3, "code": 0, "web": 3}
    assert report.domain_loss == {"books": (1 + 2 + 9) / 3, "web": (4 + 5 + 6) / 3}
    assert report.loss == (1 + 2 + 9 + 4 + 5 + 6) / 6
    assert report.terms == {"extra": (5 * 0.5 + 2.0) / 6}


def test_the_optimised_total_by_hand() -> None:
    terms = micro_batch([[1.0, 2.0], [3.0, 4.0]], [[1, 1], [0, 1]], [0, 1])
    assert terms.total().item() == 7.0
    terms.weigh(torch.tensor([[2.0, 2.0], [1.0, 1.0]]))
    terms.weigh(torch.tensor([[1.0, 0.5], [1.0, 1.0]]))
    terms.add("extra", torch.tensor([[0.1, 0.1], [100.0, 0.3]]))
    assert terms.total().item() == pytest.approx(2 * 1 + 1 * 2 + 4 + 0.5)
    losses = ledger("extra")
    losses.record(terms)
    assert losses.reduced().loss == 7 / 3, "the reported loss is unweighted"


def test_a_merge_is_one_ledger_of_both() -> None:
    a = micro_batch([[1.0, 2.0]], [[1, 1]], [0])
    b = micro_batch([[5.0, 4.0]], [[0, 1]], [1])
    one, left, right = ledger(), ledger(), ledger()
    one.record(a)
    one.record(b)
    left.record(a)
    assert left.reduced().loss == 1.5  # a report made earlier must not be handed out again
    right.record(b)
    left.merge(right)
    assert left.reduced() == one.reduced()


def test_values_are_copied() -> None:
    terms = micro_batch([[1.0, 3.0]], [[1, 1]], [0])
    losses = ledger()
    losses.record(terms)
    terms.nll_BL /= 4  # as Megatron's schedule divides the loss it is given
    assert losses.reduced().loss == 2.0


def test_what_is_masked_may_be_anything() -> None:
    nan = math.nan
    terms = micro_batch([[nan, 1.0], [2.0, nan]], [[0, 1], [1, 0]], [0, 1])
    terms.nll_BL.requires_grad_()
    terms.add("extra", torch.tensor([[nan, 0.5], [0.5, math.inf]]))
    total = terms.total()
    total.backward()
    assert total.item() == 4.0
    assert terms.nll_BL.grad is not None
    assert terms.nll_BL.grad.tolist() == [[0, 1], [1, 0]]
    losses = ledger("extra")
    losses.record(terms)
    assert losses.reduced().loss == 1.5
    assert losses.reduced().terms == {"extra": 0.5}


def test_a_nan_is_reported_in_its_domain_and_in_the_mean_only() -> None:
    losses = ledger()
    losses.record(micro_batch([[math.nan, 1.0], [2.0, 4.0]], [[1, 1], [1, 1]], [0, 1]))
    report = losses.reduced()
    assert math.isnan(report.loss)
    assert math.isnan(report.domain_loss["books"])
    assert report.domain_loss["code"] == 3.0


def test_no_tokens_have_no_loss() -> None:
    report = ledger().reduced()
    assert math.isnan(report.loss)
    assert report.domain_loss == {}


def test_many_tokens_lose_none() -> None:
    losses = ledger()
    terms = micro_batch([[1.0] * 4096] * 64, [[1] * 4096] * 64, [0] * 64)
    for _ in range(65):  # 17 million tokens: float32 would stop counting ones at 16 777 216
        losses.record(terms)
    losses.record(micro_batch([[1.0]], [[1]], [0]))
    assert losses.reduced().tokens["books"] == 65 * 64 * 4096 + 1


def test_one_reduction_however_often_it_is_read() -> None:
    calls = []

    def twice(sums: Tensor) -> Tensor:
        calls.append(1)
        return sums.mul_(2)

    losses = ledger(sum_ranks=twice)
    losses.record(micro_batch([[1.0, 2.0]], [[1, 1]], [0]))
    assert losses.reduced().tokens["books"] == 4
    assert losses.reduced() is losses.reduced()
    assert len(calls) == 1
    losses.record(micro_batch([[1.0, 2.0]], [[1, 1]], [0]))
    assert losses.reduced().tokens["books"] == 8, "the reduction works on a copy"


def test_a_term_must_be_declared() -> None:
    terms = micro_batch([[1.0]], [[1]], [0])
    terms.add("surprise", torch.ones(1, 1))
    with pytest.raises(AssertionError, match="surprise was not declared"):
        ledger("extra").record(terms)
