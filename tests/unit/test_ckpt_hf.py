"""Models in Hugging Face's words: tensors there and back, configurations, refusals, files, tokenizers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import tensors_of, write_checkpoint

from launch.cli import main
from megafab.checkpoint import hf
from megafab.checkpoint import safetensors as files
from megafab.config.load import load
from megafab.data import hf_tokenizer
from megafab.errors import UserError
from megafab.judge import compare
from megafab.model.config import Activation, ModelConfig, MoEConfig, Norm, Position
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "seq_len": 16, "vocab": 128}
GPT: dict[str, Any] = {"norm": Norm.layernorm, "activation": Activation.gelu, "bias": True}
MODELS = {
    "llama": ("LlamaForCausalLM", ModelConfig(name="m", **SMALL)),
    "llama, grouped queries": ("LlamaForCausalLM", ModelConfig(name="m", **SMALL, kv_heads=2)),
    "llama, one key": ("LlamaForCausalLM", ModelConfig(name="m", **SMALL, kv_heads=1, tied_embeddings=True)),
    "llama, bias, geglu, large heads": (
        "LlamaForCausalLM",
        ModelConfig(name="m", **SMALL, kv_heads=2, bias=True, activation=Activation.geglu, head_dim=16),
    ),
    "qwen3": ("Qwen3ForCausalLM", ModelConfig(name="m", **SMALL, kv_heads=2, qk_norm=True)),
    "mixtral": (
        "MixtralForCausalLM",
        ModelConfig(name="m", **SMALL, kv_heads=2, moe=MoEConfig(experts=3, ffn=40)),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        ModelConfig(name="m", **SMALL, **GPT, position=Position.learned, tied_embeddings=True),
    ),
    "gpt2, untied, relu": (
        "GPT2LMHeadModel",
        ModelConfig(name="m", **SMALL, **{**GPT, "activation": Activation.relu}, position=Position.learned),
    ),
    "neox": ("GPTNeoXForCausalLM", ModelConfig(name="m", **SMALL, **GPT)),
    "neox, tied": ("GPTNeoXForCausalLM", ModelConfig(name="m", **SMALL, **GPT, tied_embeddings=True)),
}


def pairs_of(model: ModelConfig) -> list[hf.Pair]:
    shape = ModelShape.of(model)
    return list(hf.expressing(shape).pairs(shape))


# -- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_place_and_comes_back(name: str):
    expected, model = MODELS[name]
    assert hf.expressing(ModelShape.of(model)).name == expected
    sizes, pairs = parameter_shapes(ModelShape.of(model)), pairs_of(model)
    assert [pair.ours for pair in pairs] == list(sizes)
    assert sum(map(math.prod, sizes.values())) == ModelShape.of(model).parameters
    theirs = [their for pair in pairs for their in pair.theirs]
    assert len(theirs) == len(set(theirs))
    for pair in pairs:
        tensor = torch.randn(sizes[pair.ours])
        parts = pair.split(tensor)
        assert len(parts) == len(pair.theirs)
        assert torch.equal(pair.join(parts), tensor)


def test_the_rows_of_queries_keys_and_values():
    """Megatron's order: for each key-value head its query heads, then the key, then the value."""
    model = ModelConfig(name="m", **SMALL, kv_heads=2)  # heads of 8: rows of q0 q1 k v, q2 q3 k v
    heads = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21]).repeat_interleave(8)
    pair = next(p for p in pairs_of(model) if p.ours == "decoder.layers.1.self_attention.linear_qkv.weight")
    assert pair.theirs == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    query, key, value = (part[:, 0].unique_consecutive().tolist() for part in pair.split(heads[:, None]))
    assert (query, key, value) == ([0, 1, 2, 3], [10, 11], [20, 21])


def test_gpt2_keeps_inputs_first_and_queries_together():
    pair = next(
        p for p in pairs_of(MODELS["gpt2"][1]) if p.ours.endswith("0.self_attention.linear_qkv.weight")
    )
    heads = torch.tensor([[10 * part + head for part in range(3)] for head in range(4)]).flatten()
    (out,) = pair.split(heads.repeat_interleave(8)[:, None].expand(96, 32))
    assert out.shape == (32, 96)
    assert out[5].unique_consecutive().tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


# -- configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_comes_back(name: str):
    model = MODELS[name][1]
    shape = ModelShape.of(model)
    architecture = hf.expressing(shape)
    content = json.loads(json.dumps({**architecture.config(shape), "model_type": architecture.model_type}))
    back = hf.architecture_of(content, "config.json").model(content, "m")
    ours, theirs = ModelShape.of(back), shape
    for field in ("vocab", "kv_heads", "head_dim", "expert_ffn", "parameters"):
        assert getattr(ours, field) == getattr(theirs, field)
    same = ("norm", "norm_eps", "activation", "position", "rope_base", "bias", "qk_norm", "tied_embeddings")
    for field in (*same, "layers", "hidden", "heads", "seq_len", "init_std"):
        assert getattr(back, field) == getattr(model, field), field
    assert (back.moe.experts, back.moe.top_k) == (model.moe.experts, model.moe.top_k)


