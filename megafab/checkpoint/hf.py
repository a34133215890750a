"""Our models in Hugging Face's words: configurations, names and layouts of tensors, both ways. No files here.

An `Architecture` says which of our models it can express (`refusals`), how its `config.json` reads, and which
of its tensors each of ours becomes (`pairs`): a pair's `split` and `join` only move values, so that a
conversion and its inverse give every bit back.

Layouts that differ:
- Megatron keeps queries, keys and values of one layer as one matrix, by key-value head: its query heads, the
  key, the value. Llama keeps three matrices, GPT-2 one with all queries first, GPT-NeoX Megatron's own.
- A gated layer's first matrix is [gate; up] here and two matrices there.
- GPT-2 keeps matrices transposed (inputs first).

Settings of training (dropout, learning rates) are not part of a model and do not travel.

Shapes: H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megafab.errors import UserError
from megafab.model.config import Activation, ModelConfig, MoEConfig, Norm, Position
from megafab.model.shape import ModelShape

Tensors = tuple[torch.Tensor, ...]
_GATED = {Activation.swiglu: "silu", Activation.geglu: "gelu"}
_PLAIN = {Activation.gelu: "gelu", Activation.relu: "relu", Activation.squared_relu: "relu2"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of ours, by global name, and what it is there."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[torch.Tensor], Tensors]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def _same(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), lambda t: (t,), lambda ts: ts[0])


def _transposed(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), lambda t: (t.t(),), lambda ts: ts[0].t())


def _halves(ours: str, first: str, second: str) -> Pair:
    return Pair(ours, (first, second), lambda t: tuple(t.chunk(2)), lambda ts: torch.cat(tuple(ts)))


def _qkv(shape: ModelShape, ours: str, theirs: Sequence[str]) -> Pair:
    """Three tensors: queries [H x D, ...], keys and values [G x D, ...]."""
    groups, size = shape.kv_heads, shape.head_dim
    queries = shape.config.heads // groups

    def split(t: torch.Tensor) -> Tensors:
        by_group = t.reshape(groups, queries + 2, size, *t.shape[1:])
        parts = by_group[:, :queries], by_group[:, queries], by_group[:, queries + 1]
        return tuple(part.reshape(-1, *t.shape[1:]) for part in parts)

    def join(ts: Sequence[torch.Tensor]) -> torch.Tensor:
        rest = ts[0].shape[1:]
        query, key, value = (t.reshape(groups, -1, size, *rest) for t in ts)
        return torch.cat((query, key, value), dim=1).reshape(-1, *rest)

    return Pair(ours, tuple(theirs), split, join)


def _fused_qkv(shape: ModelShape, ours: str, theirs: str) -> Pair:
    """GPT-2's: one tensor with all queries, then all keys, then all values; a matrix is transposed."""
    three = _qkv(shape, ours, ("q", "k", "v"))

    def split(t: torch.Tensor) -> Tensors:
        whole = torch.cat(three.split(t))
        return (whole.t() if whole.dim() == 2 else whole,)

    def join(ts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = ts[0].t() if ts[0].dim() == 2 else ts[0]
        return three.join(whole.chunk(3))

    return Pair(ours, (theirs,), split, join)


class Architecture(ABC):
    """A class of `transformers` for causal language models."""

    name: ClassVar[str]
    model_type: ClassVar[str]
    prefix: ClassVar[str]  # of all tensors but the output layer's; files of the bare model leave it out
    ignored: ClassVar[tuple[str, ...]] = ()  # endings of names that are buffers, not weights

    @abstractmethod
    def refusals(self, shape: ModelShape) -> Iterator[str]:
        """What of our model it cannot express, as `key=value`; nothing if it can."""

    @abstractmethod
    def config(self, shape: ModelShape) -> dict[str, Any]:
        """What is its own of `config.json`."""

    @abstractmethod
    def model(self, config: Mapping[str, Any], name: str) -> ModelConfig:
        """Our model of a `config.json`; `name` is what it will be called.

        Raises:
            UserError: it has an option that ours do not have.
        """

    @abstractmethod
    def pairs(self, shape: ModelShape) -> Iterator[Pair]:
        """Every tensor, from the embedding to the output layer."""


class _Llama(Architecture):
    name, model_type, prefix = "LlamaForCausalLM", "llama", "model."
    ignored = ("rotary_emb.inv_freq",)
    qk_norm = False

    def refusals(self, shape: ModelShape) -> Iterator[str]:
        c = shape.config
        yield from _unlike(c, norm=Norm.rmsnorm, position=Position.rope, qk_norm=self.qk_norm)
        if not shape.gated:
            yield f"model.activation={c.activation.value}"
        if c.hidden % c.heads:
            yield f"model.hidden={c.hidden} with model.heads={c.heads}"
        yield from self._feed_forward_refusals(c)

    def _feed_forward_refusals(self, c: ModelConfig) -> Iterator[str]:
        if c.moe.experts:
            yield f"model.moe.experts={c.moe.experts}"

    def config(self, shape: ModelShape) -> dict[str, Any]:
        c = shape.config
        return {
            "vocab_size": shape.vocab,
            "hidden_size": c.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": _GATED[c.activation],
            "max_position_embeddings": c.seq_len,
            "initializer_range": c.init_std,
            "rms_norm_eps": c.norm_eps,
            "tie_word_embeddings": c.tied_embeddings,
            "attention_bias": c.bias,
            "mlp_bias": c.bias,
            **_rope(c.rope_base),
        }

    def model(self, config: Mapping[str, Any], name: str) -> ModelConfig:
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is not None and window < config["max_position_embeddings"]:
            raise _refused("sliding_window", window, "null: every token sees all before it")
        return ModelConfig(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            ffn=config["intermediate_size"],
            seq_len=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            activation=_activation(config, "hidden_act", _GATED),
            rope_base=_rope_base(config),
            qk_norm=self.qk_norm,
            bias=self._bias(config),
            tied_embeddings=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
            moe=self._experts(config),
            **_vocab(config),
        )

    def _bias(self, config: Mapping[str, Any]) -> bool:
        attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
        if attention != mlp:
            raise _refused("mlp_bias", mlp, f"{attention}, as attention_bias: on every linear layer or none")
        return attention

    def _experts(self, config: Mapping[str, Any]) -> MoEConfig:
        return MoEConfig()

    def pairs(self, shape: ModelShape) -> Iterator[Pair]:
        c = shape.config
        kinds = ("weight", "bias") if c.bias else ("weight",)
        yield _same("embedding.word_embeddings.weight", "model.embed_tokens.weight")
        for layer in range(c.layers):
            ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
            yield _same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
            for kind in kinds:
                names = [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                yield _qkv(shape, f"{ours}.self_attention.linear_qkv.{kind}", names)
            for part in "qk" if c.qk_norm else "":
                yield _same(
                    f"{ours}.self_attention.{part}_layernorm.weight", f"{theirs}.self_attn.{part}_norm.weight"
                )
            for kind in kinds:
                yield _same(f"{ours}.self_attention.linear_proj.{kind}", f"{theirs}.self_attn.o_proj.{kind}")
            yield _same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
            yield from self._feed_forward(shape, f"{ours}.mlp", f"{theirs}.", kinds)
        yield _same("decoder.final_layernorm.weight", "model.norm.weight")
        if not c.tied_embeddings:
            yield _same("output_layer.weight", "lm_head.weight")

    def _feed_forward(
        self, shape: ModelShape, ours: str, theirs: str, kinds: Sequence[str]
    ) -> Iterator[Pair]:
        for kind in kinds:
            names = f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}"
            yield _halves(f"{ours}.linear_fc1.{kind}", *names)
        for kind in kinds:
            yield _same(f"{ours}.linear_fc2.{kind}", f"{theirs}mlp.down_proj.{kind}")


class _Qwen3(_Llama):
    """Llama with a norm on each query and key head."""

    name, model_type = "Qwen3ForCausalLM", "qwen3"
    qk_norm = True

    def refusals(self, shape: ModelShape) -> Iterator[str]:
        yield from super().refusals(shape)
        yield from _unlike(shape.config, bias=False)

    def config(self, shape: ModelShape) -> dict[str, Any]:
        config = super().config(shape)
        del config["mlp_bias"]
        return {**config, "use_sliding_window": False}

    def model(self, config: Mapping[str, Any], name: str) -> ModelConfig:
        return super().model({"use_sliding_window": False, **config}, name)


class _Mixtral(_Llama):
    name, model_type = "MixtralForCausalLM", "mixtral"

    def _feed_forward_refusals(self, c: ModelConfig) -> Iterator[str]:
        yield from _unlike(c, bias=False)
        moe = c.moe
        if not moe.experts:
            yield "model.moe.experts=0"
        if moe.top_k == 1:  # our one expert counts with its probability, theirs with 1
            yield "model.moe.top_k=1"
        for key, value, wanted in (
            ("every", moe.every, 1),
            ("shared_ffn", moe.shared_ffn, 0),
            ("capacity_factor", moe.capacity_factor, None),
        ):
            if value != wanted:
                yield f"model.moe.{key}={value}"

    def config(self, shape: ModelShape) -> dict[str, Any]:
        config, moe = super().config(shape), shape.config.moe
        del config["attention_bias"], config["mlp_bias"]
        return {
            **config,
            "intermediate_size": shape.expert_ffn,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.aux_loss,
            "sliding_window": None,
        }

    def _experts(self, config: Mapping[str, Any]) -> MoEConfig:
        top_k = config["num_experts_per_tok"]
        if top_k == 1:
            raise _refused("num_experts_per_tok", 1, "2 or more: our single expert counts less than 1")
        return MoEConfig(
            experts=config["num_local_experts"],
            top_k=top_k,
            ffn=config["intermediate_size"],
            aux_loss=config.get("router_aux_loss_coef", 0.0),
        )

    def _feed_forward(
        self, shape: ModelShape, ours: str, theirs: str, kinds: Sequence[str]
    ) -> Iterator[Pair]:
        yield _same(f"{ours}.router.weight", f"{theirs}block_sparse_moe.gate.weight")
        for expert in range(shape.config.moe.experts):
            mine = f"{ours}.experts.local_experts.{expert}"
            its = f"{theirs}block_sparse_moe.experts.{expert}"
            yield _halves(f"{mine}.linear_fc1.weight", f"{its}.w1.weight", f"{its}.w3.weight")
            yield _same(f"{mine}.linear_fc2.weight", f"{its}.w2.weight")


class _LayerNorm(Architecture):
    """What GPT-2 and GPT-NeoX have in common: layer norms, biases, one head size, no gate."""

    position: ClassVar[Position]

    def refusals(self, shape: ModelShape) -> Iterator[str]:
        c = shape.config
        yield from _unlike(c, norm=Norm.layernorm, position=self.position, bias=True, qk_norm=False)
        if c.activation not in _PLAIN:
            yield f"model.activation={c.activation.value}"
        if shape.kv_heads != c.heads:
            yield f"model.kv_heads={shape.kv_heads}"
        if shape.head_dim * c.heads != c.hidden:
            yield f"model.head_dim={shape.head_dim}"
        if c.moe.experts:
            yield f"model.moe.experts={c.moe.experts}"

    def _layers(
        self, shape: ModelShape, theirs: str, names: Mapping[str, str], matrix: Callable[[str, str], Pair]
    ) -> Iterator[Pair]:
        """The layers: `names` maps our modules to theirs, `matrix` pairs the weight of a linear layer."""
        for layer in range(shape.config.layers):
            for mine, its in names.items():
                ours, other = f"decoder.layers.{layer}.{mine}", f"{theirs}.{layer}.{its}"
                for kind in ("weight", "bias"):
                    one = _same if kind == "bias" or mine.endswith("norm") else matrix
                    yield self._pair(shape, one, f"{ours}.{kind}", f"{other}.{kind}")

    def _pair(self, shape: ModelShape, one: Callable[[str, str], Pair], ours: str, theirs: str) -> Pair:
        return one(ours, theirs)


class _GPT2(_LayerNorm):
    name, model_type, prefix = "GPT2LMHeadModel", "gpt2", "transformer."
    ignored = (".attn.bias", ".attn.masked_bias")
    position = Position.learned

    def config(self, shape: ModelShape) -> dict[str, Any]:
        c = shape.config
        return {
            "vocab_size": shape.vocab,
            "n_positions": c.seq_len,
            "n_embd": c.hidden,
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_inner": shape.ffn,
            "activation_function": _PLAIN[c.activation],
            "layer_norm_epsilon": c.norm_eps,
            "initializer_range": c.init_std,
            "tie_word_embeddings": c.tied_embeddings,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    def model(self, config: Mapping[str, Any], name: str) -> ModelConfig:
        for key, ours in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if config.get(key, ours) != ours:
                raise _refused(key, config[key], str(ours).lower())
        return ModelConfig(
            name=name,
            layers=config["n_layer"],
            hidden=config["n_embd"],
            heads=config["n_head"],
            ffn=config.get("n_inner") or 4 * config["n_embd"],
            seq_len=config["n_positions"],
            norm=Norm.layernorm,
            norm_eps=config["layer_norm_epsilon"],
            activation=_activation(config, "activation_function", _PLAIN),
            position=Position.learned,
            bias=True,
            tied_embeddings=config.get("tie_word_embeddings", True),
            init_std=config.get("initializer_range", 0.02),
            **_vocab(config),
        )

    def pairs(self, shape: ModelShape) -> Iterator[Pair]:
        names = {
            "input_layernorm": "ln_1",
            "self_attention.linear_qkv": "attn.c_attn",
            "self_attention.linear_proj": "attn.c_proj",
            "pre_mlp_layernorm": "ln_2",
            "mlp.linear_fc1": "mlp.c_fc",
            "mlp.linear_fc2": "mlp.c_proj",
        }
        yield _same("embedding.word_embeddings.weight", "transformer.wte.weight")
        yield _same("embedding.position_embeddings.weight", "transformer.wpe.weight")
        yield from self._layers(shape, "transformer.h", names, _transposed)
        for kind in ("weight", "bias"):
            yield _same(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}")
        if not shape.config.tied_embeddings:
            yield _same("output_layer.weight", "lm_head.weight")

    def _pair(self, shape: ModelShape, one: Callable[[str, str], Pair], ours: str, theirs: str) -> Pair:
        return _fused_qkv(shape, ours, theirs) if ".linear_qkv." in ours else one(ours, theirs)


class _GPTNeoX(_LayerNorm):
    """GPT-NeoX's class with one residual after the other, as Pythia's but for that."""

    name, model_type, prefix = "GPTNeoXForCausalLM", "gpt_neox", "gpt_neox."
    ignored = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    position = Position.rope

    def config(self, shape: ModelShape) -> dict[str, Any]:
        c = shape.config
        return {
            "vocab_size": shape.vocab,
            "hidden_size": c.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "hidden_act": _PLAIN[c.activation],
            "max_position_embeddings": c.seq_len,
            "layer_norm_eps": c.norm_eps,
            "initializer_range": c.init_std,
            "tie_word_embeddings": c.tied_embeddings,
            "use_parallel_residual": False,
            "attention_bias": True,
            "rotary_pct": 1.0,
            "rotary_emb_base": c.rope_base,
            **_rope(c.rope_base, partial_rotary_factor=1.0),
        }

    def model(self, config: Mapping[str, Any], name: str) -> ModelConfig:
        if config.get("use_parallel_residual", True):
            raise _refused("use_parallel_residual", True, "false: attention, then the feed-forward layer")
        if not config.get("attention_bias", True):
            raise _refused("attention_bias", False, "true: a bias on every linear layer")
        rope = config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        if share != 1:
            raise _refused("rotary_pct", share, "1.0: whole heads are rotated")
        return ModelConfig(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            ffn=config["intermediate_size"],
            seq_len=config["max_position_embeddings"],
            norm=Norm.layernorm,
            norm_eps=config["layer_norm_eps"],
            activation=_activation(config, "hidden_act", _PLAIN),
            rope_base=_rope_base(config),
            bias=True,
            tied_embeddings=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
            **_vocab(config),
        )

    def pairs(self, shape: ModelShape) -> Iterator[Pair]:
        names = {
            "input_layernorm": "input_layernorm",
            "self_attention.linear_qkv": "attention.query_key_value",
            "self_attention.linear_proj": "attention.dense",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "mlp.linear_fc1": "mlp.dense_h_to_4h",
            "mlp.linear_fc2": "mlp.dense_4h_to_h",
        }
        yield _same("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight")
        yield from self._layers(shape, "gpt_neox.layers", names, _same)
        for kind in ("weight", "bias"):
            yield _same(f"decoder.final_layernorm.{kind}", f"gpt_neox.final_layer_norm.{kind}")
        if not shape.config.tied_embeddings:
            yield _same("output_layer.weight", "embed_out.weight")


ARCHITECTURES: tuple[Architecture, ...] = (_Llama(), _Qwen3(), _Mixtral(), _GPT2(), _GPTNeoX())


def expressing(shape: ModelShape) -> Architecture:
    """The architecture that our model is.

    Raises:
        UserError: none is it; says for each what stands in the way.
    """
    of_all = [f"model.retro.chunk={shape.config.retro.chunk}"] if shape.config.retro.chunk else []
    reasons = {one: [*of_all, *one.refusals(shape)] for one in ARCHITECTURES}
    for architecture, refusals in reasons.items():
        if not refusals:
            return architecture
    nearest = sorted(reasons.items(), key=lambda item: len(item[1]))
    found = "; ".join(f"not {one.name} for {', '.join(why)}" for one, why in nearest)
    raise UserError(
        f"model {shape.config.name}",
        f"a model without a class in transformers ({found})",
        "one that a class of transformers computes",
        "change these settings before training a model that is to be exported",
    )


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a `config.json` names; `where` is its path, for the error."""
    for architecture in ARCHITECTURES:
        if config.get("model_type") == architecture.model_type:
            return architecture
    known = ", ".join(architecture.model_type for architecture in ARCHITECTURES)
    fix = "convert a model of one of these kinds"
    raise UserError(where, f"model_type {config.get('model_type')}", f"one of {known}", fix)


def _unlike(config: ModelConfig, **wanted: Any) -> Iterator[str]:
    for key, value in wanted.items():
        found = getattr(config, key)
        if found != value:
            yield f"model.{key}={found.value if isinstance(found, (Norm, Position)) else str(found).lower()}"


def _refused(key: str, found: object, expected: str) -> UserError:
    fix = "megafab has no such model; choose another, or convert it elsewhere first"
    return UserError(f"config.json, {key}", str(found), expected, fix)


def _activation(config: Mapping[str, Any], key: str, table: Mapping[Activation, str]) -> Activation:
    names = {theirs: ours for ours, theirs in table.items()}
    found = {"swish": "silu"}.get(config[key], config[key])
    if found not in names:
        raise _refused(key, found, f"one of {', '.join(names)} (gelu is the exact one, not its tanh form)")
    return names[found]


def _rope(base: float, **more: Any) -> dict[str, Any]:
    """For `transformers` 5 and, flat, for 4."""
    parameters = {"rope_type": "default", "rope_theta": base, **more}
    return {"rope_theta": base, "rope_parameters": parameters}


def _rope_base(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _refused("rope_parameters", kind, "the default: angles without scaling")
    flat = config.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    return float(rope.get("rope_theta", flat))


def _vocab(config: Mapping[str, Any]) -> dict[str, Any]:
    rows = config["vocab_size"]
    return {"vocab": rows, "vocab_multiple": 1 if rows % 128 else 128}
