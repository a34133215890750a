"""The activation of a feed-forward layer, with the bias before it; `csrc/activation.cu`.

    gelu, relu, squared_relu     y = f(x + bias)                                    [..., F] -> [..., F]
    swiglu, geglu                y = f(first half) second half, of x + bias        [..., 2F] -> [..., F]

GELU by the error function (Hendrycks and Gimpel 2016), squared ReLU (So et al. 2021), gated units (Shazeer
2020). Written with plain operators, autograd keeps the activated gate and the product's operands beside the
input, and joins the two halves' gradients by a copy. Here only x is kept: backward computes the gate again
and writes both halves into place.

Floor: forward reads x and writes y; backward reads grad and x and writes grad_x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megafab.kernels.ops import chosen, define, dense

GATED = frozenset({"swiglu", "geglu"})


def activate(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation `kind` of x + bias."""
    return chosen("activation")(*dense(x, bias), kind)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return F.relu(x).square()


# Of a gated unit the function of its first half.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


# ---- reference ---------------------------------------------------------------------------------------------


def _squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return F.relu(x).mul_(2).mul_(grad)


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


_GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "relu": _relu_backward,
    "squared_relu": _squared_relu_backward,
    "swiglu": torch.ops.aten.silu_backward.grad_input,
    "geglu": torch.ops.aten.gelu_backward.grad_input,
}


def _activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if bias is not None:
        x = x + bias
    if kind not in GATED:
        return FUNCTIONS[kind](x)
    gate, linear = x.chunk(2, dim=-1)
    return FUNCTIONS[kind](gate).mul_(linear)


def _activation_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if bias is not None:
        x = x + bias
    if kind not in GATED:
        return _GRADIENTS[kind](grad, x)
    gate, linear = x.chunk(2, dim=-1)
    grad_x = torch.empty_like(x)
    grad_gate, grad_linear = grad_x.chunk(2, dim=-1)
    torch.mul(FUNCTIONS[kind](gate), grad, out=grad_linear)
    _GRADIENTS[kind](grad * linear, gate, grad_input=grad_gate)
    return grad_x


# ---- registration ------------------------------------------------------------------------------------------


def _activation_fake(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if kind in GATED else 1))


def _activation_backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x = ops.activation_backward(grad.contiguous(), x, bias, ctx.kind)
    asked = bias is not None and ctx.needs_input_grad[1]
    return grad_x, grad_x.flatten(0, -2).sum(0) if asked else None, None


define(
    "activation(Tensor x, Tensor? bias, str kind) -> Tensor", _activation, _activation_fake, _keep, _gradient
)
define(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, str kind) -> Tensor",
    _activation_backward,
    _activation_backward_fake,
)
