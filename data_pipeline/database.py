"""The chunks of a corpus with an index to find them by: `megafab/data/retrieval.py` reads the result.

    request -> rows and counts (parallel) -> embeddings (parallel) -> trained index -> its files -> rename

Shape suffixes: N rows of a range, V token ids, E length of an embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chunks import RANGE_TOKENS, ChunkProgress, row_bounds, texts
from data_pipeline.pool import Pool
from data_pipeline.retrieval_config import DIM, RetrievalConfig
from data_pipeline.tokenize import Counts
from data_pipeline.workspace import Workspace, is_finished, outages_interrupt, save_array
from megafab.data import encoders, index, order
from megafab.data.derived import RETRIEVAL
from megafab.data.encoders import IDF, Encoder
from megafab.data.format import Corpus
from megafab.data.retrieval import STARTS, Database
from megafab.errors import UserError

_SEED = 1234  # of the sample an index is trained on
_ADDED = 1 << 16  # rows added to an index at a time
_SMALL, _MEDIUM = 200_000, 2_000_000  # rows up to which an index is exact, and keeps whole vectors
_SAMPLE_A_LIST, _LEAST_SAMPLE = 64, 1 << 16


def build(config: RetrievalConfig, corpus: Corpus, pool: Pool) -> Database:
    """Build the database that `config` asks for below `corpus`, unless it is there already.

    Raises:
        UserError: see `data_pipeline.retrieval.build`.
    """
    out = corpus.path / RETRIEVAL.folder / config.out_name
    request = _request(config, corpus)
    if not is_finished(RETRIEVAL, out, request, config.overwrite):
        if config.index is not None and config.encoder == "tfidf":
            # A mistake in its name costs a second here, and hours later.
            empty = index.create(config.index, config.dim or DIM)
            index.search_parameters(empty, config.nprobe, config.ef_search)
        with outages_interrupt(out), Workspace(out, request) as work:
            _build(config, corpus, request, work, pool)
            work.publish()
        print(f"{out} is finished")
    return Database.open(out)


def _request(config: RetrievalConfig, corpus: Corpus) -> dict[str, Any]:
    """What the database depends on, and nothing else: two equal requests give equal databases."""
    return {
        "corpus": corpus.fingerprint,
        "chunk": config.chunk,
        "encoder": encoders.settings(config.encoder, config.encoder_model, config.dim or DIM),
        "index": config.index,
        "train_rows": config.train_rows,
        "nprobe": config.nprobe,
        "ef_search": config.ef_search,
        "shard_rows": config.shard_rows,
        "range_tokens": RANGE_TOKENS,
    }


@dataclass(frozen=True, slots=True)
class _Job:
    """What all ranges of a build have in common."""

    corpus: Path
    fingerprint: str  # of the corpus, which may have been replaced since a process opened it
    chunk: int
    root: Path
    encoder: str  # its settings in JSON


@dataclass(frozen=True, slots=True)
class _Range:
    """The documents that begin among some tokens of a domain."""

    job: _Job
    domain: int
    number: int
    start: int
    tokens: int

    @property
    def starts(self) -> Path:
        """Where its rows begin: int64 [N]."""
        return self._path("starts")

    @property
    def embeddings(self) -> Path:
        """Its rows' embeddings: float32 [N, E]."""
        return self._path("embeddings")

    def _path(self, what: str) -> Path:
        return self.job.root / "pieces" / f"{what}-{self.domain:05d}-{self.number:07d}.npy"


def _ranges(job: _Job, corpus: Corpus) -> Iterator[_Range]:
    """All ranges, in the order of the corpus."""
    for domain, tokens in enumerate(corpus.tokens("train")):
        for number, start in enumerate(range(0, tokens, RANGE_TOKENS)):
            yield _Range(job, domain, number, start, min(RANGE_TOKENS, tokens - start))


