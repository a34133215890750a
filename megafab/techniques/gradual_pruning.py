"""Gradual magnitude pruning while a model is pre-trained: dense first, pruned on the way, recovered.

Jin et al. 2025, "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense
Scaling Laws" (ICLR 2025, arXiv 2501.12486), who found about the lowest loss when pruning begins after a
quarter of the training compute and ends after three quarters. With the share c of the compute that is spent,
u = (c - begin) / (end - begin) within [0, 1] and the final sparsity s_f:

    linear    s(c) = s_f u
    cubic     s(c) = s_f (1 - (1 - u)^3)                    Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1

Every `every` steps, in each maskable matrix (`techniques/masks.py`) of n weights the smallest by magnitude
are masked until round(s n) are: the exact order of the fp32 masters, equal ones by their place in the matrix.
What is masked never comes back, and its moments are zeroed (but for SOAP's second moments, which belong to
directions and not to weights). Ramp, interval, threshold by matrix and moments are our choice: the abstract
says nothing of them.

**Compute** is theoretical: of a step with sparsity s, its model FLOPs without the products with masked
weights. c is what was spent of the budget C, the compute of the whole run, which depends on c in turn: it is
found by going through the run beforehand, and bisection for the C that it then spends. A resumed run keeps
the budget that it began with.

**Parameters** are the entries of maskable matrices that are not masked, N of them in a step. The mean of N
over the tokens, for which C = 6 N_avg D holds, is the paper's N_avg in the scaling law
L = E + A / N_avg^alpha + B / D^beta. The mean over compute differs from it much, and is told beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megafab.errors import UserError
from megafab.loss.ledger import LedgerReport, LossLedger
from megafab.run import Progress, StepOutcome, StepPlan
from megafab.techniques.base import Facts, Technique
from megafab.techniques.config import GradualPruningConfig, Ramp
from megafab.techniques.masks import Account, Masks, masked

if TYPE_CHECKING:
    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.engine.base import WeightEditor

_MAGNITUDE = 0x7FFFFFFF  # of the bits of a float32, all but the sign; in the order of the numbers


class GradualPruning(Technique):
    """Spends the compute, prunes on its way, and holds weights and gradients to the masks."""

    name = "gradual_pruning"
    needs = frozenset({"weights"})
    writes = frozenset({"weights", "gradient_entries"})
    config: GradualPruningConfig

    def __init__(self, config: GradualPruningConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._masks = Masks(facts.shape)
        # Training FLOPs of a token in all maskable matrices.
        self._maskable = facts.shape.flops_per_token() - facts.shape.flops_per_token(density=0)
        self._sparsity = 0.0
        self._account = Account()
        self._budget: float | None = None

    def on_start(self, progress: Progress, weights: WeightEditor) -> None:
        """Finds the budget, unless a checkpoint of this run had it; weights and moments under the masks.

        Raises:
            UserError: another run has pruned the weights that this one begins with.
        """
        if self._sparsity and not progress.step:
            raise UserError(
                "technique=[gradual_pruning]",
                f"weights that another run has pruned to {self._sparsity:g}",
                "dense weights to begin with: a ramp goes by the compute of one run",
                "go on with that run (checkpoint.resume), or densify it first: megafab ckpt densify",
            )
        if self._budget is None or not progress.step:  # of this run: not of one whose weights it begins with
            self._account = Account.dense(progress, self._active)
            plans = [(plan.flops, plan.layer_tokens * self._maskable) for plan in self.facts.plans()]
            self._budget = budget(
                plans[progress.step :], self._sparsity_at, self.config.every, progress.step, progress.flops
            )
        if self._sparsity:
            self._masks.apply(weights)

    def on_reduced(self, gradients: Mapping[str, Tensor]) -> None:
        """No gradient for what is masked, and none in the norm."""
        if self._sparsity:
            self._masks.apply_to(gradients)

    def on_step(
        self, plan: StepPlan, outcome: StepOutcome, ledger: LossLedger, weights: WeightEditor
    ) -> None:
        """Counts the step and prunes where it is time; undoes what an update of whole matrices revived."""
        self._account.add(plan, self._sparsity * self._maskable, self._active)
        sparsity = self._sparsity
        if (plan.step + 1) % self.config.every == 0:
            sparsity = max(sparsity, self._sparsity_at(self._spent))
        if sparsity > self._sparsity:
            more = [masked(n, sparsity) - masked(n, self._sparsity) for n in self._masks.sizes.values()]
            mask_smallest(self._masks, weights, more)
            self._sparsity = sparsity
            self._masks.apply(weights)
        elif self._sparsity and self.facts.whole_matrices and outcome.applied:
            self._masks.apply(weights)

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """Where the ramp is, the parameters that are left, their means, and theoretical numbers so far."""
        account, weights = self._account, sum(self._masks.sizes.values())
        return {
            "sparsity": (weights - self._active) / weights,
            "compute": self._spent,
            "active_parameters": self._active,
            "mean_active_parameters": account.active_tokens / account.tokens,
            "mean_active_parameters_by_compute": account.active_flops / account.flops,
            **account.numbers,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sparsity, the compute and its budget."""
        account = dataclasses.asdict(self._account)
        return {"sparsity": self._sparsity, "budget": self._budget, "account": account}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, with the budget of the run it was.

        Raises:
            UserError: more is pruned already than there is to be.
        """
        self._sparsity, self._budget = float(state["sparsity"]), float(state["budget"])
        if self._sparsity > self.config.sparsity:
            raise UserError(
                f"techniques.gradual_pruning.sparsity={self.config.sparsity:g}",
                f"{self._sparsity:g} of the weights pruned already",
                f"at least {self._sparsity:g}: what is pruned does not come back",
                f"techniques.gradual_pruning.sparsity={self._sparsity:g} or more",
            )
        self._account = Account(**state["account"])

    def sharded_state(self, weights: WeightEditor) -> Mapping[str, LogicalTensor]:
        """The masks by parameter name."""
        return self._masks.describe(weights)

    @property
    def _active(self) -> int:
        return sum(size - masked(size, self._sparsity) for size in self._masks.sizes.values())

    @property
    def _spent(self) -> float:
        """The share of the budget that is spent."""
        assert self._budget is not None, "the run has begun"
        return self._account.flops / self._budget

    def _sparsity_at(self, spent: float) -> float:
        config = self.config
        share = min(1.0, max(0.0, (spent - config.begin) / (config.end - config.begin)))
        return config.sparsity * (share if config.ramp is Ramp.linear else 1 - (1 - share) ** 3)


def budget(
    steps: Sequence[tuple[float, float]],
    sparsity_at: Callable[[float], float],
    every: int,
    first: int = 0,
    spent: float = 0.0,
) -> float:
    """The compute C of a run that prunes by its share of C: that which going through the run spends.

    The larger C, the later it prunes and the smaller the share of C that it spends: so bisection finds the
    largest C that is spent, to about the compute by which one pruning more or less changes it.

    Args:
        steps: of each step, its FLOPs with dense weights, and those of them in maskable matrices.
        sparsity_at: the sparsity when that share of C is spent.
        every: steps between two prunings, which are where it divides the number of steps done.
        first: how many steps were done before `steps`, all dense.
        spent: their FLOPs.

    Returns: FLOPs.
    """
    if not steps:
        return spent
    # A block of steps has one sparsity.
    ends = [step for step in range(1, len(steps)) if (first + step) % every == 0]
    blocks = [tuple(block) for block in np.add.reduceat(np.array(steps), [0, *ends]).tolist()]

    def needs(total: float) -> float:
        done, sparsity = spent, 0.0
        for flops, maskable in blocks:
            done += flops - sparsity * maskable
            sparsity = max(sparsity, sparsity_at(done / total))
        return done

    low, high = 0.0, spent + sum(flops for flops, _ in blocks)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if needs(middle) >= middle else (low, middle)
    return high


def mask_smallest(masks: Masks, weights: WeightEditor, more: Sequence[int]) -> None:
    """Mask in each matrix so many more of the weights that are smallest by magnitude. A collective.

    The threshold of a matrix that lies on several ranks is found by bisection on the bits of float32, which
    stand in the order of magnitudes: 31 counts over the job, each of all matrices together. Where not all
    weights at the threshold are to be masked, the first in the matrix are, found by bisection on the place.

    Args:
        masks: to change.
        weights: access to the masters, which are finite.
        more: by the number of the matrix; no more than are not masked.
    """
    names, more_N = list(masks.sizes), torch.tensor(more)

    def through(tried_N: Tensor) -> Tensor:
        return masks.counted(weights, lambda n, part, w: (part & (_level(w) <= tried_N[n])).sum())

    threshold_N = _smallest(through, more_N, bits=31)
    below_N = through(threshold_N - 1)
    equal_N, rest_N = through(threshold_N) - below_N, more_N - below_N
    parts = masks.parts(weights)
    equal = {  # by matrix, which of this rank's weights are at the threshold
        n: (parts[name] & (_level(weights.master(name)) == threshold_N[n])).nonzero().view(-1)
        for n, name in enumerate(names)
        if name in parts
    }
    if bool((rest_N < equal_N).any()):
        place = {n: _places(weights, names[n])[which] for n, which in equal.items()}

        def before(tried_N: Tensor) -> Tensor:
            return masks.counted(weights, lambda n, _part, _w: (place[n] <= tried_N[n]).sum())

        last_N = _smallest(before, rest_N, bits=max(masks.sizes.values()).bit_length())
        equal = {n: which[(place[n] <= last_N[n]) & (rest_N[n] > 0)] for n, which in equal.items()}
    for n, which in equal.items():
        part = parts[names[n]]
        part &= _level(weights.master(names[n])) >= threshold_N[n]
        part[which] = False


def _smallest(count: Callable[[Tensor], Tensor], wanted_N: Tensor, bits: int) -> Tensor:
    """For each matrix, of the numbers of so many bits, the smallest at which the count is what is wanted.

    Args:
        count: how many elements are no larger than a number, int64 [N] of int64 [N]; a collective.
        wanted_N: at least so many.
        bits: of the numbers.
    """
    found_N = torch.zeros_like(wanted_N)
    for bit in reversed(range(bits)):
        found_N += (count(found_N + (1 << bit) - 1) < wanted_N) * (1 << bit)
    return found_N


def _level(master: Tensor) -> Tensor:
    """The magnitudes as integers in the same order."""
    return master.view(torch.int32).bitwise_and(_MAGNITUDE)


def _places(weights: WeightEditor, name: str) -> Tensor:
    """Where each element of this rank's part of a master stands in the flattened matrix: int64."""
    places = torch.zeros_like(weights.master(name), dtype=torch.int64)
    described = weights.describe(name, places)
    for piece in described.pieces:
        rows, columns = (
            torch.arange(first, first + count, device=places.device)
            for first, count in zip(piece.offset, piece.tensor.shape, strict=True)
        )
        piece.tensor.copy_(rows[:, None] * described.global_shape[1] + columns)
    return places