@pytest.mark.parametrize(
    ("preset", "architecture"),
    [
        ("llama_tiny", "LlamaForCausalLM"),
        ("llama_70b", "LlamaForCausalLM"),
        ("gpt_tiny", "GPT2LMHeadModel"),
        ("gpt_175b", "GPT2LMHeadModel"),
        ("mixtral_8x7b", "MixtralForCausalLM"),
    ],
)
def test_presets_can_be_exported(preset: str, architecture: str):
    model = load([f"model={preset}", "data.path=x"]).model
    assert hf.expressing(ModelShape.of(model, 50000)).name == architecture


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm": Norm.layernorm}, "not LlamaForCausalLM for model.norm=layernorm"),
        ({"activation": Activation.relu}, "not LlamaForCausalLM for model.activation=relu"),
        ({"qk_norm": True, "bias": True}, "not Qwen3ForCausalLM for model.bias=true"),
        ({"moe": MoEConfig(experts=4, top_k=1)}, "not MixtralForCausalLM for model.moe.top_k=1"),
        ({"moe": MoEConfig(experts=4, every=2)}, "not MixtralForCausalLM for model.moe.every=2"),
        ({"moe": MoEConfig(experts=4, shared_ffn=64)}, "not MixtralForCausalLM for model.moe.shared_ffn=64"),
        (
            {"moe": MoEConfig(experts=4, capacity_factor=1.5)},
            "not MixtralForCausalLM for model.moe.capacity_factor=1.5",
        ),
        ({**GPT, "kv_heads": 2}, "not GPTNeoXForCausalLM for model.kv_heads=2"),
        ({**GPT, "position": Position.learned, "bias": False}, "not GPT2LMHeadModel for model.bias=false"),
    ],
)
def test_what_transformers_does_not_have_is_refused_with_the_reason(change: dict, reason: str):
    model = dataclasses.replace(ModelConfig(name="mine", **SMALL), **change)
    with pytest.raises(UserError) as caught:
        hf.expressing(ModelShape.of(model))
    assert caught.value.where == "model mine"
    assert reason in caught.value.found.replace(";", ",").replace(")", ",")


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "llama",
            {"hidden_act": "gelu_new"},
            "config.json, hidden_act: found gelu_new, expected one of ",
        ),
        ("llama", {"mlp_bias": True}, "config.json, mlp_bias: found True, expected False, as attention_bias"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "config.json, rope_parameters: found llama3, expected the default",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "config.json, rope_parameters: found linear",
        ),
        ("mixtral", {"sliding_window": 8}, "config.json, sliding_window: found 8, expected null"),
        ("mixtral", {"num_experts_per_tok": 1}, "config.json, num_experts_per_tok: found 1"),
        ("gpt2", {"activation_function": "gelu_new"}, "config.json, activation_function: found gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "config.json, scale_attn_by_inverse_layer_idx"),
        ("neox", {"use_parallel_residual": True}, "config.json, use_parallel_residual: found True"),
        ("neox", {"rope_parameters": None, "rotary_pct": 0.25}, "config.json, rotary_pct: found 0.25"),
        ("llama", {"model_type": "mamba"}, "config.json: found model_type mamba, expected one of llama, "),
    ],
)
def test_what_megafab_does_not_have_is_refused_with_the_reason(name: str, change: dict, line: str):
    shape = ModelShape.of(MODELS[name][1])
    architecture = hf.expressing(shape)
    content = {**architecture.config(shape), "model_type": architecture.model_type, **change}
    with pytest.raises(UserError) as caught:
        hf.architecture_of(content, "config.json").model(content, "m")
    assert str(caught.value).startswith(line)


def test_older_configurations_are_understood():
    """As they were before `rope_parameters`, with keys left at their defaults left out."""
    shape = ModelShape.of(MODELS["llama"][1])
    content = hf.expressing(shape).config(shape)
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        del content[key]
    content.update(rope_theta=500000.0, model_type="llama", rope_scaling=None)
    model = hf.architecture_of(content, "config.json").model(content, "m")
    assert (model.rope_base, model.kv_heads, model.head_dim, model.bias) == (500000.0, 4, 8, False)


def test_a_vocabulary_keeps_its_rows():
    shape = ModelShape.of(MODELS["gpt2"][1])
    content = {**hf.expressing(shape).config(shape), "model_type": "gpt2", "vocab_size": 50257}
    model = hf.architecture_of(content, "config.json").model(content, "m")
    assert ModelShape.of(model).vocab == 50257


