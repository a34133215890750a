"""Logical tensors in terms of torch.distributed.checkpoint: which boxes a rank writes, and which it reads."""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megafab.checkpoint.files import Deal, Entry, FileReader, FileWriter
from megafab.checkpoint.pieces import LogicalTensor
from megafab.checkpoint.team import Team, portable
from megafab.errors import UserError

# Planners are given the tensors; torch, which would ask each whether it is more than that, gets none of them.
_NONE: dict[str, Any] = {}


def write(
    directory: Path, planner: SavePlanner, team: Team | None, deal: Deal | None = None
) -> dict[str, Entry]:
    """Write the tensors of `planner` into `directory`. A collective.

    Args:
        directory: is there.
        planner: `PieceSavePlanner` for what ranks hold.
        team: None: this process alone.
        deal: see `FileWriter`.

    Returns: size and hash of each file that this rank wrote, by `directory's name/its name`.
    """
    writer = FileWriter(directory, deal)
    with _errors(directory, alone := team is None or team.alone):
        state_dict_saver.save(
            _NONE,
            storage_writer=writer,
            planner=planner,
            process_group=team.group if team else None,
            no_dist=alone,
        )
    return {f"{directory.name}/{name}": entry for name, entry in writer.written.items()}


def read(directory: Path, tensors: Mapping[str, LogicalTensor], team: Team) -> None:
    """Fill the pieces of `tensors` from the files in `directory`. A collective."""
    with _errors(directory.parent, team.alone):
        state_dict_loader.load(
            _NONE,
            storage_reader=FileReader(directory),
            planner=PieceLoadPlanner(directory.parent, tensors),
            process_group=team.group,
            no_dist=team.alone,
        )


class PieceSavePlanner(DefaultSavePlanner):
    """Every rank writes the pieces it owns, as they are; the base class checks that they do not overlap."""

    def __init__(self, tensors: Mapping[str, LogicalTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._pieces = tensors, _by_offset(tensors)

    def create_local_plan(self) -> SavePlan:
        """The boxes of this rank."""
        items = [
            item(name, tensor.global_shape, tensor.dtype, piece.offset, piece.tensor.shape)
            for name, tensor in self._tensors.items()
            if tensor.owner
            for piece in tensor.pieces
        ]
        # The leader must know the names of replicas too: a tensor that nobody owns would be lost silently.
        return SavePlan(items, planner_data={name: t.global_shape for name, t in self._tensors.items()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are; together they cover each tensor once."""
        _require_cover(all_plans)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The values of a box."""
        assert index.offset is not None
        return self._pieces[index.fqn, tuple(index.offset)]


class PieceLoadPlanner(LoadPlanner):
    """Every rank reads, into each piece, the parts of saved boxes that overlap it.

    Args:
        path: of the checkpoint, for messages.
        tensors: to fill, by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, LogicalTensor]) -> None:
        self._path, self._tensors, self._pieces = path, tensors, _by_offset(tensors)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """Take the index of what is saved."""
        assert metadata is not None
        self._saved: dict[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """The parts of boxes that this rank needs.

        Raises:
            UserError: a tensor is missing or has another shape or type.
        """
        items = []
        for name, tensor in self._tensors.items():
            if tensor.pieces:
                saved = self._matching(name, tensor)
                chunks = [
                    ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.size())
                    for piece in tensor.pieces
                ]
                items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def _matching(self, name: str, tensor: LogicalTensor) -> TensorStorageMetadata:
        saved = self._saved.get(name)
        fix = "resume with the model, precision and techniques that the checkpoint was written with"
        wanted = f"{_dtype_name(tensor.dtype)} of shape {tensor.global_shape}"
        if saved is None:
            raise UserError(f"{self._path}, tensor {name}", "no such tensor", wanted, fix)
        if tuple(saved.size) != tensor.global_shape or saved.properties.dtype != tensor.dtype:
            found = f"{_dtype_name(saved.properties.dtype)} of shape {tuple(saved.size)}"
            raise UserError(f"{self._path}, tensor {name}", found, wanted, fix)
        return saved

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank's own."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never asked for."""
        raise AssertionError("checkpoints hold tensors only; the rest is in state.json")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where to read a part to: a view of the piece."""
        assert read_item.dest_index.offset is not None
        piece = self._pieces[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].detach()
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return piece[tuple(slice(o, o + n) for o, n in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """`tensor` is a view of the piece: written already."""


def _by_offset(tensors: Mapping[str, LogicalTensor]) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    return {(name, piece.offset): piece.tensor for name, t in tensors.items() for piece in t.pieces}


def item(
    name: str, shape: Sequence[int], dtype: torch.dtype, offset: Sequence[int], size: Sequence[int]
) -> WriteItem:
    """A box to write: at `offset` and as large as `size`, of the tensor `name` of that global shape."""
    return WriteItem(
        index=MetadataIndex(name, torch.Size(offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offset), torch.Size(size)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
        ),
    )


def _require_cover(plans: Sequence[SavePlan]) -> None:
    """Owned pieces have as many elements as each tensor; else the engine described them wrongly."""
    missing: dict[str, int] = {}
    for plan in plans:
        for name, shape in plan.planner_data.items():
            missing.setdefault(name, math.prod(shape))
    for box in (box for plan in plans for box in plan.items):
        assert box.tensor_data is not None
        missing[box.index.fqn] -= math.prod(box.tensor_data.chunk.sizes)
    wrong = [f"{name} ({count} elements)" for name, count in missing.items() if count]
    assert not wrong, f"without an owner, or (negative) with several: {', '.join(wrong)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _errors(path: Path, alone: bool) -> Iterator[None]:
    """Give all ranks the same plain error for what torch.distributed.checkpoint collected from them."""
    try:
        # It warns those who are alone. A save in a thread is never that, and filters are for all threads.
        with warnings.catch_warnings() if alone else contextlib.nullcontext():
            if alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, trace) = min(error.failures.items())
        raise portable(cause, rank, path, "".join(traceback.format_list(trace))) from None
