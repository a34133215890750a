"""Lion: sign momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675).

    u = sign(beta1 m + (1 - beta1) g)
    w <- w - lr (u + weight_decay w)
    m <- beta2 m + (1 - beta2) g

One moment instead of AdamW's two and no epsilon. Every element moves by lr, whatever the size of its
gradient, which is why lr is 3 to 10 times smaller than AdamW's and the decay as much larger. An element
whose gradient has always been 0 does not move: sign(0) = 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """The update above on whole lists of tensors at a time; the moment m is `state[weight]["exp_avg"]`.

    Args:
        params: parameters or groups, which may have their own `lr` and `weight_decay`.
        lr: of every element's step.
        betas: beta1, beta2.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def start(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before the first update."""
        return {"exp_avg": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight].update(self.start(weight))
            moments = [self.state[weight]["exp_avg"] for weight in weights]
            if weights:
                gradients = [weight.grad for weight in weights]
                _step(weights, gradients, moments, group["lr"], group["betas"], group["weight_decay"])


def _step(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    updates = torch._foreach_lerp(moments, gradients, 1 - betas[0])  # pyright: ignore
    torch._foreach_sign_(updates)  # pyright: ignore
    torch._foreach_mul_(weights, 1 - lr * weight_decay)  # pyright: ignore
    torch._foreach_add_(weights, updates, alpha=-lr)  # pyright: ignore
    torch._foreach_lerp_(moments, gradients, 1 - betas[1])  # pyright: ignore
