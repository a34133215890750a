"""Megafab's GPT: Megatron-core's GPTModel with position ids that restart, and the loss left to the caller.

Core's model returns either a finished loss or copied logits. Here the last stage hands out its shard of
the logits as they are, from which the engine and techniques make the loss, or what a `Head` makes of the
hidden states in the place of logits. What was retrieved goes to the layers as their `context` (`retro.py`).

Shapes: B sequences, C chunks of a sequence, K neighbours of a chunk, R their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megafab.kernels.rope import rope_table
from megafab.run import Retrieved

# From hidden states [L, B, H] (this rank's part of L if the third argument is true: sequence parallelism) and
# this rank's rows of the output matrix to what the last stage hands out.
Head = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


class OutputLayer(ColumnParallelLinear):
    """The product with the output matrix, or what `head` does with the two.

    Either way within this module's forward, around which ZeRO 3 gathers the matrix.
    """

    head: Head | None = None

    def _forward_impl(self, input, weight, *args, **kwargs):
        if self.head is None:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return self.head(input, weight, self.sequence_parallel)


class GPT(GPTModel):
    """A decoder-only transformer, or one pipeline chunk of it."""

    rope_base: float | None = None  # null: learned positions, added by core's embedding

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # core takes no spec for it

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: Any,
        *args,
        retrieved: Retrieved | None = None,
        retrieval_mask: torch.Tensor | None = None,
        head: Head | None = None,
        **kwargs,
    ):
        """As core's, with a head, the neighbours of each chunk and `retro.retrieval_mask`; null: without."""
        if self.post_process:
            cast(OutputLayer, self.output_layer).head = head
        if retrieved is not None:
            kwargs["extra_block_kwargs"] = {
                "context": self._embed(retrieved.tokens_BCKR) if self.pre_process else None,
                "context_mask": retrieval_mask,
            }
        return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)

    def _embed(self, tokens_BCKR: torch.Tensor) -> torch.Tensor:
        """The embeddings of neighbours, of which each is a sequence by itself: [R, C x K x B, H]."""
        ids_NR = tokens_BCKR.permute(1, 2, 0, 3).flatten(0, 2)
        position_NR = torch.arange(ids_NR.shape[1], device=ids_NR.device).expand_as(ids_NR)
        return self.embedding(input_ids=ids_NR, position_ids=position_NR)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        hidden, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        table = None
        if self.rope_base is not None:
            dtype = self.config.params_dtype
            assert self.config.kv_channels is not None
            table = rope_table(position_ids, self.config.kv_channels, self.rope_base, dtype)
        return hidden, table, *rest

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Called by core where labels are given; the logits, or what `head` made, go through."""
        return logits
