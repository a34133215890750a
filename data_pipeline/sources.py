"""From what `sources` says to files, and from files to pieces.

| name | read as |
| --- | --- |
| `*.jsonl *.ndjson *.json`, also with `.gz` or `.zst` | JSONL: one object a line, text under `text_key` |
| `*.gz *.zst` | JSONL, unless the name inside ends in `.txt`, `.md`, `.rst` or `.py` |
| `*.parquet` | rows, text in column `text_key` |
| any other file | UTF-8 text, one document |
| a directory or a glob | the files below, in order of their names; hidden ones are left out |
| `org/name`, or `hf:NAME_OR_DIR`; `:CONFIG:SPLIT` may follow | `datasets.load_dataset`, streaming |
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.documents import Bad, blocks, no_text_key, optional_import
from data_pipeline.pieces import PIECE_BYTES, Broken, LineRange, Lines, ParquetRows, Piece, Rows, TextFiles
from megafab.errors import UserError

_JSONL = {".jsonl", ".ndjson", ".json"}
_COMPRESSED = {".gz", ".zst"}
_TEXT = {".txt", ".md", ".rst", ".py"}
# A row group larger than this is read by several workers; each decodes the rows before its own too.
_ROW_RANGE_BYTES = 8 * PIECE_BYTES
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


class Source(Protocol):
    """Part of a domain that is read in one way."""

    @property
    def size(self) -> int | None:
        """Bytes to read; None when nobody knows."""
        ...

    @property
    def seekable(self) -> bool:
        """Whether `pieces` only describes the data, so that listing all of them is cheap."""
        ...

    def identity(self) -> Iterator[str]:
        """Lines that change when the data may have changed."""
        ...

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """All pieces, in an order that depends on the data alone."""
        ...


@dataclass(frozen=True, slots=True)
class File:
    """A file found below a source; `name` is its path relative to the source."""

    path: str
    name: str
    size: int
    changed: int

    def identity(self) -> str:
        """Name, size and time of change."""
        return f"{self.name}\0{self.size}\0{self.changed}"


@dataclass(frozen=True, slots=True)
class JsonLines:
    """One JSONL file."""

    file: File

    @property
    def size(self) -> int:
        """See `Source`."""
        return self.file.size

    @property
    def seekable(self) -> bool:
        """See `Source`."""
        return Path(self.file.path).suffix not in _COMPRESSED

    def identity(self) -> Iterator[str]:
        """See `Source`."""
        yield self.file.identity()

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """See `Source`."""
        if not self.size:
            error = UserError(self.file.path, "an empty file", "documents", "remove it or make it again")
            yield from _broken(error, "empty file", skip_bad)
        elif self.seekable:
            for start in range(0, self.size, PIECE_BYTES):
                yield LineRange(self.file.path, start, min(self.size, start + PIECE_BYTES))
        else:
            yield from self._decompressed(skip_bad)

    def _decompressed(self, skip_bad: bool) -> Iterator[Piece]:
        path, first, taken = self.file.path, 1, 0
        position = 0

        def read_so_far(count: int) -> None:
            nonlocal position
            position = count

        parts: list[bytes] = []
        length, damaged = 0, False
        try:
            for block in blocks(path, read_so_far):
                cut = block.rfind(b"\n") + 1
                if cut and length + cut >= PIECE_BYTES:
                    data = b"".join([*parts, block[:cut]])
                    yield Lines(path, first, data, position - taken)
                    first, taken = first + data.count(b"\n"), position
                    parts, length = [], 0
                    block = block[cut:]
                parts.append(block)
                length += len(block)
        except UserError as error:
            # The unfinished line before the damage is lost; the lines before it are whole.
            whole, newline, _ = b"".join(parts).rpartition(b"\n")
            parts, damaged = [whole + newline], True
            yield from _broken(error, "damaged file", skip_bad)
        if data := b"".join(parts):
            yield Lines(path, first, data, self.size - taken)
        elif first == 1 and not damaged:
            error = UserError(path, "a compressed file with nothing in it", "documents", "remove it")
            yield from _broken(error, "empty file", skip_bad)


@dataclass(frozen=True, slots=True)
class Texts:
    """Text files, each one document."""

    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """See `Source`."""
        return sum(file.size for file in self.files)

    @property
    def seekable(self) -> bool:
        """See `Source`."""
        return True

    def identity(self) -> Iterator[str]:
        """See `Source`."""
        return (file.identity() for file in self.files)

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """See `Source`."""
        for files in group_by_size(self.files):
            yield TextFiles(tuple(file.path for file in files), sum(file.size for file in files))


def group_by_size(files: Iterable[File]) -> Iterator[list[File]]:
    """Consecutive files, about `PIECE_BYTES` at a time."""
    group: list[File] = []
    size = 0
    for file in files:
        if group and size + file.size > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class ParquetFile:
    """One Parquet file."""

    file: File

    @property
    def size(self) -> int:
        """See `Source`."""
        return self.file.size

    @property
    def seekable(self) -> bool:
        """See `Source`."""
        return True

    def identity(self) -> Iterator[str]:
        """See `Source`."""
        yield self.file.identity()

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """See `Source`."""
        path = self.file.path
        pyarrow, parquet = optional_import("pyarrow", path), optional_import("pyarrow.parquet", path)
        try:
            with parquet.ParquetFile(path) as file:
                schema, groups = file.schema_arrow, file.metadata
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            found, fix = f"a file that cannot be read ({reason})", "download or make it again"
            yield from _broken(UserError(path, found, "a Parquet file", fix), "damaged file", skip_bad)
            return
        if text_key not in schema.names:
            raise no_text_key(path, schema.names, text_key).error
        kind = schema.field(text_key).type
        if not any(is_text(kind) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
            fix = "text_key=COLUMN with a column of strings"
            raise UserError(path, f"column {text_key!r} of type {kind}", "strings", fix)
        if not groups.num_rows:
            error = UserError(path, "a Parquet file without rows", "documents", "remove it")
            yield from _broken(error, "empty file", skip_bad)
        taken: list[int] = []
        rows = size = 0
        for index in range(groups.num_row_groups):
            group = groups.row_group(index)
            column = group.column(list(groups.schema.names).index(text_key))
            taken, rows, size = [*taken, index], rows + group.num_rows, size + column.total_uncompressed_size
            if size >= PIECE_BYTES or index == groups.num_row_groups - 1:
                parts = -(-size // _ROW_RANGE_BYTES) or 1
                share = self.size * rows // max(1, groups.num_rows) // parts
                for part in range(parts):
                    start, stop = rows * part // parts, rows * (part + 1) // parts
                    if stop > start:
                        yield ParquetRows(path, tuple(taken), start, stop, share)
                taken, rows, size = [], 0, 0


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Whatever `datasets` can load: a name on the hub, or a directory in a format only it reads."""

    where: str
    spec: str
    files: tuple[File, ...] = ()

    @property
    def size(self) -> int | None:
        """See `Source`."""
        return None

    @property
    def seekable(self) -> bool:
        """See `Source`."""
        return False

    def identity(self) -> Iterator[str]:
        """See `Source`: what a name on the hub stands for is taken not to change."""
        yield self.spec if not self.files else "datasets"
        yield from (file.identity() for file in self.files)

    def pieces(self, text_key: str, skip_bad: bool) -> Iterator[Piece]:
        """See `Source`."""
        name, first, values, size = self.where, 0, [], 0
        for number, row in enumerate(self._rows()):
            if text_key not in row:
                raise no_text_key(name, list(row), text_key).error
            value = row[text_key]
            values.append(value)
            size += len(value) if isinstance(value, str) else 0
            if size >= PIECE_BYTES:
                yield Rows(name, first, tuple(values), size)
                first, values, size = number + 1, [], 0
        if values:
            yield Rows(name, first, tuple(values), size)

    def _rows(self) -> Iterator[dict[str, Any]]:
        datasets = optional_import("datasets", self.where)
        if not self.files:
            print(f"{self.where}: no such path here, asking the hub for a dataset", flush=True)
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry
        path, config, split = (*self.spec.split(":"), "", "")[:3]
        try:
            if (Path(path) / "state.json").is_file():
                yield from datasets.load_from_disk(path)
            elif (Path(path) / "dataset_dict.json").is_file():
                yield from datasets.load_from_disk(path)[split or "train"]
            else:
                yield from datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        except Exception as error:  # whatever a loader, a parser or the network raises
            text = str(error).strip().splitlines()
            found = (
                f"what datasets.load_dataset cannot load ({type(error).__name__}: {text[0] if text else ''})"
            )
            expected = "an existing path, or a dataset that can be loaded from here"
            fix = "correct the path or the id (hf:ID[:CONFIG[:SPLIT]])"
            raise UserError(self.where, found, expected, fix) from error


