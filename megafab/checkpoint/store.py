"""Checkpoints on disk: logical tensors and a JSON state, committed whole or not at all.

    <run.dir>/checkpoints/
        latest                      name of the newest checkpoint, for people and scripts
        step_00000100/              appears by one rename, when everything in it is on the disk
            manifest.json           written last: size and SHA-256 of every other file, order of commits
            state.json              progress, data order, techniques, configuration (`state.py`)
            tensors/                torch.distributed.checkpoint format, one file a rank
        .step_00000200.tmp-1f3a9c/  a save under way, or the leftovers of a dead one: removed by the next save

Tensors are never gathered: each rank writes the pieces it owns and reads the boxes it needs, whatever the
number of ranks was when they were written. No byte passes through memory more often than it must: a file is
hashed while it is written, and a box is read into the tensor it belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import shutil
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megafab.checkpoint.pieces import LogicalTensor, Piece
from megafab.errors import UserError

FORMAT = 1
MANIFEST, STATE, TENSORS, LATEST = "manifest.json", "state.json", "tensors", "latest"
INDEX = ".metadata"
WEIGHT = "weight/"  # what engines put before the global name of an fp32 master
_LARGE = 1 << 20  # bytes of a write from which on hashing it in a second thread pays

log = logging.getLogger(__name__)
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
            error = _portable(raised, self.rank)
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


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, LogicalTensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and, once it is committed, delete those that are kept no longer. A collective.

    When it returns, on any rank, the checkpoint is on the disk. When it raises, the directory is as it was
    before. A checkpoint of the same step is replaced.

    It is checked before anything older goes: the manifest is read back, and every file has the size that
    its writer counted. Content is hashed on its way to the disk, not read back: a read would be answered
    from memory and say nothing of the disk. It is hashed again when a run resumes from it.

    Args:
        directory: `<run.dir>/checkpoints`, on a filesystem that all ranks share.
        step: names the checkpoint.
        tensors: this rank's part of every logical tensor it holds.
        state: JSON-able; that of rank 0 is written.
        keep: newest checkpoints to keep, at least 1; one that is damaged does not count.
        keep_every: steps that are multiples of it are kept for ever; 0: none.
        group: see `Team`.

    Raises:
        UserError: on all ranks, when any of them cannot write.
    """
    assert keep >= 1
    team = Team(group)
    draft = team.one(lambda: _begin(directory, step))
    try:
        written = _write_tensors(draft / TENSORS, tensors, team)
        files = {name: entry for part in team.each(lambda: written) for name, entry in part.items()}
        return team.one(lambda: _commit(draft, step, files, state, keep, team.size, keep_every))
    except BaseException:
        if team.leads:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def load(path: Path, tensors: Mapping[str, LogicalTensor], *, group: dist.ProcessGroup | None = None) -> None:
    """Fill the pieces of `tensors`, in place, from the checkpoint at `path`. A collective.

    The pieces may be cut differently from those that were saved, on any number of ranks. Tensors of the
    checkpoint that nobody asks for are left alone.

    Raises:
        UserError: on all ranks; a tensor is missing or has another shape or type.
    """
    team = Team(group)
    with _dcp_errors(path, team.alone):
        state_dict_loader.load(
            dict(tensors),
            storage_reader=_Reader(path / TENSORS),
            planner=_LoadPlanner(path),
            process_group=team.group,
            no_dist=team.alone,
        )


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step_{step:08d}"


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors of the checkpoint at `path`."""
    return list(_Reader(path / TENSORS).read_metadata().state_dict_metadata)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of the checkpoint at `path`."""
    return json.loads((path / STATE).read_text())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`.

    Raises:
        UserError: there is none, it is damaged, or a newer version wrote it.
    """
    where = str(path / MANIFEST)
    fix = "name a directory `step_XXXXXXXX` that a save has finished"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written, intact = manifest["format"], sealed(manifest) == manifest
    except OSError as error:
        raise UserError(where, error.strerror or str(error), "a committed checkpoint", fix) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(where, "damaged content", "a manifest as `save` writes it", fix) from error
    if written != FORMAT:
        raise UserError(where, f"format {written}", f"format {FORMAT}", "use the version that wrote it")
    if not intact:
        raise UserError(where, "damaged content", "a manifest as `save` writes it", fix)
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` with the hash of its own content, by which a change of any of its values shows."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "seal": hashlib.sha256(text.encode()).hexdigest()}


def quick_check(path: Path) -> dict[str, str]:
    """What is wrong with the checkpoint at `path`, by file, as far as the manifest and file sizes tell."""
    try:
        files = read_manifest(path)["files"]
    except UserError as error:
        return {MANIFEST: f"found {error.found}, expected {error.expected}"}
    problems = {name: _wrong_size(path / name, entry["size"]) for name, entry in files.items()}
    return {name: problem for name, problem in problems.items() if problem}


