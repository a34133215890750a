"""Core's transformer layer and feed-forward layer, with what lies between matrix products in fused kernels.

- What ends attention, `residual + output`, is added in the norm that follows: the sum crosses memory once
  less. Where a bias or dropout comes in between, or cross-attention follows, the two are apart.
- The activation takes the bias of the first product.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megafab.kernels.dropout import bias_dropout_add
from megafab.model.activation import ActivationUnit


def get_bias_dropout_add(training: bool, fused: bool) -> Any:
    """What core's layer calls after a block: `((x, bias), residual, p)` to `residual + dropout(x + bias)`."""

    def add(x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, p: float):
        x, bias = x_and_bias
        return bias_dropout_add(x, bias, residual, p, training=training)

    return add


class Layer(TransformerLayer):
    """Core's layer; the addition after attention is in the norm that follows, where nothing is between."""

    _normed: torch.Tensor | None = None

    def _forward_attention(self, *args: Any, **kwargs: Any):
        apart = (
            self.config.add_bias_linear
            or (self.training and self.hidden_dropout > 0)
            or not isinstance(self.cross_attention, IdentityOp)
        )
        self.self_attn_bda = get_bias_dropout_add if apart else self._add_and_norm
        return super()._forward_attention(*args, **kwargs)

    def _add_and_norm(self, training: bool, fused: bool) -> Any:
        def add(x_and_bias: tuple[torch.Tensor, None], residual: torch.Tensor, p: float) -> torch.Tensor:
            self._normed, total = self.pre_mlp_layernorm(x_and_bias[0], residual)
            return total

        return add

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed, self._normed = self._normed, None
        return super()._forward_pre_mlp_layernorm(hidden_states) if normed is None else normed


class FeedForward(MLP):
    """Core's feed-forward layer with the bias of its first product in the activation."""

    def __init__(self, config: TransformerConfig, tp_group: Any = None) -> None:
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, parts, tp_group=tp_group)
        self.activation_func = ActivationUnit(config)

    def forward(self, hidden_states: torch.Tensor, per_token_scale: None = None, **_: Any):
        """[L, B, H] to [L, B, H] and the bias that is still to be added, or None."""
        assert per_token_scale is None, "experts are core's own"
        middle, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activation_func(middle, bias))