def _build(
    config: RetrievalConfig, corpus: Corpus, request: Mapping[str, Any], work: Workspace, pool: Pool
) -> None:
    settings = request["encoder"]
    job = _Job(corpus.path.absolute(), corpus.fingerprint, config.chunk, work.root, json.dumps(settings))
    ranges = list(_ranges(job, corpus))
    counts_V, rows = _count(ranges, corpus, pool)
    if not rows:
        found, fix = "no document with a token", "a corpus with text"
        raise UserError(f"path={corpus.path}", found, "chunks to retrieve", fix)
    if config.encoder == "tfidf":
        save_array(work.root / IDF, encoders.idf(counts_V, rows))
        settings = {**settings, "sha256": encoders.file_hash(work.root / IDF)}
    job = _Job(job.corpus, job.fingerprint, job.chunk, job.root, json.dumps(settings))
    ranges = list(_ranges(job, corpus))
    dim = encoder_of(job.root, job.encoder, job.corpus, job.fingerprint).dim
    factory = config.index or _default_index(rows, dim)
    empty = index.create(factory, dim)
    parameters = index.search_parameters(empty, config.nprobe, config.ef_search)
    _embed(ranges, rows, pool)
    embeddings = _Embeddings(ranges)
    print(f"index {factory} of {rows:,} rows of {dim} numbers")
    _train(empty, factory, config.train_rows, embeddings, work.root)
    files = _add(config.shard_rows, embeddings, work)

    hashes = dict(
        zip(files, pool.map(encoders.file_hash, [work.pieces / name for name in files]), strict=True)
    )
    work.result.mkdir()
    starts = np.concatenate([np.load(one.starts) for one in ranges])
    np.save(work.result / STARTS, starts)
    if config.encoder == "tfidf":
        os.replace(work.root / IDF, work.result / IDF)
    for name in files:
        os.replace(work.pieces / name, work.result / name)
    per_domain = np.bincount([one.domain for one in ranges], embeddings.counts, len(corpus.domains))
    content = {
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "chunk": config.chunk,
        "rows": {name: int(count) for name, count in zip(corpus.domains, per_domain, strict=True)},
        "encoder": settings,
        "dim": dim,
        "index": factory,
        "search": parameters,
        "shard_rows": config.shard_rows,
        "sha256": {STARTS: encoders.file_hash(work.result / STARTS), **hashes},
        "request": dict(request),
    }
    RETRIEVAL.write(work.result, content)