# -- files ---------------------------------------------------------------------------------------------------

VALUES = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(2.5),
    "d": torch.arange(4, dtype=torch.float16).view(2, 2).t(),
    "e": torch.empty(0, 3),
}
ENTRIES = {name: files.Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in VALUES.items()}


def test_safetensors_read_what_we_write_and_the_other_way_round(tmp_path: Path):
    assert files.write(tmp_path, ENTRIES, VALUES.items(), 1 << 20) == [files.SINGLE]
    theirs = safetensors.torch.load_file(tmp_path / files.SINGLE)
    other = tmp_path / "other"
    other.mkdir()
    kept = {name: tensor.contiguous() for name, tensor in VALUES.items()}
    safetensors.torch.save_file(kept, other / files.SINGLE, metadata={"format": "pt"})
    ours = files.Files(other)
    assert theirs.keys() == ours.entries.keys() == VALUES.keys()
    for name, tensor in VALUES.items():
        for found in (theirs[name], ours.read(name)):
            assert found.dtype is tensor.dtype
            assert torch.equal(found, tensor)


def test_files_of_a_size_with_an_index(tmp_path: Path):
    names = files.write(tmp_path, ENTRIES, VALUES.items(), 30)
    assert names == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 24 + 10 + 4 + 8
    assert index["weight_map"] == {"a": names[0], **dict.fromkeys("bcde", names[1])}
    reader = files.Files(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in VALUES.items())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _long_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def _broken_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"data_offsets", b"data_offxets"))


def _integers(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


@pytest.mark.parametrize("damage", [_cut, _long_header, _broken_header, _integers, Path.unlink])
def test_damaged_files_are_refused(tmp_path: Path, damage):
    files.write(tmp_path, ENTRIES, VALUES.items(), 1 << 20)
    damage(tmp_path / files.SINGLE)
    with pytest.raises(UserError) as caught:
        files.Files(tmp_path)
    assert caught.value.where in (str(tmp_path), str(tmp_path / files.SINGLE))


# -- conversions without a judge -----------------------------------------------------------------------------


def exported(directory: Path, name: str, *settings: str) -> tuple[Path, Path]:
    source = write_checkpoint(directory / "run", MODELS[name][1], kinds=["weight"])
    assert main(["ckpt", "convert", str(source), f"to={directory / 'hf'}", "judge=false", *settings]) == 0
    return source, directory / "hf"


def imported(source: Path, to: Path) -> Path:
    assert main(["ckpt", "convert", str(source), f"to={to}", "format=megafab", "judge=false"]) == 0
    return to / "checkpoints" / "step_00000000"


@pytest.mark.parametrize("name", MODELS)
def test_an_export_imported_is_the_same_bytes(tmp_path: Path, capsys, name: str):
    source, directory = exported(tmp_path, name, "max_bytes=9000")
    assert len(list(directory.glob("*.safetensors"))) > 3
    left, right = tensors_of(source), tensors_of(imported(directory, tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8)) for n in left)


def test_an_export_in_16_bits_is_rounded_once(tmp_path: Path, capsys):
    source, directory = exported(tmp_path, "llama", "dtype=bf16")
    back = tensors_of(imported(directory, tmp_path / "back"))
    for name, tensor in tensors_of(source).items():
        assert torch.equal(back[name], tensor.bfloat16().float())
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_of_the_average(tmp_path: Path, capsys):
    kinds, techniques = ["weight", "techniques/ema"], {"ema": {"updates": 3}}
    source = write_checkpoint(tmp_path, MODELS["llama"][1], kinds=kinds, techniques=techniques)
    to = tmp_path / "hf"
    assert main(["ckpt", "convert", str(source), f"to={to}", "weights=ema", "judge=false"]) == 0
    assert "tensors of fp32 equal the average, bit for bit" in capsys.readouterr().out
    ours, back = tensors_of(source), tensors_of(imported(to, tmp_path / "back"))
    assert back
    for name, tensor in back.items():
        assert torch.equal(tensor, ours[name.replace("weight/", "techniques/ema/", 1)])
        assert not torch.equal(tensor, ours[name])


def test_an_average_that_has_not_begun_is_refused(tmp_path: Path, capsys):
    kinds, techniques = ["weight", "techniques/ema"], {"ema": {"updates": 0}}
    source = write_checkpoint(tmp_path, MODELS["llama"][1], kinds=kinds, techniques=techniques)
    assert main(["ckpt", "convert", str(source), f"to={tmp_path / 'hf'}", "weights=ema"]) == 2
    assert capsys.readouterr().err == (
        f"weights=ema, {source}: found no average of the weights, expected one, as a run with "
        "technique=[ema] keeps it. Fix: leave weights out, or name a checkpoint of such a run\n"
    )
    assert not (tmp_path / "hf").exists()


