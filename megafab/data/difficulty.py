"""The windows of a corpus from the easiest to the hardest, as `megafab data difficulty` leaves them.

    <corpus>/difficulty/<name>/<domain>.windows.npy   int64: the numbers of the windows, the easiest first
    <corpus>/difficulty/<name>/<domain>.values.npy    float32: the metric of each, never falling
    <corpus>/difficulty/<name>/manifest.json          corpus, metric, seq_len, windows, fingerprint; last

A window is what the loader reads as one sample: `seq_len + 1` tokens from a multiple of `seq_len` on. Windows
of equal difficulty are in the order of the corpus.

Shape suffix: W windows of a domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megafab.data.derived import DIFFICULTY
from megafab.data.format import Corpus
from megafab.data.plan import Difficulty
from megafab.errors import UserError

_DTYPES = {"windows": np.dtype(np.int64), "values": np.dtype(np.float32)}
_CHUNK = 1 << 20  # entries hashed at a time


@dataclass(frozen=True, slots=True)
class DifficultyIndex:
    """A finished index; its arrays are mapped, not read. Tuples are by domain, in the corpus' order."""

    path: Path
    manifest: Mapping[str, Any]
    windows: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @staticmethod
    def open(name: str | Path, corpus: Corpus, seq_len: int) -> DifficultyIndex:
        """The index of `corpus` by its name below it, or by its path.

        Raises:
            UserError: none there, not finished, of another corpus or other windows, a file missing or cut.
        """
        path = name if isinstance(name, Path) else DIFFICULTY.directory(corpus.path, name)
        manifest = DIFFICULTY.read(path)
        DIFFICULTY.require_corpus(path, manifest, corpus.fingerprint)
        if manifest["seq_len"] != seq_len:
            found, fix = f"windows of {manifest['seq_len']} tokens", f"{DIFFICULTY.make} seq_len={seq_len}"
            raise UserError(str(path), found, f"windows of {seq_len}", fix)
        arrays = {
            kind: tuple(
                _array(path / f"{domain}.{kind}.npy", dtype, manifest["windows"][domain])
                for domain in corpus.domains
            )
            for kind, dtype in _DTYPES.items()
        }
        return DifficultyIndex(path, manifest, **arrays)

    @property
    def order(self) -> Difficulty:
        """What the loader is told."""
        return Difficulty(self.manifest["fingerprint"], self.windows)


def write_domain(path: Path, domain: str, values_W: np.ndarray) -> dict[str, Any]:
    """Sorts one domain's windows by their values into its two files; returns what `commit` asks for."""
    windows_W = np.argsort(values_W, kind="stable")
    digest = hashlib.sha256()
    for kind, array in (("windows", windows_W), ("values", values_W[windows_W])):
        array = np.ascontiguousarray(array, _DTYPES[kind])
        np.save(path / f"{domain}.{kind}.npy", array)
        for start in range(0, len(array), _CHUNK):
            digest.update(array[start : start + _CHUNK].data)
    return {"windows": len(values_W), "sha256": digest.hexdigest()}


def commit(
    path: Path,
    corpus: Corpus,
    domains: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    seq_len: int,
    **facts: Any,
) -> None:
    """Writes the manifest of an index whose domains are all written; `facts` are further keys of it."""
    by_name = list(zip(corpus.domains, domains, strict=True))
    content = {
        "corpus": corpus.fingerprint,
        "metric": metric,
        "seq_len": seq_len,
        "windows": {name: domain["windows"] for name, domain in by_name},
        "sha256": {name: domain["sha256"] for name, domain in by_name},
        **facts,
    }
    DIFFICULTY.write(path, content)


def _array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        expected = f"{count} numbers of type {dtype}"
        raise UserError(str(path), f"no usable file ({error})", expected, DIFFICULTY.make) from None
    if array.shape != (count,) or array.dtype != dtype:
        found, expected = f"{array.shape} of {array.dtype}", f"({count},) of {dtype}, as the manifest says"
        raise UserError(str(path), found, expected, DIFFICULTY.make)
    return array
