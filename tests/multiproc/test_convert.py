"""Trained at several layouts, exported, run by `transformers`; imported again, trained on."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_files import tensors_of
from training import SHORT_RUN, SMALL_MODEL, rows, train

from launch import cli
from megafab.checkpoint import store
from megafab.config.load import from_yaml
from megafab.data.format import Corpus
from megafab.data.tokenizer import Tokenizer

STEPS = ("train.steps=2", "eval.samples=0", "checkpoint.every=1")
GPT = ("model=gpt_tiny", *SMALL_MODEL[1:4], "model.ffn=128", "model.seq_len=64")
MIXTRAL = ("model=mixtral_tiny", *SMALL_MODEL[1:])
RUNS = {
    "llama": (1, SMALL_MODEL),
    "llama, tensor 2 x pipeline 2, sequence": (
        *(4, (*SMALL_MODEL, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")),
    ),
    "llama, tied, one key, biases, average": (
        2,
        (
            *(*SMALL_MODEL, "model.kv_heads=1", "model.tied_embeddings=true", "model.bias=true"),
            "technique=[ema]",
        ),
    ),
    "qwen3, pipeline 2": (2, (*SMALL_MODEL, "model.qk_norm=true", "parallel.pipeline=2")),
    "gpt": (1, GPT),
    "gpt, tensor 2 x pipeline 2": (4, (*GPT, "parallel.tensor=2", "parallel.pipeline=2")),
    "neox, tensor 2": (2, (*GPT, "model.position=rope", "parallel.tensor=2")),
    "mixtral": (1, MIXTRAL),
    "mixtral, tensor 2 x pipeline 2": (
        *(4, (*MIXTRAL, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")),
    ),
    "mixtral, expert 2": (2, (*MIXTRAL, "parallel.expert=2")),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt": "GPT2LMHeadModel",
    "neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


@pytest.fixture(scope="module")
def run_of(ranks, corpus, tmp_path_factory):
    """The run directory of a name in RUNS, trained on first use."""
    made: dict[str, Path] = {}

    def run_of(name: str) -> Path:
        if name not in made:
            world, overrides = RUNS[name]
            made[name] = tmp_path_factory.mktemp("run")
            arguments = [*overrides, *SHORT_RUN, *STEPS, f"data.path={corpus}", f"run.dir={made[name]}"]
            ranks.run(train, arguments, world=world, init=False)
        return made[name]

    return run_of


def command(rank: int, world: int, *arguments: str) -> tuple[int, str, str]:
    """`megafab ...` on this rank: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def converted(ranks, source: Path, to: Path, *settings: str) -> str:
    """What a conversion that succeeds prints."""
    ((code, out, err),) = ranks.run(
        command, "ckpt", "convert", str(source), f"to={to}", *settings, init=False
    )
    assert code == 0, err
    return out


