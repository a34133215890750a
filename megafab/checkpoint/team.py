"""Ranks that act together, and fail together."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megafab.errors import UserError

T = TypeVar("T")


class Team:
    """The ranks that save or load together, and how they stay together when one of them fails.

    Every call is a collective: an error on any rank is raised on all of them, so none waits for a rank that
    has left.

    Args:
        group: process group for small Python objects (host memory); None: all ranks, or this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    @property
    def leads(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    def each(self, action: Callable[[], T]) -> list[T]:
        """`action` on every rank; the results by rank, or the error of the lowest rank that failed."""
        result = error = interrupt = None
        try:
            result = action()
        except BaseException as raised:  # whatever it is, the others must not wait for this rank
            error = portable(raised, self.rank)
            interrupt = None if isinstance(raised, Exception) else raised
        if self.alone:
            gathered = [(result, error)]
        else:
            gathered = [(None, None)] * self.size
            dist.all_gather_object(gathered, (result, error), group=self.group)
        if interrupt is not None:
            raise interrupt
        for _, failure in gathered:
            if failure is not None:
                raise failure
        return [value for value, _ in gathered]  # type: ignore[misc]

    def one(self, action: Callable[[], T]) -> T:
        """`action` on the leading rank only; its result on every rank."""
        return self.each(action if self.leads else lambda: None)[0]  # type: ignore[return-value]


def portable(error: BaseException, rank: int, path: Path | None = None, trace: str = "") -> Exception:
    """An error that can travel between ranks and says where it comes from."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(
            str(error.filename or path or "the checkpoint directory"),
            f"{error.strerror or error} (rank {rank})",
            "a place to which every rank can write and from which it can read",
            "free space or permissions there, or point run.dir elsewhere; earlier checkpoints are untouched",
        )
    trace = trace or "".join(traceback.format_exception(error))
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}\n{trace}")
