"""Loss spikes in real runs: of the data and of faults, undone to the bit, at any layout and after deaths."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import EOD, write_corpus
from ranks import RankDied
from training import rows, train

from megafab.checkpoint import store
from megafab.data import order
from megafab.data.mixture import draw, occurrence, weights
from megafab.errors import UserError
from megafab.resilience.spikes import SPIKES_FILE

SEED, SEQ_LEN, BATCH, EVERY, STEPS = 1234, 32, 4, 5, 32
VOCAB, KNOWN = 64, 32  # ids from KNOWN on stand in bad windows only
BAD = (23, 24)  # the steps, from 1, whose samples are bad
SPIKES = "resilience.spikes={window: 16, min_steps: 10, threshold: 6, patience: 2, margin: 3}"
SKIP = "data.skip=[[76,20]]"  # those steps and a margin of 3
RUN = (
    *("model=llama_tiny", "model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=2"),
    *("model.ffn=64", f"model.seq_len={SEQ_LEN}", f"train.seed={SEED}", f"train.steps={STEPS}"),
    *(f"train.global_batch={BATCH}", "train.micro_batch=1", "optim.lr=1e-2", "schedule=constant"),
    *("schedule.warmup=2", "tracking=none", "eval.samples=0", f"checkpoint.every={EVERY}"),
    "checkpoint.keep=3",
)
LAYOUTS = {
    "data 2": (2, []),
    "pipeline 2, bf16, techniques": (
        2,
        [
            *("parallel.pipeline=2", "train.precision=bf16", "technique=[ema,static_sparsity]"),
            *("techniques.ema.decay=0.9", "eval.samples=2", "eval.every=8"),
        ],
    ),
}
MORE_LAYOUTS = {
    "tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "gathers overlapped": (2, ["engine.overlap_param_gather=true"]),
    "muon": (2, ["optim=muon", "optim.lr=1e-2"]),
    "zero 2": (2, ["engine=deepspeed", "engine.zero_stage=2"]),
    "zero 1, offload": (2, ["engine=deepspeed", "engine.zero_stage=1", "engine.offload=optimizer"]),
    "zero 3": (2, ["engine=deepspeed", "engine.zero_stage=3"]),
}
ALL_LAYOUTS = [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two domains of skewed noise, soon learnt, with noise of ids never seen in what the bad steps read."""
    rng, lengths = np.random.default_rng(0), {"books": 6000, "code": 3000}
    share = 1 / np.arange(1, KNOWN)
    streams = {
        name: rng.choice(np.arange(1, KNOWN), length, p=share / share.sum())
        for name, length in lengths.items()
    }
    for stream in streams.values():
        stream[199::200] = EOD
    cut = {name: np.split(stream, np.arange(200, len(stream), 200)) for name, stream in streams.items()}
    plain = write_corpus(tmp_path_factory.mktemp("plain"), cut, vocab_size=VOCAB)
    samples = np.arange(BAD[1] * BATCH)
    domain_N = draw(SEED, 0, len(samples), weights(None, plain))
    index_N = occurrence(domain_N)
    for sample in samples[(BAD[0] - 1) * BATCH :].tolist():
        name = plain.domains[domain_N[sample]]
        key = np.array([order.stream_key(SEED, "windows", name)], np.uint64)
        windows = np.array([(lengths[name] - 1) // SEQ_LEN])
        start = int(order.visit(index_N[sample : sample + 1], windows, key)[0]) * SEQ_LEN
        streams[name][start : start + SEQ_LEN] = rng.integers(KNOWN, VOCAB, SEQ_LEN)
    valid = {name: documents[:2] for name, documents in cut.items()}
    return write_corpus(tmp_path_factory.mktemp("bad"), cut, valid, vocab_size=VOCAB).path


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory) -> Run:
    """`run(layout, *overrides)` trains, with the function `body` and its arguments; its run directory."""

    def run(layout: str, *more: str, body: tuple[Any, ...] = (train,), into: Path | None = None) -> Path:
        directory = into or tmp_path_factory.mktemp("run")
        world, axes = (LAYOUTS | MORE_LAYOUTS)[layout]
        arguments = [*RUN, *axes, f"data.path={corpus}", f"run.dir={directory}", *more]
        ranks.run(body[0], arguments, *body[1:], world=world, init=False)
        return directory

    return run


@pytest.fixture(scope="module")
def fired(run) -> Run:
    """The runs that come upon the bad samples, each trained once."""
    return cache(lambda layout: run(layout, SPIKES))


@pytest.fixture(scope="module")
def told(run) -> Run:
    """The runs that are told to skip them, and look at nothing."""
    return cache(lambda layout: run(layout, SKIP))


def numbers(run_dir: Path, *more: str) -> list[dict[str, Any]]:
    """What training computed at each step, bit for bit; not how long it took."""
    keys = ("step", "samples", "tokens", "loss", "grad_norm", "lr", "skipped", "domain_loss", "valid_loss")
    return [{key: row[key] for key in (*keys, *more) if key in row} for row in rows(run_dir)]


def decided(run_dir: Path) -> list[tuple[int, str, int | None]]:
    """Where a spike was found, what was said of it, and to which step the run went back."""
    lines = map(json.loads, (run_dir / SPIKES_FILE).read_text().splitlines())
    return [(line["first"], line["cause"], line.get("back_to")) for line in lines]


def log(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text()


# -- of the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_spike_of_the_data_is_skipped_as_if_it_had_been_known(fired, told, layout):
    directory = fired(layout)
    assert decided(directory) == [(BAD[0], "unknown", 15), (BAD[0], "data", 15)]
    entry = json.loads((directory / SPIKES_FILE).read_text().splitlines()[-1])
    assert f"data.skip=[[{','.join(map(str, entry['samples']))}]]" == SKIP
    assert sum(entry["domains"].values()) == entry["samples"][1]
    assert re.search(
        rf"step {BAD[1]}: loss [\d.]+ \([\d.]+ deviations above the median\), gradient norm [\d.]+: the "
        rf"spike of step {BAD[0]} has come back, it is of the data; back to step 15, skipping samples "
        r"76 to 95 \(books \d+, code \d+\)\n",
        log(directory),
    )
    assert numbers(directory) == numbers(told(layout))
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))
    assert [row["spikes"]["rollbacks"] for row in rows(directory)] == [0] * 15 + [2] * (STEPS - 15)


