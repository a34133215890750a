"""Copies that must agree: compared in real runs, and found where one of them is changed."""

from __future__ import annotations

import pytest
from training import SHORT_RUN, SMALL_MODEL

from megafab.errors import UserError

TIED = "model.tied_embeddings=true"
DATA = "data x context"


def build_run(rank: int, world: int, overrides: list[str]):
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform

    platform.start(rank, 1)
    return build(load.load(overrides), ranks=world)


def change_and_check(rank: int, world: int, overrides: list[str], name: str, changed: int) -> str:
    """One element of parameter `name` changed in its last bit on rank `changed`; what the check says."""
    import torch

    run = build_run(rank, world, overrides)
    run.invariants.check(0, saving=True)
    if rank == changed:
        (mine,) = (tensor for t, tensor in run.engine.copies() if t.name == name)
        words = mine.view(-1)[:1].view(torch.int32)
        words ^= 1
    run.invariants.check(7, saving=False)  # not due: nothing is compared
    with pytest.raises(UserError) as error:
        run.invariants.check(10, saving=False)
    return str(error.value)


CASES = {
    # name: (ranks, overrides, parameter, changed on, what is found)
    "norm, tensor": (
        *(2, ["parallel.tensor=2", "parallel.sequence=true"], "decoder.final_layernorm.weight", 1),
        "rank 0 != rank 1 along the tensor axis",
    ),
    "slice, data": (
        *(4, ["parallel.tensor=2"], "decoder.layers.1.mlp.linear_fc1.weight", 3),
        f"rank 1 != rank 3 along the {DATA} axis",
    ),
    "norm, tensor and data": (
        *(4, ["parallel.tensor=2"], "decoder.layers.0.input_layernorm.weight", 2),
        f"rank 0 != rank 2 along the {DATA} axis",
    ),
    "one of three, data": (
        *(3, ["train.global_batch=6"], "embedding.word_embeddings.weight", 1),
        f"rank 1 != ranks 0, 2 along the {DATA} axis",
    ),
    "tied embedding, pipeline": (
        *(2, ["parallel.pipeline=2", TIED], "embedding.word_embeddings.weight", 1),
        "rank 0 != rank 1 along the pipeline axis",
    ),
    "expert, its copies": (
        *(
            4,
            ["model.moe.experts=4", "parallel.expert=2"],
        ),
        *("decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight", 2),
        "rank 0 != rank 2 along the expert data axis",
    ),
    "ZeRO 2, data": (
        *(2, ["engine=deepspeed", "engine.zero_stage=2"], "output_layer.weight", 0),
        f"rank 0 != rank 1 along the {DATA} axis",
    ),
    "ZeRO 3 partition, tensor": (
        *(
            2,
            ["engine=deepspeed", "engine.zero_stage=3", "parallel.tensor=2"],
        ),
        *("decoder.layers.3.pre_mlp_layernorm.weight", 0),
        "rank 0 != rank 1 along the tensor axis",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_its_ranks_are_named(case, ranks, corpus, tmp_path):
    world, overrides, name, changed, found = CASES[case]
    fixed = [*SMALL_MODEL, *SHORT_RUN, f"data.path={corpus}", f"run.dir={tmp_path}"]
    arguments = [*fixed, "resilience.check_every=10", *overrides]
    messages = ranks.run(change_and_check, arguments, name, changed, world=world, init=False)
    assert len(set(messages)) == 1, "every rank stops, with the same words"
    assert messages[0].startswith(f"parameter {name}: found ranks that hold it alike disagree: {found}")


def test_gathers_that_are_still_to_come_are_no_difference(ranks, corpus, tmp_path):
    """Checked after every step, and the losses are those of a run that is not checked."""
    from training import rows, train

    fixed = [*SMALL_MODEL, *SHORT_RUN, f"data.path={corpus}", "engine.overlap_param_gather=true"]
    losses = []
    for every in (1, 0):
        more = [f"run.dir={tmp_path / str(every)}", f"resilience.check_every={every}", "train.steps=6"]
        ranks.run(train, [*fixed, *more], world=2, init=False)
        losses.append([(row["loss"], row["grad_norm"]) for row in rows(tmp_path / str(every))])
    assert losses[0] == losses[1]


def test_a_trained_model_keeps_its_copies(ranks, corpus, tmp_path):
    """Checked after every step, at a layout that has copies along every axis."""
    from training import rows, train

    fixed = [*SMALL_MODEL, *SHORT_RUN, TIED, f"data.path={corpus}", f"run.dir={tmp_path}"]
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]
    arguments = [*fixed, *layout, "resilience.check_every=1", "train.steps=4"]
    assert ranks.run(train, arguments, world=8, init=False, timeout=240) == [0] * 8
    assert len(rows(tmp_path)) == 4
