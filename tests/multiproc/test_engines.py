"""What every engine owes the loop, in every mode: a veto that leaves no trace, and the memory it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from training import SHORT_RUN, SMALL_MODEL

from megafab.engine.capabilities import MODES, Mode
from megafab.engine.config import Offload
from megafab.run import Action, Progress, Verdict

VERIFIED = [mode for mode in MODES if mode.verified]
# Stage 1, and stage 3 with something offloaded, take the ways that the others take.
SLOW = ("ZeRO 1", "ZeRO 1, offload optimizer", "ZeRO 3, offload optimizer", "ZeRO 3, offload parameters")
EACH = [
    pytest.param(mode, id=mode.name, marks=[pytest.mark.slow] if mode.name in SLOW else [])
    for mode in VERIFIED
]


@pytest.fixture
def arguments(corpus, tmp_path):
    return [*SMALL_MODEL, *SHORT_RUN, f"data.path={corpus}", f"run.dir={tmp_path}"]


def build_run(overrides: list[str], world: int):
    from megafab.build import build
    from megafab.config import load, rules
    from megafab.platform import platform

    config = load.load(overrides)
    rules.check_all(config, ranks=world, corpus=rules.corpus_facts(config))
    platform.start(0, 1)
    return build(config, ranks=world)


def norms(rank: int, world: int, overrides: list[str], verdicts: list[Verdict]) -> list[float]:
    """The gradient norm of each of a few steps on the same batch, each ended by its verdict."""
    run = build_run(overrides, world)
    plan = run.schedules.at(Progress())
    batch, weights = run.loader.take(plan), run.engine.weights()
    found = []
    for verdict in verdicts:
        run.engine.forward_backward(batch, plan, run.bus.loss)
        stats = run.engine.gradient_stats()
        before = {name: weights.master(name).clone() for name in weights.names()}
        outcome = run.engine.update(plan, verdict, stats)
        same = [bool((weights.master(name) == before[name]).all()) for name in before]
        assert outcome.applied is (verdict.action is not Action.SKIP)
        assert all(same) if verdict.action is Action.SKIP else not any(same)
        found.append(stats.norm)
    return found


APPLY, SKIP = Verdict(), Verdict(Action.SKIP, reason="for the test")
HALF = Verdict(Action.SCALE, scale=0.5)
LAYOUT = ("parallel.tensor=2", "parallel.sequence=true")


@pytest.mark.parametrize("mode", EACH)
def test_a_discarded_update_leaves_no_trace(mode: Mode, ranks, arguments):
    """Neither in the weights nor in the moments: the norms that follow are those without it, to the bit."""
    overrides = [*arguments, *mode.overrides, *LAYOUT]
    with_skips = ranks.run(norms, overrides, [APPLY, SKIP, SKIP, HALF, APPLY], world=4, init=False)
    without = ranks.run(norms, overrides, [APPLY, HALF, APPLY], world=4, init=False)
    assert len({tuple(one) for one in with_skips}) == 1, "the norm is the same number on every rank"
    first, skipped, again, half, last = with_skips[0]
    assert skipped == again == half, "the same gradients of the same weights"
    assert [first, half, last] == without[0]


def memory(rank: int, world: int, overrides: list[str]) -> tuple[int, ...]:
    """Elements of this rank's parameters, and its memory when all gradients of a step are there."""
    run = build_run(overrides, world)
    numel = sum(math.prod(t.layout.local_shape) for t, _ in run.engine.copies())
    plan = run.schedules.at(Progress())
    seen = []
    transformer = run.engine._modules[0].config
    finalize = transformer.finalize_model_grads_func

    def look_and_finalize(*args: object, **kwargs: object) -> None:
        seen.append(run.engine.memory())
        finalize(*args, **kwargs)

    transformer.finalize_model_grads_func = look_and_finalize
    run.engine.forward_backward(run.loader.take(plan), plan, run.bus.loss)
    (before_reduction,) = seen
    return numel, *before_reduction


