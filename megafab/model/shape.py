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
    def retro_layers(self) -> tuple[int, ...]:
        """The layers (from 0) that look at neighbours; none without retrieval."""
        retro, count = self.config.retro, self.config.layers
        if not retro.chunk:
            return ()
        if retro.layers is not None:
            return tuple(layer - 1 for layer in retro.layers)
        first = (count + 1) // 2 if count < 6 else 6 if count <= 15 else 9
        return tuple(range(first - 1, count, 3))

    @property
    def attention_matrix_parameters(self) -> int:
        """Weights of one attention block: query, key, value and output projections."""
        queries = self.config.heads * self.head_dim
        return self.config.hidden * (2 * queries + 2 * self.kv_heads * self.head_dim)

    def _mlp_matrix_parameters(self, width: int) -> int:
        return (3 if self.gated else 2) * self.config.hidden * width

    @property
    def _attention_parameters(self) -> int:
        """One attention block with its biases, without norms."""
        biases = (self.config.heads + 2 * self.kv_heads) * self.head_dim + self.config.hidden
        return self.attention_matrix_parameters + (biases if self.config.bias else 0)

    def _mlp_parameters(self, width: int) -> int:
        biases = width * (2 if self.gated else 1) + self.config.hidden
        return self._mlp_matrix_parameters(width) + (biases if self.config.bias else 0)

    @property
    def _norm_parameters(self) -> int:
        return self.config.hidden * (2 if self.config.norm is Norm.layernorm else 1)

    def layer_parameters(self, layer: int) -> int:
        """All parameters of one layer, every expert included."""
        c = self.config
        own = self._attention_parameters + 2 * self._norm_parameters
        if c.qk_norm:
            own += 2 * self.head_dim * (2 if c.norm is Norm.layernorm else 1)
        count = own
        widths = [self.ffn]
        if self.is_moe_layer(layer):
            count += c.moe.experts * c.hidden  # the router
            widths = [self.expert_ffn] * c.moe.experts + ([c.moe.shared_ffn] if c.moe.shared_ffn else [])
        for width in widths:
            count += self._mlp_parameters(width)
        looking = self._norm_parameters + self._attention_parameters
        if layer in self.retro_layers:
            count += looking
        if layer in self.retro_layers[:1]:  # it holds the encoder, whose first layer looks at the chunk
            count += c.retro.encoder_layers * (own + self._mlp_parameters(self.ffn)) + looking
            count += self._norm_parameters
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
        head_again: bool = False,
        kept: Mapping[int, int] = MappingProxyType({}),
        density: float = 1.0,
    ) -> float:
        """Training FLOPs of one token, forward and backward.

        Args:
            seq_len: length the attention runs over; the model's own by default.
            recompute: `none`, `selective` (attention products again) or `full` (every layer's forward again).
            head_again: whether backward computes the logits again (`train.head_chunk`).
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
            looking, looked = self._retro_work(layer)
            matrices, attentions = matrices + looking, attentions + looked
            layers += looked
            tokens = kept.get(layer, length)
            attention = 4.0 * tokens * c.heads * self.head_dim  # query x key and probabilities x value
            # Of the tokens of a sequence only these are computed, and see each other.
            attentions += attention * tokens / length
            layers += (2.0 * matrices + attention) * tokens / length
        head = 2.0 * self.vocab * c.hidden
        again = {"none": 0.0, "selective": attentions, "full": layers}[recompute]
        return 3.0 * (layers + head) + again + (head if head_again else 0.0)

    def _retro_work(self, layer: int) -> tuple[float, float]:
        """What looking at neighbours adds to a layer for a token of the sequence, in the forward pass.

        Returns: the weights that multiply (each 2 FLOPs), and the FLOPs of attention products. Keys and
        values are those of retrieved tokens, of which a token has neighbors x retrieved / chunk.
        """
        c, retro = self.config, self.config.retro
        if layer not in self.retro_layers:
            return 0.0, 0.0
        width = c.heads * self.head_dim
        queries, keys = 2 * c.hidden * width, 2 * c.hidden * self.kv_heads * self.head_dim
        ratio = retro.neighbors * retro.length / retro.chunk
        matrices, attention = queries + ratio * keys, 4.0 * width * retro.neighbors * retro.length
        if layer == self.retro_layers[0]:
            encoder_layer = self.attention_matrix_parameters + self._mlp_matrix_parameters(self.ffn)
            matrices += ratio * (retro.encoder_layers * encoder_layer + queries) + keys
            attention += ratio * 4.0 * width * (retro.encoder_layers * retro.length + retro.chunk)
        return matrices, attention
