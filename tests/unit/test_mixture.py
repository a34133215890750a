"""Domain weights from the configuration, and the draw of each sample's domain."""

from __future__ import annotations

import logging
import math
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from corpora import counting_documents, write_corpus

from megafab.data.format import Corpus
from megafab.data.mixture import draw, occurrence, weights
from megafab.errors import ConfigError, UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    # 60, 30 and 10 training tokens.
    domains = {"books": [20, 40], "code": [30], "web": [3, 7]}
    return write_corpus(tmp_path, {name: counting_documents(lengths) for name, lengths in domains.items()})


def test_no_mixture_weighs_by_training_tokens(corpus: Corpus):
    assert weights(None, corpus) == pytest.approx((0.6, 0.3, 0.1), abs=1e-15)


@pytest.mark.parametrize(
    ("temperature", "factor"), [(1.0, lambda tokens: tokens), (0.5, math.sqrt), (0.0, lambda tokens: 1.0)]
)
def test_a_temperature_flattens_the_natural_mixture(corpus: Corpus, temperature: float, factor):
    values = [factor(tokens) for tokens in corpus.tokens("train")]
    assert weights(None, corpus, temperature) == pytest.approx([value / sum(values) for value in values])


def test_mixture_is_normalised_in_the_order_of_the_corpus(corpus: Corpus):
    assert weights({"web": 1.0, "books": 6.0, "code": 3.0}, corpus) == (0.6, 0.3, 0.1)


def test_a_domain_left_out_gets_weight_0_and_that_is_said(corpus: Corpus, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert weights({"code": 2.0, "books": 2.0}, corpus) == (0.5, 0.5, 0.0)
    assert "data.mixture leaves out web" in caplog.text
    caplog.clear()
    assert weights({"code": 2.0, "books": 2.0, "web": 0.0}, corpus) == (0.5, 0.5, 0.0)
    assert caplog.text == ""


def test_unknown_domain_is_refused_with_the_known_ones(corpus: Corpus):
    with pytest.raises(ConfigError, match=r"data\.mixture\.bokks: .*expected one of books, code, web"):
        weights({"bokks": 1.0}, corpus)


@pytest.mark.parametrize("weight", [-0.5, nan, inf])
def test_weights_that_are_no_weights_are_refused(corpus: Corpus, weight: float):
    with pytest.raises(ConfigError, match=r"data\.mixture\.code: found -?\w+(\.5)?, expected a finite"):
        weights({"books": 1.0, "code": weight}, corpus)


@pytest.mark.parametrize("mixture", [{}, {"books": 0.0, "code": 0.0}])
def test_a_mixture_of_nothing_is_refused(corpus: Corpus, mixture: dict[str, float]):
    with pytest.raises(ConfigError, match=r"data\.mixture: found no positive weight"):
        weights(mixture, corpus)


def test_a_corpus_of_nothing_is_refused(tmp_path: Path):
    empty = write_corpus(tmp_path, {"books": []})
    with pytest.raises(UserError, match="no training tokens"):
        weights(None, empty)


def test_a_draw_depends_on_seed_sample_and_weights_only():
    weights_D = (0.5, 0.3, 0.2)
    whole = draw(3, 0, 1000, weights_D)
    pieces = [draw(3, first, 100, weights_D) for first in range(0, 1000, 100)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert (draw(4, 0, 1000, weights_D) != whole).sum() > 400


def test_frequencies_match_the_weights():
    weights_D, count = (0.55, 0.0, 0.3, 0.149, 0.001, 0.0), 100_000
    found_D = np.bincount(draw(1234, 10**9, count, weights_D), minlength=len(weights_D))
    for found, weight in zip(found_D, weights_D, strict=True):
        assert abs(found - count * weight) <= 4 * np.sqrt(count * weight * (1 - weight))


def test_one_domain_takes_all():
    assert draw(0, 0, 100, (0.0, 1.0, 0.0)).tolist() == [1] * 100


def test_occurrence_counts_earlier_equals():
    assert occurrence(np.array([2, 0, 2, 2, 1, 0])).tolist() == [0, 0, 1, 2, 0, 1]
    assert occurrence(np.array([], np.int64)).tolist() == []
