"""Chunks of a corpus to retrieve, and which of them are near each chunk of a corpus: the data of RETRO.

    <corpus>/retrieval/<name>/starts.npy            int64: where each row begins in its domain's train stream
    <corpus>/retrieval/<name>/idf.npy               what the encoder `tfidf` has counted
    <corpus>/retrieval/<name>/index-00000.faiss     the rows' embeddings, `shard_rows` of them a file
    <corpus>/retrieval/<name>/manifest.json         corpus, chunk, encoder, index, fingerprint; last

    <corpus>/neighbors/<name>/<split>-<domain>.npy  int64: rows of a database, the nearest first; -1: no more
    <corpus>/neighbors/<name>/manifest.json         corpus, tokenizer, database, fingerprint; written last

Borgeaud et al. 2022, "Improving Language Models by Retrieving from Trillions of Tokens" (arXiv 2112.04426),
section 2; Wang et al. 2023, "Shall We Pretrain Autoregressive Language Models with Retrieval?" (arXiv
2304.06762). `m` is the length of a chunk in tokens.

A row of a database is a chunk of a document of the training split, its EOD left out; chunks are cut from the
document's beginning, so the last may be short. Rows are in the order of domains, documents, chunks. A query
chunk is tokens `[c * m, (c + 1) * m)` of a domain's stream: it depends on neither sequence length, nor seed,
nor mixture. It is searched with what it has of the document of its last token, EOD left out: the later tokens
of other documents do not see its neighbours.

Shape suffixes: N rows, L tokens of a row and what follows it, C query chunks, K neighbours kept, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megafab.data import order
from megafab.data.derived import NEIGHBORS, RETRIEVAL
from megafab.data.format import SPLITS, Corpus
from megafab.errors import UserError

if TYPE_CHECKING:
    from megafab.data.encoders import Encoder
    from megafab.data.index import ShardedIndex

STARTS = "starts.npy"


class Database:
    """Chunks to retrieve. Their tokens are read from the mapped shards of the corpus they are of.

    `chunk` is m, `rows` how many there are, `fingerprint` identifies rows, encoder and index.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], corpus: Corpus) -> None:
        self.path, self.manifest, self.corpus = path, manifest, corpus
        self.fingerprint: str = manifest["fingerprint"]
        self.chunk: int = manifest["chunk"]
        self._first_D = np.cumsum([0, *(manifest["rows"][name] for name in corpus.domains)])
        self.rows = int(self._first_D[-1])
        self._starts = _array(path / STARTS, (self.rows,), RETRIEVAL.make)
        self._streams = [corpus.domain("train", domain) for domain in range(len(corpus.domains))]

    @staticmethod
    def open(path: str | Path) -> Database:
        """The database in a directory `<corpus>/retrieval/<name>`; the index is not read.

        Raises:
            UserError: none there, not finished, of another corpus than the one it lies in, a file missing.
        """
        path = Path(path).expanduser().absolute()
        manifest = RETRIEVAL.read(path)
        corpus = Corpus.open(path.parents[1])
        RETRIEVAL.require_corpus(path, manifest, corpus.fingerprint)
        return Database(path, manifest, corpus)

    def read(self, rows_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens from the beginning of each row on, and how many they are.

        A row goes on into the chunks that follow it in its document, and ends with the document.

        Args:
            rows_N: int64; -1 for no row.
            length: L, tokens wanted of each: 2m for a chunk and its continuation.

        Returns:
            int64 [N, L], EOD where a document has ended or no row is; int64 [N], tokens before that.
        """
        tokens_NL = np.full((len(rows_N), length), self.corpus.eod, np.int64)
        domain_N = np.searchsorted(self._first_D, rows_N, side="right") - 1
        for domain in set(domain_N.tolist()) - {-1}:
            here = np.flatnonzero(domain_N == domain)
            tokens_NL[here] = self._streams[domain].gather(self._starts[rows_N[here]], length)
        ended_NL = np.logical_or.accumulate(tokens_NL == self.corpus.eod, axis=1)
        tokens_NL[ended_NL] = self.corpus.eod
        return tokens_NL, length - ended_NL.sum(axis=1)

    def rows_between(self, domain: int, begin: Any, end: Any) -> tuple[Any, Any]:
        """`low, high`: rows `low:high` are those that begin at tokens `begin:end` of a domain's stream.

        For two integers, or for two arrays of them.
        """
        first, last = self._first_D[domain], self._first_D[domain + 1]
        starts = self._starts[first:last]
        return first + np.searchsorted(starts, begin), first + np.searchsorted(starts, end)

    def search(self, texts_ids: Sequence[np.ndarray], count: int) -> np.ndarray:
        """The rows nearest to some texts, now: int64 [Q, count], the nearest first, -1 for no more.

        The encoder and the index are loaded on first use.

        Args:
            texts_ids: each text's ids; ids of EOD stand for nothing, and an empty text has no neighbours.
            count: rows wanted of each.

        Raises:
            UserError: a package or a model that the encoder or the index needs is not there, or is another.
        """
        embeddings_QE = self.encoder.embed([ids[ids != self.corpus.eod] for ids in texts_ids])
        _, rows_QK = self._index.search(embeddings_QE, count)
        return rows_QK

    @cached_property
    def encoder(self) -> Encoder:
        """What made the embeddings, and makes those of queries."""
        from megafab.data import encoders

        return encoders.load(self.path, self.manifest["encoder"], self.corpus)

    @cached_property
    def _index(self) -> ShardedIndex:
        from megafab.data.index import ShardedIndex

        return ShardedIndex.of(self.path, self.manifest)


class Neighbors:
    """The nearest rows of a database for every query chunk of a corpus; its arrays are mapped, not read.

    `chunk` is m, `kept` how many rows a chunk has at most, `facts` what identifies it, in short.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], corpus: Corpus, database: Database) -> None:
        self.path, self.manifest, self.database = path, manifest, database
        self.fingerprint: str = manifest["fingerprint"]
        self.chunk: int = manifest["chunk"]
        self.kept: int = manifest["neighbors"]
        self._domains = corpus.domains
        # Only there can a window meet its own documents.
        self._own = "train" if database.corpus.fingerprint == corpus.fingerprint else None
        self._streams = {
            split: [corpus.domain(split, domain) for domain in range(len(corpus.domains))] for split in SPLITS
        }
        self._rows = {
            split: [
                _array(path / neighbors_file(split, name), (tokens // self.chunk, self.kept), NEIGHBORS.make)
                for name, tokens in zip(corpus.domains, corpus.tokens(split), strict=True)
            ]
            for split in SPLITS
        }

    @staticmethod
    def open(name: str | Path, corpus: Corpus, chunk: int) -> Neighbors:
        """The neighbours of `corpus` by their name below it, or by their path.

        Raises:
            UserError: none there, not finished, of another corpus, tokenizer or chunk length, a file missing
                or cut, a database that is gone or has changed since.
        """
        path = name if isinstance(name, Path) else NEIGHBORS.directory(corpus.path, name)
        manifest = NEIGHBORS.read(path)
        NEIGHBORS.require_corpus(path, manifest, corpus.fingerprint)
        if manifest["chunk"] != chunk:
            found, fix = f"chunks of {manifest['chunk']} tokens", f"{NEIGHBORS.make} chunk={chunk}"
            raise UserError(str(path), found, f"chunks of {chunk}", fix)
        database = Database.open(RETRIEVAL.directory(corpus.path, manifest["database"]))
        require_tokenizer(database.corpus, corpus)
        if database.fingerprint != manifest["database_fingerprint"]:
            raise UserError(
                str(path),
                f"neighbours in the database {manifest['database_fingerprint'][:12]}",
                f"neighbours in {database.path}, which is {database.fingerprint[:12]} now",
                f"{NEIGHBORS.make} overwrite=true",
            )
        return Neighbors(path, manifest, corpus, database)

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the neighbours, for a checkpoint and for saying what differs."""
        return {
            "neighbors": self.fingerprint,
            "database": self.database.fingerprint,
            "chunk": self.chunk,
            "encoder": self.database.manifest["encoder"],
            "index": self.database.manifest["index"],
            "kept": self.kept,
        }

    def rows(self, split: str, domain: int) -> np.ndarray:
        """The rows kept for every query chunk of a domain's stream: int64 [C, K], -1 for no more."""
        return self._rows[split][domain]

    def read(
        self, split: str, domain: int, start: int, chunks: int, *, count: int, wrong: bool = False
    ) -> np.ndarray:
        """The rows to show beside each chunk of one window, the nearest first: int64 [chunks, count].

        Rows of documents that the window has a token or its last label of are left out; -1 stands where
        there are no more rows, and for chunks that reach beyond the end of the stream.

        Args:
            split: `train` or `valid`.
            domain: its number.
            start: the window's first token in the domain's stream, a multiple of m.
            chunks: C, chunks of m tokens in the window.
            count: at most `kept`.
            wrong: in place of each row one drawn from all others by a hash of split, domain and chunk: what
                retrieval gives when what is retrieved says nothing.
        """
        assert start % self.chunk == 0, (start, self.chunk)
        assert count <= self.kept, (count, self.kept)
        first = start // self.chunk
        rows_CK = np.full((chunks, self.kept), -1, np.int64)
        known_CK = self._rows[split][domain][first : first + chunks]
        rows_CK[: len(known_CK)] = known_CK
        low = high = 0
        if split == self._own and len(known_CK):
            stream = self._streams[split][domain]
            window = min(chunks * self.chunk + 1, stream.tokens - start)
            low, high = self.database.rows_between(domain, *stream.document_bounds(start, window))
        rows_CK = _without(rows_CK, low, high)[:, :count]
        if not wrong:
            return rows_CK
        number_CK = (first + np.arange(chunks))[:, None] * self.kept + np.arange(count)
        key = np.array([order.stream_key("wrong neighbors", split, self._domains[domain])], np.uint64)
        others = max(1, self.database.rows - (high - low))
        drawn_CK = (order.random_bits(key, number_CK) % np.uint64(others)).astype(np.int64)
        drawn_CK += np.where(drawn_CK >= low, high - low, 0)
        return np.where(rows_CK >= 0, drawn_CK, -1)


def neighbors_file(split: str, domain: str) -> str:
    """The name of the file with the neighbours of one domain of one split."""
    return f"{split}-{domain}.npy"


def require_tokenizer(database: Corpus, corpus: Corpus) -> None:
    """Refuses to retrieve for a corpus whose ids mean something else in that of the database.

    Raises:
        UserError: the tokenizers differ.
    """
    theirs, ours = database.tokenizer_fingerprint, corpus.tokenizer_fingerprint
    if theirs != ours:
        found, expected = f"text of the tokenizer {theirs[:12]}", f"text of the tokenizer {ours[:12]}"
        fix = (
            f"build both with one: megafab data ... tokenizer.type=file tokenizer.path={corpus.tokenizer_dir}"
        )
        raise UserError(str(database.path), found, f"{expected}, as {corpus.path} has", fix)


def _without(rows_CK: np.ndarray, low: int, high: int) -> np.ndarray:
    """Rows in `low:high` left out, the others moved up in their order, -1 behind them."""
    dropped_CK = (rows_CK < 0) | ((rows_CK >= low) & (rows_CK < high))
    others_first_CK = np.argsort(dropped_CK, axis=1, kind="stable")
    return np.take_along_axis(np.where(dropped_CK, -1, rows_CK), others_first_CK, axis=1)


def _array(path: Path, shape: tuple[int, ...], make: str) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, np.int64)  # an empty file cannot be mapped
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"no usable file ({error})", f"int64 numbers {shape}", make) from None
    if array.shape != shape or array.dtype != np.int64:
        found = f"{array.shape} of {array.dtype}"
        raise UserError(str(path), found, f"{shape} of int64, as the manifest says", make)
    return array.view(np.ndarray)
