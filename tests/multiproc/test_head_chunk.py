"""`train.head_chunk` trains as whole logits do; a plain loss gets the gradient that was expected."""

from __future__ import annotations

import json
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


def used(rank: int, world: int, verb: str, *arguments: str) -> int:
    """`megafab VERB` on this rank."""
    from launch import cli

    return cli.main([verb, *arguments])


def test_a_run_by_chunks_can_be_used(ranks, trained, tmp_path: Path) -> None:
    """Its checkpoint's losses on held-out text and by token are those of the plain run; it writes text."""
    found, scores = [], []
    for number, more in enumerate(((), (CHUNK,))):
        run = trained(1, *SMALL_MODEL, *SHORT_RUN, "train.steps=2", *more)
        out = tmp_path / f"{number}.json"
        arguments = (f"checkpoint={run}", f"out={out}", "samples=4")
        assert ranks.run(used, "perplexity", *arguments, init=False) == [0]
        found.append({n: d["loss"]["off"] for n, d in json.loads(out.read_text())["domains"].items()})
        arguments = (f"checkpoint={run}", "prompt=def", "tokens=3", f"out={tmp_path / 'text'}")
        assert ranks.run(used, "generate", *arguments, init=False) == [0]
        ((predictions, nll),) = ranks.run(scored, run, tmp_path / f"scores-{number}", init=False)
        assert predictions > 100
        scores.append(nll)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def scored(rank: int, world: int, run_dir: Path, out: Path) -> tuple[int, float]:
    """Predictions and their summed loss in the first windows of a run's corpus."""
    from launch.chosen import chosen
    from megafab.data.scores import ScoresWriter
    from megafab.platform import platform

    platform.start(0, 1)
    from megafab.scorer import Scorer

    checkpoint, run, corpus = chosen(str(run_dir), None)
    ScoresWriter(out, corpus).create()
    return Scorer(run, checkpoint, corpus, out, seq_len=64, micro_batch=2).run(0, 0, 4)


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
