"""What ends a block of a layer: y = residual + dropout(x + bias); `csrc/dropout.cu`.

No mask is kept. Element i is dropped where word i mod 4 of Philox4x32-7 (Salmon et al. 2011) at counter
i // 4, keyed by the seed, is below p 2^32; backward makes the same numbers again. The seed is drawn from
torch's generator, where core's forks and recomputation have put it into the right state.

Floor: forward reads x and the residual and writes y; backward reads grad and writes grad_x, or nothing where
nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define, dense


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, *, training: bool) -> Tensor:
    """residual + dropout(x + bias), of [..., C] with a bias [C]; `p` is the share that training drops."""
    seed = None
    if training and p > 0:
        seed = torch.empty((), dtype=torch.int64, device=x.device).random_()
    return chosen("dropout")(*dense(x, bias, residual), p if training else 0.0, seed)


# ---- reference ---------------------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, count: int) -> Tensor:
    """The random words of elements 0 to count - 1: int64 [count], each below 2^32.

    64-bit products wrap around, which leaves both 32-bit halves as they are.
    """
    groups = -(-count // 4)
    counter = torch.arange(groups, device=seed.device)
    words = [counter & _LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key_0, key_1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((right >> 32) & _LOW) ^ words[1] ^ key_0,
            right & _LOW,
            ((left >> 32) & _LOW) ^ words[3] ^ key_1,
            left & _LOW,
        ]
        key_0, key_1 = (key_0 + 0x9E3779B9) & _LOW, (key_1 + 0xBB67AE85) & _LOW
    return torch.stack(words, dim=1).flatten()[:count]


def _kept(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return (philox(seed, x.numel()) >= int(p * 2**32)).view(x.shape)


def _dropout(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if bias is not None:
        x = x + bias
    if seed is not None:
        x = torch.where(_kept(x, p, seed), x * (1 / (1 - p)), 0.0)
    return residual + x


def _dropout_backward(grad: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.where(_kept(grad, p, seed), grad * (1 / (1 - p)), 0.0)


# ---- registration ------------------------------------------------------------------------------------------


def _dropout_fake(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _dropout_backward_fake(grad: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.p, seed = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(seed)


def _gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    grad_x = grad if seed is None else ops.dropout_backward(grad.contiguous(), ctx.p, seed)
    asked = ctx.has_bias and ctx.needs_input_grad[1]
    return grad_x, grad_x.flatten(0, -2).sum(0) if asked else None, grad, None, None


define(
    "dropout(Tensor x, Tensor? bias, Tensor? residual, float p, Tensor? seed) -> Tensor",
    _dropout,
    _dropout_fake,
    _keep,
    _gradient,
)
define(
    "dropout_backward(Tensor grad, float p, Tensor seed) -> Tensor", _dropout_backward, _dropout_backward_fake
)
