"""RETRO in real runs: the same course at every layout, exact resume, neighbours that are worth something."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from checkpoint_files import tensors_of
from corpora import write_corpus
from ranks import RankDied
from training import SHORT_RUN, SMALL_MODEL, build_corpus, rows, train

from megafab.errors import UserError

pytestmark = pytest.mark.multiproc

CHUNK = 16
RETRO = ("data.retrieval=tfidf-16", f"model.retro.chunk={CHUNK}", "train.micro_batch=2")
GPT = (
    *("model.norm=layernorm", "model.position=learned", "model.bias=true", "model.activation=gelu"),
    *("model.tied_embeddings=true", "model.qk_norm=true", "model.retro.layers=[1,2,4]"),
    *("model.retro.in_context=true", "model.retro.retrieved=16", "data.packing=concatenate"),
)
MOE = ("model.moe.experts=4", "model.moe.z_loss=0.001")
TENSOR, SEQUENCE, PIPELINE = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"
INTERLEAVED, FULL = "parallel.virtual_pipeline=2", "train.recompute=full"
ZERO_2 = ("engine=deepspeed", "engine.zero_stage=2")
ZERO_3 = ("engine=deepspeed", "engine.zero_stage=3")
LAYOUTS = {
    "tensor 2": (2, (), (TENSOR,)),
    "data 2": (2, (), ()),
    "pipeline 2": (2, (), (PIPELINE,)),
    "ZeRO 2": (2, (), ZERO_2),
    "ZeRO 3, recompute attention": (2, (), (*ZERO_3, "train.recompute=selective")),
    "sequence parallel, recompute all": (2, (), (TENSOR, SEQUENCE, FULL)),
    "interleaved, recompute all": (2, (), (PIPELINE, INTERLEAVED, FULL)),
    "experts 2": (2, MOE, ("parallel.expert=2",)),
    "passages in context, tensor 2": (2, GPT, (TENSOR, SEQUENCE)),
    "passages in context, interleaved": (2, GPT, (PIPELINE, INTERLEAVED)),
    "ZeRO 2, tensor 2 x pipeline 2": (4, (), (*ZERO_2, TENSOR, SEQUENCE, PIPELINE)),
    "passages in context, all at once": (8, GPT, (TENSOR, SEQUENCE, PIPELINE, INTERLEAVED, FULL)),
}
SLOW = (
    *("ZeRO 3, recompute attention", "experts 2", "passages in context, interleaved"),
    *("ZeRO 2, tensor 2 x pipeline 2", "passages in context, all at once"),
)


def build_neighbors(path: Path, *overrides: str) -> None:
    from launch import retrieval

    assert retrieval.main([f"path={path}", "workers=1", *overrides]) == 0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of real text with the neighbours of its chunks."""
    path = build_corpus(tmp_path_factory.mktemp("retrieval"))
    build_neighbors(path, f"chunk={CHUNK}")
    return path


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(trained, text: Path) -> Run:
    """Train with neighbours; the directory of the run."""
    return lambda world, *more: trained(world, *SMALL_MODEL, *SHORT_RUN, f"data.path={text}", *RETRO, *more)


@pytest.fixture(scope="module")
def single(run: Run) -> Run:
    """Runs on one rank, each trained once."""
    cache: dict[tuple[str, ...], Path] = {}

    def single(*model: str) -> Path:
        if model not in cache:
            cache[model] = run(1, *model)
        return cache[model]

    return single


