"""z-loss: keep the softmax normaliser near 1.

Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", section 5 (training setup): the
auxiliary loss `1e-4 * log(Z)^2` with Z the sum of exponentials of a token's logits, added to every token's
loss. It holds the logits' common offset, which cross-entropy leaves free, near 0; bf16 training with a
large vocabulary is steadier for it.
"""

from __future__ import annotations

from megafab.loss.terms import LossTerms
from megafab.run import Batch
from megafab.techniques.base import Technique
from megafab.techniques.config import ZLossConfig


class ZLoss(Technique):
    """Adds `weight * log(Z)^2` to every token's loss."""

    name = "z_loss"
    writes = frozenset({"loss_terms"})
    composes = frozenset({"loss_terms"})
    terms = ("z_loss",)
    config: ZLossConfig

    def on_loss(self, terms: LossTerms, batch: Batch) -> None:
        """The term of this micro-batch."""
        terms.add("z_loss", self.config.weight * terms.log_z_BL.square())
