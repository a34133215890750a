"""Core's expert router, with auxiliary losses that weigh the same however a sequence is split.

Core scales its auxiliary losses by the tokens of this rank alone (`calculate_per_token_loss`), so that
splitting sequences over tensor (sequence parallel) or context ranks divides their weight. Here each
counts every token once at every topology.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Top-k routing with the load-balancing loss of Fedus et al. 2021 (eq. 4) and the z-loss of ST-MoE."""

    def attach_and_log_load_balancing_loss(
        self, activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, *args, **kwargs
    ):
        """As core's, for the tokens of all ranks that share these sequences."""
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss * reduce_group.size(),
            aux_loss_name,
            reduce_group,
            *args,
            **kwargs,
        )

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Adds weight x logsumexp(logits)^2 of every token (Zoph et al. 2022, eq. 5) to the gradient."""
        weight = self.config.moe_z_loss_coeff
        if weight is None or not self.training or not torch.is_grad_enabled():
            return logits
        return MoEAuxLossAutoScaler.apply(logits, weight * logits.logsumexp(dim=-1).square().sum())
