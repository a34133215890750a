"""What the loop asks of an engine, and what a technique may do to its weights.

An engine owns the model on this rank, the optimizer, and all communication between ranks. The four calls of
a step are apart, because something stands between each two of them: techniques see the loss before
gradients are measured, and the measured gradients before any weight changes. Nothing waits for the device
but `gradient_stats`, which every clipped step must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from megafab.loss.ledger import LossLedger
from megafab.loss.terms import LossTerms
from megafab.run import Batch, GradStats, StepOutcome, StepPlan, Verdict

if TYPE_CHECKING:
    from megafab.checkpoint.pieces import LogicalTensor
    from megafab.engine.sharded import Memory
    from megafab.model.tags import TaggedParameter

# What a micro-batch's loss is made of, beside the nll: called once a micro-batch on the last pipeline stage,
# with its terms and its rows; adds terms and token weights. The engine then records, sums and divides.
LossFunction = Callable[[LossTerms, Batch], None]

# What may change gradients before they are measured: is given this rank's part of each by global name, views
# shaped like `WeightEditor.master`, reduced over the job, and edits them in place, element by element.
GradientEdit = Callable[[Mapping[str, Tensor]], None]


def nll_only(terms: LossTerms, batch: Batch) -> None:
    """The `LossFunction` of evaluation: nothing beside the nll."""


class Engine(Protocol):
    """A model, its optimizer and their ranks.

    `capabilities` names what an engine may lack and a technique may need: `veto` (an update can still be
    scaled or discarded after the gradients were measured), `weights` (masters can be edited between steps).
    """

    capabilities: frozenset[str]

    def forward_backward(self, batch: Batch, plan: StepPlan, loss: LossFunction) -> LossLedger:
        """All micro-batches of the step, forward and backward.

        Gradients are those of the total over the global count of valid tokens (`loss.ledger`).

        Returns: this rank's part of the step's losses, on the device; nothing waits for it.
        """
        ...

    def gradient_stats(self, edit: GradientEdit | None = None) -> GradStats:
        """Finishes the reduction of gradients, has them edited and measures them; nothing is applied.

        The norm is the global L2 norm before clipping, shared and replicated parameters counted once, the
        same number on every rank.
        """
        ...

    def update(self, plan: StepPlan, verdict: Verdict, stats: GradStats) -> StepOutcome:
        """Scales by the verdict, clips and steps with the plan's learning rate and weight decay, or discards.

        Either way the gradients are gone afterwards.
        """
        ...

    def evaluate(self, batch: Batch, micro_batch: int, loss: LossFunction) -> LossLedger:
        """Forward only, dropout off, `micro_batch` rows at a time; weights and random state stay."""
        ...

    def weights(self) -> WeightEditor:
        """Access to the master weights of this rank."""
        ...

    partitions_parameters: bool  # whether data ranks hold parts of the parameters instead of copies

    def copies(self) -> Iterator[tuple[TaggedParameter, Tensor]]:
        """Each parameter of this rank with what it has of it between two layers: all, or a part."""
        ...

    def memory(self) -> Memory:
        """What parameters, gradients and optimizer take on this rank now."""
        ...

    def sharded_state(self) -> Mapping[str, LogicalTensor]:
        """Master weights and moments by global name, as views: a checkpoint is read from and into them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is left of the state: JSON-able, the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called once `sharded_state` was filled: also makes the model's own copies agree."""
        ...


class WeightEditor(Protocol):
    """The fp32 master weights that this rank holds, whole parameters or parts of them.

    Editing a model's own copy is undone by the next optimizer step, which starts from the master; so edit
    masters and `commit`. Parts are cut anywhere, through rows or heads: edits must be element by element.
    """

    def names(self) -> Sequence[str]:
        """Global names of the parameters of which this rank holds (a part of) the master."""
        ...

    def master(self, name: str) -> Tensor:
        """This rank's part of the master, flat [n], a view: write into it, then `commit`."""
        ...

    def moments(self, name: str) -> Mapping[str, Tensor]:
        """What the optimizer keeps of each element of `master(name)`, views of that shape, by kind.

        Kinds are those of checkpoints (`adam_m`). What belongs to no single element, such as second moments
        in an eigenbasis, is not among them.
        """
        ...

    def sum(self, counts: Tensor) -> Tensor:
        """The sum of a small tensor over all ranks of the job, on the device. A collective."""
        ...

    def describe(self, name: str, value: Tensor) -> LogicalTensor:
        """`value`, shaped like `master(name)`, as this rank's part of a logical tensor like the parameter.

        So a technique's state follows its parameter through any change of topology.
        """
        ...

    def commit(self) -> None:
        """Copies the masters to the model's own copies, on all ranks. A collective."""
        ...
