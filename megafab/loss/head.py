"""From what the last stage hands out to the losses of its tokens: by whole logits, or by chunks of them.

By chunks (`train.head_chunk`) the logits of a chunk of tokens exist at a time: forward keeps a few numbers of
each token, backward computes the chunk's logits again and puts their gradient in their place. It costs one
more product with the output matrix and saves all but the chunk's logits (cut cross-entropy: Wijmans et al.
2024, arXiv 2411.09009, does the same tile by tile inside one kernel).

Shapes: N tokens, H hidden, L sequence, B sequences, V vocabulary on this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megafab.kernels.cross_entropy import gradient_, statistics
from megafab.loss.cross_entropy import TokenLosses, joined, token_losses


@dataclass(frozen=True, slots=True)
class LossHead:
    """The end of a model: `layer` goes into its last stage, `losses` takes what comes out.

    Attributes:
        group: the ranks that share the vocabulary.
        chunk: tokens whose logits exist at a time; None: all, as the stage hands them out.
    """

    group: dist.ProcessGroup
    chunk: int | None = None

    def layer(self, labels_LB: Tensor) -> Callable[[Tensor, Tensor, bool], Tensor] | None:
        """What the last stage is to do with its hidden states (`model.gpt.Head`); None: hand out logits."""
        chunk = self.chunk
        if chunk is None:
            return None

        def losses(hidden_LBH: Tensor, weight_VH: Tensor, sequence_parallel: bool) -> Tensor:
            if sequence_parallel:
                hidden_LBH = gather_from_sequence_parallel_region(hidden_LBH, group=self.group)
            else:
                hidden_LBH = copy_to_tensor_model_parallel_region(hidden_LBH, group=self.group)
            hidden_NH, labels_N = hidden_LBH.flatten(0, 1), labels_LB.flatten()
            losses_3N = _LinearLosses.apply(hidden_NH, weight_VH, labels_N, self.group, chunk)
            return losses_3N.view(3, *labels_LB.shape)

        return losses

    def losses(self, output: Tensor, labels_LB: Tensor, *, expected: Tensor | None = None) -> TokenLosses:
        """The losses of all tokens.

        Args:
            output: what the last stage handed out.
            labels_LB: global token ids.
            expected: the gradient of each nll, as for `token_losses`.
        """
        if self.chunk is None:
            return token_losses(output, labels_LB, self.group, expected=expected)
        return TokenLosses(*output.unbind())


class _LinearLosses(torch.autograd.Function):
    """nll, log_z and mean logit [3, N] of hidden x weight^T over a split vocabulary."""

    @staticmethod
    def forward(
        ctx, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, group: dist.ProcessGroup, chunk: int
    ) -> Tensor:
        first, vocabulary = group.rank() * len(weight_VH), group.size() * len(weight_VH)
        parts = [
            statistics(logits, labels_N[tokens], first)
            for tokens, logits in _logits(hidden_NH, weight_VH, chunk)
        ]
        sums = (torch.cat(part) for part in zip(*parts, strict=True))
        peak_N, total_N, *losses = joined(*sums, vocabulary=vocabulary, group=group)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, peak_N, total_N)
        ctx.chunk, ctx.first, ctx.vocabulary = chunk, first, vocabulary
        return torch.stack(losses)

    @staticmethod
    def backward(ctx, grad_3N: Tensor):
        hidden_NH, weight_VH, labels_N, peak_N, total_N = ctx.saved_tensors
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # In fp32: one rounding at the end, not one a chunk.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for tokens, logits in _logits(hidden_NH, weight_VH, ctx.chunk):
            nll, log_z, mean = grad_3N[:, tokens]
            gradient_(
                logits,
                labels_N[tokens],
                ctx.first,
                peak_N[tokens],
                total_N[tokens],
                nll=nll,
                log_z=log_z,
                mean=mean,
                vocabulary=ctx.vocabulary,
            )
            torch.mm(logits, weight_VH, out=grad_hidden_NH[tokens])
            if grad_weight_VH is None:
                continue
            if logits.dtype is torch.float32:
                grad_weight_VH.addmm_(logits.t(), hidden_NH[tokens])
            else:
                grad_weight_VH.add_(logits.t() @ hidden_NH[tokens])
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None, None


def _logits(hidden_NH: Tensor, weight_VH: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Tokens and their logits, a chunk at a time; the next chunk's take their place."""
    count = len(hidden_NH)
    room = hidden_NH.new_empty(min(chunk, count), len(weight_VH))
    for start in range(0, count, chunk):
        tokens = slice(start, min(start + chunk, count))
        logits = room[: tokens.stop - start]
        torch.mm(hidden_NH[tokens], weight_VH.t(), out=logits)
        yield tokens, logits
