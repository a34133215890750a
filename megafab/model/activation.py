"""Gated units (Shazeer 2020) that keep one activation for backward.

Written with plain operators, autograd keeps the activated gate and the product's operands beside the
input, and joins the two halves' gradients by a copy. Here backward computes the gate again and writes
both halves into place.

Shapes: F width of the feed-forward layer on this tensor rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

_BACKWARD = {
    F.silu: torch.ops.aten.silu_backward.grad_input,
    F.gelu: torch.ops.aten.gelu_backward.grad_input,
}


class _Gated(torch.autograd.Function):
    """activation(first half) * second half: [..., 2F] -> [..., F]."""

    @staticmethod
    def forward(ctx, both: torch.Tensor, activation) -> torch.Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        gate, linear = both.chunk(2, dim=-1)
        return activation(gate).mul_(linear)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (both,) = ctx.saved_tensors
        gate, linear = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_linear = grad_both.chunk(2, dim=-1)
        torch.mul(ctx.activation(gate), grad, out=grad_linear)
        _BACKWARD[ctx.activation](grad * linear, gate, grad_input=grad_gate)
        return grad_both, None


class GatedUnit(torch.nn.Module):
    """SwiGLU or GeGLU, as `config.activation_func` says; takes the place of core's own in its MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation_func

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """[..., 2F] -> [..., F]."""
        return _Gated.apply(both, self.activation)
