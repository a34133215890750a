"""The nearest rows of a database by inner product, found by faiss in one index or several.

An index is named as faiss names it (`Flat`, `IVF4096,Flat`, `OPQ32_64,IVF65536_HNSW8,PQ32`). A database of
many rows has several files of it: all are trained alike, and the i-th holds rows from `i * shard_rows` on.

Shape suffixes: Q queries, E length of a vector, K rows asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megafab.errors import ConfigError, UserError

_PROBED_SHARE = 1 / 16  # of the lists, as RETRO's Wikipedia index: 4096 of 65536
_EF_SEARCH = 256  # RETRO's for large graphs


def faiss() -> Any:
    """The package, which only those need who search.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise UserError(
            "faiss", "no such package", "faiss-cpu or faiss-gpu", "pip install faiss-cpu"
        ) from None


def create(factory: str, dim: int) -> Any:
    """An empty index.

    Raises:
        ConfigError: faiss knows no such index for vectors of this length.
    """
    package = faiss()
    try:
        return package.index_factory(dim, factory, package.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        found, expected = (
            f"no index for vectors of {dim} numbers ({_reason(error)})",
            "a string for faiss' index_factory",
        )
        raise ConfigError(
            f"index={factory}", found, expected, "index=Flat, or IVF4096,Flat, for example"
        ) from None


def search_parameters(index: Any, nprobe: int | None, ef_search: int | None) -> dict[str, int]:
    """How an index is searched, by faiss' names: what is given, or the papers' where that is null.

    Raises:
        ConfigError: the index has no parameter of a kind that is given.
    """
    package, inner = faiss(), _inner(index)
    found: dict[str, int] = {}
    if isinstance(inner, package.IndexIVF):
        found["nprobe"] = nprobe or max(1, round(inner.nlist * _PROBED_SHARE))
        if isinstance(package.downcast_index(inner.quantizer), package.IndexHNSW):
            found["quantizer_efSearch"] = ef_search or _EF_SEARCH
    elif isinstance(inner, package.IndexHNSW):
        found["efSearch"] = ef_search or _EF_SEARCH
    problems = [
        ConfigError(f"{key}={value}", f"an index without {what}", f"one with {what}", f"leave {key} out")
        for key, value, name, what in (
            ("nprobe", nprobe, "nprobe", "lists (IVF)"),
            ("ef_search", ef_search, "efSearch", "a graph (HNSW)"),
        )
        if value is not None and not any(parameter.endswith(name) for parameter in found)
    ]
    if problems:
        raise problems[0]
    return found


def lists(index: Any) -> int:
    """How many lists an index sorts its rows into; 0 when it has none."""
    package, inner = faiss(), _inner(index)
    return inner.nlist if isinstance(inner, package.IndexIVF) else 0


def train(index: Any, sample_NE: np.ndarray, factory: str) -> None:
    """Lets an index learn its lists and codes from a sample of the rows.

    Raises:
        UserError: the sample is too small for it.
    """
    try:
        index.train(sample_NE)
    except RuntimeError as error:
        found = f"{len(sample_NE)} rows to train it on ({_reason(error)})"
        fix = "a larger train_rows, an index with fewer lists, or index=Flat"
        raise UserError(f"index={factory}", found, "at least one for each list and code", fix) from None


class ShardedIndex:
    """The files of an index and what it is searched with.

    Each is opened when it is first searched: vectors and lists are mapped, a graph is read.
    """

    def __init__(self, files: Sequence[Path], shard_rows: int, parameters: Mapping[str, int]) -> None:
        self.files, self._shard_rows, self._parameters = files, shard_rows, parameters
        self._opened: dict[int, Any] = {}

    @staticmethod
    def of(directory: Path, manifest: Mapping[str, Any]) -> ShardedIndex:
        """The index of a database."""
        rows, shard_rows = sum(manifest["rows"].values()), manifest["shard_rows"]
        files = [directory / index_file(number) for number in range(-(-rows // shard_rows))]
        return ShardedIndex(files, shard_rows, manifest["search"])

    def search(self, queries_QE: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products float32 [Q, K] and rows int64 [Q, K] of the nearest in all files; see `merge`."""
        nothing = np.full((len(queries_QE), count), -np.inf, np.float32)
        none = nothing, np.full(nothing.shape, -1, np.int64)
        parts = [self.search_file(number, queries_QE, count) for number in range(len(self.files))]
        return merge([none, *parts], count)

    def search_file(self, number: int, queries_QE: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, in one file. A query of length 0 finds nothing.

        Raises:
            UserError: the file is not there, or not an index.
        """
        if number not in self._opened:
            self._opened[number] = self._open(self.files[number])
        scores_QK, rows_QK = self._opened[number].search(queries_QE, count)
        found_QK = (rows_QK >= 0) & np.any(queries_QE, axis=1, keepdims=True)
        rows_QK = np.where(found_QK, rows_QK + number * self._shard_rows, -1)
        return np.where(found_QK, scores_QK, np.float32(-np.inf)), rows_QK

    def close(self) -> None:
        """Lets go of what is in memory."""
        self._opened.clear()

    def _open(self, path: Path) -> Any:
        package = faiss()
        try:
            index = package.read_index(str(path), package.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            found, fix = f"no usable index ({_reason(error)})", "build it again: megafab data retrieval"
            raise UserError(str(path), found, "a file of faiss", f"{fix} ... overwrite=true") from None
        space = package.ParameterSpace()
        for name, value in self._parameters.items():
            space.set_index_parameter(index, name, value)
        return index


def merge(parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best of several results, the nearest first; of equally near ones the first rows.

    Args:
        parts: inner products float32 [Q, any] and rows int64 [Q, any]; -inf and -1 where there is none.
        count: K, at most what the parts have together.
    """
    scores_QK = np.concatenate([scores for scores, _ in parts], axis=1)
    rows_QK = np.concatenate([rows for _, rows in parts], axis=1)
    best_QK = np.lexsort((rows_QK, -scores_QK), axis=1)[:, :count]
    return np.take_along_axis(scores_QK, best_QK, 1), np.take_along_axis(rows_QK, best_QK, 1)


def index_file(number: int) -> str:
    """The name of the i-th file of an index."""
    return f"index-{number:05d}.faiss"


def _inner(index: Any) -> Any:
    """The index itself where it stands behind a rotation."""
    package = faiss()
    return package.downcast_index(index.index) if isinstance(index, package.IndexPreTransform) else index


def _reason(error: Exception) -> str:
    """What faiss says, without the place in its source."""
    return re.split(r" at \S+:\d+: ", str(error).strip())[-1].splitlines()[-1]
