"""Label smoothing: part of the target is spread evenly over the vocabulary.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7: cross-entropy
with the target (1 - epsilon) onehot(label) + epsilon / V, which is

    (1 - epsilon) nll + epsilon (log Z - mean logit) = nll + epsilon (log Z - mean logit - nll)

over the V entries of the model's vocabulary, those that pad it among them. Reported is the plain nll, and the
rest as the term.
"""

from __future__ import annotations

from megafab.loss.terms import LossTerms
from megafab.run import Batch
from megafab.techniques.base import Technique
from megafab.techniques.config import LabelSmoothingConfig


class LabelSmoothing(Technique):
    """Adds `epsilon * (log Z - mean logit - nll)` to every token's loss."""

    name = "label_smoothing"
    writes = frozenset({"loss_terms"})
    composes = frozenset({"loss_terms"})
    terms = ("label_smoothing",)
    config: LabelSmoothingConfig

    def on_loss(self, terms: LossTerms, batch: Batch) -> None:
        """The term of this micro-batch."""
        evenly_BL = terms.log_z_BL - terms.mean_logit_BL
        terms.add("label_smoothing", self.config.epsilon * (evenly_BL - terms.nll_BL))
