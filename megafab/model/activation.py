"""The activation of Megatron-core's feed-forward layers, from the layer's spec."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megafab.kernels.activation import FUNCTIONS, GATED, activate


class ActivationUnit(torch.nn.Module):
    """The activation that `config.activation_func` and `config.gated_linear_unit` say."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        (self.kind,) = (
            kind
            for kind, function in FUNCTIONS.items()
            if function is config.activation_func and (kind in GATED) is config.gated_linear_unit
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., F] to [..., F], or [..., 2F] to [..., F] of a gated unit."""
        return activate(x, bias, self.kind)