def test_a_crash_repeats_no_decision(run, fired, told, tmp_path):
    """Killed in the replay, and again once the cause is known: the window of losses is exact, too."""
    for cause in ("unknown", "data"):
        with pytest.raises(RankDied, match="ended with status -9"):
            run("data 2", SPIKES, body=(train_and_die, cause, 18), into=tmp_path)
        assert decided(tmp_path)[-1][1] == cause
        assert store.candidates(tmp_path / "checkpoints")[0].name == "step_00000015"
    run("data 2", SPIKES, into=tmp_path)
    assert decided(tmp_path) == decided(fired("data 2"))
    assert numbers(tmp_path, "spikes") == numbers(fired("data 2"), "spikes")


def train_and_die(rank, world, overrides, cause, step):
    """Train; rank 1 is killed as `step` begins, once `cause` is the last thing that was decided."""
    from megafab.optim.schedules import Schedules

    at, (directory,) = Schedules.at, [Path(o[8:]) for o in overrides if o.startswith("run.dir=")]

    def dying(self, progress):
        file = directory / SPIKES_FILE
        if rank == 1 and progress.step + 1 == step and file.exists() and decided(directory)[-1][1] == cause:
            os.kill(os.getpid(), signal.SIGKILL)
        return at(self, progress)

    Schedules.at = dying
    return train(rank, world, overrides)


# -- of faults -----------------------------------------------------------------------------------------------


def train_with_a_fault(rank, world, overrides, fault, times):
    """Train, with something wrong in the update of step 26, the first so many times that it is computed."""
    from megafab.engine.scheduled import ScheduledEngine

    update, left = ScheduledEngine.update, [times]

    def faulty(self, plan, verdict, stats):
        strikes = plan.step == 25 and left[0] > 0
        left[0] -= strikes
        if not strikes:
            return update(self, plan, verdict, stats)
        if fault == "huge step":
            return update(self, replace(plan, lr=300 * plan.lr), verdict, stats)
        outcome, editor = update(self, plan, verdict, stats), self.weights()
        for name in (name for name in editor.names() if "layers.0.mlp" in name):
            editor.master(name)[:] = float("nan")
        editor.commit()
        return outcome

    ScheduledEngine.update = faulty
    return train(rank, world, overrides)


@pytest.mark.parametrize(
    ("layout", "fault"), [("data 2", "huge step"), ("zero 2", "nan"), ("pipeline 2, bf16, techniques", "nan")]
)
def test_a_passing_fault_leaves_no_trace(run, told, layout, fault):
    directory = run(layout, SPIKES, SKIP, body=(train_with_a_fault, fault, 1))
    assert decided(directory) == [(27, "unknown", 20), (27, "numeric", None)]
    assert "step 28: the spike of step 27 has not come back: its cause was numeric" in log(directory)
    assert numbers(directory) == numbers(told(layout))


def test_a_spike_that_nothing_helps_against_ends_the_run(run, tmp_path):
    most = SPIKES.replace("}", ", max_rollbacks: 3}")
    with pytest.raises(
        UserError,
        match=r"resilience\.spikes\.max_rollbacks=3: found a spike again at step 28 \(loss .*\), after as",
    ):
        run("data 2", most, SKIP, body=(train_with_a_fault, "huge step", 9), into=tmp_path)
    assert [(first, cause) for first, cause, _ in decided(tmp_path)] == [
        (27, "unknown"),
        (27, "data"),
        (27, "unknown"),
    ]
