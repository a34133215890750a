"""Corpora for tests, written with the shard writer that `megafab data` uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megafab.data.format import Corpus, ShardWriter, split_entry, token_dtype, write_manifest

EOD = 0


def counting_documents(lengths: Sequence[int], first: int = 1) -> list[np.ndarray]:
    """Documents of these lengths, EOD included, whose other tokens count up from `first` without a gap.

    An EOD takes the place of a number, so token i of the stream is `first + i` unless it is an EOD.
    """
    stream = np.arange(first, first + sum(lengths))
    ends = np.cumsum(lengths)
    stream[ends - 1] = EOD
    return np.split(stream, ends[:-1])


def write_corpus(
    root: Path,
    train: Mapping[str, Sequence[np.ndarray]],
    valid: Mapping[str, Sequence[np.ndarray]] | None = None,
    *,
    vocab_size: int = 65000,
    shard_documents: int = 1_000_000,
) -> Corpus:
    """A corpus of the given documents by domain, opened; it has no tokenizer files.

    Args:
        root: the directory to make.
        train: documents of each domain, each ending with `EOD`.
        valid: as `train`; domains left out have none.
        vocab_size: ids are below it.
        shard_documents: documents of a shard, to make streams that cross shards.
    """
    domains = []
    for name, documents in train.items():
        splits = {}
        for split, chosen in (("train", documents), ("valid", (valid or {}).get(name, ()))):
            shards = []
            for number, first in enumerate(range(0, len(chosen), shard_documents)):
                writer = ShardWriter(root, f"{split}/{name}-{number:05d}", token_dtype(vocab_size))
                for document in chosen[first : first + shard_documents]:
                    writer.append(document)
                shards.append(writer.close())
            splits[split] = split_entry(shards, text_bytes=0)
        domains.append({"name": name, "splits": splits})
    tokenizer = {"vocab_size": vocab_size, "eod": EOD, "fingerprint": "none"}
    write_manifest(root, {"tokenizer": tokenizer, "domains": domains})
    return Corpus.open(root)
