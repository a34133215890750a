"""Cross-entropy over logits whose vocabulary is split over the tensor ranks, unreduced.

Shoeybi et al. 2019, section 3: a rank reduces its shard to a few numbers a token, and two small messages
join them over the ranks. No second tensor of the logits' size exists: their gradient takes their place
(`megafab/kernels/cross_entropy.py`). Where nothing but the nll is differentiated, by a gradient that is
known beforehand, loss and gradient are made in one go.

Shapes: N tokens, L sequence, B sequences, V vocabulary on this tensor rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megafab.kernels.cross_entropy import gradient_, nll_and_gradient_, scale_rows_, statistics
from megafab.kernels.ops import dense


class TokenLosses(NamedTuple):
    """What the logits come to for every token: fp32 [L, B], the same on all tensor ranks.

    Attributes:
        nll: the negative log-likelihood of the label, in nats.
        log_z: log of the softmax normaliser; None where only the nll was asked for.
        mean_logit: the mean of the logits over the vocabulary; None likewise.
    """

    nll: Tensor
    log_z: Tensor | None = None
    mean_logit: Tensor | None = None


def token_losses(
    logits_LBV: Tensor, labels_LB: Tensor, group: dist.ProcessGroup, *, expected: Tensor | None = None
) -> TokenLosses:
    """The losses of logits, each with gradient. Where one is wanted, it will take the place of the logits.

    Args:
        logits_LBV: this tensor rank's part of the vocabulary, rank order.
        labels_LB: global token ids.
        group: the tensor parallel group.
        expected: a scalar, the gradient that the nll of a token will most likely be given, never 0; another
            one costs time, no more. Only the nll is then handed out. None: nothing is known of it.
    """
    logits_NV, labels_N = logits_LBV.flatten(0, 1), labels_LB.flatten()
    if expected is not None and group.size() == 1 and torch.is_grad_enabled() and logits_LBV.requires_grad:
        return TokenLosses(_ExpectedNLL.apply(logits_NV, labels_N, expected).view(labels_LB.shape))
    losses = TokenLosses(*_Losses.apply(logits_NV, labels_N, group))
    return TokenLosses(*(value.view(labels_LB.shape) for value in losses if value is not None))


class _ExpectedNLL(torch.autograd.Function):
    """The nll over a whole vocabulary, and its gradient at once; mended where it is not as expected."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, expected: Tensor) -> Tensor:
        nll_N = nll_and_gradient_(logits_NV, labels_N, expected)
        ctx.save_for_backward(logits_NV, expected)
        return nll_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        gradient_NV, expected = ctx.saved_tensors
        gradient_NV = gradient_NV.detach()
        scale_rows_(gradient_NV, expected, grad_N.contiguous())
        return gradient_NV, None, None


class _Losses(torch.autograd.Function):
    """nll, log_z and the mean logit over a split vocabulary."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup):
        shard = logits_NV.shape[1]
        first = group.rank() * shard
        peak_N, *sums = statistics(logits_NV, labels_N, first)
        peak_N, total_N, *losses = joined(peak_N, *sums, vocabulary=shard * group.size(), group=group)
        ctx.save_for_backward(logits_NV, labels_N, peak_N, total_N)
        ctx.first, ctx.vocabulary = first, shard * group.size()
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    def backward(ctx, nll_N: Tensor | None, log_z_N: Tensor | None, mean_N: Tensor | None):
        logits_NV, labels_N, peak_N, total_N = ctx.saved_tensors
        logits_NV = logits_NV.detach()
        nll_N, log_z_N, mean_N = dense(nll_N, log_z_N, mean_N)
        gradient_(
            logits_NV,
            labels_N,
            ctx.first,
            peak_N,
            total_N,
            nll=nll_N,
            log_z=log_z_N,
            mean=mean_N,
            vocabulary=ctx.vocabulary,
        )
        return logits_NV, None, None


def joined(
    peak_N: Tensor,
    total_N: Tensor,
    target_N: Tensor,
    sum_N: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of shards as those of the whole vocabulary, by one maximum and one sum over the ranks.

    Args:
        peak_N, total_N, target_N, sum_N: of this rank's shard, from `kernels.cross_entropy.statistics`.
        vocabulary: over all ranks.
        group: the tensor parallel group.

    Returns: peak, total, nll, log_z and the mean logit of every token.
    """
    if group.size() > 1:
        own_N = peak_N.clone()
        dist.all_reduce(peak_N, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack((total_N * (own_N - peak_N).exp(), target_N, sum_N))
        dist.all_reduce(sums, group=group)
        total_N, target_N, sum_N = sums
    log_N = total_N.log()
    # The target comes off the peak, since peak + log(total) has lost digits where logits are large.
    return peak_N, total_N, log_N + (peak_N - target_N), peak_N + log_N, sum_N / vocabulary
