"""softmax(scale x scores) under a mask, for what no fused attention takes; `csrc/softmax.cu`.

fp32 arithmetic whatever the type of the scores. A row in which nothing may be seen is 0.

Floor: forward reads scores (and mask) and writes probabilities; backward reads grad and probabilities and
writes grad_scores.

Shapes: B sequences, H heads, L queries, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define, dense, wide


def masked_softmax(scores_BHLS: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """The probabilities [B, H, L, S].

    Args:
        scores_BHLS: products of queries and keys.
        mask: bool, true where a query may look; any of its first three dimensions may be 1.
        scale: multiplies the scores.
        causal: query l sees the keys up to S - L + l only.
    """
    return chosen("masked_softmax")(*dense(scores_BHLS, mask), scale, causal)


# ---- reference ---------------------------------------------------------------------------------------------


def _masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    queries, keys = scores.shape[-2:]
    values = wide(scores) * scale
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
        values = values.masked_fill(hidden, float("-inf"))
    if mask is not None:
        values = values.masked_fill(~mask, float("-inf"))
    return values.softmax(-1).nan_to_num(0.0).to(scores.dtype)


def _masked_softmax_backward(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    p, g = wide(probabilities), wide(grad)
    return (p * (g - (p * g).sum(-1, keepdim=True)) * scale).to(grad.dtype)


# ---- registration ------------------------------------------------------------------------------------------


def _masked_softmax_fake(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(scores)


def _masked_softmax_backward_fake(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    return torch.empty_like(probabilities)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[2]
    ctx.save_for_backward(output)


def _gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (probabilities,) = ctx.saved_tensors
    return ops.masked_softmax_backward(grad.contiguous(), probabilities, ctx.scale), None, None, None


define(
    "masked_softmax(Tensor scores, Tensor? mask, float scale, bool causal) -> Tensor",
    _masked_softmax,
    _masked_softmax_fake,
    _keep,
    _gradient,
)
define(
    "masked_softmax_backward(Tensor grad, Tensor probabilities, float scale) -> Tensor",
    _masked_softmax_backward,
    _masked_softmax_backward_fake,
)
