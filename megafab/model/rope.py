"""Rotary position embedding (Su et al. 2021) by position id, so that packed documents restart at 0.

Shapes: L sequence, B sequences, H heads, D head size.
"""

from __future__ import annotations

import torch


def rope_table(position_BL: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """cos and sin of every position, stacked: [2, L, B, 1, D/2]. One tensor, because activation
    recomputation passes tensors on by position."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device).double() / head_dim)
    angle = position_BL.t().unsqueeze(-1).unsqueeze(-1).double() * frequency
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


class _Rotate(torch.autograd.Function):
    """Turns (first half, second half) of the head by the angle; backward turns back. Saves no activation.

    The result lies in memory as [B, H, L, D], which attention kernels read fastest.
    """

    @staticmethod
    def forward(ctx, x_LBHD: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(table)
        length, batch, heads, dim = x_LBHD.shape
        out = torch.empty(batch, heads, length, dim, dtype=x_LBHD.dtype, device=x_LBHD.device)
        return _turn(x_LBHD, table[0], table[1], out.permute(2, 0, 1, 3))

    @staticmethod
    def backward(ctx, grad_LBHD: torch.Tensor):
        (table,) = ctx.saved_tensors
        out = torch.empty(grad_LBHD.shape, dtype=grad_LBHD.dtype, device=grad_LBHD.device)
        return _turn(grad_LBHD, table[0], -table[1], out), None


def _turn(x_LBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    first, second = x_LBHD.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)
    return out


def apply_rope(x_LBHD: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by the angles of `rope_table`."""
    return _Rotate.apply(x_LBHD, table)
