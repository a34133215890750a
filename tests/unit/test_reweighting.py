"""Weights of samples and tokens against the papers' numbers, plain oracles and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megafab.loss.terms import LossTerms
from megafab.techniques.config import Strategy
from megafab.techniques.sample_reweighting import sample_weights
from megafab.techniques.token_selection import selection

GOLDEN = {  # w of losses 1, 2, 3, 4 by strategy and temperature
    (Strategy.linupper, 1.0): (0.119271, 0.232307, 0.324211, 0.324211),
    (Strategy.linupper, 0.4): (0.032616, 0.172687, 0.397348, 0.397348),
    (Strategy.quadratic, 1.0): (0.145670, 0.354330, 0.354330, 0.145670),
    (Strategy.quadratic, 0.4): (0.048886, 0.451114, 0.451114, 0.048886),
    (Strategy.extremes, 1.0): (0.330378, 0.169622, 0.169622, 0.330378),
    (Strategy.extremes, 0.4): (0.420565, 0.079435, 0.079435, 0.420565),
}


@pytest.mark.parametrize(("strategy", "temperature"), GOLDEN)
def test_weights_of_four_samples(strategy: Strategy, temperature: float):
    weights = sample_weights(torch.tensor([1.0, 2, 3, 4]), strategy, temperature) / 4
    assert weights.tolist() == pytest.approx(GOLDEN[strategy, temperature], abs=5e-7)


def test_three_samples_by_hand():
    """Losses 0, 1, 4: h = -1, -1/2, 1; linupper f = 0, 1/2, 1; at r = 1/2 the weights are as 1, e, e^2."""
    total = 1 + math.e + math.e**2
    weights = sample_weights(torch.tensor([0.0, 1, 4]), Strategy.linupper, 0.5)
    assert weights.tolist() == pytest.approx([3 / total, 3 * math.e / total, 3 * math.e**2 / total])


@pytest.mark.parametrize("strategy", Strategy)
def test_what_every_strategy_keeps(strategy: Strategy):
    losses = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3
    weights = sample_weights(losses, strategy, 0.4)
    assert weights.mean().item() == pytest.approx(1)
    assert weights.max() / weights.min() <= math.exp(1 / 0.4) * (1 + 1e-6)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(sample_weights(losses[order], strategy, 0.4), weights[order])
    assert sample_weights(losses, strategy, 1e-39).isfinite().all()
    assert sample_weights(losses, strategy, 1e6).tolist() == pytest.approx([1.0] * 64, abs=1e-5)
    assert sample_weights(torch.full((5,), 2.5), strategy, 0.4).tolist() == pytest.approx([1.0] * 5)
    assert sample_weights(torch.tensor([2.5]), strategy, 0.4).tolist() == [1.0]


def test_samples_without_a_loss_take_no_part():
    losses = torch.tensor([1.0, math.nan, 2, 3, 4, math.inf])
    weights = sample_weights(losses, Strategy.linupper, 1.0)
    assert weights[[1, 5]].tolist() == [1.0, 1.0]
    assert torch.equal(
        weights[[0, 2, 3, 4]], sample_weights(torch.tensor([1.0, 2, 3, 4]), Strategy.linupper, 1.0)
    )
    assert sample_weights(torch.full((2,), math.nan), Strategy.extremes, 1.0).tolist() == [1.0, 1.0]


def test_quantiles_hold_an_outlier():
    """One sample of 20 nats among 127 of 2 to 4: it takes everything, unless edges are quantiles."""
    losses = torch.cat((torch.linspace(2, 4, 127), torch.tensor([20.0])))
    assert sample_weights(losses, Strategy.linupper, 0.4)[-1] > 8
    assert sample_weights(losses, Strategy.linupper, 0.4, quantile=0.01)[-1] < 2


def terms(nll_BL: Tensor, mask_BL: Tensor, **more) -> LossTerms:
    rows, length = nll_BL.shape
    return LossTerms(
        nll_BL=nll_BL,
        mask_BL=mask_BL,
        domain_B=torch.zeros(rows, dtype=torch.int64),
        **more,
    )


def test_a_row_s_loss_is_the_mean_of_its_valid_tokens():
    nll = torch.tensor([[1.0, 2, 3], [4, 5, math.nan], [7, 8, 9]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    found = terms(nll, mask).row_losses()
    assert found[:2].tolist() == [1.5, 4.5]
    assert found[2].isnan()


def test_a_step_whose_losses_are_known_is_one_population():
    known = torch.arange(12.0)
    made = terms(torch.ones(3, 2), torch.ones(3, 2), step_losses_M=known, micro_batch=2)
    losses, place = made.population()
    assert losses is known
    assert place.tolist() == [6, 7, 8]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.6, 1.0])
def test_selection_keeps_the_largest_excesses_of_each_row(keep: float):
    generator = torch.Generator().manual_seed(3)
    excess = torch.randn(5, 20, generator=generator)
    valid = torch.rand(5, 20, generator=generator) > 0.3
    valid[4] = False
    weights = selection(excess, valid, excess, valid, keep=keep)
    for row in range(4):
        ranked = sorted(excess[row][valid[row]].tolist(), reverse=True)
        count = math.ceil(len(ranked) * keep - 1e-6)
        kept = set(ranked[:count])
        for value, is_valid, weight in zip(
            excess[row].tolist(), valid[row], weights[row].tolist(), strict=True
        ):
            chosen = bool(is_valid) and value in kept
            assert weight == pytest.approx(len(ranked) / count if chosen else 0.0)
    assert weights[4].tolist() == [0.0] * 20


@pytest.mark.parametrize(
    ("length", "keep", "kept"), [(50, 0.6, 30), (100, 0.6, 60), (100, 0.07, 7), (7, 0.5, 4)]
)
def test_a_share_of_a_row_is_rounded_up_once(length: int, keep: float, kept: int):
    excess, valid = torch.randperm(length).view(1, -1).float(), torch.ones(1, length, dtype=torch.bool)
    assert (selection(excess, valid, excess, valid, keep=keep) > 0).sum() == kept


def test_selection_of_a_part_of_a_row_is_that_of_the_whole():
    excess, valid = torch.randn(3, 16), torch.ones(3, 16, dtype=torch.bool)
    whole = selection(excess, valid, excess, valid, keep=0.4)
    half = selection(excess[:, 8:], valid[:, 8:], excess, valid, keep=0.4)
    assert torch.equal(half, whole[:, 8:])
