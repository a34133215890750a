"""Rotary position embedding (Su et al. 2021) by position id; `csrc/rope.cu`.

    (first half, second half) of a head  ->  (first cos - second sin, second cos + first sin)

The table of angles has a row for every token, so that packed documents restart at 0. Nothing else is kept for
backward, which turns back.

Floor: reads and writes queries and keys once.

Shapes: L sequence, B sequences, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define


def rope_table(position_BL: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """cos and sin of every position, stacked: [2, L, B, 1, D/2]. One tensor, because activation
    recomputation passes tensors on by position."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device).double() / head_dim)
    angle = position_BL.t().unsqueeze(-1).unsqueeze(-1).double() * frequency
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def rotate(x_LBHD: Tensor, table: Tensor) -> Tensor:
    """Queries or keys turned by the angles of `rope_table`, whose B may be 1."""
    return chosen("rope")(x_LBHD, None, table, False)[0]


def rotate_both(query_LBHD: Tensor, key_LBHD: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of the same tokens, turned at once; the results lie in memory as [B, H, L, D]."""
    return chosen("rope")(query_LBHD, key_LBHD, table, False)


def rotate_both_(query_LBHD: Tensor, key_LBHD: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate_both`, in place, which spares a copy of both until backward.

    They may be parts of one tensor, and must not be needed as they were.
    """
    return _InPlace.apply(query_LBHD, key_LBHD, table)  # pyright: ignore


class _InPlace(torch.autograd.Function):
    """Turns its arguments and hands them on, without telling autograd: it refuses to hear that parts of one
    tensor have changed. That is sound where nothing has kept them for backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(table)
        chosen("rope_")(query.data, key.data, table, False)  # of `data` autograd does not count the changes
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None]:
        (table,) = ctx.saved_tensors
        return *chosen("rope")(*_dense_heads(grad_query, grad_key), table, True), None


def _dense_heads(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


# ---- reference ---------------------------------------------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)
    return out


def _empty(x: Tensor, back: bool) -> Tensor:
    """As attention reads fastest, [B, H, L, D] in memory; gradients as they go on, [L, B, H, D]."""
    length, batch, heads, dim = x.shape
    return x.new_empty(x.shape) if back else x.new_empty(batch, heads, length, dim).permute(2, 0, 1, 3)


def _rope(q: Tensor, k: Tensor | None, table: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    cos, sin = table[0], -table[1] if back else table[1]
    turned = _turn(q, cos, sin, _empty(q, back))
    return turned, q.new_empty(0) if k is None else _turn(k, cos, sin, _empty(k, back))


def _rope_(q: Tensor, k: Tensor | None, table: Tensor, back: bool) -> None:
    q_turned, k_turned = _rope(q, k, table, back)
    q.copy_(q_turned)
    if k is not None:
        k.copy_(k_turned)


# ---- registration ------------------------------------------------------------------------------------------


def _rope_fake(q: Tensor, k: Tensor | None, table: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return _empty(q, back), q.new_empty(0) if k is None else _empty(k, back)


def _rope_fake_(q: Tensor, k: Tensor | None, table: Tensor, back: bool) -> None:
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, table, ctx.back = inputs
    ctx.sizes = inputs[0].shape, None if k is None else k.shape
    ctx.save_for_backward(table)


def _gradient(ops: Any, ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    (table,) = ctx.saved_tensors
    sizes_q, sizes_k = ctx.sizes
    grad_q = table.new_zeros(sizes_q) if grad_q is None else grad_q
    if sizes_k is not None and grad_k is None:
        grad_k = table.new_zeros(sizes_k)
    given = _dense_heads(grad_q, None if sizes_k is None else grad_k)
    turned_q, turned_k = ops.rope(*given, table, not ctx.back)
    return turned_q, None if sizes_k is None else turned_k, None, None


define(
    "rope(Tensor q, Tensor? k, Tensor table, bool back) -> (Tensor, Tensor)",
    _rope,
    _rope_fake,
    _keep,
    _gradient,
)
define("rope_(Tensor(a!) q, Tensor(b!)? k, Tensor table, bool back) -> ()", _rope_, _rope_fake_)
