"""Models that grow: what their logits do on real text, that all of them can learn, where they train on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import hash_of, state_of
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch import cli
from megafab.checkpoint import store, writer
from megafab.checkpoint.config import Depth, GrowConfig, Width
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.config.growth import grown
from megafab.config.schema import RunConfig
from megafab.errors import UserError
from megafab.model.config import Activation, ModelConfig, MoEConfig, Norm, Position
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape

LLAMA = ModelConfig(
    name="llama", layers=4, hidden=32, heads=4, kv_heads=2, ffn=48, seq_len=64, vocab=512, head_dim=8
)
PLAIN = dataclasses.replace(
    LLAMA, norm=Norm.layernorm, activation=Activation.gelu, position=Position.learned, bias=True, kv_heads=4
)
SHARED = "moe, shared, every second"
MODELS = {
    "llama": LLAMA,
    "llama, tied, qk norm, biases": dataclasses.replace(LLAMA, tied_embeddings=True, qk_norm=True, bias=True),
    "geglu, one key": dataclasses.replace(LLAMA, activation=Activation.geglu, kv_heads=1),
    "gpt, tied": dataclasses.replace(PLAIN, tied_embeddings=True),
    "gpt, relu, qk norm": dataclasses.replace(PLAIN, activation=Activation.relu, qk_norm=True, bias=False),
    "neox, squared relu": dataclasses.replace(
        PLAIN, activation=Activation.squared_relu, position=Position.rope
    ),
    SHARED: dataclasses.replace(LLAMA, moe=MoEConfig(experts=4, shared_ffn=16, every=2)),
    "moe, one expert a token": dataclasses.replace(LLAMA, moe=MoEConfig(experts=4, top_k=1)),
}
# What keeps the function, by the kind of model.
ANY = {
    "depth, hidden, heads, vocabulary": {
        **{"layers": 8, "depth": Depth.zero, "hidden": 44, "heads": 8, "vocab": 513},
    },
    "hidden by copies": {"hidden": 96, "heads": 12, "width": Width.direct, "split": 0.3},
}
DENSE = {
    "width": {"hidden": 40, "heads": 8, "ffn": 50},
    "queries of old keys": {"heads": 8, "kv_heads": 4, "ffn": 96},
    "width by copies": {"hidden": 64, "heads": 8, "ffn": 50, "width": Width.direct},
}
NO_BIAS = {
    "experts": {"experts": 4},
    "everything": {
        **{"experts": 3, "top_k": 3, "shared_ffn": 16, "every": 2, "layers": 6, "depth": Depth.zero},
        **{"hidden": 36, "heads": 8, "ffn": 56, "vocab": 600},
    },
}


def growths(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """All that a model may become without a change of its function."""
    found = dict(ANY) if model.moe.experts else {**ANY, **DENSE}
    if model.kv_heads != 2:
        found.pop("queries of old keys", None)
    return found if model.moe.experts or model.bias else {**found, **NO_BIAS}


def slow_unless(name: str, *fast: str) -> Any:
    """A parameter that is marked slow unless it is one of those."""
    return name if name in fast else pytest.param(name, marks=pytest.mark.slow)


def write_model(run_dir: Path, model: ModelConfig) -> Path:
    """A checkpoint of a model whose every number matters: gains that are not 1, biases that are not 0."""
    shapes = parameter_shapes(ModelShape.of(model))

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        shape = shapes[name.removeprefix(store.WEIGHT)]
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name)))
        if len(shape) == 2:
            return drawn * (0.3 if "embedding" in name else 0.5 * shape[1] ** -0.5)
        return 0.2 * drawn + ("norm" in name and name.endswith("weight"))

    infos = {store.WEIGHT + name: TensorInfo(shape, torch.float32, 1) for name, shape in shapes.items()}
    return writer.write(run_dir, 7, infos, source, state_of(model, 7))


def grow_all(rank: int, world: int, name: str, directory: str, corpus: str) -> dict[str, str]:
    """What each growth of a model says of the logits."""
    from megafab.checkpoint.surgery.grow import grow

    root, said = Path(directory), {}
    path = write_model(root / "run", MODELS[name])
    for label, config in growths(MODELS[name]).items():
        lines: list[str] = []
        settings = GrowConfig(**config, data=corpus, preserving=True)
        grow(path, root / label, settings, lines.append)
        said[label] = lines[0]
    return said


@pytest.mark.parametrize("name", [slow_unless(name, "llama", "gpt, tied", SHARED) for name in MODELS])
def test_operators_that_keep_the_function_keep_the_logits_on_real_text(ranks, corpus, tmp_path, name):
    (said,) = ranks.run(grow_all, name, str(tmp_path), str(corpus), init=False)
    assert len(said) >= 2
    for label, line in said.items():
        assert line.startswith("logits on 192 tokens of real text: "), line
        match = re.search(r"largest difference (\S+), KL \S+, loss (\S+) before and (\S+) after$", line)
        assert match, line
        assert float(match[1]) < 1e-5, (label, line)
        # The rows of a larger vocabulary count in the loss, and in nothing else.
        assert "vocab" in growths(MODELS[name])[label] or match[2] == match[3], (label, line)


def grow_one(
    rank: int, world: int, model: ModelConfig, directory: str, corpus: str, config: Mapping[str, Any]
):
    """What a growth says."""
    from megafab.checkpoint.surgery.grow import grow

    path = write_model(Path(directory) / "run", model)
    lines: list[str] = []
    grow(path, Path(directory) / "to", GrowConfig(**config, data=corpus), lines.append)
    return lines


def test_the_others_say_how_far_the_logits_move(ranks, corpus, tmp_path):
    (said,) = ranks.run(grow_otherwise, str(tmp_path), str(corpus), init=False)
    assert len(said) == len(OTHERS)
    for line in said:
        match = re.search(r"largest difference (\S+), KL (\S+),", line)
        assert match
        assert float(match[1]) > 0.01
        assert float(match[2]) > 1e-5


OTHERS = (
    {"layers": 8, "depth": Depth.interleave},
    {"hidden": 48, "width": Width.direct},
    {"experts": 4, "top_k": 1},
)


def grow_otherwise(rank: int, world: int, directory: str, corpus: str) -> list[str]:
    """What the growths say that change the function."""
    from megafab.checkpoint.surgery.grow import grow

    path, said = write_model(Path(directory) / "run", LLAMA), list[str]()
    for number, config in enumerate(OTHERS):
        lines: list[str] = []
        grow(path, Path(directory) / str(number), GrowConfig(**config, data=corpus), lines.append)
        said.append(lines[0])
    return said


def test_without_text_it_says_so(ranks, tmp_path):
    config = {"layers": 8, "depth": Depth.zero, "preserving": True}
    (lines,) = ranks.run(grow_without_text, str(tmp_path), config, init=False)
    assert lines[0].startswith(
        "logits on 192 tokens of random ids, for there is no text: no corpus (data=DIR "
    )


def grow_without_text(rank: int, world: int, directory: str, config: Mapping[str, Any]) -> list[str]:
    from megafab.checkpoint.surgery.grow import grow

    path, lines = write_model(Path(directory) / "run", LLAMA), list[str]()
    grow(path, Path(directory) / "to", GrowConfig(**config), lines.append)
    return lines


def test_a_claim_that_rounding_breaks_is_refused_and_nothing_is_made(ranks, corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"^preserving=true: found logits that move by .*, expected less than 1e-05"
    ):
        ranks.run(claim_of_large_logits, str(tmp_path), str(corpus), init=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def claim_of_large_logits(rank: int, world: int, directory: str, corpus: str) -> None:
    """A model whose logits are in the thousands, where fp32 has not as many digits left."""
    from megafab.checkpoint.surgery.grow import grow

    model = dataclasses.replace(LLAMA, init_std=1.0)
    path = write_model(Path(directory) / "small", model)
    reader = Reader(path)

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        return reader.read(name, band) * (1e4 if name.endswith("output_layer.weight") else 1.0)

    large = writer.write(Path(directory) / "run", 7, reader.tensors, source, reader.state)
    shutil.rmtree(Path(directory) / "small")
    grow(large, Path(directory) / "to", GrowConfig(hidden=40, data=corpus, preserving=True), print)


# -- nothing is left where it cannot learn -------------------------------------------------------------------


def moved(rank: int, world: int, model: ModelConfig, directory: str, corpus: str, config: Mapping[str, Any]):
    """By name, the share of entries of a matrix that have had a gradient after some steps of descent."""
    from megafab import judge
    from megafab.checkpoint.surgery.grow import grow
    from megafab.data.format import Corpus
    from megafab.platform import platform

    path = write_model(Path(directory) / "run", model)
    path = grow(path, Path(directory) / "to", GrowConfig(**config, judge=False), print)
    platform.start(0)
    from megafab.generate import load_model

    run = RunConfig(model=grown(ModelShape.of(model), GrowConfig(**config), ids=512))
    net = load_model(run, path, 512)
    tokens, _ = judge.text(Corpus.open(corpus), seq_len=64, vocab=512)
    positions = torch.arange(64).expand_as(tokens)
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    for _ in range(3):
        logits = net(tokens, positions, None)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        net.zero_grad()
        loss.backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            seen[name] |= parameter.grad != 0
            parameter.data.sub_(0.1 * parameter.grad)
    return {name: float(mask.float().mean()) for name, mask in seen.items() if mask.dim() == 2}


@pytest.mark.parametrize(
    "model", [LLAMA, dataclasses.replace(PLAIN, activation=Activation.relu)], ids=["llama", "gpt, relu"]
)
def test_all_that_zero_adds_learns_from_the_start(ranks, corpus, tmp_path, model):
    config = {"layers": 8, "depth": Depth.zero, "hidden": 40, "heads": 8, "ffn": 64}
    (shares,) = ranks.run(moved, model, str(tmp_path), str(corpus), config, init=False)
    assert len(shares) == 4 * 8 + 2 + (model.position is Position.learned)
    # Not all ids are in the text, nor is the last position's prediction in the loss; all else learns.
    words, others = shares.pop("embedding.word_embeddings.weight"), shares
    assert words > 0.1
    least = 0.9 if model.activation is Activation.relu else 0.98  # some neurons are off on all of this text
    assert all(share > least for share in others.values()), others


# -- learned -------------------------------------------------------------------------------------------------


def command(rank: int, world: int, *arguments: str) -> tuple[int, str, str]:
    """`megafab ...` on this rank: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def base(ranks, corpus, tmp_path_factory) -> Path:
    """A small Llama that has learned something, written at tensor 2 x pipeline 2."""
    directory = tmp_path_factory.mktemp("base")
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    arguments = [
        *SMALL_MODEL,
        *SHORT_RUN,
        "train.steps=10",
        "optim.lr=1e-2",
        *layout,
        f"data.path={corpus}",
        f"run.dir={directory}",
    ]
    ranks.run(train, arguments, world=4, init=False)
    return directory


