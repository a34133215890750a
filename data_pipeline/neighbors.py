"""The rows of a database that are nearest to each chunk of a corpus: `megafab/data/retrieval.py` reads them.

    request -> embeddings of the query chunks (parallel) -> search, file by file of the index -> rename

Shape suffixes: C query chunks of a range, E length of an embedding, K neighbours kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chunks import RANGE_TOKENS, ChunkProgress, queries, texts
from data_pipeline.database import encoder_of, open_corpus
from data_pipeline.pool import Pool
from data_pipeline.retrieval_config import RetrievalConfig
from data_pipeline.tokenize import Counts
from data_pipeline.workspace import Workspace, is_finished, outages_interrupt, save_array
from megafab.data.derived import NEIGHBORS
from megafab.data.encoders import file_hash
from megafab.data.format import SPLITS, Corpus
from megafab.data.index import ShardedIndex, merge
from megafab.data.retrieval import Database, neighbors_file


def build(config: RetrievalConfig, corpus: Corpus, database: Database, pool: Pool) -> None:
    """Find the neighbours that `config` asks for below `corpus`, unless they are there already.

    Raises:
        UserError: see `data_pipeline.retrieval.build`.
    """
    out = corpus.path / NEIGHBORS.folder / config.out_name
    beside = database.corpus.path == corpus.path.absolute()
    request = {
        "corpus": corpus.fingerprint,
        # Beside its neighbours it is found by its name, wherever the corpus is moved.
        "database": database.path.name if beside else str(database.path),
        "database_fingerprint": database.fingerprint,
        "neighbors": config.neighbors,
        "candidates": config.candidates,
        "range_tokens": RANGE_TOKENS,
    }
    if not is_finished(NEIGHBORS, out, request, config.overwrite):
        with outages_interrupt(out), Workspace(out, request) as work:
            _build(config, corpus, database, request, work, pool)
            work.publish()
        print(f"{out} is finished")


@dataclass(frozen=True, slots=True)
class _Job:
    """What all ranges of a build have in common."""

    corpus: Path
    fingerprint: str  # of the corpus, which may have been replaced since a process opened it
    chunk: int
    pieces: Path
    database: Path
    database_corpus: Path
    database_fingerprint: str  # of its corpus
    encoder: str  # its settings in JSON


@dataclass(frozen=True, slots=True)
class _Range:
    """Consecutive query chunks of a domain of a split."""

    job: _Job
    split: str
    domain: int
    number: int
    first: int
    chunks: int

    @property
    def embeddings(self) -> Path:
        """What its chunks are searched with: float32 [C, E]; 0 for nothing."""
        return self._path("embeddings")

    def found(self, file: int, what: str) -> Path:
        """The best `rows` or `scores` [C, K] after the index' files `0..file`."""
        return self._path(f"{what}-{file:05d}")

    def _path(self, what: str) -> Path:
        return self.job.pieces / f"{what}-{self.split}-{self.domain:05d}-{self.number:07d}.npy"


