"""What an engine asks of an optimizer that is sharded over the job, whichever library shards it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.slices import Slice


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
        """The gradients of `slices`, flat, to be scaled in place; between `prepare` and `step`."""
        ...

    def step(self, lr: float, weight_decay: float) -> None:
        """Update the masters by the gradients, and the model from the masters."""
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


def storage_bytes(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes of the storages behind `tensors` by their address, each once, whole, on whatever device."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def memory_of(
    parameters: Iterable[torch.Tensor | None],
    gradients: Iterable[torch.Tensor | None],
    optimizer: Iterable[torch.Tensor | None],
) -> Memory:
    """The memory of these tensors; a storage that several name counts for the first."""
    seen: dict[int, int] = {}
    sums = []
    for tensors in (parameters, gradients, optimizer):
        new = {key: size for key, size in storage_bytes(tensors).items() if key not in seen}
        seen |= new
        sums.append(sum(new.values()))
    return Memory(*sums)
