"""Every optimizer trains, and takes the same course at every topology, on real text, in real ranks."""

from __future__ import annotations

import math

import pytest
from training import SHORT_RUN, SMALL_MODEL, rows

from megafab.errors import UserError

RUN = (*SMALL_MODEL, *SHORT_RUN, "model.layers=2", "model.seq_len=32", "train.global_batch=4")
GPT = (
    "model.norm=layernorm",
    "model.activation=gelu",
    "model.position=learned",
    "model.bias=true",
    "model.tied_embeddings=true",
)
MOE = ("model.moe.experts=4", "model.moe.shared_ffn=64")
SEQUENCE = "parallel.sequence=true"

# With techniques that edit or follow the masters, where a rank holds them whole.
AVERAGED = ("technique=[ema]", "techniques.ema.decay=0.8")
OPTIMIZERS = {
    "lion": ("optim=lion", "optim.lr=1e-3"),
    "muon": ("optim=muon", "optim.lr=4e-3", *AVERAGED),
    "soap": ("optim=soap", "optim.lr=3e-3", "optim.soap.frequency=4"),
}
# (ranks, model, layout)
TENSOR_DATA = (4, (), ("parallel.tensor=2", SEQUENCE))
MANY_TENSOR = (4, (), ("parallel.tensor=4",))  # more than key-value heads
CONTEXT_DATA = (4, (), ("parallel.context=2", "engine.bucket_parameters=10000"))
PIPELINE = (2, GPT, ("parallel.pipeline=2",))
EXPERT = (2, MOE, ("parallel.expert=2", "parallel.tensor=2", SEQUENCE))
ZERO = tuple((2, (), ("engine=deepspeed", f"engine.zero_stage={stage}")) for stage in (2, 3))
LAYOUTS = {
    "lion": (TENSOR_DATA, EXPERT, *ZERO),
    "muon": (TENSOR_DATA, MANY_TENSOR, CONTEXT_DATA, PIPELINE, EXPERT),
    "soap": (TENSOR_DATA, PIPELINE, EXPERT),
}
CASES = [
    pytest.param(optimizer, *case, id=f"{optimizer}: {' '.join(case[2])}")
    for optimizer, cases in LAYOUTS.items()
    for case in cases
]


@pytest.fixture(scope="module")
def run(trained):
    """Train; the run directory."""
    return lambda world, *overrides: trained(world, *RUN, *overrides)


@pytest.fixture(scope="module")
def single(run):
    """The single-rank runs that everything is compared with."""
    cache = {}

    def single(*overrides):
        if overrides not in cache:
            cache[overrides] = rows(run(1, *overrides))
        return cache[overrides]

    return single


