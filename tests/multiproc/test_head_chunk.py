"""`train.head_chunk` trains as whole logits do; a plain loss gets the gradient that was expected."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training import SHORT_RUN, SMALL_MODEL, rows

TIED = ("model.tied_embeddings=true", "parallel.pipeline=2")
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
ZERO_3 = ("engine=deepspeed", "engine.zero_stage=3", "engine.persistent_parameters=0")
CHUNK = "train.head_chunk=24"  # of 64 tokens: two and a rest


@pytest.mark.parametrize(
    "layout",
    [
        SEQUENCE,
        (*ZERO_3, "model.tied_embeddings=true", "train.recompute=full"),
        (*TIED, "technique=[label_smoothing,z_loss]"),
    ],
    ids=" ".join,
)
def test_chunks_train_as_whole_logits_do(layout: tuple[str, ...], trained) -> None:
    """20 steps on real text, and their evaluation."""
    plain, chunked = (rows(trained(2, *SMALL_MODEL, *SHORT_RUN, *layout, *more)) for more in ((), (CHUNK,)))
    assert len(plain) == len(chunked) == 20
    assert plain[-1]["loss"] < plain[0]["loss"] - 0.3, "the run must have learned something"
    for a, b in zip(plain, chunked, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-6), (a["step"], a["loss"], b["loss"])
    assert math.isclose(plain[-1]["valid_loss"], chunked[-1]["valid_loss"], rel_tol=1e-6)


def gradients_found(rank: int, world: int, arguments: list[str]) -> list[tuple[float, list[float]]]:
    """Of each micro-batch of a step: the gradient expected of a token's loss, and those that came."""
    from megafab.build import build
    from megafab.config import load
    from megafab.loss import cross_entropy
    from megafab.platform import platform
    from megafab.run import Progress

    platform.start(0, 1)
    seen: list[tuple[float, list[float]]] = []
    scale = cross_entropy.scale_rows_

    def spy(x: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> None:
        seen.append((expected.item(), found.tolist()))
        scale(x, expected, found)

    cross_entropy.scale_rows_ = spy
    try:
        run = build(load.load(arguments), ranks=world)
        plan = run.schedules.at(Progress())
        run.engine.forward_backward(run.loader.take(plan), plan, run.bus.loss)
        run.close()
    finally:
        cross_entropy.scale_rows_ = scale
    return seen


@pytest.mark.parametrize(
    "engine", [(), ("engine=deepspeed", "engine.zero_stage=2")], ids=["megatron", "zero"]
)
def test_the_gradient_of_a_plain_loss_is_the_expected_one(
    engine: tuple[str, ...], ranks, corpus: Path, tmp_path: Path
) -> None:
    """Bit for bit, so that no row of the logits is read a third time."""
    arguments = [*SMALL_MODEL, *SHORT_RUN, *engine, f"data.path={corpus}", f"run.dir={tmp_path}"]
    for seen in ranks.run(gradients_found, arguments, world=2, init=False):
        assert len(seen) == 4
        for expected, found in seen:
            assert set(found) <= {0.0, expected}
            assert found.count(expected) > len(found) / 2