def assert_same_course(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), a["step"]
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), a["step"]
    assert math.isclose(found[-1]["valid_loss"], expected[-1]["valid_loss"], rel_tol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_every_layout_and_engine_equals_one_rank(layout: str, run: Run, single: Run) -> None:
    world, model, overrides = LAYOUTS[layout]
    assert_same_course(rows(run(world, *model, *overrides)), rows(single(*model)))


def test_bf16_stays_close_to_fp32(run: Run, single: Run) -> None:
    for a, b in zip(rows(run(1, "train.precision=bf16")), rows(single()), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=5e-3), a["step"]


@pytest.mark.parametrize("engine", [(), ZERO_2], ids=["megatron", "ZeRO 2"])
def test_a_resume_is_exact(engine: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    whole = run(2, *engine, "checkpoint.every=8", "train.steps=12")
    again = run(2, *engine, "train.steps=12", f"checkpoint.resume={whole / 'checkpoints' / 'step_00000008'}")
    keys = ("step", "loss", "grad_norm", "valid_loss")
    found, expected = ([[row.get(key) for key in keys] for row in rows(one)] for one in (again, whole))
    assert found == expected[8:]


def train_until_killed(rank: int, world: int, overrides: list[str], kill: faults.Kill) -> int:
    faults.inflict(faults.Faults(kill), rank)
    return train(rank, world, overrides)


def test_killed_the_same_command_goes_on(run: Run, ranks, text: Path, tmp_path: Path) -> None:
    more = ("train.steps=12", "checkpoint.every=4", "eval.samples=0")
    whole = run(2, PIPELINE, *more)
    where = (f"data.path={text}", f"run.dir={tmp_path}")
    command = [*SMALL_MODEL, *SHORT_RUN, *where, *RETRO, PIPELINE, *more]
    kill = faults.Kill(1, "step", 7, 0.0)
    with pytest.raises(RankDied):
        ranks.run(train_until_killed, command, kill, world=2, init=False)
    assert len(rows(tmp_path)) < 12
    ranks.run(train, command, world=2, init=False)
    keys = ("step", "loss", "grad_norm")
    found, expected = ([[row[key] for key in keys] for row in rows(one)] for one in (tmp_path, whole))
    assert found == expected


def test_a_changed_database_is_refused_with_what_differs(
    run: Run, single: Run, text: Path, tmp_path: Path
) -> None:
    build_neighbors(text, f"chunk={CHUNK}", "name=other", "dim=32")
    where = f"checkpoint.resume={single() / 'checkpoints' / 'step_00000020'}"
    with pytest.raises(UserError, match=r"data\.retrieval, database: was \w+ and is \w+"):
        run(1, where, "data.retrieval=other", "train.steps=22")


# -- causality -----------------------------------------------------------------------------------------------


def logits(rank: int, world: int, arguments: list[str], cases: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    """Normaliser and mean of the logits [S, 2 + 2] of the first two rows of each case, on the last stage.

    A case is tokens [B, S], documents [B, S], neighbours [B, C, K, R] and their lengths [B, C, K].
    """
    from megafab.build import build
    from megafab.config import load
    from megafab.loss.terms import LossTerms
    from megafab.model.names import is_gate
    from megafab.platform import platform
    from megafab.run import Batch, Retrieved
    from megafab.topology.groups import shutdown

    platform.start(0, 1)
    run = build(load.load(arguments), ranks=world)
    weights = run.engine.weights()
    for name in weights.names():
        if is_gate(name):  # zero at first: nothing would show
            weights.master(name).fill_(0.01).mul_(torch.arange(len(weights.master(name))).cos())
    weights.commit()
    found: list[torch.Tensor] = []
    for tokens, documents, neighbors, lengths in cases:
        size = len(tokens)
        batch = Batch(
            *(tokens, tokens, torch.ones(tokens.shape), torch.arange(tokens.shape[1]).repeat(size, 1)),
            *(documents, torch.zeros(size, dtype=torch.int64), torch.arange(size)),
            retrieved=Retrieved(neighbors, lengths),
        )
        seen: list[torch.Tensor] = []

        def see(terms: LossTerms, _: Batch, seen: list[torch.Tensor] = seen) -> None:
            seen.append(torch.cat((terms.log_z_BL.t(), terms.mean_logit_BL.t()), dim=-1))

        run.engine.evaluate(batch, 2, see)
        found += seen[:1]  # on the last stage
    run.close()
    shutdown()
    return found


def cases_of(vocab: int) -> tuple[list[tuple[Any, ...]], list[tuple[str, int, int]]]:
    """A case, then the same with one chunk's token or neighbours changed; and what each of those changes:
    the first and last position that may be another one."""
    chunk, chunks, neighbors, retrieved, size = 4, 3, 2, 6, 2
    generator = torch.Generator().manual_seed(5)
    shape = (size, chunks, neighbors, retrieved)
    tokens = torch.randint(1, vocab, (size, chunk * chunks), generator=generator)
    texts = torch.randint(1, vocab, shape, generator=generator)
    lengths = torch.randint(1, retrieved + 1, shape[:3], generator=generator)
    documents = torch.zeros(tokens.shape, dtype=torch.int32)
    documents[:, 6:] = 1  # from the middle of chunk 1 on
    cases, reach = [(tokens, documents, texts, lengths)], []
    for place in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, place] = other[:, place] % (vocab - 1) + 1
        cases.append((other, documents, texts, lengths))
        last = 5 if place < 6 else 11
        reach.append((f"token {place}", place, last))
    for one in range(chunks):
        other = texts.clone()
        other[:, one] = other[:, one] % (vocab - 1) + 1
        cases.append((tokens, documents, other, lengths))
        # Those of chunk 0 are looked at from its last token on, but not in the other document.
        reach.append((f"neighbours of chunk {one}", (one + 1) * chunk - 1, 5 if one == 0 else 11))
    return cases, reach


CAUSAL = (
    *("model=llama_tiny", "model.layers=4", "model.hidden=32", "model.heads=4", "model.kv_heads=2"),
    *("model.ffn=32", "model.seq_len=12", "model.retro.chunk=4", "model.retro.retrieved=6"),
    *("model.retro.layers=[1,3]", "data.retrieval=tfidf-4", "eval.samples=0", "tracking=none"),
    *("train.steps=1", "train.global_batch=4", "train.micro_batch=2", "optim.lr=1e-3"),
)


@pytest.mark.parametrize(
    "layout",
    [
        (),
        (TENSOR,),
        (TENSOR, SEQUENCE),
        (PIPELINE,),
        (PIPELINE, INTERLEAVED),
        ZERO_3,
        pytest.param((TENSOR, SEQUENCE, PIPELINE), marks=pytest.mark.slow),
    ],
    ids=lambda layout: " ".join(layout) or "one rank",
)
def test_nothing_is_seen_before_its_time(layout: tuple[str, ...], ranks, text: Path, tmp_path: Path) -> None:
    """Each token and each chunk's neighbours changed in turn: the normaliser and the mean of all logits that
    may not change are the same bit for bit, and of the first that may they do."""
    if not (text / "neighbors" / "tfidf-4").exists():
        build_neighbors(text, "chunk=4", "neighbors=2", "candidates=4", "index=IVF64,Flat", "dim=32")
    world = math.prod(2 for axis in layout if axis in (TENSOR, PIPELINE)) if layout != ZERO_3 else 2
    cases, reach = cases_of(512)
    if INTERLEAVED in layout:  # its schedule takes rounds of two micro-batches
        cases = [tuple(torch.cat((part, part)) for part in case) for case in cases]
    arguments = [*CAUSAL, f"data.path={text}", f"run.dir={tmp_path}", *layout]
    answers = ranks.run(logits, arguments, cases, world=world, init=False, timeout=240)
    found = [torch.cat(parts, dim=-1) for parts in zip(*(one for one in answers if one), strict=True)]
    for (what, first, last), changed in zip(reach, found[1:], strict=True):
        same = (changed == found[0]).flatten(1).all(1)
        assert same[:first].all(), what
        assert same[last + 1 :].all(), what
        assert not same[first], what


# -- what neighbours are worth -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random documents, each of which is in the database a second time; and a database of other ones."""
    root = tmp_path_factory.mktemp("copies")
    draw = np.random.default_rng(0)

    def documents(count: int) -> list[np.ndarray]:
        return [np.append(draw.integers(1, 32, 63), 0) for _ in range(count)]

    seen, held_out = documents(2000), documents(64)
    train = {"seen": seen, "twins": [*seen, *held_out]}
    write_corpus(root / "text", train, {"seen": held_out}, vocab_size=32)
    write_corpus(root / "others", {"others": documents(2000)}, vocab_size=32)
    sizes = ("chunk=8", "neighbors=2", "candidates=8", "dim=64")
    build_neighbors(root / "text", *sizes)
    build_neighbors(root / "text", f"database={root / 'others'}", "name=random", *sizes)
    return root / "text"


COPYING = (
    *("model=llama_tiny", "model.hidden=64", "model.heads=4", "model.layers=2", "model.ffn=128"),
    *("model.seq_len=64", "data.mixture={seen:1}"),
    *("train.global_batch=16", "train.micro_batch=16", "train.steps=100", "eval.samples=64"),
    *("optim.lr=1e-2", "optim.beta2=0.95", "schedule=constant", "schedule.warmup=10", "tracking=none"),
)
LOOKING = (
    *("model.retro.chunk=8", "model.retro.neighbors=1", "model.retro.encoder_layers=1"),
    "model.retro.layers=[1,2]",
)


@pytest.fixture(scope="module")
def copying(trained, copies: Path) -> Path:
    """A model that was trained with the true continuation of each chunk."""
    return trained(1, *COPYING, f"data.path={copies}", "data.retrieval=tfidf-8", *LOOKING)


def test_a_true_continuation_is_copied_and_a_random_one_is_of_no_use(
    trained, copies: Path, copying: Path
) -> None:
    """Documents of random tokens: without their continuation nothing can be predicted but where they end."""

    def loss(*retrieval: str) -> float:
        return rows(trained(1, *COPYING, f"data.path={copies}", *retrieval))[-1]["valid_loss"]

    floor = math.log(31) * 63 / 64  # of a token; the last is always the end
    useless, plain = loss("data.retrieval=random", *LOOKING), loss()
    assert rows(copying)[-1]["valid_loss"] < 0.5 * floor
    assert useless > 0.97 * floor
    assert plain > 0.97 * floor


# -- a model that was trained without retrieval --------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(trained, text: Path) -> Path:
    """A run without retrieval, with a checkpoint in the middle."""
    more = (f"data.path={text}", "train.micro_batch=2", "checkpoint.every=10")
    return trained(1, *SMALL_MODEL, *SHORT_RUN, *more)


RETROFIT = ("start.data=keep", "train.steps=6", "technique=[freezing]", "optim.weight_decay=0.1")


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, ()), (2, (TENSOR, SEQUENCE)), (2, ZERO_2), (2, ("optim=lion", "train.precision=bf16"))],
    ids=["one rank", "tensor 2", "ZeRO 2", "Lion in bf16"],
)
def test_retrofitting_begins_as_the_model_was_and_leaves_it_so(
    world: int, layout: tuple[str, ...], run: Run, plain: Path
) -> None:
    source = plain / "checkpoints" / "step_00000010"
    fitted = run(world, f"start.checkpoint={source}", *RETROFIT, *layout)
    first, expected = rows(fitted)[0], rows(plain)[10]
    exact = 2e-3 if "train.precision=bf16" in layout else 1e-6
    assert math.isclose(first["loss"], expected["loss"], rel_tol=exact), "the same function, the next batch"
    before, after = tensors_of(source), tensors_of(fitted / "checkpoints" / "step_00000006")
    names = {name for name in after if name.startswith("weight/")}
    base = {name for name in names if name in before}
    assert base == {name for name in before if name.startswith("weight/")}
    assert all(torch.equal(before[name], after[name]) for name in base)
    moved = [name for name in names - base if name.endswith("cross_attention.linear_proj.weight")]
    assert moved
    assert all(bool((after[name] != 0).any()) for name in moved)


