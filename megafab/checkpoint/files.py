"""The files that the tensors of a checkpoint are in: hashed while they are written, read into their place.

The format is that of torch.distributed.checkpoint: a file is a row of archives as `torch.save` makes them,
one a box of a tensor, and the index says which box is where. No byte passes through memory more often than
it must, and no more than one box is held beside the tensors themselves. The values of a bool tensor, the
mask of a sparse model, are stored eight to a byte, the first in the highest bit, padded to whole bytes at the
end of a box; the index calls them what they are, bool of the tensor's shape.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as Running
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options
from xxhash import xxh3_128

INDEX = ".metadata"
HASH = "xxh3_128"  # what the hash of a file is called where it is recorded
_CHUNK = 4 << 20  # bytes that are hashed and then, still in the processor's cache, written
# Bytes written after which the disk is told to begin. Less often, it idles at first; more often, the file
# system lets the two wait for each other: at 32 MiB a save is at times faster, at times half as fast.
_AHEAD = 128 << 20

Entry = dict[str, Any]  # size and hash of a file, as the manifest has them
Deal = Callable[[Sequence[int]], list[int]]  # sizes of tensors in bytes -> the number of each one's file


def entry(path: Path) -> Entry:
    """Size and hash of the file at `path`."""
    return {"size": path.stat().st_size, HASH: hash_of(path)}


def hash_of(path: Path) -> str:
    """XXH3 (128 bits) of the file at `path`, in hexadecimal digits.

    It finds every accident and is no defence against an attacker; it is eight times as fast as SHA-256,
    which would be slower than a disk.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


class FileWriter(FileSystemWriter):
    """Writes the boxes of a plan one after the other: of a GPU's, one at a time is in host memory.

    torch's own holds all tensors of a file until the file is closed. Raises what the system said when the
    disk is full.

    Args:
        path: the directory.
        deal: which tensors share a file; None: all.
    """

    fs: _OutFiles

    def __init__(self, path: Path, deal: Deal | None = None) -> None:
        super().__init__(path)
        self.fs = _OutFiles()
        self._deal = deal or _together

    @property
    def written(self) -> dict[str, Entry]:
        """Size and hash of each file, by name."""
        return self.fs.written

    def storage_meta(self) -> StorageMeta:
        """Nothing; by default, the path of the draft."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync the files of this rank."""
        results: list[WriteResult] = []
        try:
            with _without_crc32():
                for number, items in enumerate(_dealt(plan.items, self._deal)):
                    assert plan.storage_data is not None
                    results += self._write(f"{plan.storage_data.prefix}{number}.distcp", items, planner)
        except RuntimeError as error:  # what the archive made of it
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[WriteResult]:
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in items:
                begin = stream.tell()
                torch.save(_archivable(_packed(planner.resolve_data(item))), stream)
                stored = _StorageInfo(name, begin, stream.tell() - begin)
                yield WriteResult(item.index, stored.length, stored)
            os.fsync(stream.fileno())


def _together(sizes: Sequence[int]) -> list[int]:
    return [0] * len(sizes)


def _dealt(items: Sequence[WriteItem], deal: Deal) -> list[list[WriteItem]]:
    """The items file by file; the boxes of a tensor stay together."""
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


def _packed(data: Any) -> torch.Tensor:
    """Bools eight to a byte, uint8 [ceil(n / 8)]; other tensors as they are."""
    if data.dtype != torch.bool:
        return data
    return torch.from_numpy(np.packbits(data.detach().cpu().numpy()))


def _archivable(data: Any) -> torch.Tensor:
    """The tensor in host memory, alone in its storage, which `torch.save` writes whole and without a copy."""
    tensor = data.detach().cpu().contiguous()
    if not tensor.numel() or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out checksums, which no reader of torch looks at: the file is hashed whole."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _OutFiles(FileSystem):
    """The local files, of which each that is written is an `_OutFile`: `written` has what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, Entry] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with open(path, "wb") as raw, ThreadPoolExecutor(1) as pool:
            stream = _OutFile(raw, pool)
            yield stream
        # The index is written beside its name and then renamed.
        self.written[Path(path).name.removesuffix(".tmp")] = stream.entry()


class _OutFile(io.RawIOBase):
    """A file to write: hashed on the way, and going to the disk while the rest of it is written."""

    def __init__(self, raw: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._raw, self._pool = raw, pool
        self._hash, self._size, self._sent = xxh3_128(), 0, 0
        self._sending: Running[None] | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            self._raw.write(chunk)
            self._size += len(chunk)
            self._send_ahead()
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        """Of the file, with all that was written in it: it is asked for to sync the file."""
        self._raw.flush()
        if self._sending is not None:
            self._sending.result()  # the system tells of an error once, perhaps there
        return self._raw.fileno()

    def entry(self) -> Entry:
        """Size and hash."""
        return {"size": self._size, HASH: self._hash.hexdigest()}

    def _send_ahead(self) -> None:
        """Let the disk write what there is, one such call at a time: a sync at the end would wait for all."""
        if self._size - self._sent < _AHEAD:
            return
        if self._sending is not None:
            if not self._sending.done():
                return
            self._sending.result()
        self._sent = self._size
        self._sending = self._pool.submit(os.fdatasync, self._raw.fileno())


class FileReader(FileSystemReader):
    """Reads boxes into their place, and runs no code that somebody put into the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of tensors."""
        with (Path(self.path) / INDEX).open("rb") as file:
            return _MetadataUnpickler(file).load()

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """Remember which box is where."""
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._headers: dict[tuple[str, tuple[int, ...], torch.dtype, int], int] = {}
        self._shapes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
            for chunk in saved.chunks
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, file by file from the beginning to the end."""
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
        row = math.prod(inner)
        stored = self.storage_data[item.storage_index]
        start = stored.offset + self._header(file, stored, shape, target.dtype)
        if target.dtype == torch.bool:
            band = _read_packed(file, start, first * row, rows * row).view((rows, *inner) if shape else ())
        else:
            start += first * row * target.element_size()
            if target.is_cpu and target.is_contiguous() and tuple(item.lengths[1:]) == inner:
                _read_into(file, start, target)
                return
            band = torch.empty((rows, *inner) if shape else (), dtype=target.dtype)
            _read_into(file, start, band)
        parts = zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
        target.copy_(band[(..., *(slice(offset, offset + length) for offset, length in parts))])

    def _header(
        self, file: io.FileIO, stored: _StorageInfo, shape: tuple[int, ...], dtype: torch.dtype
    ) -> int:
        """Bytes of an archive before the values of its box.

        In one file, which one process wrote, it depends on shape, type and length: parsed once for each.
        """
        key = stored.relative_path, shape, dtype, stored.length
        if key not in self._headers:
            box = cast(IO[bytes], _Slice(file, stored.offset, stored.length))
            archive: Any = torch._C.PyTorchFileReader(box)
            self._headers[key] = archive.get_record_offset("data/0")
        return self._headers[key]


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


def _read_packed(file: io.FileIO, start: int, first: int, count: int) -> torch.Tensor:
    """Of bools that are packed from byte `start` on, so many from the one numbered `first`: bool [count]."""
    packed = torch.empty(-(-(first + count) // 8) - first // 8, dtype=torch.uint8)
    _read_into(file, start + first // 8, packed)
    bits = np.unpackbits(packed.numpy(), count=first % 8 + count)[first % 8 :]
    return torch.from_numpy(bits).view(torch.bool)


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
