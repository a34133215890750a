"""What lets a run train on while its checkpoint is written: a copy that no later step changes, and a thread.

The copy lies in host memory, pinned where there is a GPU, and is made into the same buffers each time. It
costs a rank as much memory as it writes: for fp32 masters and Adam's moments, 12 bytes a parameter it owns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from megafab.checkpoint.pieces import LogicalTensor, Piece
from megafab.platform import platform


class Snapshot:
    """Copies of what this rank writes, by name. A copy is valid until the next one is taken."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
        """The same logical tensors with pieces of their own; those of replicas, which are not written, go.

        When it returns, the originals may change.
        """
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        copies = {name: _copied(tensor, self._buffers[name]) for name, tensor in tensors.items()}
        platform.synchronize()
        return copies

    def _buffer(self, name: str, tensor: LogicalTensor) -> torch.Tensor:
        """Memory for the pieces of `tensor`, flat: that of the last time if it fits."""
        size = sum(piece.tensor.numel() for piece in _written(tensor))
        buffer = self._buffers.get(name)
        if buffer is not None and (buffer.numel(), buffer.dtype) == (size, tensor.dtype):
            return buffer
        return platform.host_buffer(size, tensor.dtype)


def _written(tensor: LogicalTensor) -> tuple[Piece, ...]:
    return tensor.pieces if tensor.owner else ()


def _copied(tensor: LogicalTensor, buffer: torch.Tensor) -> LogicalTensor:
    pieces, used = [], 0
    for piece in _written(tensor):
        source = piece.tensor.detach()
        copy = buffer[used : used + source.numel()].view(source.shape)
        copy.copy_(source, non_blocking=True)
        pieces.append(Piece(piece.offset, copy))
        used += source.numel()
    return LogicalTensor(tensor.global_shape, tensor.dtype, tuple(pieces), tensor.owner)


class Background:
    """A thread for one action at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], object]) -> None:
        """Run `action` while the caller goes on; the last one has been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                action()
            except BaseException as error:  # it belongs to whoever waits
                self._error = error

        # Should the process be told to end at once, what it writes is an uncommitted draft.
        self._thread = threading.Thread(target=run, name="megafab-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Until the action under way has ended, if any; what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
