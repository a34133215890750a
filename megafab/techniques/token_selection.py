"""Selective language modelling: train on the tokens whose loss is furthest above a reference model's.

Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need" (arXiv 2404.07965), section 2.2. The excess of a
token is its loss minus that of a reference model, which is kept beside the corpus (`megafab score`). Of each
sequence's valid tokens the `keep` share with the largest excess is trained on, with the weight that keeps
the sequence's share of the gradient; the others have none.

The choice is made sequence by sequence, so that it does not depend on what else is in the batch. Reported
losses are those of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megafab.data.scores import Scores
from megafab.errors import UserError
from megafab.loss.ledger import LedgerReport
from megafab.loss.terms import LossTerms
from megafab.run import Batch
from megafab.techniques.base import Clock, RunPlan, Technique
from megafab.techniques.config import TokenSelectionConfig

if TYPE_CHECKING:
    from megafab.topology.mesh import Mesh

COLUMN = "reference_nll"


class TokenSelection(Technique):
    """Weighs tokens by whether they are selected."""

    name = "token_selection"
    writes = frozenset({"token_weights"})
    composes = frozenset({"token_weights"})
    notes = ("excess", "selected_excess")
    config: TokenSelectionConfig

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """Has the reference's losses read with every sequence."""
        scores = Scores.open(self.config.reference, plan.data.corpus)
        plan.data.columns[COLUMN] = scores
        self._fingerprint = scores.fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Which losses of the reference."""
        return {"scores": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The losses must be the same.

        Raises:
            UserError: they were made anew, with another reference.
        """
        if state["scores"] != self._fingerprint:
            raise UserError(
                f"techniques.token_selection.reference={self.config.reference}",
                f"other scores ({self._fingerprint[:12]}) than the run began with ({state['scores'][:12]})",
                "the same ones, for the resumed run to equal the unbroken one",
                "name those, or begin a new run.dir",
            )

    def on_build(self, stages: Sequence[torch.nn.Module], clock: Clock) -> None:
        """Keeps the clock, for the step's number."""
        self._clock = clock

    def on_loss(self, terms: LossTerms, batch: Batch) -> None:
        """Selects this micro-batch's tokens."""
        reference_BL = batch.columns[COLUMN].to(terms.nll_BL.device)
        # Where the reference has predicted nothing, there is nothing to compare with: not selected.
        scored_BL = reference_BL.isfinite()
        excess_BL = torch.where(scored_BL, terms.nll_BL.detach() - reference_BL, 0.0)
        weight_BL = torch.ones_like(excess_BL)
        assert self._clock.plan is not None
        if self._clock.plan.step >= self.config.warmup_steps:
            valid_BL = (terms.mask_BL != 0) & scored_BL
            weight_BL = selection(
                excess_BL, valid_BL, *terms.whole_rows(excess_BL, valid_BL), keep=self.config.keep
            )
            terms.weigh(weight_BL)
        terms.note("excess", excess_BL)
        terms.note("selected_excess", weight_BL * excess_BL)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Mean excess of all tokens, and of those selected."""
        return {note: losses.term(note) for note in self.notes}


def selection(
    excess_BL: Tensor, valid_BL: Tensor, row_excess_BS: Tensor, row_valid_BS: Tensor, *, keep: float
) -> Tensor:
    """Weights [B, L]: valid tokens / selected tokens of the row where selected, else 0.

    Args:
        excess_BL, valid_BL: of this rank's positions.
        row_excess_BS, row_valid_BS: of the whole sequences.
        keep: share of a row's valid tokens, rounded up; those as large as the last of them stay, too.
    """
    count_B = row_valid_BS.sum(1)
    # In float64, and with room for what a share like 0.6 is off by in it.
    wanted_B = (count_B.double() * keep - 1e-9).ceil().clamp(min=1).long()
    ranked_BS = row_excess_BS.masked_fill(~row_valid_BS, -torch.inf).sort(dim=1, descending=True).values
    edge_B1 = ranked_BS.gather(1, (wanted_B - 1).unsqueeze(1))
    selected_B = ((row_excess_BS >= edge_B1) & row_valid_BS).sum(1).clamp(min=1)
    weight_B1 = (count_B / selected_B).unsqueeze(1)
    return torch.where((excess_BL >= edge_B1) & valid_BL, weight_B1, 0.0)
