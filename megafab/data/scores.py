"""A reference model's loss for every token of the training split, computed once and read beside the tokens.

    <corpus>/scores/<name>/train/<domain>.f16     float16, one value a position of the stream
    <corpus>/scores/<name>/manifest.json          corpus, checkpoint, seq_len, packing; written last

The value at a position is the nll, in nats, of the token after it. It is NaN where nothing was predicted: at
the end of the stream, in the tail that fills no window and, with `document` packing, where the next token
begins a document.

Shape suffix: N consecutive positions of a token stream.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megafab.data.derived import MANIFEST, SCORES
from megafab.data.format import Corpus
from megafab.errors import UserError

_DTYPE = np.dtype("<f2")
_CHUNK = 1 << 22  # positions that are written or hashed at a time


class Scores:
    """Finished scores: a `data.plan.Column`. Files are mapped on first use.

    `manifest` says what they were made with, `fingerprint` identifies their every bit.
    """

    def __init__(self, path: Path, corpus: Corpus, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._files = _files(path, corpus)
        self._map = lru_cache(maxsize=None)(self._map_file)

    @staticmethod
    def open(name: str | Path, corpus: Corpus) -> Scores:
        """The scores of `corpus` by their name below it, or by their path.

        Raises:
            UserError: none there, not finished, of another corpus, or with a file missing or cut.
        """
        path = name if isinstance(name, Path) else SCORES.directory(corpus.path, name)
        manifest = SCORES.read(path)
        SCORES.require_corpus(path, manifest, corpus.fingerprint)
        scores = Scores(path, corpus, manifest)
        for file, tokens in scores._files:
            size = file.stat().st_size if file.exists() else 0
            if size != tokens * _DTYPE.itemsize:
                expected = f"{tokens * _DTYPE.itemsize} bytes, a float16 for each of {tokens} tokens"
                raise UserError(str(file), f"{size} bytes", expected, SCORES.make)
        return scores

    def read(self, domain: int, start: int, count: int) -> np.ndarray:
        """float32 [N] of the positions `start:start + count`; NaN where nothing was predicted."""
        return np.asarray(self._map(domain)[start : start + count], np.float32)

    def _map_file(self, domain: int) -> np.ndarray:
        return _mapped(*self._files[domain], mode="r")


class ScoresWriter:
    """Writes scores range by range, in any order and from several processes.

    Each process makes a writer of the same path; one calls `create` before any of them writes, and `finish`
    when all have flushed.
    """

    def __init__(self, path: Path, corpus: Corpus) -> None:
        self._path, self._corpus = path, corpus
        self._files = _files(path, corpus)
        self._maps: dict[int, np.ndarray] = {}

    def create(self) -> None:
        """Makes every file with its full length, all NaN: any earlier content is lost."""
        (self._path / "train").mkdir(parents=True, exist_ok=True)
        (self._path / MANIFEST).unlink(missing_ok=True)
        for path, tokens in self._files:
            with open(path, "wb") as file:
                for start in range(0, tokens, _CHUNK):
                    file.write(np.full(min(_CHUNK, tokens - start), np.nan, _DTYPE).tobytes())

    def write(self, domain: int, start: int, values_N: np.ndarray) -> None:
        """The values of the positions from `start` on."""
        if domain not in self._maps:
            self._maps[domain] = _mapped(*self._files[domain], mode="r+")
        assert start + len(values_N) <= self._files[domain][1], (domain, start, len(values_N))
        self._maps[domain][start : start + len(values_N)] = values_N

    def flush(self) -> None:
        """What this process has written is on the disk when it returns."""
        for mapped in self._maps.values():
            assert isinstance(mapped, np.memmap)
            mapped.flush()

    def finish(self, *, checkpoint: str, seq_len: int, packing: str, **facts: Any) -> Scores:
        """Commits: hashes all values and writes the manifest. `facts` are further keys of it."""
        self.flush()
        digest = hashlib.sha256()
        for path, _ in self._files:
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        content = {
            "corpus": self._corpus.fingerprint,
            "checkpoint": checkpoint,
            "seq_len": seq_len,
            "packing": packing,
            **facts,
            "sha256": digest.hexdigest(),
        }
        SCORES.write(self._path, content)
        return Scores.open(self._path, self._corpus)


def _files(path: Path, corpus: Corpus) -> list[tuple[Path, int]]:
    """The file of each domain and how many values it has."""
    names = (path / "train" / f"{name}.f16" for name in corpus.domains)
    return list(zip(names, corpus.tokens("train"), strict=True))


def _mapped(path: Path, tokens: int, mode: Any) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, _DTYPE, mode, shape=(tokens,)) if tokens else np.empty(0, _DTYPE)
