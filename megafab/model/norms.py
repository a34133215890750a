"""LayerNorm and RMSNorm for Megatron-core's layer specs.

Core's own wrapper around torch's norms refuses sequence parallelism; these weights carry the mark that
tells Megatron to add their gradients up over the tensor ranks, which is all it needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


class _RMSNorm(torch.autograd.Function):
    """RMSNorm from the kernels that a CPU has, in about half the time of torch's own.

    LayerNorm's fused backward at mean 0 is RMSNorm's but for the row's mean of grad x weight / rms, which
    it takes off and is added again. Only the input and a number a row are kept.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        hidden, weight, scale = ctx.saved_tensors
        size, grad, weight = hidden.shape[-1], grad.float(), weight.float()
        grad_hidden, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, hidden.float(), (size,), torch.zeros_like(scale), scale, weight, None, (True, True, False)
        )
        row_mean = torch.mv(grad.flatten(0, -2), weight).view(scale.shape).mul_(scale).div_(size)
        return grad_hidden.add_(row_mean).to(hidden.dtype), grad_weight.to(hidden.dtype), None


class Norm(torch.nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), as `config.normalization` says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            setattr(self.bias, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        else:
            self.register_parameter("bias", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        if self.bias is None and hidden.device.type == "cpu":
            return _RMSNorm.apply(hidden, self.weight, self.eps)
        if self.bias is None:
            return F.rms_norm(hidden, self.shape, self.weight, self.eps)
        return F.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)