# Bytes a parameter (fp32, bf16), and what of it is divided by the number of data ranks. Gradients are kept
# in fp32 by all. The masters of an fp32 model are its parameters under Megatron, and copies under ZeRO.
FORMULA = {
    # stage: parameters, gradients, optimizer: (bytes in fp32, bytes in bf16, divided)
    None: ((4, 2, False), (4, 4, False), (8, 12, True)),
    1: ((4, 2, False), (4, 4, False), (12, 12, True)),
    2: ((4, 2, False), (4, 4, True), (12, 12, True)),
    3: ((4, 2, True), (4, 4, True), (12, 12, True)),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "mode", [mode for mode in VERIFIED if mode.offload is Offload.none], ids=lambda mode: mode.name
)
def test_memory_falls_as_zero_says(mode: Mode, precision: str, ranks, arguments):
    """Rajbhandari et al. 2020, section 3 and table 1, with fp32 gradients."""
    # Many like layers: what falls between two ranks' ranges is small beside the whole.
    shape = ["model.layers=16", "model.hidden=64", "model.vocab=1024", f"train.precision={precision}"]
    gathered = ["engine.persistent_parameters=0"] if mode.zero_stage == 3 else []
    overrides = [*arguments, *shape, *mode.overrides, *gathered, "train.global_batch=4"]
    world = 4
    for numel, *found in ranks.run(memory, overrides, world=world, init=False):
        for (fp32, bf16, divided), measured in zip(FORMULA[mode.zero_stage], found, strict=True):
            expected = numel * (bf16 if precision == "bf16" else fp32) / (world if divided else 1)
            assert measured == pytest.approx(expected, rel=0.05), (mode.name, expected)


@pytest.mark.parametrize("mode", EACH)
def test_no_operation_is_compiled(mode: Mode, ranks, arguments, tmp_path, monkeypatch):
    """DeepSpeed builds C++ on demand, for half a minute each; on the way of training nothing is asked for."""
    built = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(built))
    ranks.run(norms, [*arguments, *mode.overrides], [APPLY], world=2, init=False)
    assert not list(built.rglob("*.so"))
    assert not list(built.rglob("*.ninja"))


def there_and_back(rank: int, world: int, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Norms of two steps after a save; and again, after going back to it in the same process."""
    run = build_run(overrides, world)
    progress = Progress()

    def steps(progress: Progress, count: int) -> tuple[Progress, list[float]]:
        found = []
        for _ in range(count):
            plan = run.schedules.at(progress)
            run.engine.forward_backward(run.loader.take(plan), plan, run.bus.loss)
            stats = run.engine.gradient_stats()
            progress = progress.advance(plan, run.engine.update(plan, Verdict(), stats))
            found.append(stats.norm)
        return progress, found

    with run.checkpoints:
        progress, _ = steps(progress, 2)
        run.checkpoints.save(progress, wait=True)
        _, first = steps(progress, 2)
        back = run.checkpoints.restore()
        assert back == progress
        _, again = steps(back, 2)
    run.loader.close()
    return first, again


@pytest.mark.parametrize("mode", EACH)
def test_a_run_goes_back_to_its_checkpoint(mode: Mode, ranks, arguments):
    """What a roll-back is, in every mode: weights, moments and data as they were, to the bit."""
    overrides = [*arguments, *mode.overrides, *LAYOUT, "checkpoint.resume=auto"]
    for first, again in ranks.run(there_and_back, overrides, world=4, init=False):
        assert first == again


def weights_and_masters(rank: int, world: int, overrides: list[str]) -> dict[str, tuple[Any, ...]]:
    """After two steps: by name the whole parameter, and this rank's range of its master with its start."""
    run = build_run(overrides, world)

    def refuse() -> None:
        raise AssertionError("a pass over the masters of its own")

    for part in run.engine._optimizer._parts:
        part._copy_main_params_to_model_params = refuse
    plan = run.schedules.at(Progress())
    batch = run.loader.take(plan)
    for _ in range(2):
        run.engine.forward_backward(batch, plan, run.bus.loss)
        run.engine.update(plan, Verdict(), run.engine.gradient_stats())
    return {
        s.tagged.name: (s.tagged.parameter.detach().flatten(), s.start, s.master.detach())
        for s in run.engine._optimizer.slices
    }


def test_adamw_writes_the_models_weights_in_its_own_pass(ranks, arguments):
    """Of dense parameters and experts, whose optimizers are two: the rounded masters of all data ranks."""
    overrides = [*arguments, "train.precision=bf16", "model.moe.experts=2", "engine.bucket_parameters=10000"]
    found = ranks.run(weights_and_masters, overrides, world=2, init=False)
    names = set().union(*found)
    assert any(".experts." in name for name in names)
    for name in names:
        parts = [one[name] for one in found if name in one]
        (whole, *_), *_ = parts
        assert whole.dtype is torch.bfloat16
        rounded = torch.full_like(whole, float("nan"))
        for copy, start, master in parts:
            assert torch.equal(copy, whole)
            rounded[start : start + len(master)] = master.bfloat16()
        assert torch.equal(rounded, whole), name


def test_a_bf16_run_goes_back_to_its_checkpoint(ranks, arguments):
    """Where the model has the weights rounded, and the masters come from the files."""
    overrides = [*arguments, "train.precision=bf16", "checkpoint.resume=auto"]
    for first, again in ranks.run(there_and_back, overrides, world=2, init=False):
        assert first == again
