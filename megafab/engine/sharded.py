"""What an engine asks of an optimizer that is sharded over the job, whichever library shards it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.slices import Slice
from megafab.model.tags import TaggedParameter


class Memory(NamedTuple):
    """Bytes that one rank keeps between two steps, and of gradients between backward and update."""

    parameters: int
    gradients: int
    optimizer: int  # masters that are not the parameters themselves, and moments


class ShardedOptimizer(Protocol):
    """Masters and moments of this rank. `prepare`, `step`, `discard` and `commit` are collectives."""

    slices: list[Slice]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        ...

    def prepare(self) -> None:
        """Bring the reduced gradients to where they are needed."""
        ...

    def gradients(self) -> Sequence[torch.Tensor]:
        """The gradients of `slices`, flat, to be changed in place; between `prepare` and `step`."""
        ...

    def step(self, lr: float, weight_decay: float, scale: float) -> None:
        """Update the masters by the gradients times `scale`, and the model from the masters."""
        ...

    def discard(self) -> None:
        """Forget the gradients instead of stepping."""
        ...

    def set_updates(self, updates: int) -> None:
        """Set the counters that follow from the count of updates."""
        ...

    def commit(self) -> None:
        """Update the model from the masters."""
        ...

    def factors(self) -> Mapping[str, LogicalTensor]:
        """State that is not shaped like a parameter, and so is not in `slices`."""
        ...

    def memory(self) -> Memory:
        """What it takes on this rank now."""
        ...


class Sharding(NamedTuple):
    """The model chunks of a rank as an engine wraps them, and the optimizer around them."""

    modules: Sequence[torch.nn.Module]  # what the schedule calls
    tagged: Sequence[TaggedParameter]  # their parameters
    optimizer: ShardedOptimizer
    no_sync: Sequence[Callable[[], AbstractContextManager[None]]] = ()  # see `Schedule`
    finalize: Callable[[], None] | None = None  # see `Schedule`


def memory_of(
    parameters: Iterable[torch.Tensor | None],
    gradients: Iterable[torch.Tensor | None],
    optimizer: Iterable[torch.Tensor | None],
) -> Memory:
    """Bytes of the storages behind these tensors, on whatever device: each whole, and once, for the first."""
    seen: dict[int, int] = {}
    sums = []
    for tensors in (parameters, gradients, optimizer):
        before = sum(seen.values())
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor is not None):
            seen[storage.data_ptr()] = storage.nbytes()
        sums.append(sum(seen.values()) - before)
    return Memory(*sums)
