"""Optimizers that update every element on its own, and so survive any cut of the parameters into ranges.

Both engines shard these: Megatron's distributed optimizer and every stage of ZeRO hand them flat ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megafab.optim.config import OptimConfig, OptimName
from megafab.optim.lion import Lion

# By optimizer: the name of each moment in checkpoints, and in `optimizer.state`.
MOMENTS: Mapping[OptimName, Mapping[str, str]] = {
    OptimName.adamw: {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"},
    OptimName.lion: {"lion_m": "exp_avg"},
}


def make(config: OptimConfig, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The elementwise optimizer of `config` over `param_groups`: Lion, or else AdamW.

    Torch's fused AdamW whatever else is installed: one pass over memory on CPU and GPU, and one layout of
    state in checkpoints.
    """
    betas = (config.beta1, config.beta2)
    if config.name is OptimName.lion:
        return Lion(param_groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    assert config.eps is not None
    return torch.optim.AdamW(
        param_groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def prime(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Create the moments of `parameters` now, so that they can be saved and loaded before the first step."""
    for parameter in parameters:
        state = {"exp_avg": torch.zeros_like(parameter)}
        if isinstance(optimizer, torch.optim.AdamW):
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = state


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the count from which AdamW's bias corrections follow; Lion has none.

    Each parameter has its own counter: one shared tensor would be advanced once per parameter.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(updates)
