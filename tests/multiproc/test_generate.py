"""Text from checkpoints of split models, against the same model written out in plain torch."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch import cli
from megafab.checkpoint import store
from megafab.data.format import Corpus
from megafab.data.tokenizer import Tokenizer

PROMPT = "def test_the_"
TOKENS = 24
# Large initial weights, since a small model says nothing but the commonest token for long.
VARIED = ("model.init_std=0.2", "optim.lr=3e-3", "train.steps=20", "checkpoint.every=10")
RUNS = {
    "1 rank": (1, []),
    "tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "data 2, bf16": (2, ["train.precision=bf16"]),
}


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory) -> dict[str, Path]:
    """Run directories of short trainings on real text, at different topologies."""
    directories = {}
    for name, (world, layout) in RUNS.items():
        directory = tmp_path_factory.mktemp("run")
        arguments = [*SMALL_MODEL, *SHORT_RUN, f"data.path={corpus}", f"run.dir={directory}", *layout]
        ranks.run(train, [*arguments, *VARIED], world=world, init=False)
        found = rows(directory)
        assert found[-1]["loss"] < found[0]["loss"] - 0.3, "it says what it has learned"
        directories[name] = directory
    return directories


def generate(rank, world, *overrides):
    """`megafab generate` on this rank: exit code and stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["generate", f"prompt={PROMPT}", f"tokens={TOKENS}", *overrides])
    return code, out.getvalue()


def texts_of(ranks, run_dir: Path, out: Path, *overrides: str) -> list[str]:
    arguments = [f"checkpoint={run_dir}", f"out={out}", *overrides]
    ((code, shown),) = ranks.run(generate, *arguments, init=False)
    assert code == 0
    texts = out.read_text().removesuffix("\n").split(f"\n\n{PROMPT}")
    texts = [texts[0], *(PROMPT + text for text in texts[1:])]
    assert shown.endswith("\n".join(["\n", *texts]) + "\n")
    assert texts[0].startswith(PROMPT)
    return texts


# -- the model in plain torch --------------------------------------------------------------------------------


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint, read with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    path = store.newest(run_dir / "checkpoints")
    assert path is not None
    metadata = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
    found = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in metadata.items()
        if name.startswith("weight/")
    }
    with warnings.catch_warnings(action="ignore"):  # it warns that there is no process group
        load(found, checkpoint_id=path / "tensors", no_dist=True)
    return {name.removeprefix("weight/"): tensor.double() for name, tensor in found.items()}


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * gain