def assert_same_course(found, expected, loss=1e-5, norm=1e-4):
    """Within these relative tolerances."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=loss), (a["step"], a["loss"], b["loss"])
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=norm), (a["step"], a["grad_norm"])
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=loss)


# SOAP gives every direction of its eigenbasis the same weight, also those in which the statistics are hardly
# more than rounding errors: more of them in an expert, which sees few tokens.
SOAPS = {"loss": 1e-4, "norm": 5e-3}
SOAPS_EXPERTS = {"loss": 2e-4, "norm": 1e-2}


@pytest.mark.parametrize(("optimizer", "world", "model", "layout"), CASES)
def test_it_equals_one_rank(optimizer, world, model, layout, run, single):
    options = (*OPTIMIZERS[optimizer], *model)
    found, expected = rows(run(world, *options, *layout)), single(*options)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.3, "the reference must have learned something"
    tolerances = {} if optimizer != "soap" else SOAPS_EXPERTS if model == MOE else SOAPS
    assert_same_course(found, expected, **tolerances)


def test_muon_in_bf16_stays_close_to_fp32(run, single):
    options = OPTIMIZERS["muon"]
    bf16, fp32 = rows(run(4, *options, "train.precision=bf16", "parallel.tensor=2")), single(*options)
    for a, b in zip(bf16, fp32, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-2), (a["step"], a["loss"], b["loss"])
    assert any(a["loss"] != b["loss"] for a, b in zip(bf16, fp32, strict=True)), "bf16 must be bf16"


@pytest.fixture(scope="module", params=["muon", "soap"])
def saved(request, run):
    """Name and run directory of two data parallel ranks that saved in mid-course."""
    return request.param, run(2, *OPTIMIZERS[request.param], "checkpoint.every=10", "checkpoint.keep=9")


def resumed(run, saved, world, *overrides, options=None):
    name, directory = saved
    source = directory / "checkpoints" / "step_00000010"
    return rows(run(world, *(options or OPTIMIZERS[name]), f"checkpoint.resume={source}", *overrides))


def test_it_resumes_bit_for_bit(run, saved):
    keys = ("step", "loss", "grad_norm", "lr", "valid_loss")
    found, expected = resumed(run, saved, 2), rows(saved[1])[10:]
    assert [[a.get(key) for key in keys] for a in found] == [[b.get(key) for key in keys] for b in expected]


def test_it_resumes_at_another_topology(run, saved):
    found = resumed(run, saved, 4, "parallel.tensor=2", "parallel.pipeline=2")
    assert_same_course(found, rows(saved[1])[10:], **(SOAPS if saved[0] == "soap" else {}))


def test_another_optimizers_checkpoint_is_refused(run, saved):
    with pytest.raises(
        UserError, match=r"optim\.name=adamw.*the optimizer that the checkpoint was written with"
    ):
        resumed(run, saved, 1, options=("optim=adamw", "optim.lr=1e-3"))


def held(rank, world, overrides):
    """Elements of master and optimizer state by kind, which this rank holds and which it owns."""
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform
    from megafab.topology.groups import shutdown

    platform.start(0)
    run = build(load.load(overrides), ranks=world)
    held, owned = {}, {}
    for name, logical in run.engine.sharded_state().items():
        kind = name.partition("/")[0]
        size = sum(piece.tensor.numel() for piece in logical.pieces)
        held[kind] = held.get(kind, 0) + size
        owned[kind] = owned.get(kind, 0) + size * logical.owner
    run.close()
    shutdown()
    return held, owned


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_state_per_rank_falls_with_the_copies(optimizer, ranks, corpus, tmp_path):
    overrides = [*RUN, f"optim={optimizer}", "model.layers=4", f"data.path={corpus}", f"run.dir={tmp_path}"]
    [(whole, _)] = ranks.run(held, overrides, world=1, init=False)
    parts = ranks.run(held, [*overrides, "parallel.tensor=2"], world=4, init=False)
    total = sum(whole.values())
    for kind, size in whole.items():
        assert sum(owned.get(kind, 0) for _, owned in parts) == size, f"{kind} must be owned exactly once"
    for part, _ in parts:
        assert abs(sum(part.values()) - total / 4) < 0.1 * total / 4


def moved(rank, world, overrides):
    """Names of all parameters, and of those that training changed."""
    from megafab.build import build
    from megafab.config import load
    from megafab.platform import platform
    from megafab.train import fit

    platform.start(0)
    run = build(load.load(overrides), ranks=world)
    weights = run.engine.weights()
    before = {name: weights.master(name).clone() for name in weights.names()}
    fit(run)
    return list(before), [name for name in before if not weights.master(name).equal(before[name])]


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_layers_matrices_are_its_own_and_the_rest_adamws(optimizer, ranks, corpus, tmp_path):
    """Seen by what stands still: with a rate of nothing for AdamW, and as SOAP only looks on at first."""
    still = ["optim.muon.adamw_lr_ratio=1e-20"] if optimizer == "muon" else ["train.steps=1"]
    settings = [f"optim={optimizer}", "train.steps=2", "schedule.warmup=1", "optim.weight_decay=0", *still]
    overrides = [*RUN, *MOE, *settings, f"data.path={corpus}", f"run.dir={tmp_path}", "eval.samples=0"]
    [(names, changed)] = ranks.run(moved, overrides, world=1, init=False)
    matrices = {name for name in names if name.startswith("decoder.layers.") and ".linear_" in name}
    assert 0 < len(matrices) < len(names)
    assert set(changed) == (matrices if optimizer == "muon" else set(names) - matrices)
