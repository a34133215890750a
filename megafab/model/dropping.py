"""A layer that computes some of its tokens only: the others pass by it unchanged.

Which tokens is decided outside, before the forward pass, and comes in through the block's argument
`context`, made for cross-attention, which decoders have none of: activation recomputation passes it on like
the hidden states, so that a layer that is computed a second time computes the same tokens.

Shapes: S whole sequence, L this tensor rank's part of it (S without sequence parallelism), R kept tokens of a
sequence, B sequences, H hidden size, N dropping layers of a model chunk.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megafab.kernels.rows import gather_rows, put_rows
from megafab.model.gpt import GPT


def drops_tokens(spec: ModuleSpec) -> ModuleSpec:
    """The spec of the same layer, able to leave tokens out."""
    kind = spec.module
    assert isinstance(kind, type)
    assert issubclass(kind, TransformerLayer), kind
    # In front of the layer's own class, so that other changes of it stay.
    return dataclasses.replace(spec, module=type(f"Dropping{kind.__name__}", (_DropsTokens, kind), {}))


def dropping_layers(chunk: GPT) -> list[int]:
    """The global numbers (from 0) of the layers of a chunk that drop tokens, in the order of their rows."""
    layers = [layer for layer in chunk.decoder.layers if isinstance(layer, _DropsTokens)]
    for place, layer in enumerate(layers):
        layer.place = place
    return [layer.layer_number - 1 for layer in layers]


def rows_of(kept_NBR: torch.Tensor) -> torch.Tensor:
    """Positions in their sequences as rows of hidden states that are laid out [S x B, H]: int64 [N, R, B]."""
    batch = kept_NBR.shape[1]
    return kept_NBR.transpose(1, 2) * batch + torch.arange(batch, device=kept_NBR.device)


class _DropsTokens(TransformerLayer):
    """Hands the layer the kept tokens, and puts back what it makes of them."""

    place = 0  # of this layer in `context`

    def forward(
        self, hidden_states, attention_mask=None, context=None, context_mask=None, rotary_pos_emb=None, **rest
    ):
        """As core's; `context` is null, then nothing is dropped, or `rows_of` all dropping layers."""
        if context is None:
            return super().forward(
                hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, **rest
            )
        rows_RB = context[self.place]
        of_kept = {**rest, "attention_mask": None, "rotary_pos_emb": None}
        if attention_mask is not None:
            of_kept["attention_mask"] = _among(attention_mask, rows_RB // rows_RB.shape[1])
        if rotary_pos_emb is not None:
            table = rotary_pos_emb.flatten(1, 2).index_select(1, rows_RB.flatten())
            of_kept["rotary_pos_emb"] = table.unflatten(1, rows_RB.shape)

        def layer(kept_RBH: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, super(_DropsTokens, self).forward(kept_RBH, **of_kept)[0])

        if not self.config.sequence_parallel:
            return put_rows(hidden_states, layer(gather_rows(hidden_states, rows_RB)), rows_RB), context
        # The layer's input is split over the tensor ranks: each brings an equal share of the kept tokens.
        group = self.tp_group
        ranks, rank = group.size(), group.rank()
        whole_SBH = gather_from_sequence_parallel_region(hidden_states, group=group)
        mine_RBH = layer(gather_rows(whole_SBH, rows_RB.chunk(ranks)[rank]))
        made_RBH = gather_from_sequence_parallel_region(mine_RBH, group=group)
        # A copy: the schedule frees what a stage has sent, which a view does not allow.
        return put_rows(whole_SBH, made_RBH, rows_RB).chunk(ranks)[rank].clone(), context


def _among(mask: torch.Tensor, kept_RB: torch.Tensor) -> torch.Tensor:
    """Who among the kept may look at whom: bool [B, 1, S, S] to [B, 1, R, R]."""
    kept_BR = kept_RB.t()
    batch_B = torch.arange(kept_BR.shape[0], device=mask.device)[:, None, None]
    return mask[batch_B, 0, kept_BR[:, :, None], kept_BR[:, None, :]].unsqueeze(1)
