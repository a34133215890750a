"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), alone or of a sum; `csrc/norm.cu`.

    rstd = 1 / sqrt(mean(x^2) + eps)                          RMSNorm, where `bias` is None
    mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps)          LayerNorm
    y    = (x - mean) rstd weight + bias

All arithmetic is fp32; x, weight and the results have one type. `add_norm` normalises x + residual, rounded
to that type, and returns the sum too: the next residual.

Floor: forward reads x and writes y, with a residual two more; backward reads grad and x and writes grad_x.

Shapes: N rows, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define, dense, wide, wide_type


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of the last dimension, or LayerNorm where there is a bias: [..., C] -> [..., C]."""
    return chosen("norm")(*dense(x, weight, bias), eps)[0]


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm` of x + residual, and x + residual itself: both [..., C]."""
    y, total, *_ = chosen("add_norm")(*dense(x, residual, weight, bias), eps)
    return y, total


# ---- reference ---------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    columns, none = x.shape[-1], x.new_empty(0, dtype=wide_type(x))
    if bias is not None:
        y, mean, rstd = torch.native_layer_norm(wide(x), (columns,), wide(weight), wide(bias), eps)
        return y.to(x.dtype), mean.flatten(), rstd.flatten()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_type(x))
    rstd = norm.square_().div_(columns).add_(eps).rsqrt_()
    return (x * rstd).mul_(weight).to(x.dtype), none, rstd.flatten()


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    total = x + residual
    y, mean, rstd = _norm(total, weight, bias, eps)
    return y, total, mean, rstd


def _norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # LayerNorm's backward at mean 0 is RMSNorm's but for the row's mean of grad x weight x rstd, which it
    # takes off and is added again: about half the time of torch's own RMSNorm on a CPU.
    columns, scale = x.shape[-1], rstd.view(*x.shape[:-1], 1)
    grad, factor = wide(grad), wide(weight)
    middle = torch.zeros_like(scale) if mean is None else mean.view_as(scale)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, wide(x), (columns,), middle, scale, factor, factor, (True, True, mean is not None)
    )
    if not x.numel():  # which torch leaves without sums
        grad_bias = torch.zeros_like(weight)
    if mean is None:
        grad_x.add_(torch.mv(grad.reshape(-1, columns), factor).view_as(scale).mul_(scale).div_(columns))
        grad_bias = weight.new_empty(0)
    if grad_sum is not None:
        grad_x.add_(grad_sum)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


# ---- registration ------------------------------------------------------------------------------------------


def _statistics(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    kind = wide_type(x)
    return x.new_empty(rows if bias is not None else 0, dtype=kind), x.new_empty(rows, dtype=kind)


def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_statistics(x, bias)


def _add_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(x), *_statistics(x, bias)


def _norm_backward_fake(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, ...]:
    grad_bias = weight.new_empty(0) if mean is None else torch.empty_like(weight)
    return torch.empty_like(x), torch.empty_like(weight), grad_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, None if bias is None else mean, rstd)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, None if bias is None else mean, rstd)


def _gradient(ops: Any, ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = ops.norm_backward(grad.contiguous(), None, x, weight, mean, rstd)
    return grad_x, grad_weight, None if mean is None else grad_bias, None


def _sum_gradient(
    ops: Any, ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    grad_x, grad_weight, grad_bias = ops.norm_backward(*dense(grad, grad_sum), total, weight, mean, rstd)
    return grad_x, grad_x, grad_weight, None if mean is None else grad_bias, None


define(
    "norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    _norm,
    _norm_fake,
    _keep,
    _gradient,
)
define(
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    _add_norm,
    _add_norm_fake,
    _keep_sum,
    _sum_gradient,
)
define(
    "norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward,
    _norm_backward_fake,
)
