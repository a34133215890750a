"""Operations on lists of tensors, one launch each: AdamW, sums of squares, masks; `csrc/multi_tensor.cu`.

    g = scale grad                                     AdamW (Loshchilov and Hutter 2019, algorithm 2), step t
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
    w <- (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

Lists may have any number of tensors, of any sizes and wherever they begin in memory, but each contiguous.
Arithmetic is fp32. Sums have one order, so that the same tensors give the same bits.

Floor in bytes an element: AdamW with fp32 gradients and bf16 copies 30, of which 14 are written; a sum of
squares reads each element once; a mask takes 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megafab.kernels.ops import chosen, define, wide_type


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """An AdamW step of all `weights`, in place.

    Args:
        weights: fp32; at least one.
        grads: of one type. Their values are not defined afterwards: the reference scales them in place.
        m, v: the moments, fp32.
        copies: of the weights, of one type: written in the same pass. Empty: there are none.
        scale: what gradients are multiplied by as they are read, fp32 of one value; None: 1.
        lr, beta1, beta2, eps, decay: as above.
        step: t, from 1.
    """
    chosen("adamw_")(weights, grads, m, v, copies, scale, lr, beta1, beta2, eps, decay, step)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, fp32, 0-d; not finite if one of them is not.

    Args:
        tensors: of one type; at least one.
    """
    return chosen("sum_of_squares")(tensors)


def mask_(values: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Multiply each of `values`, fp32, by the mask beside it, bool, in place: what is not finite stays so."""
    if values:
        chosen("mask_")(values, masks)


# ---- reference ---------------------------------------------------------------------------------------------


def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    copies: list[Tensor],
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    if grads[0].dtype is not weights[0].dtype:
        grads = [grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True)]
    if scale is not None:
        torch._foreach_mul_(grads, scale)  # pyright: ignore
    # Torch counts the step in a tensor of each weight.
    steps = torch.full((len(weights),), step - 1.0, device=weights[0].device).unbind()
    adamw(
        weights,
        grads,
        m,
        v,
        [],
        list(steps),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
    if copies:
        torch._foreach_copy_(copies, weights)  # pyright: ignore


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors, 2, wide_type(tensors[0]))  # pyright: ignore
    return torch.stack(norms).square_().sum()


def _mask(values: list[Tensor], masks: list[Tensor]) -> None:
    for value, mask in zip(values, masks, strict=True):
        value.mul_(mask)


# ---- registration ------------------------------------------------------------------------------------------


def _in_place(*_: object) -> None:
    """Results of other shapes there are none."""


def _sum_of_squares_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=wide_type(tensors[0]))


define(
    "adamw_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] m, Tensor(d!)[] v, Tensor(e!)[] copies,"
    " Tensor? scale, float lr, float beta1, float beta2, float eps, float decay, int step) -> ()",
    _adamw,
    _in_place,
)
define("sum_of_squares(Tensor[] tensors) -> Tensor", _sum_of_squares, _sum_of_squares_fake)
define("mask_(Tensor(a!)[] values, Tensor[] masks) -> ()", _mask, _in_place)
