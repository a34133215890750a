"""A checkpoint written by one process, tensor by tensor as a source yields them.

Training saves what its ranks hold; here nothing is held. A tensor is asked for band by band of its rows when
its turn comes, and let go.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megafab.checkpoint import store
from megafab.checkpoint.reader import TensorInfo
from megafab.checkpoint.state import _versions
from megafab.errors import UserError

FILE_BYTES = 4 << 30  # of tensors in a file, unless the caller says otherwise

Source = Callable[[str, tuple[int, int]], torch.Tensor]  # name, (first row, rows) -> these rows
Deal = Callable[[Sequence[int]], list[int]]  # sizes of tensors in bytes -> the number of each one's file


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
    directory = run_dir / "checkpoints"
    draft = store._begin(directory, step)
    files = _Writer(draft / store.TENSORS, deal or by_size(FILE_BYTES))
    with store._dcp_errors(draft):
        state_dict_saver.save(
            dict(tensors), storage_writer=files, planner=_Planner(tensors, source), no_dist=True
        )
    entries = {f"{store.TENSORS}/{name}": entry for name, entry in files.fs.written.items()}
    return store._commit(draft, step, entries, state, keep=1, ranks=1)


def derived_state(
    operation: str, sources: Sequence[tuple[Path, Mapping[str, Any]]], *, weights_only: bool
) -> dict[str, Any]:
    """The state of a checkpoint that `operation` made of `sources`: that of the last, with its lineage.

    With `weights_only`, a run that resumes from it starts anew from its weights (`state.py`).
    """
    path, state = sources[-1]
    entries = [
        {
            "from": str(path.resolve()),
            "step": state["progress"]["step"],
            "written_at": state["written_at"],
            "operation": operation,
        }
        for path, state in sources
    ]
    return {
        **state,
        "weights_only": weights_only or state["weights_only"],
        "versions": _versions(),
        "written_at": now(),
        "lineage": [*state["lineage"], *entries],
    }


def now() -> str:
    """The time as checkpoints write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class _Planner(DefaultSavePlanner):
    """Every band of every tensor is an item; its values come from the source when they are to be written."""

    def __init__(self, tensors: Mapping[str, TensorInfo], source: Source) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._source = tensors, source

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(n, info, band) for n, info in self._tensors.items() for band in info.bands()])

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        info = self._tensors[index.fqn]
        band = next(b for b in info.bands() if not index.offset or b[0] == index.offset[0])
        tensor = self._source(index.fqn, band)
        assert tensor.dtype == info.dtype, index.fqn
        assert tuple(tensor.shape) == _box(info, band)[1], index.fqn
        return store._alone_in_storage(tensor.contiguous())


def _box(info: TensorInfo, band: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a band."""
    if not info.shape:
        return (), ()
    return (band[0], *(0,) * (len(info.shape) - 1)), (band[1], *info.shape[1:])


def _item(name: str, info: TensorInfo, band: tuple[int, int]) -> WriteItem:
    offset, shape = map(torch.Size, _box(info, band))
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, shape),
        properties=TensorProperties(dtype=info.dtype),
        size=torch.Size(info.shape),
    )
    return WriteItem(index=MetadataIndex(name, offset), type=WriteItemType.SHARD, tensor_data=data)


class _Writer(store._Writer):
    """The file writer of training, with the items dealt to several files."""

    def __init__(self, path: Path, deal: Deal) -> None:
        super().__init__(path)
        self._deal = deal

    def _write_data(self, planner: SavePlanner, file_queue: Queue) -> Future[list[WriteResult]]:
        """Write item by item; torch's own keeps every tensor of a file until the file is closed."""
        _, _, items = file_queue.get_nowait()
        results: list[WriteResult] = []
        for number, part in enumerate(_dealt(items, self._deal)):
            name = f"__0_{number}.distcp"
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                for item in part:
                    begin = stream.tell()
                    torch.save(planner.resolve_data(item), stream)
                    stored = _StorageInfo(name, begin, stream.tell() - begin)
                    results.append(WriteResult(item.index, stored.length, stored))
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


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


def _dealt(items: Sequence[WriteItem], deal: Deal) -> list[list[WriteItem]]:
    """The items file by file; a tensor's bands stay together."""
    sizes: dict[str, int] = {}
    for item in items:
        assert item.tensor_data is not None
        size = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        sizes[item.index.fqn] = sizes.get(item.index.fqn, 0) + size
    number = dict(zip(sizes, deal(list(sizes.values())), strict=True))
    files: dict[int, list[WriteItem]] = {}
    for item in items:
        files.setdefault(number[item.index.fqn], []).append(item)
    return list(files.values())
