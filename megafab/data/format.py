"""The contract between `megafab data`, which writes a corpus, and training, which reads it.

A corpus is a directory:

    manifest.json                      written last; what is below is listed here with sizes and hashes
    tokenizer/                         tokenizer.model (SentencePiece) or tokenizer.json (Hugging Face)
    train/<domain>-00000.bin, .idx     token ids and where each document begins
    valid/<domain>-00000.bin, .idx     documents held out for evaluation

A `.bin`/`.idx` pair is a Megatron `IndexedDataset` with one sequence per document, so that vanilla
Megatron reads it too. Every document ends with the end-of-document id (EOD). Ids are uint16 when the
vocabulary has fewer than 65500 entries, else int32: Megatron's own rule.

Only numpy and the standard library are needed here; a corpus is checked without torch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megafab.errors import UserError

MANIFEST = "manifest.json"
FORMAT_NAME = "megafab-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "valid")

# Megatron's index header: magic, version, dtype code, number of sequences, number of document marks.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_OPEN_SHARDS = 64
_SAMPLE = 4096  # tokens looked at in each of three places when a shard is opened


def token_dtype(vocab_size: int) -> np.dtype:
    """The type ids are stored in: the smaller of the two Megatron uses that holds `vocab_size` ids."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True, slots=True)
