"""Attention for Megatron-core's layer specs: SDPA with document masks, and context parallelism.

Core's own core attention materialises the L x L scores and refuses context parallelism; Transformer
Engine's needs CUDA. This one is PyTorch's scaled_dot_product_attention (flash kernels on CPU and GPU)
between two ways of splitting a sequence over the context ranks:

- `allgather` (Llama 3, section 3.3.2): each rank keeps its queries, keys and values are gathered. The
  sequence is cut into 2 x context chunks and rank r holds chunks r and 2 x context - 1 - r, which evens
  out the causal work. Works with any number of heads.
- `ulysses` (Jacobs et al. 2023): an all-to-all trades the sequence split for a head split, attention
  runs on whole sequences, and a second all-to-all trades back.

Shapes: L sequence on this rank, S whole sequence, B sequences, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megafab.kernels.rope import rotate_both, rotate_both_
from megafab.kernels.softmax import masked_softmax
from megafab.topology.config import ContextMethod

# Below this head size a CPU's attention kernel spends more on packing bf16 for its backward products than
# the products gain: fp32 is faster (and exact).
_BF16_HEAD_ON_CPU = 64


def context_positions(length: int, method: ContextMethod, ranks: int, rank: int) -> torch.Tensor:
    """The positions of a sequence of `length` that a context rank holds, in its local order: int64 [L]."""
    if method is ContextMethod.ulysses or ranks == 1:
        part = length // ranks
        return torch.arange(rank * part, (rank + 1) * part)
    part = length // (2 * ranks)
    chunks = [torch.arange(c * part, (c + 1) * part) for c in (rank, 2 * ranks - 1 - rank)]
    return torch.cat(chunks)


def attention_mask(document_BS: torch.Tensor, rows_L: torch.Tensor | None = None) -> torch.Tensor:
    """Who may attend to whom: bool [B, 1, L, S], true where position l may look at position s.

    `rows_L` are the positions of this rank's queries, null for all of them.
    """
    size = document_BS.shape[1]
    rows = torch.arange(size, device=document_BS.device) if rows_L is None else rows_L
    causal_LS = rows[:, None] >= torch.arange(size, device=document_BS.device)
    same_BLS = document_BS[:, rows, None] == document_BS[:, None, :]
    return (same_BLS & causal_LS).unsqueeze(1)


def attend(
    query_BHLD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """softmax(Q K^T scale) V by PyTorch's SDPA; on a GPU where none of its fused kernels can, in parts.

    Args:
        query_BHLD: queries.
        key_BGSD, value_BGSD: of fewer heads, of which each serves H / G of the queries', or as many.
        mask: bool [B or 1, H or 1, L or 1, S], true where a query may look.
        dropout: the share of probabilities to drop.
        causal: query l sees the keys up to l; without a mask only.
        scale: multiplies the scores.
    """
    grouped = key_BGSD.shape[1] != query_BHLD.shape[1]
    if query_BHLD.is_cuda:
        params = torch.backends.cuda.SDPAParams(
            query_BHLD, key_BGSD, value_BGSD, mask, dropout, causal, grouped
        )
        if not (
            torch.backends.cuda.can_use_flash_attention(params)
            or torch.backends.cuda.can_use_efficient_attention(params)
            or torch.backends.cuda.can_use_cudnn_attention(params)
        ):
            return attend_in_parts(
                query_BHLD, key_BGSD, value_BGSD, mask, dropout, causal=causal, scale=scale
            )
    return F.scaled_dot_product_attention(
        query_BHLD,
        key_BGSD,
        value_BGSD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )


def attend_in_parts(
    query_BHLD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """As `attend`, with the scores in memory: two products around a fused softmax."""
    repeat = query_BHLD.shape[1] // key_BGSD.shape[1]
    if repeat > 1:
        key_BGSD, value_BGSD = (x.repeat_interleave(repeat, dim=1) for x in (key_BGSD, value_BGSD))
    probability_BHLS = masked_softmax(query_BHLD @ key_BGSD.transpose(2, 3), mask, scale, causal=causal)
    return F.dropout(probability_BHLS, dropout) @ value_BGSD


class RopeSelfAttention(SelfAttention):
    """Core's self-attention with the rotation done from a table of positions (`kernels.rope.rope_table`).

    The table arrives as `rotary_pos_emb` through core's own argument, is kept for the length of this
    call and applied where queries and keys are split, so that core does not rotate a second time.
    """

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs):
        """As core's, but `rotary_pos_emb` is the table of `rope_table`."""
        self._rope_table = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._rope_table = None

    def get_query_key_value_tensors(self, *args, **kwargs):
        """Query, key and value, the first two rotated: [L, B, H or G, D]."""
        query, key, *rest = cast(tuple, super().get_query_key_value_tensors(*args, **kwargs))
        if self._rope_table is not None:
            # A CPU's attention reads fastest what `rotate_both` writes; neither the product that made them
            # nor a norm of heads needs them again.
            turn = rotate_both_ if query.is_cuda else rotate_both
            query, key = turn(query, key, self._rope_table)
        return query, key, *rest


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V with grouped heads; see the module's docstring for context parallelism."""

    context_method = ContextMethod.allgather  # set by the spec through a subclass, see plan.py

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object = None,
    ) -> torch.Tensor:
        """Attend: query [L, B, H, D], key and value [L, B, G, D] -> [L, B, H x D].

        `attention_mask` is `attention_mask()`'s result: None is plain causal attention.
        """
        length, batch = query.shape[:2]
        if self.context_group.size() == 1:
            out = self._attend(query, key, value, attention_mask)
        elif self.context_method is ContextMethod.ulysses:
            query, key, value = (self._sequence_to_heads(x) for x in (query, key, value))
            out = self._heads_to_sequence(self._attend(query, key, value, attention_mask))
        else:
            out = self._attend_gathered(query, key, value, attention_mask)
        return out.reshape(length, batch, -1)

    def _attend(self, query, key, value, mask, *, causal: bool = True) -> torch.Tensor:
        """One SDPA call on [L, B, H, D] tensors; `causal` matters only without a mask."""
        dtype = query.dtype
        if key.shape[2] != query.shape[2] and mask is not None and query.is_cuda:
            # CUDA's only fused kernel that takes a mask wants as many keys as queries.
            repeat = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
        if dtype is torch.bfloat16 and query.device.type == "cpu" and query.shape[-1] < _BF16_HEAD_ON_CPU:
            query, key, value = query.float(), key.float(), value.float()
        dropout = self.dropout if self.training else 0.0
        # Heads of different tensor ranks must not drop alike. With sequence parallelism the block forks.
        forks = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks else nullcontext():  # pyright: ignore
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = attend(query, key, value, mask, dropout, causal=causal and mask is None, scale=self.scale)
        return out.permute(2, 0, 1, 3).to(dtype)

    def _attend_gathered(self, query, key, value, mask) -> torch.Tensor:
        """Queries of two chunks against all keys before them; keys and values gathered in one exchange."""
        ranks, rank = self.context_group.size(), self.context_group.rank()
        both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=2), group=self.context_group)
        chunk = query.shape[0] // 2
        # The gather lays chunks out by rank: 0, last, 1, last - 1, ...; put them back in order.
        parts = both.split(chunk)
        where = {c: i for i, c in enumerate(c for r in range(ranks) for c in (r, 2 * ranks - 1 - r))}
        key, value = torch.cat([parts[where[c]] for c in range(2 * ranks)]).split(key.shape[2], dim=2)
        outs = []
        for half, c in enumerate((rank, 2 * ranks - 1 - rank)):
            rows, seen = slice(half * chunk, (half + 1) * chunk), (c + 1) * chunk
            outs.append(self._attend(query[rows], key[:seen], value[:seen], mask[:, :, rows, :seen]))
        return torch.cat(outs)

    def _sequence_to_heads(self, x_LBHD: torch.Tensor) -> torch.Tensor:
        """[L, B, H, D] -> [S, B, H / ranks, D]."""
        ranks = self.context_group.size()
        length, batch, heads, dim = x_LBHD.shape
        by_rank = x_LBHD.reshape(length, batch, ranks, heads // ranks, dim).permute(2, 0, 1, 3, 4)
        out = all_to_all(self.context_group, by_rank.reshape(ranks * length, -1))
        return out.reshape(ranks * length, batch, heads // ranks, dim)

    def _heads_to_sequence(self, x_SBHD: torch.Tensor) -> torch.Tensor:
        """[S, B, H / ranks, D] -> [L, B, H, D]."""
        ranks = self.context_group.size()
        length, batch, heads, dim = x_SBHD.shape
        out = all_to_all(self.context_group, x_SBHD.reshape(length, -1).contiguous())
        by_rank = out.reshape(ranks, length // ranks, batch, heads, dim).permute(1, 2, 0, 3, 4)
        return by_rank.reshape(length // ranks, batch, ranks * heads, dim)
