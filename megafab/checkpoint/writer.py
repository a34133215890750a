"""A checkpoint written by one process, tensor by tensor as a source yields them.

Training saves what its ranks hold; here nothing is held. A tensor is asked for band by band of its rows when
its turn comes, and let go.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megafab.checkpoint import dcp, store
from megafab.checkpoint.files import Deal
from megafab.checkpoint.reader import TensorInfo
from megafab.errors import UserError

FILE_BYTES = 4 << 30  # of tensors in a file, unless the caller says otherwise

Source = Callable[[str, tuple[int, int]], torch.Tensor]  # name, (first row, rows) -> these rows


@contextmanager
def fresh_directory(to: Path) -> Iterator[Path]:
    """A draft that becomes the directory `to` when the body ends well, and nothing when it does not.

    Raises:
        UserError: `to` is something already, or cannot be made.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        expected, fix = "a place for a new directory", "give to= another place, or remove what is there"
        raise UserError(f"to={to}", "something there already", expected, fix)
    draft = to.absolute().with_name(f".{to.name}.tmp-{uuid.uuid4().hex[:6]}")
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.replace(to)
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(
            f"to={to}", found, "room and permission to write", "give to= another place"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, TensorInfo],
    source: Source,
    state: Mapping[str, Any],
    *,
    deal: Deal | None = None,
) -> Path:
    """Commit `<run_dir>/checkpoints/step_XXXXXXXX` with these tensors; returns it.

    Args:
        run_dir: has no checkpoint yet.
        step: names the checkpoint.
        tensors: what will be written; `pieces` does not matter.
        source: gives each band of each of them (`TensorInfo.bands`), once, in order.
        state: the JSON beside them.
        deal: which tensors share a file: `by_size`, `by_count`; null: `by_size(FILE_BYTES)`.
    """
    draft = store.begin(run_dir / "checkpoints", step)
    planner = _BandSavePlanner(tensors, source)
    files = dcp.write(draft / store.TENSORS, planner, None, deal or by_size(FILE_BYTES))
    return store.commit(draft, step, files, state, keep=1, ranks=1)


class _BandSavePlanner(DefaultSavePlanner):
    """Every band of every tensor is an item; its values come from the source when they are to be written."""

    def __init__(self, tensors: Mapping[str, TensorInfo], source: Source) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._source = tensors, source

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                dcp.item(name, info.shape, info.dtype, *_box(info, band))
                for name, info in self._tensors.items()
                for band in info.bands()
            ]
        )

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        info = self._tensors[index.fqn]
        band = next(b for b in info.bands() if not index.offset or b[0] == index.offset[0])
        tensor = self._source(index.fqn, band)
        assert tensor.dtype == info.dtype, index.fqn
        assert tuple(tensor.shape) == _box(info, band)[1], index.fqn
        return tensor


def _box(info: TensorInfo, band: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a band."""
    if not info.shape:
        return (), ()
    return (band[0], *(0,) * (len(info.shape) - 1)), (band[1], *info.shape[1:])


def by_size(file_bytes: int) -> Deal:
    """Tensors go into a file until it would exceed `file_bytes`; a larger one has a file of its own."""

    def deal(sizes: Sequence[int]) -> list[int]:
        files, number, used = [], 0, 0
        for size in sizes:
            if used and used + size > file_bytes:
                number, used = number + 1, 0
            used += size
            files.append(number)
        return files

    return deal


def by_count(count: int) -> Deal:
    """At most `count` files, of about the same size as far as whole tensors allow."""

    def deal(sizes: Sequence[int]) -> list[int]:
        total, start, files = max(sum(sizes), 1), 0, []
        for size in sizes:
            files.append(start * count // total)
            start += size
        return files

    return deal
