"""The activation of Megatron-core's feed-forward layers, from the layer's spec."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megafab.kernels.activation import activate
from megafab.model.config import Activation


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return F.relu(x).square()


# What core's configuration is told, from which it takes the widths; it calls `ActivationUnit` instead.
FUNCTIONS = {
    Activation.gelu: F.gelu,
    Activation.relu: F.relu,
    Activation.squared_relu: squared_relu,
    Activation.swiglu: F.silu,
    Activation.geglu: F.gelu,
}


class ActivationUnit(torch.nn.Module):
    """The activation that `config.activation_func` and `config.gated_linear_unit` say."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        gated = (Activation.swiglu, Activation.geglu)
        (self.kind,) = (
            kind.value
            for kind, function in FUNCTIONS.items()
            if function is config.activation_func and (kind in gated) is config.gated_linear_unit
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., F] to [..., F], or [..., 2F] to [..., F] of a gated unit."""
        return activate(x, bias, self.kind)
