"""Static sparsity: a random mask, drawn once, under which the whole run trains.

Thangarasa et al. 2023, "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models" (UAI,
arXiv 2303.10464). In every layer the matrices of attention and feed-forward are masked, each with the same
share s of zeros at random places; embeddings, head, routers, norms and biases stay dense. With a mask m:

    w <- w * m,  moments <- moments * m                     once, before the first step
    g <- g * m                                              before the norm is taken and gradients are clipped
    w <- w * m                                              after an update of whole matrices (Muon, SOAP)

Where an update goes element by element (AdamW, Lion) a masked weight has neither gradient nor moment nor
itself to decay: it stays exactly 0. Initial weights are not rescaled.

`pattern=two_four` keeps two of every four inputs of an output instead, the pattern that sparse tensor cores
compute (Mishra et al. 2021, arXiv 2104.08378). Here both are masks and nothing else: they save no time.

The masks are a function of (seed, parameter name), the same at every layout and engine, exact to one
element, and part of the checkpoint. Dense training goes on after `megafab ckpt densify`: revived weights
begin at 0, moments, schedule and data anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megafab.errors import UserError
from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.run import Progress, StepOutcome, StepPlan
from megafab.techniques.base import Facts, Technique
from megafab.techniques.config import StaticSparsityConfig
from megafab.techniques.masks import Account, Masks, masked, random_mask

if TYPE_CHECKING:
    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.engine.base import WeightEditor


class StaticSparsity(Technique):
    """Draws the masks, holds weights and gradients to them, and counts what they would save."""

    name = "static_sparsity"
    needs = frozenset({"weights"})
    writes = frozenset({"weights", "gradient_entries"})
    config: StaticSparsityConfig

    def __init__(self, config: StaticSparsityConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        shape, share = facts.shape, config.share
        self._seed = facts.seed if config.seed is None else config.seed
        self._masks = Masks(shape)
        self._weights = sum(self._masks.sizes.values())
        self._masked = sum(masked(size, share) for size in self._masks.sizes.values())
        self._saved = shape.flops_per_token() - shape.flops_per_token(density=1 - share)
        self._account, self._restored = Account(), False

    def on_start(self, progress: Progress, weights: WeightEditor) -> None:
        """Draws the masks, unless a checkpoint had them; weights and moments under them."""
        if not self._restored:
            self._masks.fill(weights, self._draw)
        if not (self._restored and progress.step):  # of this run: not of one whose weights it begins with
            self._account = Account.dense(progress, self._weights)
        self._masks.apply(weights)

    def on_reduced(self, gradients: Mapping[str, Tensor]) -> None:
        """No gradient for what is masked, and none in the norm."""
        self._masks.apply_to(gradients)

    def on_step(
        self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor
    ) -> None:
        """Counts the step; undoes what an update of whole matrices did to masked weights."""
        self._account.add(plan, self._saved, self._weights - self._masked)
        if self.facts.whole_matrices and outcome.applied:
            self._masks.apply(weights)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The share of zeros in the masked matrices, and theoretical numbers of the run so far."""
        return {"sparsity": self._masked / self._weights, **self._account.numbers}

    def state_dict(self) -> dict[str, Any]:
        """What the masks are, and the account."""
        return {**self._identity, "account": dataclasses.asdict(self._account)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the masks of the checkpoint.

        Raises:
            UserError: the configuration asks for others.
        """
        if self.config.seed is None:
            self._seed = int(state["seed"])
        for key, value in self._identity.items():
            if state[key] != value:
                raise UserError(
                    f"techniques.static_sparsity.{key}={value}",
                    f"weights that were masked with {key}={state[key]}",
                    "the masks that the weights were trained with",
                    f"techniques.static_sparsity.{key}={state[key]}, or make the checkpoint dense first: "
                    "megafab ckpt densify",
                )
        self._account, self._restored = Account(**state["account"]), True

    def sharded_state(self, weights: WeightEditor) -> Mapping[str, LogicalTensor]:
        """The masks by parameter name."""
        return self._masks.describe(weights)

    @property
    def _identity(self) -> dict[str, Any]:
        return {"pattern": self.config.pattern.value, "sparsity": self.config.share, "seed": self._seed}

    def _draw(self, name: str, offset: tuple[int, ...], box: tuple[int, ...]) -> Tensor:
        config, shape = self.config, self._masks.shapes[name]
        return random_mask(self._seed, name, shape, config.pattern, config.share, offset, box)
