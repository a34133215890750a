"""Megafab's GPT: Megatron-core's GPTModel with position ids that restart, and the loss left to the caller.

Core's model returns either a finished loss or copied logits. Here the last stage hands out its shard of
the logits as they are, from which the engine and techniques make the loss.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megafab.model.rope import rope_table


class GPT(GPTModel):
    """A decoder-only transformer, or one pipeline chunk of it."""

    rope_base: float | None = None  # null: learned positions, added by core's embedding

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        hidden, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        table = None
        if self.rope_base is not None:
            dtype = self.config.params_dtype
            assert self.config.kv_channels is not None
            table = rope_table(position_ids, self.config.kv_channels, self.rope_base, dtype)
        return hidden, table, *rest

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Called by core where labels are given; the logits [L, B, vocabulary / tensor ranks] go through."""
        return logits