def _broken(error: UserError, reason: str, skip_bad: bool) -> Iterator[Piece]:
    if not skip_bad:
        raise error
    yield Broken(Bad(reason, error))


def resolve(domain: str, values: list[str]) -> list[Source]:
    """The sources of one domain, in the order given.

    Raises:
        UserError: a path that does not exist, a glob or directory without files.
    """
    return [source for value in values for source in _resolve(f"sources.{domain}={value}", value)]


def _resolve(where: str, value: str) -> list[Source]:
    if value.startswith("hf:"):
        spec = value.removeprefix("hf:")
        local = Path(spec.split(":")[0])
        files = _walk(local) if local.is_dir() else []
        return [HubDataset(where, spec, tuple(files))]
    path = Path(value).expanduser()
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise UserError(where, "a directory without files", "files to read", "give another directory")
        return _by_kind(files)
    if path.exists():
        return _by_kind([_file(path, path.name)])
    if any(character in value for character in "*?["):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        # A file once, by its first name: `**` follows a link back to a directory above over and over.
        names = {os.path.realpath(name): name for name in reversed(found)}.values()
        if not names:
            fix = "correct the pattern, and quote it so that the shell leaves it alone"
            raise UserError(where, "no file that matches", "at least one", fix)
        return _by_kind([_file(Path(name), name) for name in sorted(names)])
    if _HUB_ID.fullmatch(value) and Path(value).suffix not in _JSONL | _COMPRESSED | {
        ".parquet",
        ".txt",
        ".md",
    }:
        return [HubDataset(where, value)]
    parent = next(parent for parent in [*path.absolute().parents] if parent.exists())
    found = "no such file or directory" + (f" ({parent} exists)" if parent != path.absolute().parent else "")
    expected = "a file, a directory, a glob or a datasets id"
    raise UserError(where, found, expected, "correct the path")