def rotate(x: torch.Tensor) -> torch.Tensor:
    """[L, heads, D]: (first half, second half) turned by position x 10000^(-2i/D)."""
    length, _, size = x.shape
    angle = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, size, 2).double() / size))
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def logits(w: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [L, V] of SMALL_MODEL: 4 layers, hidden 64, 4 heads of 16, 2 key-value heads, SwiGLU of 128."""
    length, heads, groups, size = len(ids), 4, 2, 16
    hidden = w["embedding.word_embeddings.weight"][ids]
    future = torch.ones(length, length).triu(1).bool()
    for number in range(4):
        layer = {k.split(".", 3)[3]: v for k, v in w.items() if k.startswith(f"decoder.layers.{number}.")}
        x = norm(hidden, layer["input_layernorm.weight"])
        # Megatron's order: for every key-value head its query heads, the key, the value.
        qkv = (x @ layer["self_attention.linear_qkv.weight"].t()).view(length, groups, -1, size)
        query = rotate(qkv[:, :, : heads // groups].reshape(length, heads, size))
        key, value = rotate(qkv[:, :, -2]), qkv[:, :, -1]
        key, value = (t.repeat_interleave(heads // groups, dim=1) for t in (key, value))
        scores = torch.einsum("lhd,shd->hls", query, key) / math.sqrt(size)
        mixed = torch.einsum("hls,shd->lhd", torch.softmax(scores.masked_fill(future, -math.inf), -1), value)
        hidden = hidden + mixed.reshape(length, -1) @ layer["self_attention.linear_proj.weight"].t()
        x = norm(hidden, layer["pre_mlp_layernorm.weight"])
        gate, up = (x @ layer["mlp.linear_fc1.weight"].t()).chunk(2, dim=-1)
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ layer["mlp.linear_fc2.weight"].t()
    return norm(hidden, w["decoder.final_layernorm.weight"]) @ w["output_layer.weight"].t()


def most_likely(run_dir: Path, corpus: Path) -> str:
    """The prompt and the most likely token after each token, by hand."""
    opened = Corpus.open(corpus)
    tokenizer, w = Tokenizer.load(opened.tokenizer_dir), weights_of(run_dir)
    ids = tokenizer.encode(PROMPT)
    start = len(ids)
    while len(ids) < start + TOKENS:
        token = int(logits(w, ids[-64:])[-1, : opened.vocab_size].argmax())
        if token == opened.eod:
            break
        ids.append(token)
    assert len(set(ids[start:])) > 4, "a text that could be another"
    return PROMPT + tokenizer.decode(ids[start:])


@pytest.mark.parametrize("name", RUNS)
def test_without_temperature_it_is_the_argmax_by_hand(ranks, runs, corpus, tmp_path, name):
    texts = texts_of(ranks, runs[name], tmp_path / "a", "temperature=0")
    assert texts == [most_likely(runs[name], corpus)]
    assert texts_of(ranks, runs[name], tmp_path / "b", "temperature=0", "seed=9") == texts


def test_a_split_training_writes_what_one_rank_writes(ranks, runs, tmp_path):
    one, split = (
        texts_of(ranks, runs[name], tmp_path / "text", "temperature=0")
        for name in ("1 rank", "tensor 2 x pipeline 2")
    )
    assert split == one


def loaded_logits(rank, world, run_dir, ids):
    """Logits of the model as `megafab generate` loads it."""
    from megafab.config.load import from_yaml
    from megafab.generate import load_model

    path = store.newest(Path(run_dir) / "checkpoints")
    model = load_model(from_yaml(Path(run_dir) / "config.yaml"), path, 512)
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0), None)[0]


@pytest.mark.parametrize("name", RUNS)
def test_logits_equal_plain_torch(ranks, runs, name):
    ids = [(7 * i) % 512 for i in range(64)]
    (found,) = ranks.run(loaded_logits, str(runs[name]), ids, init=False)
    torch.testing.assert_close(found.double(), logits(weights_of(runs[name]), ids), rtol=1e-4, atol=1e-4)


def test_temperature_and_seed_decide_the_samples(ranks, runs, tmp_path):
    def texts(*overrides: str) -> list[str]:
        return texts_of(ranks, runs["1 rank"], tmp_path / "text", "samples=2", *overrides)

    first = texts("seed=1", "temperature=1")
    assert len(set(first)) == 2
    assert texts("seed=1", "temperature=1") == first
    assert set(texts("seed=2", "temperature=1")).isdisjoint(first)
    # One candidate leaves no choice.
    assert texts("seed=3", "top_k=1", "temperature=5") == texts("temperature=0")


def test_a_step_is_chosen_by_its_directory(ranks, runs, tmp_path):
    directory = runs["1 rank"]
    at = {
        step: texts_of(ranks, directory / "checkpoints" / f"step_{step:08d}", tmp_path / "a", "temperature=0")
        for step in (10, 20)
    }
    assert at[10] != at[20]
    assert texts_of(ranks, directory, tmp_path / "a", "temperature=0") == at[20]


def test_another_tokenizer_is_refused(ranks, runs, tmp_path, capsys):
    from launch import data

    other = tmp_path / "other"
    data.main([f"out={other}", "stdlib_bytes=150000", "tokenizer.vocab=400", "workers=1"])
    capsys.readouterr()
    assert cli.main(["generate", f"checkpoint={runs['1 rank']}", f"data={other}"]) == 2
    assert capsys.readouterr().err == (
        f"data={other}: found another tokenizer than the checkpoint was trained with, expected the corpus of "
        "the run, or one with its tokenizer. Fix: name such a corpus with data=\n"
    )


def test_a_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert cli.main(["generate", f"checkpoint={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"checkpoint={tmp_path}: found no checkpoint there, expected ")
    assert err.count("\n") == 1
