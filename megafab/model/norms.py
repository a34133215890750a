"""LayerNorm and RMSNorm for Megatron-core's layer specs.

Core's own wrapper around torch's norms refuses sequence parallelism; these weights carry the mark that
tells Megatron to add their gradients up over the tensor ranks, which is all it needs.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megafab.kernels.norm import add_norm, norm


class Norm(torch.nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), as `config.normalization` says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            setattr(self.bias, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        else:
            self.register_parameter("bias", None)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise the last dimension; with a residual, of the sum, which is returned too."""
        if residual is None:
            return norm(hidden, self.weight, self.bias, self.eps)
        return add_norm(hidden, residual, self.weight, self.bias, self.eps)
