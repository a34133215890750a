"""What the axes of a parameter count, and which of them touch the residual stream: by its name alone.

Growth by units (channels, heads, neurons) says for each axis of each parameter where its entries come from.
The residual stream is what every layer reads (through a norm) and adds to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Axis(Enum):
    """What an axis of a parameter counts."""

    vocab = "rows of the embedding"
    hidden = "channels of the residual stream"
    heads = "outputs of the query heads, head by head"
    qkv = "queries, key and value of every group of heads, group by group"
    ffn = "neurons of the feed-forward layer"
    fc1 = "inputs of the neurons: their gates, where they have them, then the rest"
    fixed = "what never grows"


class Use(Enum):
    """What a parameter does to the residual stream."""

    table = "has rows that are added to the stream"
    reader = "takes the stream's channels in"
    writer = "gives what is added to the stream"
    norm = "scales the stream's channels, or shifts them"
    inner = "knows nothing of the stream"


@dataclass(frozen=True, slots=True)
class Role:
    """What a parameter is: its use, and what its axes count."""

    use: Use
    axes: tuple[Axis, ...]

    @property
    def taken_in(self) -> int | None:
        """The axis of inputs, along which a matrix sums; None: it has none."""
        return 1 if len(self.axes) == 2 and self.use in (Use.reader, Use.writer) else None

    @property
    def given_out(self) -> int | None:
        """The axis of the stream's channels that the parameter writes; None: it writes none."""
        return {Use.table: 1, Use.writer: 0}.get(self.use)


# Of a weight; a bias has its first axis.
_ROLES = {
    "word_embeddings": (Use.table, Axis.vocab, Axis.hidden),
    "position_embeddings": (Use.table, Axis.fixed, Axis.hidden),
    "input_layernorm": (Use.norm, Axis.hidden),
    "pre_mlp_layernorm": (Use.norm, Axis.hidden),
    "final_layernorm": (Use.norm, Axis.hidden),
    "q_layernorm": (Use.inner, Axis.fixed),
    "k_layernorm": (Use.inner, Axis.fixed),
    "linear_qkv": (Use.reader, Axis.qkv, Axis.hidden),
    "linear_proj": (Use.writer, Axis.hidden, Axis.heads),
    "linear_fc1": (Use.reader, Axis.fc1, Axis.hidden),
    "linear_fc2": (Use.writer, Axis.hidden, Axis.ffn),
    "router": (Use.reader, Axis.fixed, Axis.hidden),
    "output_layer": (Use.reader, Axis.vocab, Axis.hidden),
}


def role_of(name: str) -> Role:
    """The role of a parameter by its global name."""
    *_, module, kind = name.split(".")
    use, *axes = _ROLES[module]
    return Role(use, tuple(axes[:1] if kind == "bias" else axes))
