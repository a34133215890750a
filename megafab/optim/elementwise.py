"""Optimizers that update every element on its own, and so survive any cut of the parameters into ranges.

Both engines shard these: Megatron's distributed optimizer and every stage of ZeRO hand them flat ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megafab.optim.adamw import AdamW
from megafab.optim.config import OptimConfig, OptimName
from megafab.optim.lion import Lion

# By optimizer: the name of each moment in checkpoints, and in `optimizer.state`.
MOMENTS: Mapping[OptimName, Mapping[str, str]] = {
    OptimName.adamw: {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"},
    OptimName.lion: {"lion_m": "exp_avg"},
}


def make(config: OptimConfig, param_groups: list[dict[str, Any]]) -> AdamW | Lion:
    """The elementwise optimizer of `config` over `param_groups`: Lion, or else AdamW."""
    betas = (config.beta1, config.beta2)
    if config.name is OptimName.lion:
        return Lion(param_groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    assert config.eps is not None
    return AdamW(param_groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)


def prime(optimizer: AdamW | Lion, parameters: Iterable[torch.Tensor]) -> None:
    """Create the moments of `parameters` now, so that they can be saved and loaded before the first step."""
    for parameter in parameters:
        optimizer.state[parameter] = optimizer.start(parameter)


def scale(optimizer: AdamW | Lion, gradients: Sequence[torch.Tensor], by: float) -> None:
    """Have the next step see gradients times `by`: AdamW multiplies as it reads them, others now.

    Args:
        optimizer: of all that have these gradients.
        gradients: whose values are not defined after the step.
        by: for this step alone; it has to be said before each.
    """
    if isinstance(optimizer, AdamW):
        optimizer.scale = by
    elif by != 1.0 and gradients:
        torch._foreach_mul_(list(gradients), by)  # pyright: ignore


def set_updates(optimizer: AdamW | Lion, updates: int) -> None:
    """Set the count from which AdamW's bias corrections follow; Lion has none.

    Each parameter has its own counter: one shared tensor would be advanced once per parameter.
    """
    if isinstance(optimizer, AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(updates)
