"""What a model is. Sizes only; where it runs is `topology.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Norm(Enum):
    """Normalisation before attention, before the feed-forward layer and at the end."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(Enum):
    """Of the feed-forward layer; swiglu and geglu have a gate (Shazeer 2020)."""

    gelu = "gelu"
    relu = "relu"
    squared_relu = "squared_relu"
    swiglu = "swiglu"
    geglu = "geglu"


class Position(Enum):
    """How positions are told: a learned table, or rotary embedding (Su et al. 2021)."""

    learned = "learned"
    rope = "rope"


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer; off while `experts` is 0."""

    experts: int = 0
    top_k: int = 2
    ffn: int | None = None  # width of one expert; null: model.ffn
    shared_ffn: int = 0  # width of the always-on shared expert; 0: none
    aux_loss: float = 0.01  # load-balancing loss (Switch Transformer, eq. 4)
    z_loss: float = 0.0  # router z-loss (ST-MoE, eq. 5)
    capacity_factor: float | None = None  # null: no token is dropped; a capacity counts one rank's tokens,
    # so that losses then depend on how sequences are split over ranks
    every: int = 1  # every n-th layer is MoE, the others dense


@dataclass(frozen=True, slots=True)
class RetroConfig:
    """Neighbours from a database, encoded and looked at by some layers (RETRO); off while `chunk` is 0."""

    chunk: int = 0  # tokens of a chunk, as the database was made with
    neighbors: int = 2  # of each chunk
    retrieved: int | None = None  # tokens of a neighbour, what follows it included; null: 2 x chunk
    encoder_layers: int = 2
    in_context: bool = False  # RETRO++: a row begins with what was retrieved for the chunk before its window
    # Decoder layers, from 1, that look at neighbours; null: every third from the sixth on, from the ninth on
    # where there are more than 15, from the middle on where there are fewer than 6.
    layers: list[int] | None = None

    @property
    def length(self) -> int:
        """Tokens of a neighbour, what follows it included."""
        return self.retrieved or 2 * self.chunk


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer."""

    name: str = MISSING
    layers: int = MISSING
    hidden: int = MISSING
    heads: int = MISSING
    kv_heads: int | None = None  # grouped-query attention; null: heads
    head_dim: int | None = None  # null: hidden / heads
    ffn: int | None = None  # null: 4 x hidden, or 8/3 x hidden rounded up to 128 when gated
    seq_len: int = MISSING
    vocab: int | None = None  # null: the tokenizer's size rounded up to vocab_multiple
    vocab_multiple: int = 128  # fixed, not scaled by tensor parallelism: weights stay the same
    norm: Norm = Norm.rmsnorm
    norm_eps: float = 1e-5
    activation: Activation = Activation.swiglu
    position: Position = Position.rope
    rope_base: float = 10000.0
    bias: bool = False  # on every linear layer
    qk_norm: bool = False
    tied_embeddings: bool = False
    dropout: float = 0.0  # hidden and attention dropout
    init_std: float = 0.02
    moe: MoEConfig = field(default_factory=MoEConfig)
    retro: RetroConfig = field(default_factory=RetroConfig)
