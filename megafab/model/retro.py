"""RETRO: layers that look at the neighbours of earlier chunks, retrieved from a database.

Borgeaud et al. 2022, "Improving language models by retrieving from trillions of tokens" (arXiv 2112.04426),
with the mechanics of Megatron-LM's version (Wang et al. 2023, arXiv 2304.06762). A sequence is cut into
chunks of M tokens, and each chunk has K neighbours of R tokens: chunks that are like it, with what follows
them. A decoder layer that looks at them attends to itself first, then to the neighbours, then comes its
feed-forward layer. The first such layer holds the encoder, which reads the neighbours in both directions,
seeing in its first layer the decoder's hidden states of the chunk they were retrieved for; later layers look
at the same encoding.

Chunked cross-attention is causal by construction: the last position of chunk u, which has seen all of it, is
the first to look at its neighbours, and the M - 1 positions after it are the others:

    positions (u + 1) M - 1  ...  (u + 2) M - 2   look at the neighbours of chunk u, all K x R tokens at once

The first M - 1 positions look at nothing. Nor does a position of another document than that of chunk u's last
token, for which the neighbours were retrieved; and what of chunk u is of another one, the encoder does not
see. What is added is zero there to the bit, and everywhere at the beginning of training, since the last
projection begins at zero: a pre-trained model with new layers of this kind is the same function at first.

With rotary positions a query counts as the place in a neighbour that continues it: position (u + 1) M - 1 + i
is at M - 1 + i there, as if chunk u had been at 0 ... M - 1 (so count the relative positions of Borgeaud et
al.). Learned positions are added to the neighbours' tokens, from 0.

Keys of every context are columns of the tensor ranks like those of any attention, and chunks are put
together where queries, keys and values are of whole sequences: after the projections, so that sequence
parallelism splits neighbours like everything else. Between layers the encoding is core's `context`; pipeline
stages send it with the hidden states, as further rows of one tensor.

Shapes: S whole sequence, C = S / M chunks of it, M chunk, K neighbours, R their tokens, B sequences, H hidden
size, A heads of this tensor rank, G its key-value heads, D head size. L is this tensor rank's part of S or R
with sequence parallelism, otherwise all of it. N = C x K x B, in that order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from megafab.kernels.rope import rope_table, rotate
from megafab.model.attention import CoreAttention
from megafab.model.layer import FeedForward
from megafab.model.norms import Norm
from megafab.model.shape import ModelShape
from megafab.run import Retrieved


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the modules need to know of a retrieving model. `rope_base` is None with learned positions."""

    chunk: int
    neighbors: int
    retrieved: int
    encoder_layers: int
    kv_heads: int
    rope_base: float | None
    layers: tuple[int, ...]  # that look at neighbours, from 0

    @staticmethod
    def of(shape: ModelShape, rope: bool) -> Sizes:
        """Those of a model."""
        config = shape.config
        return Sizes(
            config.retro.chunk,
            config.retro.neighbors,
            config.retro.length,
            config.retro.encoder_layers,
            shape.kv_heads,
            config.rope_base if rope else None,
            shape.retro_layers,
        )

    def rows(self, seq_len: int) -> int:
        """Rows [*, B, H] that the neighbours of `seq_len` tokens are."""
        return seq_len // self.chunk * self.neighbors * self.retrieved

    def parts(self, mask_BCX: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The three parts of a `retrieval_mask`: [B, C, K R], [B, C, M] and [B, C, M]."""
        return mask_BCX.split((self.neighbors * self.retrieved, self.chunk, self.chunk), dim=-1)

    def table(self, position_X: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
        """The angles of positions, the same for all sequences; None where they are learned."""
        if self.rope_base is None:
            return None
        return rope_table(position_X.unsqueeze(0), like.shape[-1], self.rope_base, like.dtype)


def retrieval_mask(document_BS: torch.Tensor, retrieved: Retrieved) -> torch.Tensor:
    """What may be looked at, as one tensor, which activation recomputation passes on: bool [B, C, K R + 2 M].

    For each chunk: which tokens of its neighbours there are [K R]; which of the positions that come to look
    at them may [M], and which of the chunk's own tokens the encoder may see [M].
    """
    chunks, _, tokens = retrieved.tokens_BCKR.shape[1:]
    chunk = document_BS.shape[1] // chunks
    there_BCKR = torch.arange(tokens, device=document_BS.device) < retrieved.length_BCK.unsqueeze(-1)
    there_BCX = there_BCKR.flatten(2)
    own_BCM = document_BS.unflatten(1, (chunks, chunk))
    of_BC1 = own_BCM[..., -1:]
    after = document_BS.new_full((len(document_BS), chunk - 1), -1)  # positions beyond the sequence
    lookers_BCM = torch.cat((document_BS[:, chunk - 1 :], after), dim=1).unflatten(1, (chunks, chunk))
    may_BCM = (lookers_BCM == of_BC1) & there_BCX.any(-1, keepdim=True)
    return torch.cat((there_BCX, may_BCM, own_BCM == of_BC1), dim=2)


class CrossAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V with queries of one sequence and keys of another, heads grouped.

    Queries and keys are regrouped between projections and attention, so that both are whole sequences there.
    """

    def __init__(
        self, config: TransformerConfig, sizes: Sizes, groups: ProcessGroupCollection, layer: int
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.sizes, self.head = sizes, config.kv_channels
        width = config.num_attention_heads * self.head
        linear: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": config.add_bias_linear,
            "tp_group": groups.tp,
        }
        columns = {**linear, "gather_output": False}
        self.linear_q = ColumnParallelLinear(config.hidden_size, width, **columns)
        self.linear_kv = ColumnParallelLinear(config.hidden_size, 2 * sizes.kv_heads * self.head, **columns)
        self.core_attention = CoreAttention(
            config, layer, AttnMaskType.padding, "cross", pg_collection=groups
        )
        self.linear_proj = RowParallelLinear(
            width, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **linear
        )
        # Where every layer is computed again, attention already is.
        self._recomputes = config.recompute_granularity == "selective"

    def queries(self, hidden_LXH: torch.Tensor) -> torch.Tensor:
        """[L, X, H] of any batch X to [S, X, A, D]."""
        return self.linear_q(hidden_LXH)[0].unflatten(-1, (-1, self.head))

    def keys_values(self, hidden_LXH: torch.Tensor) -> torch.Tensor:
        """[L, X, H] of any batch X to [S, X, G, 2 D]: key and value of each head."""
        return self.linear_kv(hidden_LXH)[0].unflatten(-1, (-1, 2 * self.head))

    def attend(
        self,
        query: torch.Tensor,
        query_at: torch.Tensor,
        key_value: torch.Tensor,
        key_at: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of [Q, X, A, D] to [T, X, G, 2 D], both of any batch X: [Q, X, A x D].

        Args:
            query: queries.
            query_at: their positions, int64 [Q].
            key_value: keys and values.
            key_at: their positions, int64 [T].
            mask: bool [X, T], which of the keys there are; a row without any attends to all of them, for the
                caller to leave out.
        """
        key, value = key_value.chunk(2, dim=-1)
        tables = self.sizes.table(query_at, query), self.sizes.table(key_at, key)
        if tables[0] is not None and tables[1] is not None:
            query, key = rotate(query, tables[0]), rotate(key, tables[1])
        mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        if self._recomputes and self.training:
            return cast(torch.Tensor, checkpoint(self.core_attention, False, query, key, value, mask))
        return self.core_attention(query, key, value, mask)


class _EncoderLayer(MegatronModule):
    """Reads neighbours in both directions; with `looks`, sees the chunk that they were retrieved for."""

    def __init__(
        self,
        config: TransformerConfig,
        sizes: Sizes,
        attention: ModuleSpec,
        groups: ProcessGroupCollection,
        layer: int,
        looks: bool,
    ) -> None:
        super().__init__(config=config)
        self.sizes = sizes
        self.input_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = build_module(attention, config=config, layer_number=layer, pg_collection=groups)
        if looks:
            self.pre_cross_attn_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
            self.cross_attention = CrossAttention(config, sizes, groups, layer)
        self.looks = looks
        self.pre_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = FeedForward(config, tp_group=groups.tp)

    def forward(self, x_LNH: torch.Tensor, chunk_LBH: torch.Tensor, mask_BCX: torch.Tensor) -> torch.Tensor:
        """Neighbours [L, N, H] to the same shape.

        Args:
            x_LNH: the neighbours.
            chunk_LBH: the decoder's hidden states, normalised.
            mask_BCX: `retrieval_mask`.
        """
        sizes = self.sizes
        there_BCX, _, own_BCM = sizes.parts(mask_BCX)
        there_NR = there_BCX.unflatten(-1, (-1, sizes.retrieved)).permute(1, 2, 0, 3).flatten(0, 2)
        # Where a neighbour is missing all see all: nobody looks at them, and a softmax of nothing is nan.
        seen_N1RR = (there_NR | ~there_NR.any(-1, keepdim=True))[:, None, None, :].expand(
            -1, 1, sizes.retrieved, -1
        )
        at_R = torch.arange(sizes.retrieved, device=x_LNH.device)
        table = sizes.table(at_R, x_LNH.new_empty(0, self.config.kv_channels or 0))
        out = self.self_attention(self.input_layernorm(x_LNH), seen_N1RR, rotary_pos_emb=table)
        x_LNH = self._add(x_LNH, out)
        if self.looks:
            attention, batch = self.cross_attention, chunk_LBH.shape[1]
            query = attention.queries(self.pre_cross_attn_layernorm(x_LNH))  # [R, N, A, D]
            neighbors = query.shape[1] // (own_BCM.shape[1] * batch)
            shape = (own_BCM.shape[1], neighbors, batch)
            key_value = attention.keys_values(chunk_LBH).unflatten(0, (-1, sizes.chunk))
            seen = attention.attend(
                # The neighbours of a chunk are queries of one sequence: they look at the same keys.
                query.unflatten(1, shape).permute(2, 0, 1, 3, 4, 5).flatten(0, 1).flatten(1, 2),
                at_R.repeat(neighbors),
                key_value.transpose(0, 1).flatten(1, 2),
                torch.arange(sizes.chunk, device=x_LNH.device),
                own_BCM.transpose(0, 1).flatten(0, 1),
            )
            seen = seen.unflatten(0, (neighbors, -1)).unflatten(2, (-1, batch))  # [K, R, C, B, A x D]
            out = attention.linear_proj(seen.permute(1, 2, 0, 3, 4).flatten(1, 3).contiguous())
            x_LNH = self._add(x_LNH, out)
        return self._add(x_LNH, self.mlp(self.pre_mlp_layernorm(x_LNH)))

    def _add(self, x: torch.Tensor, out_and_bias: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        out, bias = out_and_bias
        out = out if bias is None else out + bias
        return x + F.dropout(out, self.config.hidden_dropout, self.training)


class Encoder(MegatronModule):
    """The neighbours of every chunk, read with the chunk in view."""

    def __init__(
        self,
        config: TransformerConfig,
        sizes: Sizes,
        attention: ModuleSpec,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layers = torch.nn.ModuleList(
            _EncoderLayer(config, sizes, attention, groups, layer + 1, looks=layer == 0)
            for layer in range(sizes.encoder_layers)
        )
        self.final_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x_LNH: torch.Tensor, chunk_LBH: torch.Tensor, mask_BCX: torch.Tensor) -> torch.Tensor:
        """The embeddings of neighbours [L, N, H] to their encoding."""
        for layer in self.layers:
            x_LNH = layer(x_LNH, chunk_LBH, mask_BCX)
        return self.final_layernorm(x_LNH)


class ChunkedCrossAttention(CrossAttention):
    """Hidden states to what they see of the neighbours of the chunk before (see above).

    As core's layers call it. The answer has what is `seen` [L, B, H], None where nothing was retrieved, and
    as `context` the neighbours' encoding for the next layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        sizes: Sizes,
        attention: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config, sizes, pg_collection, layer_number)
        self._ranks, self._rank = 1, 0
        if config.sequence_parallel:
            self._ranks, self._rank = pg_collection.tp.size(), pg_collection.tp.rank()
        is_first = layer_number - 1 == sizes.layers[0]
        self.encoder = Encoder(config, sizes, attention, pg_collection) if is_first else None

    def forward(self, hidden_LBH, attention_mask=None, key_value_states=None, **_):
        """`attention_mask` is a `retrieval_mask`, `key_value_states` the neighbours [L, N, H]; null: none."""
        if attention_mask is None:
            return {"context": None, "seen": None}
        assert key_value_states is not None
        sizes, context_LNH, chunk = self.sizes, key_value_states, self.sizes.chunk
        if self.encoder is not None:
            context_LNH = self.encoder(context_LNH, hidden_LBH, attention_mask)
        query_SBAD = self.queries(hidden_LBH)
        batch, count = query_SBAD.shape[1], query_SBAD.shape[0] // chunk
        nobody = query_SBAD.new_zeros(chunk - 1, *query_SBAD.shape[1:])
        query = torch.cat((query_SBAD[chunk - 1 :], nobody)).unflatten(0, (count, chunk))
        key_value = self.keys_values(context_LNH).unflatten(1, (count, -1, batch))  # [R, C, K, B, G, 2 D]
        there_BCX, may_BCM, _ = sizes.parts(attention_mask)
        seen = self.attend(
            query.transpose(0, 1).flatten(1, 2),
            torch.arange(chunk - 1, 2 * chunk - 1, device=query.device),
            key_value.permute(2, 0, 1, 3, 4, 5).flatten(0, 1).flatten(1, 2),
            torch.arange(sizes.retrieved, device=query.device).repeat(sizes.neighbors),
            there_BCX.transpose(0, 1).flatten(0, 1),
        )
        may_SB1 = may_BCM.permute(1, 2, 0).flatten(0, 1).unsqueeze(-1)
        seen_SBX = seen.unflatten(1, (count, batch)).transpose(0, 1).flatten(0, 1) * may_SB1
        out_LBH, bias = self.linear_proj(_later(seen_SBX, chunk - 1))
        if bias is not None:
            may_SB1 = _later(may_SB1, chunk - 1)
            out_LBH = out_LBH + bias * may_SB1.chunk(self._ranks)[self._rank]
        return {"context": context_LNH, "seen": out_LBH}


def _later(x_SBX: torch.Tensor, positions: int) -> torch.Tensor:
    """Everything so many positions later: zero at first, and the last ones gone."""
    none = x_SBX.new_zeros(positions, *x_SBX.shape[1:])
    return torch.cat((none, x_SBX[: len(x_SBX) - positions]))


def _add_what_is_seen(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """In the place of core's bias-dropout-add after cross-attention."""

    def add(answer: dict[str, Any], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        seen = answer["seen"]
        return residual if seen is None else residual + F.dropout(seen, dropout, training)

    return add


def looks_at_neighbors(spec: ModuleSpec, sizes: Sizes, attention: ModuleSpec) -> ModuleSpec:
    """The spec of the same layer with chunked cross-attention.

    Args:
        spec: of a decoder layer.
        sizes: of the model.
        attention: self-attention of the encoder.
    """
    parts = dataclasses.replace(
        cast(Any, spec.submodules),
        pre_cross_attn_layernorm=Norm,
        cross_attention=ModuleSpec(
            module=ChunkedCrossAttention, params={"sizes": sizes, "attention": attention}
        ),
        cross_attn_bda=_add_what_is_seen,
    )
    return dataclasses.replace(spec, submodules=parts)


def at_stage_boundary(spec: ModuleSpec, sizes: Sizes, *, receives: bool, sends: bool) -> ModuleSpec:
    """The spec of the first or last layer of a pipeline chunk, between which hidden states travel.

    Neighbours travel with them, as further rows of the tensor that the schedule sends.
    """
    kind = spec.module
    assert isinstance(kind, type)
    assert issubclass(kind, TransformerLayer), kind
    attributes = {"sizes": sizes, "receives": receives, "sends": sends}
    return dataclasses.replace(spec, module=type(f"Boundary{kind.__name__}", (_Boundary, kind), attributes))


class _Boundary(TransformerLayer):
    """Takes neighbours out of what a stage was sent, and puts them to what it sends."""

    sizes: Sizes
    receives = sends = False

    def forward(self, hidden_states, context=None, context_mask=None, **rest):
        """As core's; without a mask nothing was retrieved, and nothing but hidden states travels."""
        if context_mask is None:
            return super().forward(hidden_states, context=None, context_mask=None, **rest)
        batch, hidden = hidden_states.shape[1:]
        if self.receives:
            count, sizes = context_mask.shape[1], self.sizes
            whole = count * sizes.chunk
            own = len(hidden_states) * whole // (whole + sizes.rows(whole))
            hidden_states, rows = hidden_states.split((own, len(hidden_states) - own))
            context = rows.reshape(-1, count * sizes.neighbors * batch, hidden)
        made = super().forward(hidden_states, context=context, context_mask=context_mask, **rest)
        hidden_states, context = cast(tuple[torch.Tensor, torch.Tensor], made)
        if self.sends:
            hidden_states = torch.cat((hidden_states, context.reshape(-1, batch, hidden)))
        return hidden_states, context
