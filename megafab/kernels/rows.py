"""Rows of hidden states taken out, and put back; `csrc/rows.cu`.

Floor: taking R rows out reads and writes them, its backward writes the gradient of all S; putting them back
writes S rows and reads as many, and so does its backward, which writes R more.

Shapes: x is [..., H], S rows of H where they are counted; `rows` is int64 [...], of R numbers from 0 to
S - 1, no two alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define, dense


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows: [*rows.shape, H]."""
    return chosen("gather_rows")(*dense(x, rows))


def put_rows(x: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """`x` with the given rows replaced by `new`, [*rows.shape, H]: a new tensor like `x`, and not a view."""
    return chosen("put_rows")(*dense(x, new, rows))


# ---- reference ---------------------------------------------------------------------------------------------


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    return _flat(x).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def _put(x: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    out = x.clone()
    _flat(out).index_copy_(0, rows.flatten(), _flat(new))
    return out


def _gather_backward(grad: Tensor, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    grad_x = grad.new_zeros(sizes)
    _flat(grad_x).index_copy_(0, rows.flatten(), _flat(grad))
    return grad_x


def _put_backward(grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = grad.clone()
    _flat(grad_x).index_fill_(0, rows.flatten(), 0)
    return grad_x, _gather(grad, rows)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


# ---- registration ------------------------------------------------------------------------------------------


def _gather_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(*rows.shape, x.shape[-1])


def _put_fake(x: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gather_backward_fake(grad: Tensor, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    return grad.new_empty(sizes)


def _put_backward_fake(grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), _gather_fake(grad, rows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.sizes = x.shape


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[-1])


def _gather_gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rows,) = ctx.saved_tensors
    return ops.gather_rows_backward(grad.contiguous(), rows, ctx.sizes), None


def _put_gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rows,) = ctx.saved_tensors
    return *ops.put_rows_backward(grad.contiguous(), rows), None


define("gather_rows(Tensor x, Tensor rows) -> Tensor", _gather, _gather_fake, _keep, _gather_gradient)
define("put_rows(Tensor x, Tensor new, Tensor rows) -> Tensor", _put, _put_fake, _keep_rows, _put_gradient)
define(
    "gather_rows_backward(Tensor grad, Tensor rows, SymInt[] sizes) -> Tensor",
    _gather_backward,
    _gather_backward_fake,
)
define(
    "put_rows_backward(Tensor grad, Tensor rows) -> (Tensor grad_x, Tensor grad_new)",
    _put_backward,
    _put_backward_fake,
)
