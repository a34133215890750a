"""Reference losses beside the tokens: what is written is read, and what does not belong is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from corpora import counting_documents, write_corpus

from megafab.data.format import Corpus
from megafab.data.plan import DataPlan
from megafab.data.scores import Scores, ScoresWriter
from megafab.errors import UserError
from megafab.techniques.base import RunPlan
from megafab.techniques.config import TokenSelectionConfig
from megafab.techniques.token_selection import TokenSelection


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "c", {"a": counting_documents([9, 8]), "b": [], "c": [np.array([5, 0])]})


def finish(writer: ScoresWriter) -> Scores:
    return writer.finish(checkpoint="step_00000010", seq_len=4, packing="document", step=10)


def written(corpus: Corpus, name: str = "ref") -> Scores:
    """Positions 3..12 of the first domain, by two writers as two processes would have them."""
    path = corpus.path / "scores" / name
    one, other = ScoresWriter(path, corpus), ScoresWriter(path, corpus)
    one.create()
    one.write(0, 3, np.arange(5.0))
    other.write(0, 8, np.arange(5.0, 10.0))
    other.write(2, 0, np.array([0.5]))
    other.flush()
    return finish(one)


def test_what_is_written_is_read(corpus: Corpus) -> None:
    made = written(corpus)
    scores = Scores.open("ref", corpus)
    assert scores.manifest["step"] == 10
    assert scores.fingerprint == made.fingerprint
    values = scores.read(0, 0, 17)
    assert values.dtype == np.float32
    assert values[3:13].tolist() == list(range(10))
    assert np.isnan(np.delete(values, range(3, 13))).all()
    assert scores.read(0, 7, 2).tolist() == [4, 5]
    assert scores.read(1, 0, 0).tolist() == []
    assert scores.read(2, 0, 1).tolist() == [0.5]


def test_the_fingerprint_is_of_the_values(corpus: Corpus) -> None:
    writer = ScoresWriter(corpus.path / "scores" / "other", corpus)
    writer.create()
    other = finish(writer)
    assert other.fingerprint != written(corpus).fingerprint
    assert written(corpus, "again").fingerprint == written(corpus).fingerprint


def selecting_by(reference: str, corpus: Corpus) -> TokenSelection:
    technique = TokenSelection(TokenSelectionConfig(reference), cast(Any, None))
    technique.on_plan(RunPlan(cast(Any, None), DataPlan(corpus)), cast(Any, None))
    return technique


def test_a_resume_with_other_scores_is_refused(corpus: Corpus) -> None:
    written(corpus)
    written(corpus, "again")
    state = selecting_by("ref", corpus).state_dict()
    selecting_by("again", corpus).load_state_dict(state)  # of the same values
    writer = ScoresWriter(corpus.path / "scores" / "other", corpus)
    writer.create()
    finish(writer)
    with pytest.raises(
        UserError, match=r"token_selection\.reference=other: found other scores \(.*than the run"
    ):
        selecting_by("other", corpus).load_state_dict(state)


def test_what_is_not_finished_or_not_of_this_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores/none: found no such directory.*megafab score"):
        Scores.open("none", corpus)
    path = corpus.path / "scores" / "ref"
    ScoresWriter(path, corpus).create()
    with pytest.raises(UserError, match="not finished"):
        Scores.open("ref", corpus)
    written(corpus)
    other = write_corpus(tmp_path / "d", {"a": counting_documents([9])})
    with pytest.raises(UserError, match="of the corpus"):
        Scores.open(path, other)
    (path / "train" / "a.f16").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.f16: found 0 bytes, expected 34 bytes"):
        Scores.open("ref", corpus)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="something else"):
        Scores.open("ref", corpus)