def our_logits(rank: int, world: int, run_dir: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the model as `megafab generate` loads it, from the newest checkpoint of a run."""
    from megafab.generate import load_model

    path = store.newest(Path(run_dir) / "checkpoints")
    assert path is not None
    model = load_model(from_yaml(Path(run_dir) / "config.yaml"), path, 512)
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.mark.parametrize("name", RUNS)
def test_transformers_computes_the_same_logits(ranks, run_of, corpus, tmp_path, name):
    run_dir = run_of(name)
    out = converted(ranks, run_dir, tmp_path / "hf")
    assert "tokens of real text: KL " in out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == CLASSES[name.partition(",")[0]]
    text = torch.from_numpy(Corpus.open(corpus).domain("train", 2).read(100, 128)).long().view(2, 64)
    with torch.no_grad():
        theirs = model(text).logits
    (ours,) = ranks.run(our_logits, str(run_dir), text, init=False)
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float(ours.std()) > 0.01, "logits that could be others"


def test_the_average_is_exported_in_place_of_the_weights(ranks, run_of, tmp_path):
    run_dir = run_of("llama, tied, one key, biases, average")
    out = converted(ranks, run_dir, tmp_path / "hf", "weights=ema")
    assert "tokens of real text: KL " in out
    source = store.newest(run_dir / "checkpoints")
    assert source is not None
    name = "decoder.final_layernorm.weight"
    ours, model = tensors_of(source), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.norm.weight, ours[f"techniques/ema/{name}"])
    assert not torch.equal(model.model.norm.weight, ours[f"weight/{name}"])


@pytest.mark.parametrize("name", ["llama, tensor 2 x pipeline 2, sequence", "gpt", "mixtral, expert 2"])
def test_an_import_has_the_masters_byte_for_byte_and_trains_as_they_do(ranks, run_of, corpus, tmp_path, name):
    run_dir = run_of(name)
    converted(ranks, run_dir, tmp_path / "hf")
    out = converted(ranks, tmp_path / "hf", tmp_path / "back", "format=megafab", f"data={corpus}")
    assert "tokens of real text: KL " in out
    imported = tmp_path / "back" / "checkpoints" / "step_00000000"
    source = store.newest(run_dir / "checkpoints")
    assert source is not None
    back, ours = tensors_of(imported), tensors_of(source)
    assert back.keys() == {key for key in ours if key.startswith("weight/")}
    assert all(
        torch.equal(tensor.view(torch.uint8), ours[key].view(torch.uint8)) for key, tensor in back.items()
    )

    sample = ["generate", f"checkpoint={tmp_path / 'back'}", f"data={corpus}", "prompt=def", "tokens=3"]
    ((code, text, err),) = ranks.run(command, *sample, init=False)
    assert (code, "\ndef" in text) == (0, True), err

    # The command that the import prints, and the same weights as a checkpoint without moments.
    begin = out.splitlines()[-1].split()[2:-1]
    weights = ["ckpt", "reshape", str(run_dir), f"to={tmp_path / 'weights'}", "moments=false"]
    assert cli.main(weights) == 0
    parts = RUNS[name][1]
    layout = [part for part in parts if part.startswith("parallel.")]
    losses = []
    for directory, start in (("a", begin), ("b", [*parts, f"checkpoint.resume={tmp_path / 'weights'}"])):
        arguments = [*start, *SHORT_RUN, *STEPS, f"data.path={corpus}", f"run.dir={tmp_path / directory}"]
        ranks.run(train, [*arguments, *(layout if directory == "a" else [])], world=RUNS[name][0], init=False)
        losses.append([row["loss"] for row in rows(tmp_path / directory)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert losses[0][0] < rows(run_dir)[0]["loss"], "it begins with what was learned"


def test_an_export_generates_text_with_its_tokenizer(ranks, run_of, corpus, tmp_path):
    out = converted(ranks, run_of("llama"), tmp_path / "hf", "dtype=bf16", "max_bytes=100000")
    assert "tokenizer: tokenizer.json gives the ids of tokenizer.model" in out
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    ours = Tokenizer.load(Corpus.open(corpus).tokenizer_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype is torch.bfloat16
    assert model.generation_config.eos_token_id == theirs.eos_token_id == ours.eod
    prompt = theirs("def main(", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0]
    assert theirs.decode(text).startswith("def main(")


def test_a_conversion_that_changes_the_model_fails(ranks, run_of, tmp_path):
    """A rotation base that is not the one it was trained with: every tensor is right, the model is not."""
    converted(ranks, run_of("llama"), tmp_path / "hf")
    source = tmp_path / "run"
    shutil.copytree(run_of("llama") / "checkpoints", source / "checkpoints")
    fine, wrong = ["ckpt", "convert", str(source)], tmp_path / "wrong"
    ((code, out, err),) = ranks.run(misread, *fine, f"to={wrong}", init=False)
    assert (code, wrong.exists()) == (2, False)
    assert "equal the masters, bit for bit" in out
    assert err.startswith("max_kl=1e-08: found a divergence of ")
    ((code, out, err),) = ranks.run(misread, *fine, f"to={wrong}", "max_kl=10", init=False)
    assert code == 0, err
    assert json.loads((wrong / "config.json").read_text())["rope_theta"] == 500.0


def misread(rank: int, world: int, *arguments: str) -> tuple[int, str, str]:
    """As `command`, with an export that gets the rotation base wrong."""
    from megafab.checkpoint import hf

    right = hf._rope
    hf._rope = lambda base, **more: right(500.0, **more)
    return command(rank, world, *arguments)


def without_transformers(rank: int, world: int, *arguments: str) -> tuple[int, str, str]:
    """As `command`, where transformers is not installed."""
    import importlib.util

    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
    return command(rank, world, *arguments)


def test_without_transformers_the_bytes_are_the_judge(ranks, run_of, tmp_path):
    arguments = ["ckpt", "convert", str(run_of("llama")), f"to={tmp_path / 'hf'}"]
    ((code, out, err),) = ranks.run(without_transformers, *arguments, init=False)
    assert (code, err) == (0, "")
    assert "equal the masters, bit for bit" in out
    assert "transformers is not installed: the logits were not compared" in out
