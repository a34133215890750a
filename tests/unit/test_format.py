"""The corpus on disk: vanilla Megatron reads it, streams cross shards, damage is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import EOD, counting_documents, write_corpus

from megafab.data.format import MANIFEST, Corpus, corpus_fingerprint, token_dtype
from megafab.errors import UserError

LENGTHS = [3, 1, 7, 2, 2, 1, 1, 9, 4, 5, 1, 8]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Domains `a` in 5 shards of up to 3 documents, and `b`; `b` alone has a validation split."""
    documents = counting_documents(LENGTHS)
    other = counting_documents([4, 4], first=500)
    return write_corpus(
        tmp_path / "corpus", {"a": documents, "b": other}, {"b": other[:1]}, shard_documents=3
    )


@pytest.mark.parametrize(("vocab", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_vanilla_megatron_reads_it(vocab: int, dtype: type, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    assert token_dtype(vocab) == DType.optimal_dtype(vocab)
    documents = [*counting_documents(LENGTHS), np.array([vocab - 1, EOD])]
    write_corpus(tmp_path, {"a": documents}, vocab_size=vocab)
    dataset = IndexedDataset(str(tmp_path / "train" / "a-00000"))
    assert dataset.index.dtype == dtype
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    for index, document in enumerate(documents):
        assert dataset[index].tolist() == document.tolist()


def test_counts(corpus: Corpus) -> None:
    assert corpus.domains == ("a", "b")
    assert corpus.tokens("train") == (sum(LENGTHS), 8)
    assert corpus.documents("train") == (len(LENGTHS), 2)
    assert corpus.tokens("valid") == (0, 4)
    assert corpus.documents("valid") == (0, 1)
    assert (corpus.vocab_size, corpus.eod) == (65000, EOD)


def test_every_range_of_a_stream(corpus: Corpus) -> None:
    stream = corpus.domain("train", 0)
    tokens = np.concatenate(counting_documents(LENGTHS))
    begins = np.cumsum([0, *LENGTHS[:-1]])
    for start in range(len(tokens) + 1):
        for count in range(len(tokens) - start + 1):
            read = stream.read(start, count)
            assert read.dtype == np.int64
            assert read.tolist() == tokens[start : start + count].tolist()
            inside = [int(at) - start for at in begins if 0 < at - start < count]
            assert stream.document_starts(start, count).tolist() == inside


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 45), (44, 1), (10, -1)])
def test_a_range_outside_of_the_stream(corpus: Corpus, start: int, count: int) -> None:
    with pytest.raises(IndexError, match="of a stream of 44"):
        corpus.domain("train", 0).read(start, count)


def test_an_empty_split(corpus: Corpus) -> None:
    stream = corpus.domain("valid", 0)
    assert (stream.tokens, stream.documents) == (0, 0)
    assert stream.read(0, 0).tolist() == []


def test_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    documents = counting_documents([2] * 150)
    corpus = write_corpus(tmp_path, {"a": documents}, shard_documents=1)
    stream = corpus.domain("train", 0)
    assert stream.read(0, 300).tolist() == np.concatenate(documents).tolist()
    assert stream.read(0, 3).tolist() == [1, EOD, 3]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    documents = counting_documents(LENGTHS)
    one = write_corpus(tmp_path / "one", {"a": documents})
    same = write_corpus(tmp_path / "same", {"a": documents})
    other = write_corpus(tmp_path / "other", {"a": documents[1:]})
    assert one.fingerprint == same.fingerprint != other.fingerprint


