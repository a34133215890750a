"""What several ranks hold alike must stay alike, to the bit.

Parallel training fails silently where copies drift apart: norms on the tensor ranks when their gradients were
not added up, tied embeddings on the outer stages, replicas on the data ranks after a faulty reduction or a
flipped bit in memory. The loss hardly shows it. So every so many steps all copies are compared: each rank
adds up the bit patterns of each of its parameters, and the ranks of an axis take the least and the greatest
of these sums. One pass over the weights, one small message an axis.

The sums are 64-bit integers, exact in any order: two copies with the same sum differ only where changes
cancel out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from megafab.errors import UserError
from megafab.topology.groups import Groups

if TYPE_CHECKING:
    from megafab.model.tags import TaggedParameter

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HasCopies(Protocol):
    """What an engine shows of its parameters (`engine/base.py`)."""

    partitions_parameters: bool

    def copies(self) -> Iterator[tuple[TaggedParameter, torch.Tensor]]:
        """Each parameter with what this rank has of it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """Ranks that hold some parameters alike."""

    name: str
    group: dist.ProcessGroup
    indices: torch.Tensor  # of these parameters among all of this rank


class Invariants:
    """Compares copies. A check is a collective over the job.

    Args:
        engine: whose parameters to compare.
        groups: this rank's place.
        every: steps between two checks; 0: never.
    """

    def __init__(self, engine: HasCopies, groups: Groups, every: int) -> None:
        self._engine, self._groups, self._every = engine, groups, every
        self._names = [t.name for t, _ in engine.copies()]
        self._axes = list(_axes([t for t, _ in engine.copies()], engine.partitions_parameters, groups))

    def check(self, step: int, *, saving: bool) -> None:
        """Compare all copies after `step`, if a check is due, or a checkpoint is about to be written.

        Raises:
            UserError: on every rank, naming a parameter that differs, the axis and the ranks.
        """
        if not self._every or not (saving or step % self._every == 0):
            return
        sums = torch.stack([_bit_sum(tensor) for _, tensor in self._engine.copies()])
        differing = [(axis, _differing(sums[axis.indices], axis.group)) for axis in self._axes]
        found = bool(torch.stack([where.any() for _, where in differing]).any()) if differing else False
        if not self._groups.agree_max(int(found)):
            return
        # All of them, in one order: a rank may disagree along one axis and be asked along another.
        mine = [self._describe(axis, where, sums) for axis, where in differing if where.any()]
        self._fail(mine[0] if mine else None)

    def _describe(self, axis: _Axis, where: torch.Tensor, sums: torch.Tensor) -> tuple[str, str]:
        """(parameter, what differs): the first of them. A collective over the axis, as all its ranks come."""
        first = int(axis.indices[int(where.nonzero()[0])])
        mine = sums[first].reshape(1)
        theirs = [torch.empty_like(mine) for _ in range(axis.group.size())]
        dist.all_gather(theirs, mine, group=axis.group)
        by_sum: dict[int, list[int]] = {}
        for rank, value in zip(dist.get_process_group_ranks(axis.group), theirs, strict=True):
            by_sum.setdefault(int(value), []).append(rank)
        sides = [_ranks(ranks) for ranks in sorted(by_sum.values(), key=len)]
        others = len(where.nonzero()) - 1
        more = f", and {others} more parameters" if others else ""
        return self._names[first], f"{' != '.join(sides)} along the {axis.name} axis{more}"

    def _fail(self, mine: tuple[str, str] | None) -> None:
        found: list[tuple[str, str] | None] = [None] * self._groups.mesh.ranks
        dist.all_gather_object(found, mine, group=self._groups.host)
        name, what = next(one for one in found if one is not None)
        raise UserError(
            f"parameter {name}",
            f"ranks that hold it alike disagree: {what}",
            "the same bits on all of them",
            "resume from the last checkpoint; if it happens again at another step, suspect the memory of the "
            "rank that stands alone, else report it (resilience.check_every=0 turns the check off)",
        )


def _axes(parameters: Sequence[TaggedParameter], partitioned: bool, groups: Groups) -> Iterator[_Axis]:
    def axis(
        name: str, group: dist.ProcessGroup | None, held: Callable[[TaggedParameter], bool]
    ) -> Iterator[_Axis]:
        indices = [n for n, t in enumerate(parameters) if held(t)]
        if group is not None and group.size() > 1 and indices:
            yield _Axis(name, group, torch.tensor(indices, device=groups.device))

    yield from axis("tensor", groups.tensor, lambda t: not t.tensor_split and not t.expert)
    if groups.mesh.pipeline > 1:
        yield from axis("pipeline", groups.embedding, lambda t: t.shared)
    if not partitioned:
        yield from axis("data x context", groups.data_context, lambda t: not t.expert)
        yield from axis("expert data", groups.expert_data, lambda t: t.expert)


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_WORD[tensor.element_size()]).sum(dtype=torch.int64)


def _differing(sums: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Which of these sums are not the same on all ranks of the group: bool, on the device."""
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return extremes[0] != -extremes[1]


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
