"""Sparsity is exact to one element after every step, at every layout, engine and optimizer; and then dense.

Runs save after each step, and what they saved is looked at: masters, moments and masks as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import SHORT_RUN, SMALL_MODEL, rows

from launch import cli
from megafab.checkpoint.reader import Reader
from megafab.errors import UserError
from megafab.model.names import is_maskable
from megafab.techniques.config import SparsityPattern
from megafab.techniques.masks import masked, random_mask

STEPS, SEED = 4, 11
SPARSE = ("technique=[static_sparsity]", f"techniques.static_sparsity.seed={SEED}")
TWO_FOUR = (*SPARSE, "techniques.static_sparsity.pattern=two_four")
PRUNING = (
    "technique=[gradual_pruning]",
    *("techniques.gradual_pruning.every=1", "techniques.gradual_pruning.begin=0.1"),
    *("techniques.gradual_pruning.end=0.6", "techniques.gradual_pruning.sparsity=0.6"),
)
EVERY_STEP = ("checkpoint.every=1", "checkpoint.keep=99", "checkpoint.asynchronous=false")
RUN = (*SMALL_MODEL, *SHORT_RUN, f"train.steps={STEPS}")
MOE = ("model.moe.experts=2", "model.moe.shared_ffn=64", "model.moe.every=2")
ZERO = "engine=deepspeed"
TP_PP = ("parallel.tensor=2", "parallel.pipeline=2")
MUON, SOAP = ("optim=muon", "optim.lr=4e-3"), ("optim=soap", "optim.lr=3e-3", "optim.soap.frequency=2")

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(trained) -> Run:
    """Train; the run directory."""
    return lambda world, *overrides: trained(world, *RUN, *overrides)


@pytest.fixture(scope="module")
def single(run: Run) -> Callable[..., Path]:
    """The single-rank runs that everything is compared with."""
    cache: dict[tuple[str, ...], Path] = {}

    def single(*overrides: str) -> Path:
        if overrides not in cache:
            cache[overrides] = run(1, *EVERY_STEP, *overrides)
        return cache[overrides]

    return single


def step_of(directory: Path, step: int) -> Reader:
    return Reader(directory / "checkpoints" / f"step_{step:08d}")


def masks_of(directory: Path, technique: str, step: int) -> dict[str, Tensor]:
    reader, prefix = step_of(directory, step), f"techniques/{technique}/mask/"
    return {name: reader.read(prefix + name) for name in reader.named(prefix)}


def assert_exact(directory: Path, technique: str, sparsity: Callable[[int], float]) -> None:
    """After every step, each matrix has exactly round(s n) zeros, where its mask is; nothing else has."""
    for step in range(1, STEPS + 1):
        reader, masks = step_of(directory, step), masks_of(directory, technique, step)
        assert masks.keys() == {name for name in reader.weights if is_maskable(name)}
        for name in reader.weights:
            zero = reader.read(f"weight/{name}") == 0
            if name not in masks:
                assert zero.all() or not zero.any(), "biases begin at 0, other weights do not"
                continue
            assert int((~masks[name]).sum()) == masked(zero.numel(), sparsity(step)), (step, name)
            assert torch.equal(zero, ~masks[name]), (step, name)
            for kind in ("adam_m", "adam_v", "lion_m", "muon_m", "soap_m"):
                if f"{kind}/{name}" in reader.tensors:
                    assert not reader.read(f"{kind}/{name}")[zero].any(), (step, kind, name)


def assert_same_losses(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    for a, b in zip(rows(found), rows(expected), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=tolerance), (a["step"], a["loss"], b["loss"])
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=10 * tolerance), a["step"]
    assert math.isclose(rows(found)[-1]["valid_loss"], rows(expected)[-1]["valid_loss"], rel_tol=tolerance)


# -- static sparsity -----------------------------------------------------------------------------------------

# name: ranks, what is asked of the model and the optimizer, layout
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "tensor 2 x pipeline 2": (4, (), TP_PP),
    "ZeRO 2, tensor 2 x pipeline 2": (4, (), (ZERO, "engine.zero_stage=2", *TP_PP)),
    "ZeRO 3, data 2, two of four": (2, TWO_FOUR, (ZERO, "engine.zero_stage=3")),
    "ZeRO 2, offload, data 2": (2, (), (ZERO, "engine.zero_stage=2", "engine.offload=optimizer")),
    "experts, data 2": (2, MOE, ("parallel.expert=2",)),
    "lion, ZeRO 1": (2, ("optim=lion",), (ZERO, "engine.zero_stage=1")),
    "muon, tensor 2 x data 2": (4, MUON, ("parallel.tensor=2",)),
    "soap, tensor 2": (2, SOAP, ("parallel.tensor=2",)),
}
SLOW = (
    *("ZeRO 2, tensor 2 x pipeline 2", "ZeRO 2, offload, data 2", "experts, data 2"),
    *("lion, ZeRO 1", "soap, tensor 2"),
)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_sparsity_is_exact_after_every_step_and_the_same_at_every_layout(
    layout: str, run: Run, single: Run
) -> None:
    world, asked, parallel = LAYOUTS[layout]
    options = (*SPARSE, *asked)
    found, expected = run(world, *EVERY_STEP, *options, *parallel), single(*options)
    pattern = SparsityPattern.two_four if asked == TWO_FOUR else SparsityPattern.unstructured
    sparsity = 0.5 if asked == TWO_FOUR else 0.75
    for directory in (found, expected):
        assert_exact(directory, "static_sparsity", lambda step: sparsity)
        for name, mask in masks_of(directory, "static_sparsity", 1).items():
            size = tuple(mask.shape)
            assert torch.equal(mask, random_mask(SEED, name, size, pattern, sparsity, (0, 0), size)), name
    assert_same_losses(found, expected, tolerance=1e-4 if asked == SOAP else 1e-5)
    own = rows(found)[-1]["static_sparsity"]
    assert own == rows(expected)[-1]["static_sparsity"]
    assert own["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert own["theoretical_flops"] * own["theoretical_speedup"] == pytest.approx(rows(found)[-1]["flops"])


def measured(rank: int, world: int, overrides: list[str]) -> tuple[float, float, float]:
    """The gradient norm of a sparse model, that of its masked gradients by hand, and that of all of them."""
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform
    from megafab.run import Progress

    platform.start(0, 1)
    run = build(load.load(overrides), ranks=world)
    weights, squares = run.engine.weights(), {True: 0.0, False: 0.0}
    run.bus.start(Progress(), weights)

    def edit(gradients: Any) -> None:
        for name, gradient in gradients.items():
            kept = weights.master(name) != 0 if is_maskable(name) else torch.ones_like(gradient).bool()
            for keeping in (True, False):
                squares[keeping] += float(gradient[kept == keeping].double().square().sum())
        assert run.bus.reduced is not None
        run.bus.reduced(gradients)

    plan = run.schedules.at(Progress())
    run.engine.forward_backward(run.loader.take(plan), plan, run.bus.loss)
    norm = run.engine.gradient_stats(edit).norm
    run.close()
    return norm, math.sqrt(squares[True]), math.sqrt(sum(squares.values()))


def test_the_norm_that_is_clipped_is_that_of_masked_gradients(ranks, corpus, tmp_path) -> None:
    overrides = [*RUN, *SPARSE, f"data.path={corpus}", f"run.dir={tmp_path}"]
    ((norm, by_hand, dense),) = ranks.run(measured, overrides, init=False)
    assert norm == pytest.approx(by_hand, rel=1e-5)
    assert norm < 0.99 * dense


def test_it_goes_with_other_techniques(run: Run) -> None:
    """The average of masked weights is masked; theoretical FLOPs count the tokens that layers computed."""
    others = (
        "technique=[static_sparsity,ema,token_dropping,replay,z_loss]",
        *("techniques.token_dropping.start=16", "techniques.token_dropping.steps=3"),
        *("techniques.replay.domains=[prose]", "techniques.ema.decay=0.5"),
    )
    directory = run(2, *EVERY_STEP, *SPARSE, *others, *TP_PP[1:])
    assert_exact(directory, "static_sparsity", lambda step: 0.75)
    reader = step_of(directory, STEPS)
    for name, mask in masks_of(directory, "static_sparsity", STEPS).items():
        average = reader.read(f"techniques/ema/{name}")
        assert torch.equal(average == 0, ~mask)
        assert not torch.equal(average, reader.read(f"weight/{name}"))
    last = rows(directory)[-1]
    # Of the layers' matrices, 3/4 of the products are left out, on the tokens that the mean layer computed.
    products = 3 * 2 * 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    saved = 0.75 * products * last["layer_tokens"]
    assert last["layer_tokens"] < last["tokens"]
    assert last["static_sparsity"]["theoretical_flops"] == pytest.approx(last["flops"] - saved, rel=1e-3)


# -- gradual pruning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(4, TP_PP, id="tensor 2 x pipeline 2"),
        pytest.param(2, (ZERO, "engine.zero_stage=3"), id="ZeRO 3", marks=pytest.mark.slow),
        pytest.param(2, (*MUON, "parallel.tensor=2"), id="muon", marks=pytest.mark.slow),
        pytest.param(2, (*SOAP, "parallel.pipeline=2"), id="soap", marks=pytest.mark.slow),
    ],
)
def test_pruning_is_exact_and_takes_the_same_course(
    world: int, options: tuple[str, ...], run: Run, single: Run
) -> None:
    asked = tuple(option for option in options if option.startswith("optim"))
    found, expected = run(world, *EVERY_STEP, *PRUNING, *options), single(*PRUNING, *asked)
    for directory in (found, expected):
        states = [step_of(directory, step).state["techniques"]["gradual_pruning"] for step in (1, 2, 3, 4)]
        assert_exact(directory, "gradual_pruning", lambda step: states[step - 1]["sparsity"])  # noqa: B023
        sparsities = [state["sparsity"] for state in states]
        assert 0 < sparsities[0] < sparsities[1] < sparsities[-1] == 0.6
        assert states[-1]["account"]["flops"] == pytest.approx(states[0]["budget"])
        for step in range(1, STEPS):
            now, then = (masks_of(directory, "gradual_pruning", s) for s in (step + 1, step))
            assert all((now[name] <= then[name]).all() for name in now), "what is pruned stays so"
    # Weights at the threshold may change places with the order in which gradients are added up.
    for name, mask in masks_of(found, "gradual_pruning", STEPS).items():
        other = masks_of(expected, "gradual_pruning", STEPS)[name]
        assert int((mask != other).sum()) <= (2 if not asked else 0.02 * mask.numel()), name
    assert_same_losses(found, expected, tolerance=1e-4 if asked else 1e-5)


def test_a_budget_of_tokens_and_layers_that_drop_some_are_reckoned_with(run: Run) -> None:
    """The compute is spent when the run ends, whatever it is measured in."""
    dropping = (
        *PRUNING[1:],
        "technique=[gradual_pruning,token_dropping]",
        *("techniques.token_dropping.start=16", "techniques.token_dropping.steps=5"),
        *("train.steps=null", "train.tokens=2048", "train.count=layer_tokens"),
    )
    last = rows(run(1, *dropping))[-1]
    assert last["step"] > 4
    assert last["gradual_pruning"]["compute"] == pytest.approx(1.0)
    assert last["gradual_pruning"]["sparsity"] == pytest.approx(0.6, abs=1e-3)


# -- and then dense ------------------------------------------------------------------------------------------

ONE_STEP = ("train.steps=1", "schedule.warmup=1")


@pytest.fixture(scope="module")
def sparse(single: Run) -> Path:
    return single(*SPARSE)


@pytest.fixture(scope="module")
def dense(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("densified") / "run"
    assert cli.main(["ckpt", "densify", str(sparse), f"to={to}"]) == 0
    return to


@pytest.fixture(scope="module")
def weights(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("weights") / "run"
    assert cli.main(["ckpt", "reshape", str(sparse), f"to={to}", "moments=false"]) == 0
    return to


def test_the_dense_model_begins_where_the_sparse_one_was(run: Run, sparse: Path, dense: Path) -> None:
    """To the bit, after an update that is too small to show."""
    after = rows(run(1, f"checkpoint.resume={dense}", *ONE_STEP, "optim.lr=1e-30"))
    assert after[-1]["valid_loss"] == rows(sparse)[-1]["valid_loss"]


def test_all_weights_train_again(run: Run, sparse: Path, dense: Path, weights: Path) -> None:
    on, off = run(1, *SPARSE, f"checkpoint.resume={weights}"), run(1, f"checkpoint.resume={dense}")
    assert rows(on)[0]["loss"] == rows(off)[0]["loss"], "the same model, on the same first batch"
    assert rows(on)[0]["grad_norm"] < rows(off)[0]["grad_norm"]
    before, after = masks_of(sparse, "static_sparsity", STEPS), step_of(off, STEPS)
    for name, mask in before.items():
        assert (after.read(f"weight/{name}")[~mask] != 0).float().mean() > 0.99
    # With the masks, weights alone begin another sparse run.
    assert all(torch.equal(mask, before[n]) for n, mask in masks_of(on, "static_sparsity", STEPS).items())
    reader = step_of(on, STEPS)
    assert all(torch.equal(reader.read(f"weight/{n}") == 0, ~mask) for n, mask in before.items())


def test_other_seeds_do_not_move_the_masks_of_weights_that_are_there(run: Run, weights: Path) -> None:
    found = run(1, SPARSE[0], "train.seed=5", f"checkpoint.resume={weights}", *ONE_STEP)
    before = masks_of(weights, "static_sparsity", STEPS)
    assert all(torch.equal(mask, before[n]) for n, mask in masks_of(found, "static_sparsity", 1).items())


@pytest.mark.parametrize("moments", [True, False])
def test_masks_are_not_lost_without_a_word(run: Run, sparse: Path, weights: Path, moments: bool) -> None:
    source = (sparse if moments else weights) / "checkpoints" / f"step_{STEPS:08d}"
    text = (
        r"found weights under the masks of static_sparsity, which is off, expected the technique.*"
        rf"Fix: technique=\[static_sparsity\]; or megafab ckpt densify {source} to=DIR"
    )
    for technique in ((), PRUNING):
        with pytest.raises(UserError, match=text):
            run(1, *technique, f"checkpoint.resume={source}", f"train.steps={STEPS + 4}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_sparser_the_higher_the_loss(trained) -> None:
    """The order of the paper in the first stage of `recipe=spdf`, with a narrower model."""
    stage = (
        *("model=llama_tiny", "model.hidden=128", "train.steps=300", "train.global_batch=8"),
        *("train.micro_batch=8", "optim.lr=2e-3", "schedule.warmup=20", "eval.samples=16", "tracking=none"),
    )

    def loss(sparsity: float) -> float:
        sparse = (*SPARSE, f"techniques.static_sparsity.sparsity={sparsity}") if sparsity else ()
        return rows(trained(1, *stage, *sparse))[-1]["valid_loss"]

    losses = [loss(sparsity) for sparsity in (0, 0.5, 0.75, 0.9)]
    assert losses == sorted(losses)
    assert losses[-1] < 0.7 * math.log(512), "even the sparsest must have learned"
