"""Pieces of input: what one worker reads and tokenizes at once.

Where pieces begin and end depends on the input alone, never on the number of workers, so neither does
the corpus. A piece is a small picklable description wherever the input can be entered anywhere (plain
files, Parquet); of a compressed file or a `datasets` stream it carries the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from data_pipeline.documents import Bad, Document, from_file, from_line, from_value, optional_import
from megafab.errors import UserError

PIECE_BYTES = 4 << 20  # about a second of tokenizing


class Piece(Protocol):
    """Some consecutive documents of one domain."""

    @property
    def size(self) -> int:
        """Bytes of the source that this piece stands for; for progress only."""
        ...

    def documents(self, text_key: str) -> Iterator[Document]:
        """The documents in order, bad ones marked."""
        ...


@dataclass(frozen=True, slots=True)
class LineRange:
    """The lines of a plain JSONL file that begin at byte `start` or later, and before `end`."""

    path: str
    start: int
    end: int

    @property
    def size(self) -> int:
        """See `Piece`."""
        return self.end - self.start

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        with open(self.path, "rb") as file:
            position = self.start
            if position:
                file.seek(position - 1)
                rest = file.readline(self.size + 1)
                if not rest.endswith(b"\n"):
                    return  # a line so long that none begins here
                position += len(rest) - 1
            while position < self.end and (line := file.readline()):
                yield from_line(line, partial(self._where, position), text_key)
                position += len(line)

    def _where(self, position: int) -> str:
        with open(self.path, "rb") as file:
            before = 0
            while position > 0 and (block := file.read(min(position, 1 << 20))):
                before += block.count(b"\n")
                position -= len(block)
        return f"{self.path} line {before + 1}"


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a compressed JSONL file, decompressed; the first has number `first`."""

    path: str
    first: int
    data: bytes
    size: int

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last newline
        for number, line in enumerate(lines, self.first):
            yield from_line(line, partial("{} line {}".format, self.path, number), text_key)


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Text files, each one document."""

    paths: tuple[str, ...]
    size: int

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        return map(from_file, self.paths)


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """Rows `start:stop` of some consecutive row groups of a Parquet file."""

    path: str
    groups: tuple[int, ...]
    start: int
    stop: int
    size: int

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        pyarrow = optional_import("pyarrow", self.path)
        try:
            yield from self._read(text_key)
        except (pyarrow.ArrowException, OSError) as error:
            found = f"a damaged Parquet file ({str(error).splitlines()[0]})"
            fix = "download or make it again, or leave it out"
            yield Bad("damaged file", UserError(self.path, found, "readable row groups", fix))

    def _read(self, text_key: str) -> Iterator[Document]:
        parquet = optional_import("pyarrow.parquet", self.path)
        row = 0
        with parquet.ParquetFile(self.path) as file:
            first = sum(file.metadata.row_group(group).num_rows for group in range(self.groups[0]))
            for batch in file.iter_batches(256, row_groups=list(self.groups), columns=[text_key]):
                if row + len(batch) > self.start:
                    for at, value in enumerate(batch.column(0).to_pylist(), row):
                        if self.start <= at < self.stop:
                            where = partial("{} row {}".format, self.path, first + at)
                            yield from_value(value, where, text_key)
                row += len(batch)
                if row >= self.stop:
                    return


@dataclass(frozen=True, slots=True)
class Rows:
    """Values of the text column of a `datasets` stream; the first is row `first`."""

    name: str
    first: int
    values: tuple[Any, ...]
    size: int

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        for number, value in enumerate(self.values, self.first):
            yield from_value(value, partial("{} row {}".format, self.name, number), text_key)


@dataclass(frozen=True, slots=True)
class Broken:
    """The place where a source stops being readable, when bad documents are skipped."""

    bad: Bad
    size: int = 0

    def documents(self, text_key: str) -> Iterator[Document]:
        """See `Piece`."""
        yield self.bad
