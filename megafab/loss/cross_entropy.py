"""Cross-entropy over logits whose vocabulary is split over the tensor ranks, unreduced.

One buffer of the logits' size holds their exponentials from forward to backward and becomes the gradient
there; torch's own cross-entropy allocates two. On a CPU the passes over it go block by block, so that all
but the first find their block in the cache.

Shapes: N tokens, L sequence, B sequences, V vocabulary on this tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

_BLOCK = 2**17  # logits; 512 KiB in fp32


class _VocabParallelNLL(torch.autograd.Function):
    """nll = logsumexp(logits) - logits[label] with two small reductions (Shoeybi et al. 2019, section 3)."""

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, labels_N: torch.Tensor, group) -> torch.Tensor:
        shard = logits_NV.shape[-1]
        first = group.rank() * shard
        exponentials_NV = torch.empty_like(logits_NV, dtype=torch.float32)
        peak_N1, total_N1 = exponentials_NV.new_empty(2, len(labels_N), 1)
        for rows in _blocks(logits_NV):
            # A CPU is slow at the maximum of bf16.
            values = logits_NV[rows].float() if logits_NV.device.type == "cpu" else logits_NV[rows]
            peak_N1[rows] = values.amax(dim=-1, keepdim=True)
        if group.size() > 1:
            dist.all_reduce(peak_N1, op=dist.ReduceOp.MAX, group=group)
        for rows in _blocks(logits_NV):
            torch.sub(logits_NV[rows], peak_N1[rows], out=exponentials_NV[rows])
            total_N1[rows] = exponentials_NV[rows].exp_().sum(dim=-1, keepdim=True)
        labels_N1 = labels_N.unsqueeze(-1)
        mine_N1 = (labels_N1 >= first) & (labels_N1 < first + shard)
        index_N1 = torch.where(mine_N1, labels_N1 - first, 0)
        target_N1 = torch.where(mine_N1, logits_NV.gather(-1, index_N1).float() - peak_N1, 0.0)
        if group.size() > 1:
            both = torch.stack((total_N1, target_N1))
            dist.all_reduce(both, group=group)
            total_N1, target_N1 = both
        ctx.save_for_backward(exponentials_NV, total_N1, index_N1, mine_N1)
        ctx.dtype = logits_NV.dtype
        return (total_N1.log() - target_N1).squeeze(-1)

    @staticmethod
    def backward(ctx, grad_N: torch.Tensor):
        exponentials_NV, total_N1, index_N1, mine_N1 = ctx.saved_tensors
        # (probability - 1 at the label) x grad, with the division by the total left to the one pass that
        # multiplies. A second backward over one forward is never asked for, so it may be done in place.
        exponentials_NV.scatter_add_(-1, index_N1, -torch.where(mine_N1, total_N1, 0.0))
        scale_N1 = grad_N.unsqueeze(-1) / total_N1
        if ctx.dtype is torch.float32:
            return exponentials_NV.mul_(scale_N1), None, None
        grad_NV = torch.empty_like(exponentials_NV, dtype=ctx.dtype)
        for rows in _blocks(grad_NV):
            grad_NV[rows] = exponentials_NV[rows].mul_(scale_N1[rows])
        return grad_NV, None, None


def _blocks(values_NV: torch.Tensor) -> Iterator[slice]:
    """Rows to take at a time: a cacheful on a CPU, all of them elsewhere."""
    rows, width = values_NV.shape
    step = max(1, _BLOCK // width) if values_NV.device.type == "cpu" else max(1, rows)
    return (slice(start, start + step) for start in range(0, rows, step))


def vocab_parallel_nll(
    logits_LBV: torch.Tensor, labels_LB: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Negative log-likelihood of every label in nats: fp32 [L, B].

    Args:
        logits_LBV: this tensor rank's part of the vocabulary, rank order.
        labels_LB: global token ids.
        group: the tensor parallel group.
    """
    nll_N = _VocabParallelNLL.apply(logits_LBV.flatten(0, 1), labels_LB.flatten(), group)
    return nll_N.view(labels_LB.shape)