def edit(corpus: Corpus, **changes: Any) -> None:
    """Change the first training shard's entry in the manifest, as a whole corpus of the kind would be."""
    path = corpus.path / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["domains"][0]["splits"]["train"]["shards"][0].update(changes)
    manifest["fingerprint"] = corpus_fingerprint(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("size", "found"),
    [(4, "found 4 bytes, expected 22 bytes"), (24, "found 24 bytes"), (None, "found no such file")],
)
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_of_another_size_than_the_manifest_says(
    corpus: Corpus, size: int | None, found: str, suffix: str
) -> None:
    path = corpus.path / "train" / f"a-00000{suffix}"
    if size is None:
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() + bytes(8))[:size])
    found = found.replace("22 bytes", "22 bytes" if suffix == ".bin" else "102 bytes")
    with pytest.raises(UserError, match=rf"a-00000\{suffix}: {found}.*Fix: "):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("size", [20, 24, 0])
def test_a_bin_that_does_not_fit_its_idx(corpus: Corpus, size: int) -> None:
    path = corpus.path / "train" / "a-00000.bin"
    path.write_bytes((path.read_bytes() + bytes(8))[:size])
    edit(corpus, bin_bytes=size)
    stream = Corpus.open(corpus.path).domain("train", 0)
    with pytest.raises(
        UserError, match=rf"a-00000\.bin: found {size} bytes, expected 22 bytes, as a-00000\.idx"
    ):
        stream.read(0, 1)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "another kind of file"),
        (b"PK" + bytes(100), "another kind of file"),
        (b"MMIDIDX\0\0\x02" + bytes(100), "index version 2"),
        (b"MMIDIDX\0\0" + b"\x01" + bytes(7) + b"\x06" + bytes(16), "index version 1, dtype code 6"),
        (b"MMIDIDX\0\0" + b"\x01" + bytes(7) + b"\x08" + b"\x03" + bytes(7) + b"\x04" + bytes(7), "34 bytes"),
    ],
)
def test_an_idx_that_is_none(corpus: Corpus, content: bytes, found: str) -> None:
    (corpus.path / "train" / "a-00000.idx").write_bytes(content)
    edit(corpus, idx_bytes=len(content))
    stream = Corpus.open(corpus.path).domain("train", 0)
    with pytest.raises(UserError, match=rf"a-00000\.idx: found {found}"):
        stream.read(0, 1)


@pytest.mark.parametrize(
    ("vocab", "last", "found"),
    [(5, EOD, r"token id \d+, expected ids below the tokenizer's 5"), (65000, 7, "ends with id 7")],
)
def test_ids_that_cannot_be(corpus: Corpus, vocab: int, last: int, found: str) -> None:
    path = corpus.path / "train" / "a-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + last.to_bytes(2, "little"))
    manifest = json.loads((corpus.path / MANIFEST).read_text())
    manifest["tokenizer"]["vocab_size"] = vocab
    (corpus.path / MANIFEST).write_text(json.dumps(manifest))
    edit(corpus)
    with pytest.raises(UserError, match=rf"a-00000\.bin: found .*{found}"):
        Corpus.open(corpus.path).domain("train", 0).read(0, 1)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"format": "mega', "found invalid JSON"),
        ("[]", "found []"),
        (
            '{"format": "other", "version": 1}',
            "found ('other', 1), expected format megafab-corpus, version 1",
        ),
        ('{"format": "megafab-corpus", "version": 1}', "found no key 'tokenizer'"),
    ],
)
def test_a_manifest_that_is_none(corpus: Corpus, content: str, found: str) -> None:
    (corpus.path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=rf"manifest\.json: {re.escape(found)}"):
        Corpus.open(corpus.path)


def test_a_manifest_that_was_edited(corpus: Corpus) -> None:
    path = corpus.path / MANIFEST
    path.write_text(path.read_text().replace('"eod": 0', '"eod": 1'))
    with pytest.raises(UserError, match="found content that was edited"):
        Corpus.open(corpus.path)


def test_no_corpus_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.path=.*found no manifest\.json there.*Fix: .*megafab data out="
    ):
        Corpus.open(tmp_path)
    with pytest.raises(UserError, match="found no such directory"):
        Corpus.open(tmp_path / "missing")
