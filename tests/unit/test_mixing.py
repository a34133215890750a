"""Mixing policies and replay against the papers' numbers, and against numbers made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megafab.data import mixture
from megafab.errors import ConfigError
from megafab.loss.ledger import LedgerReport
from megafab.model.config import ModelConfig
from megafab.model.shape import ModelShape
from megafab.run import Progress, StepPlan
from megafab.techniques.base import Facts
from megafab.techniques.config import (
    DynamicLoadingConfig,
    MixingMode,
    OnlineMixingConfig,
    ReplayConfig,
    Reward,
)
from megafab.techniques.dynamic_loading import DynamicLoading, predicted
from megafab.techniques.online_mixing import OnlineMixing, exploration
from megafab.techniques.replay import Replay

SHAPE = ModelShape.of(ModelConfig(name="tiny", layers=2, hidden=8, heads=1, seq_len=4, vocab=128))


def facts(**weights: float) -> Facts:
    tokens = (1000,) * len(weights)
    return Facts(1, SHAPE, tuple(weights), tuple(weights.values()), tokens, tuple(4 * n for n in tokens), 10)


FOUR = facts(a=0.25, b=0.25, c=0.25, d=0.25)


def mixing(mode: MixingMode, **settings: Any) -> OnlineMixing:
    return OnlineMixing(OnlineMixingConfig(mode=mode, **settings), FOUR)


def resumed(policy: Any, state: dict[str, Any]) -> Any:
    policy.load_state_dict(json.loads(json.dumps(state)))
    return policy


def at_weights(policy: OnlineMixing, rewards: tuple[float, ...], weights: tuple[float, ...]) -> OnlineMixing:
    names = dict(zip("abcd", weights, strict=True))
    state = {
        "kind": policy.state_dict()["kind"],
        "weights": names,
        "rewards": dict(zip("abcd", rewards, strict=True)),
        "losses": {},
        "exploration": 0.2,
    }
    return resumed(policy, state)


def test_exploration_of_four_domains():
    steps = (1, 5, 6, 10, 100, 1000)
    want = (0.25, 0.25, 0.240338, 0.186165, 0.058871, 0.018616)
    assert [exploration(4, step) for step in steps] == pytest.approx(want, abs=5e-7)


@pytest.mark.parametrize(
    ("mode", "smoothing", "rewards", "weights"),
    [
        (MixingMode.paper, 0.9, (2.55, 1, 3.95, 2), (0.251604, 0.234715, 0.268249, 0.245433)),
        (MixingMode.released, 0.5, (11.042768, 1, 7.591247, 2), (0.449108, 0.094209, 0.327135, 0.129548)),
    ],
)
def test_one_update_of_each_mode(mode, smoothing, rewards, weights):
    policy = at_weights(mixing(mode, smoothing=smoothing), (2.0, 1.0, 3.0, 2.0), (0.4, 0.3, 0.2, 0.1))
    policy.observe(100, {"a": 3.0, "c": 2.5})
    assert list(policy.state_dict()["rewards"].values()) == pytest.approx(rewards, abs=5e-7)
    assert policy.weights_K == pytest.approx(weights, abs=5e-7)


def test_two_domains_by_hand():
    """e_8 = sqrt(ln 2 / 16) = 0.20814; perplexities 2 and 6 make shares 1/4 and 3/4 of what is left."""
    policy = OnlineMixing(OnlineMixingConfig(smoothing=0.0), facts(a=0.7, b=0.3))
    policy.observe(8, {"a": math.log(2), "b": math.log(6)})
    explore = math.sqrt(math.log(2) / 16)
    assert policy.weights_K == pytest.approx(
        ((1 - 2 * explore) / 4 + explore, (1 - 2 * explore) * 3 / 4 + explore)
    )


def test_warm_up_keeps_the_mixture_and_averages_the_rewards():
    policy = OnlineMixing(OnlineMixingConfig(warmup_steps=5, smoothing=0.5), facts(a=0.7, b=0.3))
    for step in range(1, 6):
        policy.observe(step, {"a": math.log(4)} if step < 5 else {"b": math.log(8)})
        assert policy.weights_K == (0.7, 0.3)
    assert policy.state_dict()["rewards"] == pytest.approx({"a": 4, "b": 8}), (
        "a mean begins with its first value"
    )
    policy.observe(6, {"a": math.log(4)})
    assert policy.weights_K != (0.7, 0.3)
    assert sum(policy.weights_K) == pytest.approx(1)


def test_a_domain_that_was_never_drawn_counts_as_the_mean():
    policy = mixing(MixingMode.released, smoothing=0.5)
    policy.observe(1000, {"a": math.log(2), "b": math.log(6)})
    explore = exploration(4, 1000)
    assert policy.weights_K[2] == policy.weights_K[3] == pytest.approx((1 - 4 * explore) * 4 / 16 + explore)


def test_one_bad_batch_does_not_poison_the_rewards():
    policy = mixing(MixingMode.released, smoothing=0.5)
    policy.observe(10, {"a": math.nan, "b": math.inf, "c": 2.0, "d": 500.0})
    assert policy.state_dict()["rewards"] == pytest.approx({"c": math.exp(2), "d": math.exp(12)})


@pytest.mark.parametrize(
    ("mode", "settings", "want"),
    [
        (MixingMode.released, {}, {"a": math.e, "b": math.exp(3)}),
        (MixingMode.paper, {}, {"a": 4.0, "b": 12.0}),  # over the weight, 1/4
        (MixingMode.paper, {"reward_scale": 2.0}, {"a": 8.0, "b": 24.0}),
        (MixingMode.released, {"reward": Reward.loss}, {"a": 1.0, "b": 3.0}),
        # A token is 4 bytes: 1 nat a token is 1 / (4 ln 2) bits a byte.
        (MixingMode.released, {"reward": Reward.bits_per_byte}, {"a": 0.360674, "b": 1.082021}),
        (
            MixingMode.released,
            {"reward": Reward.excess, "reference": {"a": 1.5, "b": 2.0, "c": 0.0, "d": 0.0}},
            {"a": 1.0, "b": math.e},  # the perplexity over the reference's
        ),
        (
            MixingMode.paper,
            {"reward": Reward.excess, "reference": {"a": 1.5, "b": 2.0, "c": 0.0, "d": 0.0}},
            {"a": 0.0, "b": 4.0},
        ),
    ],
)
def test_rewards(mode, settings, want):
    policy = mixing(mode, smoothing=0.5, **settings)
    policy.observe(1, {"a": 1.0, "b": 3.0})
    assert policy.state_dict()["rewards"] == pytest.approx(want, abs=1e-6)


def test_a_decrease_is_measured_from_the_moving_mean():
    policy = mixing(MixingMode.released, reward=Reward.decrease, smoothing=0.5)
    for loss in (4.0, 3.0, 3.0):
        policy.observe(10, {"a": loss})
    # Means before: none, 4, 3.5; decreases: 0, 1, 0.5; their own mean: 0, 0.5, 0.5.
    assert policy.state_dict()["rewards"] == {"a": 0.5}


def test_a_floor_under_the_exploration():
    policy = mixing(MixingMode.released, exploration_floor=0.1)
    policy.observe(10**6, {"a": 9.0, "b": 1.0, "c": 1.0, "d": 1.0})
    assert min(policy.weights_K) == pytest.approx(0.1, rel=0.01)


def stationary(mode: MixingMode, steps: int = 50_000) -> np.ndarray:
    """Weights after many updates with losses that stay, eight draws a step as the released trainer has."""
    policy = OnlineMixing(OnlineMixingConfig(mode=mode, smoothing=0.5), FOUR)
    losses = {"a": 0.9, "b": 1.5, "c": 2.1, "d": 2.9}
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        drawn = rng.choice(list("abcd"), 8, p=policy.weights_K)
        policy.observe(step, {name: losses[name] for name in set(drawn)})
    return np.array(policy.weights_K)


def test_the_printed_rule_comes_to_the_uniform_mixture():
    assert np.abs(stationary(MixingMode.paper) - 0.25).sum() / 2 < 0.02


def test_the_released_rule_comes_to_shares_of_the_perplexities():
    perplexity = np.exp([0.9, 1.5, 2.1, 2.9])
    explore = exploration(4, 50_000)
    want = (1 - 4 * explore) * perplexity / perplexity.sum() + explore
    assert stationary(MixingMode.released) == pytest.approx(want, rel=0.01)


def test_the_state_goes_on_in_the_warm_up_and_after_it():
    losses = [{"a": 1.0 + step / 7, "c": 3.0 - step / 9} for step in range(12)]
    whole = OnlineMixing(OnlineMixingConfig(warmup_steps=6), FOUR)
    trajectory, states = [], []
    for step, seen in enumerate(losses, start=1):
        states.append(json.dumps(whole.state_dict()))
        whole.observe(step, seen)
        trajectory.append(whole.weights_K)
    for first in (3, 9):
        again = resumed(OnlineMixing(OnlineMixingConfig(warmup_steps=6), FOUR), json.loads(states[first]))
        for step in range(first, 12):
            again.observe(step + 1, losses[step])
            assert again.weights_K == trajectory[step]


def test_domains_without_a_weight_and_replayed_ones_are_not_mixed():
    some = replace(facts(old=0.2, a=0.2, none=0.0, b=0.6), fixed=("old",))
    policy = OnlineMixing(OnlineMixingConfig(), some)
    assert policy.names == ("a", "b")
    policy.observe(1000, {"old": 9.0, "a": 1.0, "b": 1.0})
    weights = policy.on_schedule(plan((0.2, 0.2, 0.0, 0.6)), Progress()).domain_weights
    assert weights == pytest.approx((0.2, 0.4, 0.0, 0.4))


def test_one_domain_is_nothing_to_mix():
    with pytest.raises(
        ConfigError, match="technique=.online_mixing.: found 1 domains to mix, expected at least two"
    ):
        OnlineMixing(OnlineMixingConfig(), facts(a=1.0, b=0.0))


def plan(weights: tuple[float, ...]) -> StepPlan:
    return StepPlan(0, 1e-3, 0.1, 8, 2, 4, 16, weights)


# -- dynamic loading -----------------------------------------------------------------------------------------

SHEARED = {  # references for 1.3B, and the weights that pruning begins with
    **{"cc": (1.9643, 0.67), "github": (0.7459, 0.045), "book": (2.1393, 0.045), "stackex": (1.6117, 0.02)},
    **{"wiki": (1.7590, 0.045), "arxiv": (1.4449, 0.025), "c4": (2.1251, 0.15)},
}
DIFFERENCES = (0.1, -0.1, 0.2, 0.05, 0.0, -0.2, 0.3)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, (0.653006, 0.039685, 0.048471, 0.018542, 0.039685, 0.022047, 0.178563)),
        (
            {"clamp_excess": False, "smoothing": 1e-4},
            (0.658070, 0.036200, 0.048860, 0.018700, 0.040006, 0.018205, 0.179959),
        ),
    ],
)
def test_one_update_of_dynamic_loading(settings, want):
    reference = {name: loss for name, (loss, _) in SHEARED.items()}
    policy = DynamicLoading(
        DynamicLoadingConfig(reference=reference, **settings),
        facts(**{n: w for n, (_, w) in SHEARED.items()}),
    )
    losses = {name: reference[name] + more for name, more in zip(SHEARED, DIFFERENCES, strict=True)}
    policy.on_eval(
        False, None, LedgerReport(dict.fromkeys(losses, 2.0), {"nll": {n: 2 * x for n, x in losses.items()}})
    )
    assert policy.weights_K == pytest.approx(want, abs=5e-7)
    again = DynamicLoading(policy.config, policy.facts)
    assert resumed(again, policy.state_dict()).weights_K == policy.weights_K


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("loss", [math.nan, math.inf, 2000.0, -2000.0])
def test_weights_stay_weights_whatever_the_losses(clamp: bool, loss: float):
    config = DynamicLoadingConfig(reference={"a": 1.0, "b": 1.0}, clamp_excess=clamp)
    policy = DynamicLoading(config, facts(a=0.5, b=0.5))
    policy.observe({"a": loss, "b": 1.5})
    assert sum(policy.weights_K) == pytest.approx(1)
    assert all(0 <= weight <= 1 for weight in policy.weights_K)
    if not math.isfinite(loss):
        assert policy.weights_K[0] == pytest.approx(1 / (1 + math.exp(0.5)))


def test_rewards_of_another_kind_begin_again():
    one = mixing(MixingMode.released)
    one.observe(10, {"a": 1.0, "b": 3.0})
    other = resumed(mixing(MixingMode.paper), one.state_dict())
    assert other.weights_K == one.weights_K
    assert other.state_dict()["rewards"] == {}


def test_entering_an_evaluation_decides_nothing():
    policy = DynamicLoading(DynamicLoadingConfig(reference={"a": 1.0, "b": 1.0}), facts(a=0.5, b=0.5))
    policy.on_eval(True, None)
    assert policy.weights_K == (0.5, 0.5)


def test_a_reference_is_predicted_from_three_sizes():
    """1.5 + 300 / N^0.3, at a size of its own."""
    sizes = [7e9, 13e9, 70e9]
    losses = [1.5 + 300 / size**0.3 for size in sizes]
    assert predicted("a", sizes, losses, 1.3e9) == pytest.approx(1.5 + 300 / 1.3e9**0.3, rel=1e-6)
    fitted = DynamicLoading(
        DynamicLoadingConfig(reference={"a": 1.0}, fit_sizes=sizes, fit_losses={"b": losses}),
        facts(a=0.5, b=0.5),
    )
    want = 1.5 + 300 / SHAPE.parameters**0.3
    assert fitted.metrics(LedgerReport({}, {}))["reference"] == pytest.approx({"a": 1.0, "b": want}, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1.0, 2.0], [3.0, 2.0], r"fit_losses.b=\[3.0, 2.0\]: found 2 losses for sizes \[1.0, 2.0\]"),
        ([1e6, 1e7, 1e8], [3.0, 2.0, 2.5], "found no curve E . A / N.b through them"),
        ([1e6, 1e7, 1e8], [3.0, 2.9, 2.0], "found no curve E . A / N.b through them"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes, losses, message):
    with pytest.raises(ConfigError, match=message):
        predicted("b", sizes, losses, 1e9)


def test_a_domain_without_a_reference_is_refused():
    with pytest.raises(
        ConfigError, match="dynamic_loading.reference: found no loss for b, expected one for every"
    ):
        DynamicLoading(DynamicLoadingConfig(reference={"a": 1.0}), facts(a=0.5, b=0.5))


# -- replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5])
def test_the_share_of_replay_is_exact_whatever_the_policy_does(share: float):
    replay = Replay(
        ReplayConfig(domains=["old", "older"], share=share), facts(old=0.3, a=0.2, older=0.1, b=0.4)
    )
    old, total, rng = 0, 0, np.random.default_rng(0)
    for step in range(200):
        online = rng.dirichlet((1, 1))  # what a mixing policy may have made of the new domains
        weights = (0.3, 0.6 * online[0], 0.1, 0.6 * online[1])
        made = replay.on_schedule(plan(weights), Progress(step))
        assert sum(made.domain_weights) == pytest.approx(1)
        assert made.domain_weights[0] == pytest.approx(3 * made.domain_weights[2])
        domains = mixture.draw(5, total, 16, made.domain_weights, replayed=made.replayed)
        old, total = old + int(np.isin(domains, (0, 2)).sum()), total + 16
        assert abs(old - share * total) < 1