class Shard:
    """One `.bin`/`.idx` pair as the manifest lists it; `name` is its path below the corpus, no suffix."""

    name: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one shard document by document; nothing is visible under its name until `close`.

    Args:
        root: the corpus directory.
        name: path below `root` without suffix, e.g. `train/books-00000`.
        dtype: see `token_dtype`.
    """

    def __init__(self, root: Path, name: str, dtype: np.dtype) -> None:
        self._root, self._name, self._dtype = root, name, np.dtype(dtype)
        self._code = {value: key for key, value in _CODES.items()}[self._dtype]
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._bytes = 0
        path = self._path(".bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _temporary(path)
        self._file: BinaryIO = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115

    def _path(self, suffix: str) -> Path:
        return self._root / f"{self._name}{suffix}"

    def append(self, ids: np.ndarray | Sequence[int]) -> None:
        """Add one document, its EOD included."""
        data = np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        self._lengths.append(len(ids))

    def close(self) -> Shard:
        """Flush to disk, give both files their names and say what was written."""
        _settle(self._file, self._temporary, self._path(".bin"))
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        marks = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(marks))
        index = b"".join([header, lengths.tobytes(), pointers.tobytes(), marks.tobytes()])
        path = self._path(".idx")
        with open(_temporary(path), "wb") as file:
            file.write(index)
            _settle(file, _temporary(path), path)
        return Shard(
            self._name,
            len(lengths),
            int(lengths.sum(dtype=np.int64)),
            self._bytes,
            len(index),
            self._hash.hexdigest(),
            hashlib.sha256(index).hexdigest(),
        )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _settle(file: BinaryIO, temporary: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)


def corpus_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 over what a training run reads: tokenizer, domains in order and the content of every shard.

    Where the text came from, library versions and the directory's own path do not count.
    """
    content = {key: manifest[key] for key in ("version", "tokenizer", "domains")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Commit the corpus: its fingerprint is added and `manifest.json` appears whole or not at all."""
    content = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **manifest}
    content["fingerprint"] = corpus_fingerprint(content)
    path = root / MANIFEST
    with open(_temporary(path), "wb") as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
        _settle(file, _temporary(path), path)


def split_entry(shards: Sequence[Shard], text_bytes: int) -> dict[str, Any]:
    """One split of one domain in the manifest; `text_bytes` are UTF-8 bytes of the documents' text."""
    return {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": text_bytes,
        "shards": [asdict(shard) for shard in shards],
    }


@dataclass(frozen=True, slots=True)
class Corpus:
    """A finished corpus. Get one from `Corpus.open`; domains are in the manifest's order everywhere."""

    path: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def open(path: str | Path) -> Corpus:
        """Read the manifest and check that every file it lists is there and has the listed size.

        Raises:
            UserError: no corpus there, a manifest that cannot be used, a missing or cut file.
        """
        root = Path(path)
        corpus = Corpus(root, _read_manifest(root))
        for split in SPLITS:
            for index in range(len(corpus.domains)):
                for shard in corpus._shards(split, index):
                    _check_size(root / f"{shard.name}.bin", shard.bin_bytes)
                    _check_size(root / f"{shard.name}.idx", shard.idx_bytes)
        return corpus

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the order of every per-domain sequence in megafab."""
        return tuple(domain["name"] for domain in self.manifest["domains"])

    @property
    def fingerprint(self) -> str:
        """sha256 over tokenizer and shards: equal exactly when two corpora feed training the same."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all ids are below it."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def eod(self) -> int:
        """The id every document ends with."""
        return self.manifest["tokenizer"]["eod"]

    @property
    def tokenizer_dir(self) -> Path:
        """What `Tokenizer.load` takes."""
        return self.path / "tokenizer"

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 over the tokenizer's files."""
        return self.manifest["tokenizer"]["fingerprint"]

    def tokens(self, split: str) -> tuple[int, ...]:
        """Tokens of each domain in `split`, EODs included."""
        return tuple(domain["splits"][split]["tokens"] for domain in self.manifest["domains"])

    def text_bytes(self, split: str) -> tuple[int, ...]:
        """UTF-8 bytes of the text of each domain in `split`."""
        return tuple(domain["splits"][split]["bytes"] for domain in self.manifest["domains"])

    def documents(self, split: str) -> tuple[int, ...]:
        """Documents of each domain in `split`."""
        return tuple(domain["splits"][split]["documents"] for domain in self.manifest["domains"])

    def domain(self, split: str, index: int) -> TokenStream:
        """The token stream of one domain. Files are mapped on first use; keep the object."""
        return TokenStream(self.path, self._shards(split, index), self.vocab_size, self.eod)

    def _shards(self, split: str, index: int) -> tuple[Shard, ...]:
        entries = self.manifest["domains"][index]["splits"][split]["shards"]
        return tuple(Shard(**entry) for entry in entries)


class TokenStream:
    """One domain of one split as a single long sequence of ids, documents back to back.

    Shards are memory-mapped when first read, the most recent ones kept. Threads may read at once.
    """

    def __init__(self, root: Path, shards: Sequence[Shard], vocab_size: int, eod: int) -> None:
        self._root, self._shards, self._vocab_size, self._eod = root, tuple(shards), vocab_size, eod
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.tokens)
        self.tokens = self._starts[-1]
        self._starts_S = np.array(self._starts)
        self.documents = sum(shard.documents for shard in self._shards)
        # A map holds its file open, and a process may have a thousand files open by default.
        self._map = lru_cache(maxsize=_OPEN_SHARDS)(self._map_shard)

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids at `start:start + count`, int64 [count]; the range may cross shards.

        Raises:
            IndexError: the range does not lie within `0..tokens`.
            UserError: a shard's files do not fit each other.
        """
        pieces = self._pieces(start, count)
        out = np.empty(count, dtype=np.int64)
        for shard, begin, end, at in pieces:
            out[at : at + end - begin] = self._map(shard)[0][begin:end]
        return out

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Offsets in the open interval (0, count), relative to `start`, at which a document begins.

        Sorted int64; a document beginning at `start` itself is not listed.
        """
        found: list[np.ndarray] = [np.empty(0, np.int64)]
        for shard, begin, end, at in self._pieces(start, count):
            ids, pointers = self._map(shard)
            # Plain bisection: the index is not 8-byte aligned, so that searchsorted would copy all of it.
            low = bisect_left(pointers, begin * ids.itemsize)
            high = bisect_left(pointers, end * ids.itemsize, lo=low)
            offsets = pointers[low:high] // ids.itemsize + (at - begin)
            found.append(offsets[offsets > 0])
        return np.concatenate(found)

    def document_bounds(self, start: int, count: int) -> tuple[int, int]:
        """Where the document of the first of `count` >= 1 tokens begins, and where that of the last ends.

        The end is the position after its EOD.

        Raises:
            IndexError: the range does not lie within `0..tokens`.
        """
        pieces = self._pieces(start, count)
        shard, begin, _, _ = pieces[0]
        ids, pointers = self._map(shard)
        first = bisect_right(pointers, begin * ids.itemsize) - 1
        low = self._starts[shard] + int(pointers[first]) // ids.itemsize
        shard, _, end, _ = pieces[-1]
        ids, pointers = self._map(shard)
        after = bisect_left(pointers, end * ids.itemsize)
        size = int(pointers[after]) // ids.itemsize if after < len(pointers) else len(ids)
        return low, self._starts[shard] + size

    def gather(self, start_N: np.ndarray, count: int) -> np.ndarray:
        """The ids of many ranges of one length: int64 [N, count].

        Beyond the shard in which a range begins there is EOD only: a document ends before its shard does, so
        the one that a range begins in is there as far as the range goes.

        Raises:
            IndexError: a start does not lie within `0..tokens`.
        """
        if len(start_N) and not 0 <= int(start_N.min()) <= int(start_N.max()) < self.tokens:
            raise IndexError(f"starts {start_N.min()}..{start_N.max()} of a stream of {self.tokens}")
        out = np.empty((len(start_N), count), np.int64)
        shard_N = np.searchsorted(self._starts_S, start_N, side="right") - 1
        for shard in sorted(set(shard_N.tolist())):
            here = np.flatnonzero(shard_N == shard)
            ids, _ = self._map(shard)
            at = (start_N[here] - self._starts[shard])[:, None] + np.arange(count)
            # The last id of a shard is EOD.
            out[here] = ids[np.minimum(at, len(ids) - 1)]
        return out

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """`(shard, begin, end, at)`: tokens begin..end of a shard land at position `at` of the range."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start}..{start + count} of a stream of {self.tokens}")
        pieces = []
        at = 0
        shard = bisect_right(self._starts, start) - 1
        while at < count:
            begin = start + at - self._starts[shard]
            end = min(self._shards[shard].tokens, begin + count - at)
            if end > begin:
                pieces.append((shard, begin, end, at))
            at += end - begin
            shard += 1
        return pieces

    def _map_shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return map_shard(self._root / self._shards[index].name, self._vocab_size, self._eod)


def window_count(tokens: int, seq_len: int) -> int:
    """Full windows of a stream: the last label of one is the first token of the next."""
    return max(0, tokens - 1) // seq_len


def map_shard(prefix: Path, vocab_size: int, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """Map one shard: its ids [tokens] and the byte offset of each document [documents].

    The index is checked against the size of the ids; ids are checked in three places, not everywhere.

    Raises:
        UserError: not an index, a `.bin` of another size than the index says, ids out of range.
    """
    idx_path, bin_path = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    rebuild = "build the corpus again: megafab data ... overwrite=true"
    index = _map_file(idx_path)
    if len(index) < _HEADER.size or index[: len(_MAGIC)] != _MAGIC:
        raise UserError(str(idx_path), "another kind of file", "a Megatron index (MMIDIDX)", rebuild)
    _, version, code, documents, marks = _HEADER.unpack_from(index)
    if version != 1 or code not in _CODES:
        found = f"index version {version}, dtype code {code}"
        raise UserError(str(idx_path), found, "version 1 with uint16 (8) or int32 (4) ids", rebuild)
    size = _HEADER.size + 12 * documents + 8 * marks
    if len(index) < size:
        found = f"{len(index)} bytes"
        raise UserError(str(idx_path), found, f"{size} bytes for {documents} documents", rebuild)
    lengths = np.frombuffer(index, np.int32, documents, _HEADER.size)
    pointers = np.frombuffer(index, np.int64, documents, _HEADER.size + 4 * documents)
    dtype = _CODES[code]
    expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if documents else 0
    data = _map_file(bin_path)
    if len(data) != expected:
        found = f"{len(data)} bytes"
        raise UserError(str(bin_path), found, f"{expected} bytes, as {idx_path.name} says", rebuild)
    ids = np.frombuffer(data, dtype)
    for begin in (0, len(ids) // 2, max(0, len(ids) - _SAMPLE)):
        sample = ids[begin : begin + _SAMPLE]
        if sample.size and not 0 <= int(sample.min()) <= int(sample.max()) < vocab_size:
            found = f"token id {int(sample.max() if sample.min() >= 0 else sample.min())}"
            expected_ids = f"ids below the tokenizer's {vocab_size}"
            raise UserError(str(bin_path), found, expected_ids, rebuild)
    if ids.size and int(ids[-1]) != eod:
        found = f"a last document that ends with id {int(ids[-1])}"
        raise UserError(str(bin_path), found, f"the end-of-document id {eod}", rebuild)
    return ids, pointers


def _map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _missing(path) from None


def _missing(path: Path) -> UserError:
    fix = "restore the file, or build the corpus again: megafab data ... overwrite=true"
    return UserError(str(path), "no such file", "a file the manifest lists", fix)


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise _missing(path) from None
    if found != size:
        fix = "restore the file, or build the corpus again: megafab data ... overwrite=true"
        raise UserError(str(path), f"{found} bytes", f"{size} bytes, as {MANIFEST} says", fix)


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        found = "no manifest.json there" if root.exists() else "no such directory"
        fix = f"make one: megafab data out={root}"
        raise UserError(f"data.path={root}", found, "a finished corpus", fix) from None
    except ValueError as error:
        fix = "build the corpus again: megafab data ... overwrite=true"
        raise UserError(str(path), f"invalid JSON ({error})", "a corpus manifest", fix) from None
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else manifest
    if found != (FORMAT_NAME, FORMAT_VERSION):
        expected = f"format {FORMAT_NAME}, version {FORMAT_VERSION}"
        raise UserError(str(path), repr(found), expected, "build the corpus again with this megafab")
    try:
        fingerprint = corpus_fingerprint(manifest)
    except KeyError as error:
        raise UserError(str(path), f"no key {error}", "a corpus manifest", "build the corpus again") from None
    if fingerprint != manifest.get("fingerprint"):
        found, expected = "content that was edited", f"content with fingerprint {manifest.get('fingerprint')}"
        raise UserError(str(path), found, expected, "restore the file or build the corpus again")
    return manifest
