"""AdamW: decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), all weights in one pass.

The update is in `kernels/multi_tensor.py`. State as torch's AdamW has it: `exp_avg`, `exp_avg_sq` and `step`,
which is on the host, where the bias corrections are computed, so that nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megafab.kernels.multi_tensor import adamw_


class AdamW(torch.optim.Optimizer):
    """Updates fp32 weights, each with the gradient in `grad`, whose values are not defined afterwards.

    Args:
        params: parameters or groups, which may have their own `lr` and `weight_decay`.
        lr: learning rate.
        betas: beta1, beta2.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Attributes:
        scale: what the next steps multiply gradients by as they read them.
        copies: by weight, its copy in bf16 or fp16, written in the same pass; of some weights, or none.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.scale = 1.0
        self.copies: dict[torch.Tensor, torch.Tensor] = {}

    @staticmethod
    def start(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before the first update."""
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        return {**moments, "step": torch.zeros(())}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, bool], list[torch.Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state.update(self.start(weight))
                    state["step"] += 1
                    alike.setdefault((int(state["step"]), weight in self.copies), []).append(weight)
            for (step, copied), weights in alike.items():
                self._update(group, weights, step, copied)

    def _update(self, group: dict[str, Any], weights: list[torch.Tensor], step: int, copied: bool) -> None:
        beta1, beta2 = group["betas"]
        adamw_(
            weights,
            [grad for weight in weights if (grad := weight.grad) is not None],
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            [self.copies[weight] for weight in weights] if copied else [],
            scale=None if self.scale == 1.0 else weights[0].new_full((), self.scale),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay=group["weight_decay"],
            step=step,
        )
