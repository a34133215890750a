"""From tokenized pieces to shards: which documents are held out, and the order within a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.tokenize import PieceTable, load_table
from megafab.data.format import Shard, ShardWriter, token_dtype
from megafab.errors import UserError

SHARD_TOKENS = 1 << 27  # held in memory while the shard is shuffled: 256 MiB of uint16
_NO_VALID = -1  # below every hash


def split_threshold(tables: Iterable[PieceTable], fraction: float, domain: str) -> int:
    """The hash up to which, inclusive, documents of a domain are held out.

    Splitting by a hash of the text puts equal documents on the same side. Neither side stays empty:
    when chance holds out nothing, the smallest hash goes; when it holds out everything, the largest stays.

    Raises:
        UserError: fewer than two distinct documents, none of which can be held out.
    """
    if fraction == 0:
        return _NO_VALID
    ends = [(int(table.hashes.min()), int(table.hashes.max())) for table in tables if len(table.hashes)]
    smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
    if smallest == largest:
        found, expected = "one distinct document", "at least two, so that one can be held out"
        fix = "cut it into several documents (one a file or JSONL line), or hold out none: valid_fraction=0"
        raise UserError(f"sources.{domain}", found, expected, fix)
    return min(max(int(fraction * 2**64) - 1, smallest), largest - 1)


def chosen(table: PieceTable, split: str, threshold: int) -> np.ndarray:
    """Which documents of a piece belong to `split`: bool [documents]."""
    if threshold == _NO_VALID:
        held_out = np.zeros(len(table.hashes), dtype=bool)
    else:
        held_out = table.hashes <= np.uint64(threshold)
    return held_out if split == "valid" else ~held_out


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to be written: the documents of `split` in some consecutive pieces, shuffled."""

    root: Path
    pieces: Path
    domain: str
    split: str
    number: int
    names: tuple[str, ...]
    threshold: int
    seed: int
    vocab_size: int


def plan_shards(
    root: Path, pieces: Path, domain: str, names: Sequence[str], fraction: float, seed: int, vocab_size: int
) -> list[ShardPlan]:
    """All shards of a domain, training split first."""
    threshold = split_threshold(_tables(pieces, names), fraction, domain)
    plans = []
    for split in ("train", "valid"):
        group: list[str] = []
        tokens = number = 0
        for name, table in zip(names, _tables(pieces, names), strict=True):
            group.append(name)
            tokens += int(table.lengths[chosen(table, split, threshold)].sum())
            if tokens >= SHARD_TOKENS or (name == names[-1] and tokens):
                plans.append(
                    ShardPlan(root, pieces, domain, split, number, tuple(group), threshold, seed, vocab_size)
                )
                group, tokens, number = [], 0, number + 1
    return plans


def write_shard(plan: ShardPlan) -> tuple[Shard, int]:
    """Write one shard; returns it and the UTF-8 bytes of its documents' text."""
    dtype = token_dtype(plan.vocab_size)
    documents: list[np.ndarray] = []
    size = 0
    for name in plan.names:
        table = _table(plan.pieces, name)
        mask = chosen(table, plan.split, plan.threshold)
        ends = np.cumsum(table.lengths)
        ids = np.fromfile(plan.pieces / f"{name}.bin", dtype=dtype)
        documents += [
            ids[end - length : end] for end, length in zip(ends[mask], table.lengths[mask], strict=True)
        ]
        size += int(table.sizes[mask].sum())
    writer = ShardWriter(plan.root, f"{plan.split}/{plan.domain}-{plan.number:05d}", dtype)
    for index in _order(len(documents), plan):
        writer.append(documents[index])
    return writer.close(), size


def _order(count: int, plan: ShardPlan) -> np.ndarray:
    """A random order. Raw bits of PCG64, which numpy promises never to change, unlike its shuffles."""
    name = f"{plan.split}/{plan.domain}-{plan.number}"
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    bits = np.random.PCG64(np.random.SeedSequence([plan.seed, stream])).random_raw(count)
    return np.argsort(bits, kind="stable")


def _table(pieces: Path, name: str) -> PieceTable:
    table = load_table(pieces, name)
    assert table is not None, name
    return table


def _tables(pieces: Path, names: Sequence[str]) -> Iterator[PieceTable]:
    return (_table(pieces, name) for name in names)
