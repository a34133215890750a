"""Real runs whose layers, loss and optimizer call the CUDA sources, executed on the CPU by `emulator`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import emulator
import pytest
import training

from megafab.kernels import build

pytestmark = pytest.mark.skipif(build.toolchain() is None, reason="no nvcc (CUDA_HOME)")

SMALL = ("model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128", "model.seq_len=32")
STEPS = ("train.steps=4", "train.global_batch=4", "schedule.warmup=1", "optim.lr=1e-3", "tracking=none")
LLAMA = ("model=llama_tiny", "model.kv_heads=2", *SMALL, *STEPS, "eval.samples=2")

RUNS = {
    "llama, 20 steps": (1, (*LLAMA, "train.steps=20")),
    "llama, 20 steps in bf16": (1, (*LLAMA, "train.steps=20", "train.precision=bf16")),
    "gpt with dropout": (1, ("model=gpt_tiny", *SMALL, *STEPS, "model.dropout=0.1", "eval.samples=2")),
    "tensor 2, sequence parallel": (2, (*LLAMA, "parallel.tensor=2", "parallel.sequence=true")),
    "zero 2, weighed tokens": (
        2,
        (*LLAMA, "engine=deepspeed", "engine.zero_stage=2", "technique=[z_loss,label_smoothing]"),
    ),
    "dropped tokens and masked weights": (
        1,
        (
            *LLAMA,
            "model.layers=4",
            "technique=[token_dropping,static_sparsity]",
            "techniques.token_dropping.start=16",
            "techniques.token_dropping.round_to=8",
        ),
    ),
    "logits by chunks": (1, (*LLAMA, "train.head_chunk=24")),
}


def train_with_kernels(rank: int, world: int, overrides: Sequence[str]) -> int:
    """As `training.train`, every operator the emulated kernel."""
    from megafab.kernels import dispatch, ops

    def emulated(*_: object) -> str:
        emulator.load()
        for name in ops.OPS:
            ops.choose(name, emulator.NAMESPACE)
        return "emulated"

    set_up, dispatch.set_up = dispatch.set_up, emulated
    try:
        return training.train(rank, world, overrides)
    finally:
        dispatch.set_up = set_up


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_reference(name: str, ranks, corpus: Path, tmp_path: Path):
    world, overrides = RUNS[name]
    losses = []
    for kind, train in (("kernels", train_with_kernels), ("reference", training.train)):
        run_dir = tmp_path / kind
        arguments = [*overrides, f"data.path={corpus}", f"run.dir={run_dir}"]
        assert ranks.run(train, arguments, world=world, init=False) == [0] * world
        losses.append([row["loss"] for row in training.rows(run_dir) if "loss" in row])
    limit = 2e-3 if "bf16" in name else 1e-5
    assert len(losses[0]) >= 4
    assert losses[0] == pytest.approx(losses[1], abs=limit)