def _file(path: Path, name: str) -> File:
    expected, fix = "a file to read", "repair or remove it, or leave it out with a glob"
    try:
        status = path.stat()
    except OSError as error:  # a link that leads nowhere
        raise UserError(str(path), error.strerror or str(error), expected, fix) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(str(path), "a pipe, socket or device", expected, fix)
    return File(str(path), name, status.st_size, status.st_mtime_ns)


def _walk(root: Path) -> list[File]:
    """The files below a directory. A link back to a directory it is in is not followed."""
    files = []
    above = {str(root): frozenset({_inode(root)})}  # of each directory, those it is in and itself
    for folder, folders, names in os.walk(root, followlinks=True):
        here = above.pop(folder)
        inodes = {name: _inode(Path(folder, name)) for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, inode in inodes.items() if inode not in here]
        above.update({os.path.join(folder, name): here | {inodes[name]} for name in folders})
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        files += [_file(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(files, key=lambda file: file.name)


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _by_kind(files: list[File]) -> list[Source]:
    sources: list[Source] = []
    texts: list[File] = []
    for file in files:
        kind = _kind(file.name)
        if kind == "text":
            texts.append(file)
        else:
            sources.append(JsonLines(file) if kind == "jsonl" else ParquetFile(file))
    if len(files) == 1 and texts and not texts[0].size:
        raise UserError(texts[0].path, "an empty file", "text", "give another file")
    return [*sources, Texts(tuple(texts))] if texts else sources


def _kind(name: str) -> str:
    endings = [ending.lower() for ending in Path(name).suffixes]
    compressed = bool(endings) and endings[-1] in _COMPRESSED
    if compressed:
        endings.pop()
    ending = endings[-1] if endings else ""
    if ending in _JSONL or (compressed and ending not in _TEXT):
        return "jsonl"
    return "parquet" if ending == ".parquet" and not compressed else "text"


def digest(sources: list[Source]) -> str:
    """sha256 over the identities of sources."""
    lines = (line for source in sources for line in source.identity())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