def _ranges(job: _Job, corpus: Corpus) -> Iterator[_Range]:
    """All ranges, in the order of the corpus."""
    each = max(1, RANGE_TOKENS // job.chunk)
    for split in SPLITS:
        for domain, tokens in enumerate(corpus.tokens(split)):
            chunks = tokens // job.chunk
            for number, first in enumerate(range(0, chunks, each)):
                yield _Range(job, split, domain, number, first, min(each, chunks - first))


def _build(
    config: RetrievalConfig,
    corpus: Corpus,
    database: Database,
    request: Mapping[str, Any],
    work: Workspace,
    pool: Pool,
) -> None:
    theirs = database.corpus
    job = _Job(
        *(corpus.path.absolute(), corpus.fingerprint, config.chunk, work.pieces),
        *(database.path, theirs.path, theirs.fingerprint, json.dumps(database.manifest["encoder"])),
    )
    ranges = list(_ranges(job, corpus))
    _embed(ranges, pool)
    last = _search(ranges, corpus, database, config)
    work.result.mkdir()
    hashes = {}
    for split in SPLITS:
        for domain, name in enumerate(corpus.domains):
            mine = [one for one in ranges if (one.split, one.domain) == (split, domain)]
            rows = [
                np.empty((0, config.neighbors), np.int64),
                *(np.load(one.found(last, "rows")) for one in mine),
            ]
            path = work.result / neighbors_file(split, name)
            np.save(path, np.concatenate(rows))
            hashes[path.name] = file_hash(path)
    content = {**request, "tokenizer": corpus.tokenizer_fingerprint, "chunk": config.chunk, "sha256": hashes}
    NEIGHBORS.write(work.result, {**content, "request": dict(request)})


def _embed(ranges: list[_Range], pool: Pool) -> None:
    """The embeddings of every range that is not done yet, on all workers."""
    with ChunkProgress("embed queries", sum(one.chunks for one in ranges)) as progress:
        left = []
        for one in ranges:
            if one.embeddings.exists():
                progress.add(one.chunks, Counts(documents=one.chunks), fresh=False)
            else:
                left.append(one)
        for count in pool.map(embed_range, left):
            progress.add(count, Counts(documents=count), fresh=True)


def _search(ranges: list[_Range], corpus: Corpus, database: Database, config: RetrievalConfig) -> int:
    """Searches the index' files one after the other, so that one is in memory; returns the last's number."""
    index = ShardedIndex.of(database.path, database.manifest)
    own = database.corpus.fingerprint == corpus.fingerprint
    files = range(len(index.files))
    with ChunkProgress("search", len(files) * sum(one.chunks for one in ranges)) as progress:
        for file in files:
            for one in ranges:
                fresh = not any(one.found(later, "rows").exists() for later in files[file:])
                if fresh:
                    _search_range(one, file, index, corpus, database if own else None, config)
                progress.add(one.chunks, Counts(documents=one.chunks), fresh)
            index.close()
    return files[-1]


def _search_range(
    one: _Range,
    file: int,
    index: ShardedIndex,
    corpus: Corpus,
    own: Database | None,
    config: RetrievalConfig,
) -> None:
    """Merges what one file of the index has with what the files before it had."""
    scores_CK, rows_CK = index.search_file(file, np.load(one.embeddings), config.candidates)
    if own is not None and one.split == "train":
        stream = corpus.domain(one.split, one.domain)
        asked = queries(stream, one.first * config.chunk, one.chunks, config.chunk, corpus.eod)
        low_C, high_C = own.rows_between(one.domain, asked.low_C, asked.high_C)
        mine_CK = (rows_CK >= low_C[:, None]) & (rows_CK < high_C[:, None])
        scores_CK, rows_CK = np.where(mine_CK, np.float32(-np.inf), scores_CK), np.where(mine_CK, -1, rows_CK)
    parts = [(scores_CK, rows_CK)]
    if file:
        parts.append((np.load(one.found(file - 1, "scores")), np.load(one.found(file - 1, "rows"))))
    scores_CK, rows_CK = merge(parts, config.neighbors)
    save_array(one.found(file, "scores"), scores_CK)
    save_array(one.found(file, "rows"), rows_CK)
    if file:
        one.found(file - 1, "scores").unlink()
        one.found(file - 1, "rows").unlink()


def embed_range(one: _Range) -> int:
    """Runs in the workers: writes the embeddings of a range; returns how many they are."""
    job = one.job
    corpus = open_corpus(job.corpus, job.fingerprint)
    stream = corpus.domain(one.split, one.domain)
    asked = queries(stream, one.first * job.chunk, one.chunks, job.chunk, corpus.eod)
    encoder = encoder_of(job.database, job.encoder, job.database_corpus, job.database_fingerprint)
    save_array(one.embeddings, encoder.embed(texts(stream, asked.start_C, asked.end_C)))
    return one.chunks
