"""From a host micro-batch to what the model is called with on this rank.

Shapes: B sequences, S whole sequence, L this context rank's part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megafab.model.attention import attention_mask, context_positions
from megafab.model.gpt import Head
from megafab.model.retro import retrieval_mask
from megafab.platform import platform
from megafab.run import Batch, Retrieved
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One micro-batch on the device; every tensor but the mask covers this context rank's positions only."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    loss_mask_BL: torch.Tensor
    position_BL: torch.Tensor
    attention_mask: torch.Tensor | None
    retrieved: Retrieved | None
    retrieval_mask: torch.Tensor | None
    domain_B: torch.Tensor
    rows: Batch  # the host micro-batch, this context rank's positions

    @staticmethod
    def of(rows: Batch, groups: Groups, method: ContextMethod) -> ModelInputs:
        """Slice, move to the device and build the masks of documents and neighbours there."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(platform.device, non_blocking=True)

        ranks = groups.mesh.context
        document_BS, rows_L = rows.document_BL, None
        if ranks > 1:
            length, rank = rows.tokens_BL.shape[1], groups.mesh.context_rank(groups.rank)
            positions_L = context_positions(length, method, ranks, rank)
            rows = rows.positions(positions_L)
            # Under Ulysses attention sees whole sequences; under all-gather only this rank's queries.
            rows_L = positions_L if method is ContextMethod.allgather else None
        # Decided on the host, so that nothing waits for the device; None is plain causal attention.
        one_document = bool((document_BS[:, -1] == document_BS[:, 0]).all())
        mask = None
        if rows_L is not None or not one_document:
            mask = attention_mask(move(document_BS), None if rows_L is None else move(rows_L))

        retrieved = retrieval = None
        if rows.retrieved is not None:
            retrieved = Retrieved(move(rows.retrieved.tokens_BCKR), move(rows.retrieved.length_BCK))
            retrieval = retrieval_mask(move(document_BS), retrieved)
        return ModelInputs(
            tokens_BL=move(rows.tokens_BL),
            labels_BL=move(rows.labels_BL),
            loss_mask_BL=move(rows.loss_mask_BL),
            position_BL=move(rows.position_BL),
            attention_mask=mask,
            retrieved=retrieved,
            retrieval_mask=retrieval,
            domain_B=move(rows.domain_B),
            rows=rows,
        )

    def run(self, model: torch.nn.Module, head: Head | None = None) -> torch.Tensor:
        """What a model chunk makes of them: hidden states, or logits [L, B, vocabulary / tensor ranks].

        Args:
            model: the chunk.
            head: makes of the last hidden states what the last chunk hands out; None: logits.
        """
        retrieval = {}
        if self.retrieved is not None:
            retrieval = {"retrieved": self.retrieved, "retrieval_mask": self.retrieval_mask}
        return model(
            self.tokens_BL,
            self.position_BL,
            self.attention_mask,
            labels=self.labels_BL,
            head=head,
            **retrieval,
        )
