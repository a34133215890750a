"""One piece of input to token ids on disk: the work that is spread over processes.

A finished piece is two files: `NAME.bin`, the ids of its documents back to back, each with its EOD; and
`NAME.npz`, per document the number of ids, the number of UTF-8 bytes and a hash of the text, besides the
counts of what was skipped. The `.npz` appears last; a piece that has one is done.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.documents import Bad
from data_pipeline.pieces import Piece
from megafab.data.format import token_dtype
from megafab.data.tokenizer import Tokenizer

_BATCH = 1 << 20  # characters tokenized in one call
EMPTY = "empty document"


@dataclass(frozen=True, slots=True)
class Job:
    """What all pieces of a build have in common."""

    directory: Path
    tokenizer: Path
    fingerprint: str  # of the tokenizer
    text_key: str
    skip_bad: bool


@dataclass(slots=True)
class Counts:
    """What was found in a piece, or in several."""

    documents: int = 0
    tokens: int = 0  # EODs included
    bytes: int = 0  # UTF-8 bytes of text
    skipped: Counter[str] = field(default_factory=Counter)  # documents by reason
    examples: dict[str, str] = field(default_factory=dict)  # for each reason, the first such document

    def add(self, other: Counts) -> None:
        """Add the counts of a piece that comes later."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.skipped += other.skipped
        self.examples = other.examples | self.examples


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What is known of a finished piece: one row a document, and what was skipped."""

    lengths: np.ndarray  # int64: ids, EOD included
    sizes: np.ndarray  # int64: UTF-8 bytes of the text
    hashes: np.ndarray  # uint64: of the text
    skipped: Counter[str]  # documents by reason
    examples: dict[str, str]  # for each reason, the first such document

    @property
    def counts(self) -> Counts:
        """The sums."""
        tokens, size = int(self.lengths.sum()), int(self.sizes.sum())
        return Counts(len(self.lengths), tokens, size, self.skipped, self.examples)


def tokenize_piece(job: Job, tokenizer: Tokenizer, name: str, piece: Piece) -> Counts:
    """Tokenize one piece into `job.directory`.

    Raises:
        UserError: a bad document, unless those are skipped.
    """
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    lengths, sizes, hashes = [], [], []
    ids_path = job.directory / f"{name}.bin"
    temporary = ids_path.with_suffix(f".{os.getpid()}.tmp")
    dtype = token_dtype(tokenizer.vocab_size)
    eod = dtype.type(tokenizer.eod).tobytes()
    with open(temporary, "wb") as file:
        for texts in _batches(_good(piece, job, skipped, examples)):
            for text, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True):
                file.write(ids.astype(dtype).data)
                file.write(eod)
                data = text.encode()
                lengths.append(len(ids) + 1)
                sizes.append(len(data))
                hashes.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "big"))
        _sync(file)
    os.replace(temporary, ids_path)
    table = PieceTable(
        np.array(lengths, np.int64), np.array(sizes, np.int64), np.array(hashes, np.uint64), skipped, examples
    )
    _save(table, job.directory / f"{name}.npz")
    return table.counts


def _good(piece: Piece, job: Job, skipped: Counter[str], examples: dict[str, str]) -> Iterator[str]:
    for document in piece.documents(job.text_key):
        if isinstance(document, Bad):
            if not job.skip_bad:
                raise document.error
            skipped[document.reason] += 1
            examples.setdefault(document.reason, str(document.error))
        elif document:
            yield document
        else:
            skipped[EMPTY] += 1


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _save(table: PieceTable, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    reasons = list(table.skipped)
    with open(temporary, "wb") as file:
        np.savez(
            file,
            lengths=table.lengths,
            sizes=table.sizes,
            hashes=table.hashes,
            reasons=np.array(reasons, dtype=str),
            counts=np.array([table.skipped[reason] for reason in reasons], dtype=np.int64),
            examples=np.array([table.examples.get(reason, "") for reason in reasons], dtype=str),
        )
        _sync(file)
    os.replace(temporary, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def load_table(directory: Path, name: str) -> PieceTable | None:
    """The table of a finished piece, None if it is not finished."""
    try:
        data = np.load(directory / f"{name}.npz")
    except FileNotFoundError:
        return None
    reasons = data["reasons"].tolist()
    return PieceTable(
        data["lengths"],
        data["sizes"],
        data["hashes"],
        Counter(dict(zip(reasons, data["counts"].tolist(), strict=True))),
        {reason: text for reason, text in zip(reasons, data["examples"].tolist(), strict=True) if text},
    )