def test_a_bare_model_and_a_tied_head_written_twice(tmp_path: Path, capsys):
    """As GPT-2's own files are: no prefix, buffers of masks, and here the output layer again."""
    source, directory = exported(tmp_path, "gpt2")
    tensors = safetensors.torch.load_file(directory / files.SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    safetensors.torch.save_file(bare, directory / files.SINGLE)
    back, ours = tensors_of(imported(directory, tmp_path / "back")), tensors_of(source)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    bare["lm_head.weight"][0] += 1
    safetensors.torch.save_file(bare, directory / files.SINGLE)
    capsys.readouterr()
    assert main(["ckpt", "convert", str(directory), f"to={tmp_path / 'c'}", "format=megafab"]) == 2
    assert "found a tensor lm_head.weight without a place in it" in capsys.readouterr().err


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path, capsys):
    _, directory = exported(tmp_path, "llama")
    tensors = safetensors.torch.load_file(directory / files.SINGLE)
    for change, line in (
        (
            {"lm_head.weight": None},
            "found no tensor lm_head.weight, expected the tensors of LlamaForCausalLM",
        ),
        (
            {"model.norm.weight": torch.ones(31)},
            "tensor model.norm.weight: found shape (31,), expected (32,), by config.json",
        ),
    ):
        kept = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        safetensors.torch.save_file(kept, directory / files.SINGLE)
        capsys.readouterr()
        code = main(["ckpt", "convert", str(directory), f"to={tmp_path / 'b'}", "format=megafab"])
        assert code == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_weights_that_have_no_place_are_refused(tmp_path: Path, capsys):
    model = dataclasses.replace(MODELS["llama"][1], tied_embeddings=True)
    source = write_checkpoint(tmp_path, MODELS["llama"][1], config={"model": _plain(model)})
    assert main(["ckpt", "convert", str(source), f"to={tmp_path / 'hf'}"]) == 2
    assert "found a weight output_layer.weight, expected the weights that LlamaForCausalLM has" in (
        capsys.readouterr().err
    )


def _plain(model: ModelConfig) -> dict[str, Any]:
    from megafab.config.tree import to_tree

    return to_tree(model)


# -- the judge -----------------------------------------------------------------------------------------------


def test_divergence_of_predictions():
    ours = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    theirs = torch.tensor([[0.0, 0.0], [3.0, 3.0 + float(torch.tensor(3.0).log())]])  # 1/4 and 3/4
    found = compare(ours, theirs)
    kl = 0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log())  # of (1/2, 1/2) against (1/4, 3/4)
    assert found.kl == pytest.approx(float(kl) / 2, rel=1e-6)
    assert found.max_abs == pytest.approx(3 + 1.0986, rel=1e-4)


# -- tokenizers ----------------------------------------------------------------------------------------------

TEXTS = [
    "def f(x):\n    return  x + 1\n",
    "  leading, trailing  ",
    "\u00e9\u4e2d\U0001f642 and more",
    "",
    Path(__file__).read_text(),
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_trained_tokenizer_is_the_same_in_transformers(tmp_path: Path, kind: str, capsys):
    from transformers import AutoTokenizer

    from megafab.data.tokenizer import Tokenizer

    settings = ["stdlib_bytes=150000", "tokenizer.vocab=500", f"tokenizer.type={kind}", "workers=1"]
    assert main(["data", f"out={tmp_path / 'corpus'}", *settings]) == 0
    to = tmp_path / "hf"
    to.mkdir()
    line = hf_tokenizer.export(tmp_path / "corpus" / "tokenizer", to, seq_len=64, texts=TEXTS)
    assert line == "tokenizer.json gives the ids of tokenizer.model on 5 texts"
    ours, theirs = Tokenizer.load(tmp_path / "corpus" / "tokenizer"), AutoTokenizer.from_pretrained(to)
    assert theirs.eos_token_id == ours.eod
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_a_hugging_face_tokenizer_is_passed_on(tmp_path: Path):
    from hf_tokenizer import byte_level_bpe
    from transformers import AutoTokenizer

    source, to = tmp_path / "tokenizer", tmp_path / "hf"
    source.mkdir()
    to.mkdir()
    byte_level_bpe(source / "tokenizer.json", ["<|endoftext|>"])
    assert hf_tokenizer.export(source, to, seq_len=64, texts=TEXTS) == "tokenizer.json as it is"
    theirs = AutoTokenizer.from_pretrained(to)
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.decode(theirs.encode(TEXTS[0])) == TEXTS[0]
