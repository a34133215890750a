"""Random access to the logical tensors of one checkpoint, on one process and without a model.

The index of tensors is read once; after that a tensor, or a band of its rows, costs its own bytes on the disk
and in memory, however it was cut when it was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megafab.checkpoint import store
from megafab.checkpoint.dcp import PieceLoadPlanner
from megafab.checkpoint.files import FileReader
from megafab.checkpoint.pieces import LogicalTensor, Piece
from megafab.errors import UserError

BAND_BYTES = 64 << 20  # of a band of rows, unless one row is larger


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the index says of a tensor; `pieces` is how many boxes it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> int:
        """Bytes of the values in files, where bools are packed (`files.py`)."""
        return -(-math.prod(self.shape) // 8) if self.dtype == torch.bool else self.nbytes

    @property
    def like(self) -> tuple[tuple[int, ...], torch.dtype]:
        """What two tensors must have in common for their values to be compared."""
        return self.shape, self.dtype

    def bands(self) -> Iterator[tuple[int, int]]:
        """The tensor in bands of at most `BAND_BYTES`: (first row, rows).

        A scalar is one row, a tensor without rows one band of none.
        """
        height = self.shape[0] if self.shape else 1
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, BAND_BYTES // max(row, 1))
        yield from ((first, min(step, height - first)) for first in range(0, max(height, 1), step))


class Reader:
    """The tensors of the checkpoint at `path` by name.

    Raises:
        UserError: `path` is not a committed checkpoint, or files are missing or have another size.
    """

    def __init__(self, path: Path) -> None:
        problems = store.quick_check(path)
        if problems:
            name, problem = next(iter(problems.items()))
            raise _damaged(path, f"{name}: {problem}")
        self.path = path
        self._files = FileReader(path / store.TENSORS)
        try:
            self._metadata: Metadata = self._files.read_metadata()
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise _damaged(path, f"an index that cannot be read ({error})") from None
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)

    @cached_property
    def state(self) -> Mapping[str, Any]:
        """The JSON beside the tensors.

        Raises:
            UserError: it is damaged, as far as it cannot be read.
        """
        try:
            return store.read_state(self.path)
        except ValueError as error:
            raise _damaged(self.path, f"a {store.STATE} that cannot be read ({error})") from None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, in the natural order of their names: layer 2 before layer 10."""
        index = self._metadata.state_dict_metadata
        entries = {name: entry for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
        return {
            name: TensorInfo(
                tuple(entries[name].size), entries[name].properties.dtype, len(entries[name].chunks)
            )
            for name in sorted(entries, key=natural)
        }

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The master weights by global name."""
        return self.named(store.WEIGHT)

    def named(self, prefix: str) -> dict[str, TensorInfo]:
        """The tensors whose names begin so, by what follows: from the embedding to the output."""
        found = {n.removeprefix(prefix): info for n, info in self.tensors.items() if n.startswith(prefix)}
        return dict(sorted(found.items(), key=lambda item: _place(item[0])))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, band: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or the rows of one `band` of it, on the host.

        Raises:
            UserError: the file it is in is damaged.
        """
        info = self.tensors[name]
        shape, offset = info.shape, (0,) * len(info.shape)
        if band is not None and shape:
            shape, offset = (band[1], *shape[1:]), (band[0], *offset[1:])
        out = torch.empty(shape, dtype=info.dtype)
        asked = LogicalTensor(info.shape, info.dtype, (Piece(offset, out),), owner=False)
        planner = PieceLoadPlanner(self.path, {name: asked})
        planner.set_up_planner({}, self._metadata)
        try:
            self._files.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError) as error:  # the archive's own tell what they could not make out
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise _damaged(self.path, f"a tensor {name} that cannot be read ({reason})") from None
        return out


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that counts: layers.2 before layers.10."""
    return tuple(
        (0, int(part)) if part.isdigit() else (1, part) for part in name.replace("/", ".").split(".")
    )


def _place(name: str) -> tuple[int, tuple[tuple[int, int | str], ...]]:
    """A sort key from the embedding to the output."""
    order = ("embedding.", "decoder.layers.", "decoder.")
    return next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order)), natural(name)


def _damaged(path: Path, found: str) -> UserError:
    fix = f"see what is damaged: megafab ckpt verify {path}"
    return UserError(str(path), found, "an intact checkpoint", fix)