LEARNED = {
    "depth": ["layers=6", "depth=learned"],
    "width, stacked": ["hidden=96", "heads=6", "ffn=160", "width=learned", "layers=8"],
    "both": ["hidden=80", "kv_heads=4", "width=learned", "layers=8", "depth=learned", "vocab=520"],
}


@pytest.mark.parametrize("name", [slow_unless(name, "both") for name in LEARNED])
def test_learned_operators_learn(ranks, base, tmp_path, name):
    operators = LEARNED[name]
    settings = ["steps=20", "batch=4", "lr=5e-3"]
    arguments = ["ckpt", "grow", str(base), f"to={tmp_path / 'to'}", *operators, *settings]
    ((code, out, err),) = ranks.run(command, *arguments, init=False)
    assert code == 0, err
    losses = [float(loss) for loss in re.findall(r"learning to grow: \d+/20 steps, loss (\S+)", out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - (0.01 if "width=learned" in operators else 0.001), losses
    parent = store.newest(base / "checkpoints")
    assert parent is not None
    made, old = Reader(tmp_path / "to" / "checkpoints" / parent.name), Reader(parent)
    sizes = ModelShape.of(build_model(made), 512)
    assert {name: info.shape for name, info in made.weights.items()} == parameter_shapes(sizes)
    assert store.verify(parent) == {}, "the parent is as it was"
    if "width=learned" not in operators:
        table = "weight/embedding.word_embeddings.weight"
        assert torch.equal(made.read(table), old.read(table))


def build_model(reader: Reader) -> ModelConfig:
    from megafab.config.tree import build

    return build(RunConfig, dict(reader.state["config"])).model


def test_learning_needs_text(ranks, base, tmp_path):
    arguments = [f"to={tmp_path / 'to'}", "layers=6", "depth=learned", "data=gone"]
    ((code, out, err),) = ranks.run(command, "ckpt", "grow", str(base), *arguments, init=False)
    assert (code, out) == (2, "")
    assert err.startswith("data.path=gone: found no such directory, ")
    with pytest.raises(
        UserError, match="a learned operator: found no corpus .data=DIR names one., expected text"
    ):
        ranks.run(learn_without_text, str(tmp_path), init=False)


def test_text_of_another_tokenizer_is_refused(ranks, corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"^data=.*: found 512 ids, expected at most 384, the rows of the embedding"
    ):
        ranks.run(judge_elsewhere, str(tmp_path), str(corpus), init=False)


def judge_elsewhere(rank: int, world: int, directory: str, corpus: str) -> None:
    from megafab.checkpoint.surgery.grow import grow

    path = write_model(Path(directory) / "run", dataclasses.replace(LLAMA, vocab=384))
    grow(path, Path(directory) / "to", GrowConfig(layers=8, data=corpus), print)


def learn_without_text(rank: int, world: int, directory: str) -> None:
    grow_without_text(rank, world, directory, {"layers": 6, "depth": Depth.learned})


# -- trained on, elsewhere -----------------------------------------------------------------------------------

STARTS = {
    "alone": (1, []),
    "tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "deepspeed, pipeline 2": (2, ["engine=deepspeed", "engine.zero_stage=2", "parallel.pipeline=2"]),
}
DEEPER = "wider and deeper, moments too"
GROWN = {
    "stacked": ["layers=8"],
    DEEPER: [
        *("layers=8", "depth=zero", "hidden=96", "heads=8", "ffn=192", "optimizer=copy", "preserving=true"),
    ],
    "experts": ["experts=4", "preserving=true"],
}


@pytest.mark.parametrize("name", [slow_unless(name, DEEPER) for name in GROWN])
def test_a_grown_checkpoint_trains_the_same_at_every_layout_and_engine(ranks, base, corpus, tmp_path, name):
    arguments = ["ckpt", "grow", str(base), f"to={tmp_path / 'to'}", *GROWN[name]]
    ((code, out, err),) = ranks.run(command, *arguments, init=False)
    assert code == 0, err
    begin = out.splitlines()[-1].split()[2:-1]
    steps = [*SHORT_RUN, "train.steps=3", "eval.samples=0", f"data.path={corpus}"]
    losses = {}
    for label, (world, layout) in STARTS.items():
        directory = tmp_path / label.replace(" ", "_")
        assert (
            ranks.run(train, [*begin, *steps, *layout, f"run.dir={directory}"], world=world, init=False)
            == [0] * world
        )
        losses[label] = [row["loss"] for row in rows(directory)]
    assert len(losses["alone"]) == 3
    for label, found in losses.items():
        for a, b in zip(found, losses["alone"], strict=True):
            assert math.isclose(a, b, rel_tol=1e-5), (label, found, losses["alone"])
    parent = rows(base)
    if "preserving=true" in GROWN[name]:
        assert losses["alone"][0] < parent[0]["loss"] - 0.3, "it begins with what was learned"
    lineage = store.read_state(tmp_path / "alone" / "checkpoints" / "step_00000003")["lineage"]
    assert [entry.get("operation") for entry in lineage] == ["grow", None]
