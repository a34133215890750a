"""The promise of the framework: the same losses at every topology, on real text, in real ranks."""

from __future__ import annotations

import math

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows

MOE = ("model.moe.experts=4", "model.moe.shared_ffn=64", "model.moe.z_loss=0.001")
GPT = (
    "model.norm=layernorm",
    "model.activation=gelu",
    "model.position=learned",
    "model.bias=true",
    "model.tied_embeddings=true",
    "model.kv_heads=4",
    "model.qk_norm=true",
)
SEQUENCE = "parallel.sequence=true"

# name: (ranks, layout)
LAYOUTS = {
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2, sequence parallel": (2, ["parallel.tensor=2", SEQUENCE]),
    "tensor 4, more than key-value heads": (4, ["parallel.tensor=4", SEQUENCE]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 4": (4, ["parallel.pipeline=4"]),
    "pipeline 2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "data 2": (2, []),
    "data 4, small buckets": (4, ["engine.bucket_parameters=10000"]),
    "data 2, gathers overlapped": (2, ["engine.overlap_param_gather=true"]),
    "data 2, reduction not overlapped": (2, ["engine.overlap_grad_reduce=false"]),
    "context 2, all-gather": (2, ["parallel.context=2"]),
    "context 2, Ulysses": (2, ["parallel.context=2", "parallel.context_method=ulysses"]),
    "tensor 2 x pipeline 2 x data 2, sequence parallel": (
        8,
        ["parallel.tensor=2", "parallel.pipeline=2", SEQUENCE],
    ),
    "tensor 2 x context 2": (4, ["parallel.tensor=2", "parallel.context=2", SEQUENCE]),
    "micro-batch 2": (1, ["train.micro_batch=2"]),
    "recompute all": (1, ["train.recompute=full"]),
    "recompute attention, pipeline 2": (2, ["train.recompute=selective", "parallel.pipeline=2"]),
}
MOE_LAYOUTS = {
    "expert 2": (2, ["parallel.expert=2"]),
    "data 2": (2, []),
    "expert 2 x pipeline 2": (4, ["parallel.expert=2", "parallel.pipeline=2"]),
    "tensor 2": (2, ["parallel.tensor=2", SEQUENCE]),
    "expert 2 x tensor 2": (4, ["parallel.expert=2", "parallel.tensor=2", SEQUENCE]),
    "context 2": (2, ["parallel.context=2"]),
}
GPT_LAYOUTS = {
    "tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pipeline 2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "context 2": (2, ["parallel.context=2"]),
}


def quick(layouts):
    """The layouts as parameters. Several axes at once take minutes; test_capabilities has some of them."""
    return [
        pytest.param(name, marks=pytest.mark.slow if world > 2 and len(overrides) > 1 else ())
        for name, (world, overrides) in layouts.items()
    ]


@pytest.fixture(scope="module")
def run(trained):
    """Train; the rows of its metrics."""
    return lambda world, *overrides: rows(trained(world, *SMALL_MODEL, *SHORT_RUN, *overrides))


@pytest.fixture(scope="module")
def single(run):
    """The single-rank runs that everything is compared with."""
    cache = {}

    def single(*overrides):
        if overrides not in cache:
            cache[overrides] = run(1, *overrides)
        return cache[overrides]

    return single


def assert_same_curve(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) == 20
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.3, "the reference must have learned something"
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            slack = tolerance if key == "loss" else 10 * tolerance
            assert math.isclose(a[key], b[key], rel_tol=slack), (a["step"], key, a[key], b[key])
        assert a["domain_loss"].keys() == b["domain_loss"].keys()
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=tolerance)


@pytest.mark.parametrize("layout", quick(LAYOUTS))
def test_llama_equals_one_rank(layout, run, single):
    world, overrides = LAYOUTS[layout]
    assert_same_curve(run(world, *overrides), single())


@pytest.mark.parametrize("layout", quick(MOE_LAYOUTS))
def test_mixture_of_experts_equals_one_rank(layout, run, single):
    world, overrides = MOE_LAYOUTS[layout]
    assert_same_curve(run(world, *MOE, *overrides), single(*MOE))


@pytest.mark.parametrize("layout", quick(GPT_LAYOUTS))
def test_gpt_with_tied_embeddings_equals_one_rank(layout, run, single):
    world, overrides = GPT_LAYOUTS[layout]
    assert_same_curve(run(world, *GPT, *overrides), single(*GPT))


def test_bf16_stays_close_to_fp32(run, single):
    bf16, fp32 = run(2, "train.precision=bf16", "parallel.tensor=2"), single()
    for a, b in zip(bf16, fp32, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=5e-3), a["step"]
    assert any(a["loss"] != b["loss"] for a, b in zip(bf16, fp32, strict=True)), "bf16 must be bf16"


def test_concatenated_packing_lets_documents_see_each_other(run, single):
    found, expected = ([row["loss"] for row in run] for run in (run(1, "data.packing=concatenate"), single()))
    assert found != expected, "some of the rows have a boundary in them"


def test_the_seed_changes_the_curve(run, single):
    assert run(1, "train.seed=7")[0]["loss"] != single()[0]["loss"]
