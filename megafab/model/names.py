"""Every parameter's global name and shape, without a model: pure arithmetic, no torch.

The names are those that `tags.py` gives to the modules that core builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from megafab.model.config import Norm, Position
from megafab.model.shape import ModelShape

_MASKABLE = re.compile(r"decoder\.layers\.\d+\..*\.linear_(qkv|proj|fc1|fc2)\.weight")

_RETRO = re.compile(r"decoder\.layers\.\d+\.(cross_attention|pre_cross_attn_layernorm)\..*")


def is_retro(name: str) -> bool:
    """Whether a parameter is of what RETRO adds to a model: the encoder, and the looking at its encoding."""
    return _RETRO.fullmatch(name) is not None


def is_gate(name: str) -> bool:
    """Whether a parameter is the projection by which a layer adds what it sees of neighbours."""
    return is_retro(name) and name.endswith(".cross_attention.linear_proj.weight") and ".encoder." not in name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name is one of those that the patterns stand for, with * for anything."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_maskable(name: str) -> bool:
    """Whether sparsity masks this parameter: the matrices of attention and feed-forward, in every layer.

    Embeddings, head, routers, norms and biases stay dense (Thangarasa et al. 2023, arXiv 2303.10464).
    """
    return _MASKABLE.fullmatch(name) is not None


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its global name, from the embedding to the output layer."""
    c = shape.config
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = c.bias) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = (size,)
        if c.norm is Norm.layernorm:
            found[f"{name}.bias"] = (size,)

    def mlp(name: str, width: int) -> None:
        linear(f"{name}.linear_fc1", width * (2 if shape.gated else 1), c.hidden)
        linear(f"{name}.linear_fc2", c.hidden, width)

    def attention(name: str) -> None:
        rows = (c.heads + 2 * shape.kv_heads) * shape.head_dim
        linear(f"{name}.linear_qkv", rows, c.hidden)
        if c.qk_norm:
            norm(f"{name}.q_layernorm", shape.head_dim)
            norm(f"{name}.k_layernorm", shape.head_dim)
        linear(f"{name}.linear_proj", c.hidden, c.heads * shape.head_dim)

    def cross_attention(at: str) -> None:
        norm(f"{at}.pre_cross_attn_layernorm", c.hidden)
        linear(f"{at}.cross_attention.linear_q", c.heads * shape.head_dim, c.hidden)
        linear(f"{at}.cross_attention.linear_kv", 2 * shape.kv_heads * shape.head_dim, c.hidden)
        linear(f"{at}.cross_attention.linear_proj", c.hidden, c.heads * shape.head_dim)

    found["embedding.word_embeddings.weight"] = (shape.vocab, c.hidden)
    if c.position is Position.learned:
        found["embedding.position_embeddings.weight"] = (c.seq_len, c.hidden)
    for layer in range(c.layers):
        at = f"decoder.layers.{layer}"
        norm(f"{at}.input_layernorm", c.hidden)
        attention(f"{at}.self_attention")
        if layer in shape.retro_layers:
            cross_attention(at)
        for part in range(c.retro.encoder_layers if layer in shape.retro_layers[:1] else 0):
            encoder = f"{at}.cross_attention.encoder.layers.{part}"
            norm(f"{encoder}.input_layernorm", c.hidden)
            attention(f"{encoder}.self_attention")
            if part == 0:
                cross_attention(encoder)
            norm(f"{encoder}.pre_mlp_layernorm", c.hidden)
            mlp(f"{encoder}.mlp", shape.ffn)
        if layer in shape.retro_layers[:1]:
            norm(f"{at}.cross_attention.encoder.final_layernorm", c.hidden)
        norm(f"{at}.pre_mlp_layernorm", c.hidden)
        if shape.is_moe_layer(layer):
            linear(f"{at}.mlp.router", c.moe.experts, c.hidden, bias=False)
            for expert in range(c.moe.experts):
                mlp(f"{at}.mlp.experts.local_experts.{expert}", shape.expert_ffn)
            if c.moe.shared_ffn:
                mlp(f"{at}.mlp.shared_experts", c.moe.shared_ffn)
        else:
            mlp(f"{at}.mlp", shape.ffn)
    norm("decoder.final_layernorm", c.hidden)
    if not c.tied_embeddings:
        linear("output_layer", shape.vocab, c.hidden, bias=False)
    return found