def _default_index(rows: int, dim: int) -> str:
    """Exact while that is fast, then lists, then lists of codes, as Megatron-LM's RETRO had for billions."""
    if rows <= _SMALL:
        return "Flat"
    lists = 1 << round(np.log2(4 * np.sqrt(rows)))
    if rows <= _MEDIUM:
        return f"IVF{lists},Flat"
    rotated = min(256, dim // 32 * 32)
    return f"OPQ32_{rotated},IVF{lists}_HNSW32,PQ32" if rotated else f"IVF{lists}_HNSW32,Flat"


def _count(ranges: list[_Range], corpus: Corpus, pool: Pool) -> tuple[np.ndarray, int]:
    """In how many rows each id is, int64 [V], and how many rows there are.

    Sums so far are kept for a restart. Encoders other than tfidf ask for no counts: then V is 0.
    """
    job = ranges[0].job
    ids = corpus.vocab_size if json.loads(job.encoder)["kind"] == "tfidf" else 0
    path = job.root / "counts.npy"
    # The last entries are the number of rows, and of ranges that are in the sums.
    sums = np.load(path) if path.exists() else np.zeros(ids + 2, np.int64)
    done = int(sums[-1])
    with ChunkProgress("count", len(ranges)) as progress:
        progress.add(done, Counts(documents=int(sums[-2])), fresh=False)
        for rows, counts_V in pool.map(count_range, ranges[done:]):
            sums[:-2] += counts_V
            sums[-2:] += (rows, 1)
            save_array(path, sums)
            progress.add(1, Counts(documents=rows), fresh=True)
    return sums[:-2], int(sums[-2])


def _embed(ranges: list[_Range], rows: int, pool: Pool) -> None:
    """The embeddings of every range that is not done yet, on all workers."""
    with ChunkProgress("embed", rows) as progress:
        left = []
        for one in ranges:
            if one.embeddings.exists():
                count = len(np.load(one.starts))
                progress.add(count, Counts(documents=count), fresh=False)
            else:
                left.append(one)
        for count in pool.map(embed_range, left):
            progress.add(count, Counts(documents=count), fresh=True)


class _Embeddings:
    """The embeddings of all ranges as one array that stays on the disk; `counts` are the rows of each."""

    def __init__(self, ranges: list[_Range]) -> None:
        self._paths = [one.embeddings for one in ranges]
        self.counts = [len(np.load(one.starts)) for one in ranges]
        self._first = np.cumsum([0, *self.counts])
        self.rows = int(self._first[-1])

    def take(self, rows_N: np.ndarray) -> np.ndarray:
        """Those of some rows in rising order: float32 [N, E]."""
        cuts = np.searchsorted(rows_N, self._first)
        parts = [
            np.load(path, mmap_mode="r")[rows_N[low:high] - first]
            for path, first, low, high in zip(self._paths, self._first[:-1], cuts[:-1], cuts[1:], strict=True)
            if high > low
        ]
        return np.concatenate(parts)


def _train(empty: Any, factory: str, train_rows: int | None, embeddings: _Embeddings, root: Path) -> None:
    """Leaves a trained index without rows in `root`."""
    path = root / "trained.faiss"
    if path.exists():
        return
    wanted = train_rows or max(_SAMPLE_A_LIST * index.lists(empty), _LEAST_SAMPLE)
    if not empty.is_trained:
        rows = np.arange(min(wanted, embeddings.rows))
        key = np.array([_SEED], np.uint64)
        sample = np.sort(order.permute(rows, np.array([embeddings.rows]), key))
        index.train(empty, embeddings.take(sample), factory)
    _write(empty, path)


def _add(shard_rows: int, embeddings: _Embeddings, work: Workspace) -> list[str]:
    """Writes the files of the index that are not there yet; returns their names."""
    names = []
    with ChunkProgress("index", embeddings.rows) as progress:
        for number, first in enumerate(range(0, embeddings.rows, shard_rows)):
            names.append(index.index_file(number))
            end, path = min(first + shard_rows, embeddings.rows), work.pieces / names[-1]
            if fresh := not path.exists():
                one = index.faiss().read_index(str(work.root / "trained.faiss"))
                for begin in range(first, end, _ADDED):
                    one.add(embeddings.take(np.arange(begin, min(begin + _ADDED, end))))
                _write(one, path)
            progress.add(end - first, Counts(documents=end - first), fresh=fresh)
    return names


def _write(one: Any, path: Path) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    index.faiss().write_index(one, str(temporary))
    os.replace(temporary, path)


# What follows runs in the workers.


def count_range(one: _Range) -> tuple[int, np.ndarray]:
    """Writes where the rows of a range begin; returns their number and, for tfidf, counts int64 [V]."""
    job, corpus = one.job, open_corpus(one.job.corpus, one.job.fingerprint)
    stream = corpus.domain("train", one.domain)
    start_N, end_N = row_bounds(stream, one.start, one.tokens, job.chunk)
    save_array(one.starts, start_N)
    if json.loads(job.encoder)["kind"] != "tfidf":
        return len(start_N), np.empty(0, np.int64)
    return len(start_N), encoders.document_frequencies(texts(stream, start_N, end_N), corpus.vocab_size)


def embed_range(one: _Range) -> int:
    """Writes the embeddings of a range; returns how many they are."""
    job = one.job
    stream = open_corpus(job.corpus, job.fingerprint).domain("train", one.domain)
    start_N, end_N = row_bounds(stream, one.start, one.tokens, job.chunk)
    encoder = encoder_of(job.root, job.encoder, job.corpus, job.fingerprint)
    save_array(one.embeddings, encoder.embed(texts(stream, start_N, end_N)))
    return len(start_N)


@lru_cache(maxsize=1)
def open_corpus(path: Path, fingerprint: str) -> Corpus:
    """Once a process; the fingerprint tells apart what one directory held at different times."""
    return Corpus.open(path)


@lru_cache(maxsize=1)
def encoder_of(directory: Path, settings: str, corpus: Path, fingerprint: str) -> Encoder:
    """Once a process. The settings have a hash of what the encoder depends on."""
    if parent_process() is not None:  # one of several, which share the cores
        import torch

        torch.set_num_threads(1)
    return encoders.load(directory, json.loads(settings), open_corpus(corpus, fingerprint))