def verify(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, str]:
    """What is wrong with the checkpoint at `path`, by file: sizes, then SHA-256 of all content.

    With `parts` ranks, each hashes only the files of its `part`; together they cover all.
    """
    problems = quick_check(path)
    if MANIFEST in problems:
        return problems
    files = read_manifest(path)["files"]
    for name in sorted(files)[part::parts]:
        if name not in problems:
            found = _sha256(path / name)
            if found != files[name]["sha256"]:
                problems[name] = f"SHA-256 {found[:12]}..., expected {files[name]['sha256'][:12]}..."
    return problems


def candidates(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, the last committed first.

    The order is that of commits, not of steps: a run that went back to an early checkpoint continues from
    what it saved since. Those whose manifest is damaged or missing come first, to be reported by a check: a
    save names a directory `step_*` only when its manifest is there.
    """
    ranked = []
    for path in directory.glob("step_*"):
        manifest = _manifest_or_none(path)
        ranked.append((float("inf") if manifest is None else manifest["commit"], path))
    return [path for _, path in sorted(ranked, reverse=True)]


def check_latest(directory: Path) -> str:
    """What is wrong with the pointer `latest` in `directory`, which has checkpoints; empty: nothing.

    Nothing is read through it. It may name an older checkpoint: a save was killed before it moved.
    """
    try:
        name = (directory / LATEST).read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        name = getattr(error, "strerror", None) or "damaged content"
    else:
        if (directory / name / MANIFEST).exists() and name.startswith("step_"):
            return ""
    return f"{directory / LATEST}: found {name!r}, expected the name of a checkpoint beside it"


def first_intact(
    paths: Sequence[Path], check: Callable[[Path], Mapping[str, str]]
) -> tuple[Path | None, list[str]]:
    """The first path that `check` finds nothing wrong with, and what is wrong with those before it.

    Raises:
        UserError: there are checkpoints and all are damaged. Starting afresh would hide that.
    """
    damaged = []
    for path in paths:
        problems = check(path)
        if not problems:
            return path, damaged
        damaged.append(f"{path}: " + "; ".join(f"{name}: {what}" for name, what in problems.items()))
    if damaged:
        raise UserError(
            str(paths[0].parent),
            f"only damaged checkpoints ({' | '.join(damaged)})",
            "one intact checkpoint",
            "restore the files, or set checkpoint.resume=none to start afresh in another run.dir",
        )
    return None, damaged


def newest(directory: Path) -> Path | None:
    """The last committed checkpoint in `directory` that passes the quick check, or None if there is none.

    Logs a warning for every damaged one it passes over.

    Raises:
        UserError: see `first_intact`.
    """
    path, damaged = first_intact(candidates(directory), quick_check)
    for message in damaged:
        log.warning("passing over a damaged checkpoint: %s", message)
    return path


def locate(where: Path, *, key: str = "checkpoint.resume") -> list[Path]:
    """The checkpoints that `where` names: a step directory, or the candidates of a run directory.

    Args:
        where: the directory.
        key: of the configuration, that named it.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    if (where / MANIFEST).exists():
        found = [where]
    elif where.is_dir():
        found = candidates(where / "checkpoints") or candidates(where)
    if not found:
        raise UserError(
            f"{key}={where}",
            "no checkpoint there" if where.exists() else "no such directory",
            "a directory `step_XXXXXXXX` with a manifest.json, or a run directory that has checkpoints",
            "correct the path",
        )
    return found


# Committing.


def _begin(directory: Path, step: int) -> Path:
    """Remove what dead saves left, and make the directory of this one."""
    for leftover in directory.glob(".step_*.tmp-*"):
        shutil.rmtree(leftover)
    draft = _aside(directory, step)
    (draft / TENSORS).mkdir(parents=True)
    return draft


def _aside(directory: Path, step: int) -> Path:
    return directory / f".step_{step:08d}.tmp-{uuid.uuid4().hex[:6]}"


def _describe(draft: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and hash of the files that this rank wrote; rank 0 writes the index of tensors too."""
    paths = list((draft / TENSORS).glob(f"__{rank}_*"))
    if rank == 0:
        paths.append(draft / TENSORS / INDEX)
    return {f"{TENSORS}/{path.name}": _entry(path) for path in paths}


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _commit(
    draft: Path,
    step: int,
    files: dict[str, dict[str, Any]],
    state: Mapping[str, Any],
    keep: int,
    ranks: int,
    keep_every: int = 0,
) -> Path:
    directory = draft.parent
    _write(draft / STATE, json.dumps(state, indent=1))
    files = {**files, STATE: _entry(draft / STATE)}
    for name, entry in files.items():
        if _wrong_size(draft / name, entry["size"]):
            raise UserError(
                f"run.dir, {draft / name}",
                "a file that another rank wrote but rank 0 does not see",
                "a filesystem that all nodes share",
                "point run.dir at one",
            )
    older = candidates(directory)
    commits = [m["commit"] for m in map(_manifest_or_none, older) if m is not None]
    manifest = {
        "format": FORMAT,
        "step": step,
        "commit": 1 + max(commits, default=0),
        "ranks": ranks,
        "torch": torch.__version__,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": files,
    }
    _write(draft / MANIFEST, json.dumps(sealed(manifest), indent=1))
    _sync_directory(draft / TENSORS)
    _sync_directory(draft)
    problems = quick_check(draft)
    if problems:
        name, problem = next(iter(problems.items()))
        raise UserError(str(draft / name), problem, "what was just written", "check the disk")
    final = path_of(directory, step)
    if final.exists():
        final.rename(_aside(directory, step))
    draft.rename(final)
    _sync_directory(directory)
    # Committed: what follows is housekeeping, whose failure must not be taken for that of the save.
    try:
        _point_latest(directory, final.name)
        for path in _expired(directory, keep, keep_every):
            _discard(path)
        for replaced in directory.glob(".step_*.tmp-*"):
            shutil.rmtree(replaced)
    except OSError as error:
        log.warning("saved %s, but could not tidy up %s: %s", final, directory, error)
    return final


def _expired(directory: Path, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints older than the `keep` newest sound ones, but for every `keep_every`-th step.

    One whose manifest is damaged has no place in the order: it is left for the user to look at.
    """
    expired, sound = [], 0
    for path in candidates(directory):
        if sound < keep:
            sound += not quick_check(path)
        elif not keep_every or int(path.name.removeprefix("step_")) % keep_every:
            expired.append(path)
    return expired


def _manifest_or_none(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(UserError):
        return read_manifest(path)
    return None


def _point_latest(directory: Path, name: str) -> None:
    draft = directory / f".{LATEST}.tmp"
    _write(draft, name + "\n")
    draft.rename(directory / LATEST)
    _sync_directory(directory)


def _discard(path: Path) -> None:
    """Delete a checkpoint; it stops being one at once, not file by file."""
    hidden = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:6]}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as `fsync` of a file does its content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    return "" if found == size else f"{found} bytes, expected {size}"


# Tensors: logical tensors in terms of torch.distributed.checkpoint.


def _write_tensors(
    directory: Path, tensors: Mapping[str, LogicalTensor], team: Team
) -> dict[str, dict[str, Any]]:
    """Size and hash of the files that this rank wrote, by their names in the manifest."""
    writer = _Writer(directory)
    with _dcp_errors(directory, team.alone):
        state_dict_saver.save(
            dict(tensors),
            storage_writer=writer,
            planner=_SavePlanner(tensors),
            process_group=team.group,
            no_dist=team.alone,
        )
    return {f"{TENSORS}/{name}": entry for name, entry in writer.fs.written.items()}


class _SavePlanner(DefaultSavePlanner):
    """Every rank writes the pieces it owns, as they are; the base class checks that they do not overlap."""

    def __init__(self, tensors: Mapping[str, LogicalTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._pieces = tensors, _by_offset(tensors)

    def create_local_plan(self) -> SavePlan:
        items = [
            _write_item(name, tensor, piece)
            for name, tensor in self._tensors.items()
            if tensor.owner
            for piece in tensor.pieces
        ]
        # The leader must know the names of replicas too: a tensor that nobody owns would be lost silently.
        return SavePlan(items, planner_data={name: t.global_shape for name, t in self._tensors.items()})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _require_cover(all_plans)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return _alone_in_storage(self._pieces[index.fqn, tuple(index.offset)].detach().contiguous())


class _LoadPlanner(LoadPlanner):
    """Every rank reads, into each piece, the parts of saved boxes that overlap it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        assert metadata is not None
        self._tensors: dict[str, LogicalTensor] = state_dict
        self._pieces = _by_offset(state_dict)
        self._saved: dict[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self._tensors.items():
            if tensor.pieces:
                saved = self._matching(name, tensor)
                chunks = [_chunk(piece) for piece in tensor.pieces]
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
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("checkpoints hold tensors only; the rest is in state.json")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.offset is not None
        piece = self._pieces[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].detach()
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return piece[tuple(slice(o, o + n) for o, n in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """`tensor` is a view of the piece: written already."""


def _alone_in_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage is no larger, which `torch.save` writes without a copy."""
    if not tensor.is_cpu or not tensor.numel() or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _by_offset(tensors: Mapping[str, LogicalTensor]) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    return {(name, piece.offset): piece.tensor for name, t in tensors.items() for piece in t.pieces}


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.size())


def _write_item(name: str, tensor: LogicalTensor, piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size(piece.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(piece),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.global_shape),
        ),
    )


def _require_cover(plans: Sequence[SavePlan]) -> None:
    """Owned pieces have as many elements as each tensor; else the engine described them wrongly."""
    missing: dict[str, int] = {}
    for plan in plans:
        for name, shape in plan.planner_data.items():
            missing.setdefault(name, math.prod(shape))
    for item in (item for plan in plans for item in plan.items):
        assert item.tensor_data is not None
        missing[item.index.fqn] -= math.prod(item.tensor_data.chunk.sizes)
    wrong = [f"{name} ({count} elements)" for name, count in missing.items() if count]
    assert not wrong, f"without an owner, or (negative) with several: {', '.join(wrong)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _HashingFileSystem(FileSystem):
    """The local files, of which each that is written is hashed on the way: `written` has the results."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with open(path, "wb") as raw, ThreadPoolExecutor(1) as pool:
            stream = _HashedFile(raw, pool)
            yield stream
        # The index is written beside its name and then renamed.
        self.written[Path(path).name.removesuffix(".tmp")] = stream.entry()


class _HashedFile(io.RawIOBase):
    """A file to write, and the hash of what was written; the pool's thread hashes what this one writes."""

    def __init__(self, raw: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._raw, self._pool = raw, pool
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _LARGE:
            self._hash.update(view)
            self._raw.write(view)
        else:
            hashed = self._pool.submit(self._hash.update, view)
            try:
                self._raw.write(view)
            finally:
                hashed.result()  # `data` is the caller's again when this returns
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        self._raw.flush()  # it is asked for to sync the file
        return self._raw.fileno()

    def entry(self) -> dict[str, Any]:
        """Size and hash, as the manifest has them."""
        return {"size": self._size, "sha256": self._hash.hexdigest()}


class _Writer(FileSystemWriter):
    """The file writer; hashes, and raises what the system said when the disk is full."""

    fs: _HashingFileSystem

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = _HashingFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # by default, the path of the draft

    def write_data(self, plan, planner):
        try:
            with _without_crc32():
                return super().write_data(plan, planner)
        except RuntimeError as error:  # what the archive made of it
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out checksums, which no reader of torch looks at: the file is hashed whole."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Reader(FileSystemReader):
    """The file reader. Reads boxes into their place, and runs no code that somebody put into the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            return _MetadataUnpickler(file).load()

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._shapes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
            for chunk in saved.chunks
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with open(Path(self.path) / name, "rb", buffering=0) as file:
                items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
                for item in items:
                    self._read(file, item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: io.FileIO, item: ReadItem, target: torch.Tensor) -> None:
        """The part of a stored box that `item` asks for, into `target`, by way of the rows it is in."""
        assert item.storage_index.offset is not None
        shape = self._shapes[item.storage_index.fqn, tuple(item.storage_index.offset)]
        inner = shape[1:]
        first, rows = (item.storage_offsets[0], item.lengths[0]) if shape else (0, 1)
        row = math.prod(inner) * target.element_size()
        start = self._begin_of_values(file, self.storage_data[item.storage_index]) + first * row
        if target.is_cpu and target.is_contiguous() and tuple(item.lengths[1:]) == inner:
            _read_into(file, start, target)
            return
        band = torch.empty((rows, *inner) if shape else (), dtype=target.dtype)
        _read_into(file, start, band)
        parts = zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
        target.copy_(band[(..., *(slice(offset, offset + length) for offset, length in parts))])

    @staticmethod
    def _begin_of_values(file: io.FileIO, stored: Any) -> int:
        """Where in the file the values of a box begin: what `torch.save` writes is an archive of records."""
        archive: Any = torch._C.PyTorchFileReader(cast(IO[bytes], _Slice(file, stored.offset, stored.length)))
        return stored.offset + archive.get_record_offset("data/0")


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._length - self._at]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at)
        self._at += count
        return count


def _read_into(file: io.FileIO, start: int, target: torch.Tensor) -> None:
    """Fill a contiguous tensor with the bytes from `start` on."""
    if not target.numel():
        return
    view, done = target.view(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], start + done)
        if not count:
            raise OSError(errno.EIO, "the file ends too early", file.name)
        done += count


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that describe tensors, and nothing else."""

    _KNOWN = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")
        return super().find_class(module, name)


# Errors.


@contextlib.contextmanager
def _dcp_errors(path: Path, alone: bool = True) -> Iterator[None]:
    """Give all ranks the same plain error for what torch.distributed.checkpoint collected from them."""
    try:
        # It warns those who are alone. A save in a thread is never that, and filters are for all threads.
        with warnings.catch_warnings() if alone else contextlib.nullcontext():
            if alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, trace) = min(error.failures.items())
        raise _portable(cause, rank, path, "".join(traceback.format_list(trace))) from None


def _portable(error: BaseException, rank: int, path: Path | None = None, trace: str = "") -> Exception:
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
