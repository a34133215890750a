"""A model's sizes worked out: defaults filled in, parameters and FLOPs counted. Pure arithmetic, no torch.

FLOP rule, printed wherever MFU is: a multiply-add is 2 FLOPs; every weight matrix counts 2 per token in
the forward pass and 4 in the backward pass; attention counts its two matrix products over the full
L x L square (not the causal half), as in Narayanan et al. 2021, eq. 3, and Chowdhery et al. 2022,
appendix B. The embedding look-up, norms and element-wise work are not counted. Model FLOPs leave
recomputation out; hardware FLOPs count it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megafab.model.config import Activation, ModelConfig, Norm, Position


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All sizes of a model, none of them optional."""

    config: ModelConfig
    vocab: int  # rows of the embedding: the tokenizer's size rounded up
    kv_heads: int
    head_dim: int
    ffn: int
    expert_ffn: int

    @staticmethod
    def of(config: ModelConfig, tokenizer_vocab: int | None = None) -> ModelShape:
        """Fill in what the configuration leaves to defaults.

        `tokenizer_vocab` is needed when `model.vocab` is null.
        """
        vocab = config.vocab if config.vocab is not None else tokenizer_vocab
        assert vocab is not None, "model.vocab is null and no tokenizer size was given"
        gated = config.activation in (Activation.swiglu, Activation.geglu)
        default_ffn = _round_up(config.hidden * 8 // 3, 128) if gated else 4 * config.hidden
        ffn = config.ffn or default_ffn
        return ModelShape(
            config,
            _round_up(vocab, config.vocab_multiple),
            config.kv_heads or config.heads,
            config.head_dim or config.hidden // config.heads,
            ffn,
            config.moe.ffn or ffn,
        )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate (SwiGLU, GeGLU)."""
        return self.config.activation in (Activation.swiglu, Activation.geglu)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts: every `moe.every`-th, starting with the first."""
        return self.config.moe.experts > 0 and layer % self.config.moe.every == 0

    @property
    def attention_matrix_parameters(self) -> int:
        """Weights of one attention block: query, key, value and output projections."""
        queries = self.config.heads * self.head_dim
        return self.config.hidden * (2 * queries + 2 * self.kv_heads * self.head_dim)

    def _mlp_matrix_parameters(self, width: int) -> int:
        return (3 if self.gated else 2) * self.config.hidden * width

    @property
    def _norm_parameters(self) -> int:
        return self.config.hidden * (2 if self.config.norm is Norm.layernorm else 1)

    def layer_parameters(self, layer: int) -> int:
        """All parameters of one layer, every expert included."""
        c = self.config
        count = self.attention_matrix_parameters + 2 * self._norm_parameters
        if c.qk_norm:
            count += 2 * self.head_dim * (2 if c.norm is Norm.layernorm else 1)
        if c.bias:
            count += (c.heads + 2 * self.kv_heads) * self.head_dim + c.hidden
        widths = [self.ffn]
        if self.is_moe_layer(layer):
            count += c.moe.experts * c.hidden  # the router
            widths = [self.expert_ffn] * c.moe.experts + ([c.moe.shared_ffn] if c.moe.shared_ffn else [])
        for width in widths:
            count += self._mlp_matrix_parameters(width)
            if c.bias:
                count += width * (2 if self.gated else 1) + c.hidden
        return count

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        c = self.config
        count = self.vocab * c.hidden * (1 if c.tied_embeddings else 2) + self._norm_parameters
        if c.position is Position.learned:
            count += c.seq_len * c.hidden
        return count + sum(self.layer_parameters(layer) for layer in range(c.layers))

    def flops_per_token(
        self,
        seq_len: int | None = None,
        *,
        recompute: str = "none",
        kept: Mapping[int, int] = MappingProxyType({}),
        density: float = 1.0,
    ) -> float:
        """Training FLOPs of one token, forward and backward.

        Args:
            seq_len: length the attention runs over; the model's own by default.
            recompute: `none`, `selective` (attention products again) or `full` (every layer's forward again).
            kept: by layer (from 0), how many tokens of a sequence it computes; all where it is not named.
            density: share of the weights that are not 0 in the matrices that sparsity masks
                (`names.is_maskable`), each of which counts; routers, attention and the head are dense.
        """
        c = self.config
        length = seq_len or c.seq_len
        layers = attentions = 0.0
        for layer in range(c.layers):
            matrices, router = float(self.attention_matrix_parameters), 0
            if self.is_moe_layer(layer):
                router = c.moe.experts * c.hidden
                matrices += c.moe.top_k * self._mlp_matrix_parameters(self.expert_ffn)
                matrices += self._mlp_matrix_parameters(c.moe.shared_ffn)
            else:
                matrices += self._mlp_matrix_parameters(self.ffn)
            matrices = density * matrices + router
            tokens = kept.get(layer, length)
            attention = 4.0 * tokens * c.heads * self.head_dim  # query x key and probabilities x value
            # Of the tokens of a sequence only these are computed, and see each other.
            attentions += attention * tokens / length
            layers += (2.0 * matrices + attention) * tokens / length
        head = 2.0 * self.vocab * c.hidden
        again = {"none": 0.0, "selective": attentions, "full": layers}[recompute]
        return 3.0 * (layers + head) + again