@pytest.mark.parametrize("engine", [(), ZERO_2], ids=["megatron", "ZeRO 2"])
def test_freezing_may_begin_and_end_at_a_resume(
    engine: tuple[str, ...], run: Run, plain: Path, tmp_path: Path
) -> None:
    """Moments of what was trained until then do not move it on."""
    source = plain / "checkpoints" / "step_00000010"
    steps = tmp_path / "run" / "checkpoints"
    begun = (f"start.checkpoint={source}", f"run.dir={tmp_path / 'run'}", *engine)
    found = []
    for step, more in ((2, ()), (4, ("technique=[freezing]",)), (6, ())):
        run(1, *begun, f"train.steps={step}", *more)
        found.append(tensors_of(steps / f"step_0000000{step}"))  # older checkpoints are not kept
    trained, frozen, again = found
    weights = [name for name in trained if name.startswith("weight/")]
    base = [name for name in weights if "cross_att" not in name]
    assert all(torch.equal(trained[name], frozen[name]) for name in base)
    assert not any(torch.equal(trained[name], frozen[name]) for name in set(weights) - set(base))
    assert not any(torch.equal(frozen[name], again[name]) for name in base)


def test_a_resume_looks_in_the_same_layers(run: Run, plain: Path, tmp_path: Path) -> None:
    """Names and shapes of tensors do not tell that a layer looks no more."""
    model = ("model.layers=9", f"run.dir={tmp_path / 'run'}", "schedule.warmup=0")
    run(1, *model, "train.steps=1")
    with pytest.raises(
        UserError, match=r"model\.retro\.layers=\[6\].*trained with model\.retro\.layers=null"
    ):
        run(1, *model, "train.steps=2", "model.retro.layers=[6]")


