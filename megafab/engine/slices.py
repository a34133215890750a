"""What an optimizer keeps on one rank: ranges of flattened parameters, their masters and their moments.

Sharded optimizers deal every parameter to the ranks that hold copies of it, in ranges cut anywhere. Both
engines describe theirs as slices; the gradient norm, the weight editor and the checkpoint follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megafab.checkpoint.pieces import LogicalTensor, flat_slice
from megafab.kernels.multi_tensor import sum_of_squares
from megafab.model.tags import TaggedParameter
from megafab.run import Action, Verdict
from megafab.topology.groups import Groups


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """A range of one flattened parameter, as the optimizer of this rank holds it.

    `master` is fp32 [n], what the optimizer updates; `state` has its moments [n], one of each element, by
    their name in checkpoints. `owner`: no other rank answers for the same elements, in norms and checkpoints.
    """

    tagged: TaggedParameter
    start: int  # of the range in the flattened local parameter
    master: torch.Tensor
    state: Mapping[str, torch.Tensor]
    owner: bool

    def describe(self, value: torch.Tensor) -> LogicalTensor:
        """`value`, shaped like `master`, as part of a logical tensor like the parameter."""
        return flat_slice(value, self.start, self.tagged.layout, self.owner)


def is_owner(tagged: TaggedParameter, groups: Groups) -> bool:
    """Whether this rank answers for its range of a parameter, among the tensor ranks and pipeline stages.

    What every tensor rank holds whole counts on the first; a tied copy counts where the embedding is.
    """
    first = groups.mesh.tensor_rank(groups.rank) == 0
    return not tagged.tied and (tagged.tensor_split or tagged.expert or first)


def global_norm(gradients: Iterable[tuple[Slice, torch.Tensor]], groups: Groups) -> float:
    """The L2 norm of the job's gradient, every element of every parameter counted once. A collective.

    Args:
        gradients: of all slices of this rank, [n] each, reduced over the job.
        groups: this rank's place.
    """
    owned = [gradient for s, gradient in gradients if s.owner and gradient.numel()]
    square = sum_of_squares(owned) if owned else torch.zeros(())
    return float(groups.sum_over_job(square.to(groups.device)).sqrt())


def update_scale(verdict: Verdict, norm: float, clip: float) -> float:
    """By what to multiply the gradients: the verdict's scale, then down to the norm `clip` if it is not 0."""
    scale = verdict.scale if verdict.action is Action.SCALE else 1.0
    if clip and norm * abs(scale) > clip:
        scale *= clip / (norm * abs(scale) + 1e-6)
    return scale


class MasterWeights:
    """The weight editor over slices (`engine.base.WeightEditor`), and what a checkpoint keeps of them.

    Args:
        slices: all of this rank.
        commit: makes the model compute with the masters; a collective.
        groups: this rank's place.
    """

    def __init__(self, slices: Iterable[Slice], commit: Callable[[], None], groups: Groups) -> None:
        self.slices = {s.tagged.name: s for s in slices}
        self.commit, self._groups = commit, groups

    def names(self) -> Sequence[str]:
        """Global names of the parameters of which this rank holds a range."""
        return list(self.slices)

    def master(self, name: str) -> torch.Tensor:
        """This rank's range of the fp32 master, flat."""
        return self.slices[name].master.data

    def moments(self, name: str) -> Mapping[str, torch.Tensor]:
        """This rank's range of each moment, flat, by its name in checkpoints."""
        return self.slices[name].state

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of the job."""
        return self._groups.sum_over_job(counts.to(self._groups.device))

    def describe(self, name: str, value: torch.Tensor) -> LogicalTensor:
        """`value`, shaped like `master(name)`, as part of a logical tensor like the parameter."""
        return self.slices[name].describe(value)

    def sharded_state(self) -> dict[str, LogicalTensor]:
        """Masters and moments by kind and global name: `weight/NAME`, `adam_m/NAME`, ..."""
        state = {}
        for name, s in self.slices.items():
            state[f"weight/{name}"] = s.describe(s.master.data)
            for kind, value in s.state.items():
                state[f"{kind}/{name}"] = s.describe(value)
        return state
