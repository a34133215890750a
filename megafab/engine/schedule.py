"""The only caller of Megatron-core's forward/backward schedules: no pipelining, 1F1B, interleaved.

The loss of a micro-batch is handed to the schedule as a plain sum over its tokens and divided once, in
`grad_scale_func`, by the number of valid tokens of the whole step, which is known before the first
forward pass. Gradients are then sums over ranks, with no later scaling, equal at every topology; core
scales the experts' auxiliary losses by the same function.

Shapes: B sequences, L sequence on this context rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from megafab.engine.base import LossFunction
from megafab.loss.head import LossHead
from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms, gathered
from megafab.model.inputs import ModelInputs
from megafab.platform import platform
from megafab.run import Batch
from megafab.techniques.base import Clock
from megafab.topology.config import ContextMethod
from megafab.topology.groups import Groups


class Schedule:
    """Runs micro-batches through the model chunks of this rank.

    Args:
        chunks: the chunks as the engine wrapped them.
        transformer: core's configuration, shared by all chunks.
        groups: this rank's place.
        context_method: how sequences are split over context ranks.
        clock: told which micro-batch runs.
        head_chunk: tokens whose logits exist at a time; None: all.
        plain_loss: the loss is the nll alone, every token with the same weight: its gradient is then known
            before the forward pass.
        no_sync: by chunk, what to enter for all backward passes of a step but the last, so that only the
            last one reduces gradients as it goes; empty: nothing.
        finalize: reduces the gradients over the job, called when the last backward pass is done; None:
            core's reductions, for chunks in core's DDP.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        transformer: TransformerConfig,
        groups: Groups,
        context_method: ContextMethod,
        clock: Clock,
        *,
        head_chunk: int | None,
        plain_loss: bool,
        no_sync: Sequence[Callable[[], AbstractContextManager[None]]] = (),
        finalize: Callable[[], None] | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._groups = groups
        self._context_method, self._clock = context_method, clock
        self._forward_backward = get_forward_backward_func()
        self._head, self._plain_loss = LossHead(groups.tensor, head_chunk), plain_loss
        self._valid_tokens = torch.ones((), device=platform.device)
        if no_sync:
            # A list where there are several chunks, which core's annotation leaves out.
            transformer.no_sync_func = list(no_sync) if len(no_sync) > 1 else no_sync[0]  # pyright: ignore
        transformer.grad_scale_func = lambda loss: loss / self._valid_tokens
        transformer.finalize_model_grads_func = (
            (lambda *_, **__: finalize()) if finalize is not None else _finalize
        )

    def run(
        self,
        batch: Batch,
        micro_batch: int,
        loss: LossFunction,
        ledger: LossLedger,
        *,
        forward_only: bool,
        step_losses_M: torch.Tensor | None = None,
    ) -> LossLedger:
        """All micro-batches of `batch`, `micro_batch` rows at a time.

        Gradients stay in the chunks' buffers, reduced over the job. `step_losses_M` is from `row_losses`.

        Returns:
            `ledger`, with this rank's sums if it is one that counts the loss.
        """
        count = batch.tokens_BL.shape[0] // micro_batch
        if not forward_only:
            self._valid_tokens = self._count_valid_tokens(batch)

        def forward_step(data: Iterator[tuple[int, ModelInputs]], model: torch.nn.Module):
            self._clock.micro_batch, inputs = next(data)
            self._clock.samples = tuple(inputs.rows.sample_B.tolist())
            output = inputs.run(model, self._head.layer(inputs.labels_BL.t()))
            return output, lambda output: self._sum_loss(output, inputs, loss, ledger, step_losses_M)

        def micro_batches() -> Iterator[ModelInputs]:
            for start in range(0, count * micro_batch, micro_batch):
                rows = batch.rows(start, start + micro_batch)
                yield ModelInputs.of(rows, self._groups, self._context_method)

        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[enumerate(micro_batches()) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=count,
            seq_length=_rows(batch),
            micro_batch_size=micro_batch,
            forward_only=forward_only,
        )
        return ledger

    def row_losses(self, batch: Batch, micro_batch: int, ledger: LossLedger) -> torch.Tensor | None:
        """The mean nll of every row of the step on all data ranks, in sample order: `step_losses_M` of `run`.

        It costs a forward pass, and a message between the data ranks of the last stage. None on other stages.
        """
        losses: list[torch.Tensor] = []

        def collect(terms: LossTerms, rows: Batch) -> None:
            losses.append(terms.row_losses())

        self.run(batch, micro_batch, collect, ledger, forward_only=True)
        if not losses:
            return None
        mine = torch.stack(losses)  # [micro-batches, rows of one]
        if self._groups.data.size() > 1:
            mine = gathered(mine.unsqueeze(0), self._groups.data).transpose(0, 1)
        return mine.flatten()

    def _count_valid_tokens(self, batch: Batch) -> torch.Tensor:
        """Valid tokens of the step over all data ranks: a device scalar, no host sync."""
        mine = (batch.loss_mask_BL != 0).sum().float().to(platform.device, non_blocking=True)
        if self._groups.mesh.data > 1:
            dist.all_reduce(mine, group=self._groups.data)
        return mine.clamp_(min=1.0)

    def _sum_loss(
        self,
        output: torch.Tensor,
        inputs: ModelInputs,
        loss: LossFunction,
        ledger: LossLedger,
        step_losses_M: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """The micro-batch's loss for the schedule: (sum, a token count nobody reads, nothing to collect)."""
        # What `grad_scale_func` will make of the gradient 1.
        expected = torch.ones_like(self._valid_tokens) / self._valid_tokens if self._plain_loss else None
        losses = self._head.losses(output, inputs.labels_BL.t(), expected=expected)
        terms = LossTerms(
            nll_BL=losses.nll.t(),
            log_z_BL=None if losses.log_z is None else losses.log_z.t(),
            mean_logit_BL=None if losses.mean_logit is None else losses.mean_logit.t(),
            mask_BL=inputs.loss_mask_BL,
            domain_B=inputs.domain_B,
            context_group=self._groups.context,
            data_group=self._groups.data,
            step_losses_M=step_losses_M,
            micro_batch=self._clock.micro_batch,
        )
        loss(terms, inputs.rows)
        if self._groups.counts_loss:  # the other tensor ranks have the same sums
            ledger.record(terms)
        return terms.total(), torch.zeros((), dtype=torch.int, device=platform.device), {}


def _rows(batch: Batch) -> int:
    """The length of what stages send each other: a sequence with its neighbours (`model/retro.py`)."""
    length = batch.tokens_BL.shape[1]
    return length if batch.retrieved is None else length + batch.retrieved.tokens_BCKR[0].numel()


def _finalize(chunks, num_tokens=None, **kwargs) -> None:
    """Core's reductions without its division by the token count: `grad_scale_func` has divided already."""
    finalize_model_grads(chunks, None, **kwargs)