def test_what_learned_with_retrieval_goes_on_without(run: Run, single: Run, trained, text: Path) -> None:
    source = single() / "checkpoints" / "step_00000020"
    start = (f"data.path={text}", f"start.checkpoint={source}", "train.micro_batch=2", "train.steps=2")
    without = trained(1, *SMALL_MODEL, *SHORT_RUN, *start, "optim.lr=1e-9")
    before, after = tensors_of(source), tensors_of(without / "checkpoints" / "step_00000002")
    kept = {name for name in after if name.startswith("weight/")}
    assert not [name for name in kept if "cross_attention" in name]
    for name in kept:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


def test_moments_of_new_layers_cannot_be_kept(run: Run, plain: Path) -> None:
    where = f"start.checkpoint={plain / 'checkpoints' / 'step_00000010'}"
    with pytest.raises(UserError, match=r"start\.optimizer=keep.*without the layers that look at neighbours"):
        run(1, where, "start.optimizer=keep")


def test_the_evaluation_tells_neighbors_from_wrong_ones(ranks, copying: Path, tmp_path: Path) -> None:
    """`megafab perplexity` of the model that copies: with its neighbours, with wrong ones, with none."""
    out = tmp_path / "found.json"
    ranks.run(measured, [f"checkpoint={copying}", f"out={out}", "samples=64"], init=False)
    domain = json.loads(out.read_text())["domains"]["seen"]
    assert math.isclose(domain["loss"]["on"], rows(copying)[-1]["valid_loss"], rel_tol=1e-4)
    assert domain["loss"]["on"] < 0.6 * domain["loss"]["off"]
    assert domain["loss"]["wrong"] > 0.95 * math.log(31)
    # Every document is in the database, so that almost every chunk shares all its tokens with a neighbour.
    tokens = [row["tokens"] for row in domain["overlap"]]
    assert tokens[-1] == domain["tokens"]
    assert tokens[-2] < 0.05 * tokens[-1]


def measured(rank: int, world: int, arguments: list[str]) -> None:
    from launch import perplexity

    assert perplexity.main(arguments) == 0


def written(rank: int, world: int, arguments: list[str]) -> None:
    from launch import generate

    assert generate.main(arguments) == 0


def test_text_is_written_with_neighbors_and_without(ranks, single: Run, tmp_path: Path) -> None:
    """More than a window of it, from nothing: the command as a user types it."""
    for more in ("retrieval=null", "retrieval=false"):
        out = tmp_path / more
        arguments = [f"checkpoint={single()}", f"out={out}", "tokens=80", more]
        ranks.run(written, arguments, init=False)
        assert len(out.read_text()) > 40


def test_a_model_without_retrieval_cannot_search(ranks, plain: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval=true: found a model that looks at no neighbours"):
        ranks.run(written, [f"checkpoint={plain}", "retrieval=true"], init=False)
