"""`megafab data difficulty` against its definitions, window by window, and across a kill."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import counting_documents, write_corpus
from training import build_corpus

from data_pipeline import difficulty
from launch import cli
from megafab.data.difficulty import DifficultyIndex
from megafab.data.format import Corpus
from megafab.data.scores import ScoresWriter
from megafab.data.tokenizer import Tokenizer

SEQ_LEN = 64
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Real text, real tokens."""
    return Corpus.open(build_corpus(tmp_path_factory.mktemp("real")))


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "RANGE_TOKENS", 10_000)


def run(corpus: Corpus, *overrides: str) -> int:
    return cli.main(["data", "difficulty", f"path={corpus.path}", f"seq_len={SEQ_LEN}", *overrides])


def measured(corpus: Corpus, name: str) -> list[np.ndarray]:
    """The value of each window by domain, in the order of the corpus, from a finished index."""
    index = DifficultyIndex.open(name, corpus, SEQ_LEN)
    found = []
    for domain, (windows, values) in enumerate(zip(index.windows, index.values, strict=True)):
        assert (np.diff(values) >= 0).all()
        assert sorted(windows.tolist()) == list(range((corpus.tokens("train")[domain] - 1) // SEQ_LEN))
        assert (np.diff(windows)[np.diff(values) == 0] > 0).all(), "equal ones in the order of the corpus"
        whole = np.empty(len(values))
        whole[windows] = values
        found.append(whole)
    return found


def tokens_of(corpus: Corpus, domain: int) -> list[int]:
    stream = corpus.domain("train", domain)
    return stream.read(0, stream.tokens).tolist()


def windows_of(corpus: Corpus, domain: int) -> list[list[int]]:
    tokens = tokens_of(corpus, domain)
    return [tokens[at : at + SEQ_LEN + 1] for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]


def test_rarity_is_that_of_brute_force(corpus: Corpus) -> None:
    assert run(corpus, "workers=1") == 0
    counts = Counter(token for domain in range(3) for token in tokens_of(corpus, domain))
    for domain, values in enumerate(measured(corpus, "rarity-64")):
        windows = windows_of(corpus, domain)
        assert len(windows) > 500
        want = [sum(-math.log(counts[token] / counts.total()) for token in window) for window in windows]
        assert values == pytest.approx(want, rel=1e-6)


def test_seqlen_and_compression_are_those_of_brute_force(corpus: Corpus) -> None:
    assert run(corpus, "workers=1", "metric=seqlen", "name=lengths") == 0
    assert run(corpus, "workers=1", "metric=compression") == 0
    tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    lengths, ratios = measured(corpus, "lengths"), measured(corpus, "compression-64")
    for domain in range(3):
        for at, window in enumerate(windows_of(corpus, domain)):
            pieces = 1 + sum(token == corpus.eod for token in window[:-1])
            assert lengths[domain][at] == pytest.approx((SEQ_LEN + 1) / pieces)
            text = tokenizer.decode(window).encode()
            assert ratios[domain][at] == pytest.approx(len(zlib.compress(text, 6)) / len(text))


def test_loss_is_the_mean_of_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "c", {"a": counting_documents([50] * 40), "b": [np.array([7, 0])]})
    writer = ScoresWriter(corpus.path / "scores" / "ref", corpus)
    writer.create()
    generator = np.random.default_rng(0)
    losses = generator.random(31 * SEQ_LEN).astype(np.float16)
    losses[::7] = np.nan
    writer.write(0, 0, losses)
    writer.finish(checkpoint="step", seq_len=SEQ_LEN, packing="document")
    assert run(corpus, "workers=1", "metric=loss", "scores=ref") == 0
    assert "b: no window of 65 tokens" in capsys.readouterr().out
    (values, none) = measured(corpus, "loss-64")
    assert values == pytest.approx(np.nanmean(losses.astype(float).reshape(31, SEQ_LEN), axis=1))
    assert none.shape == (0,)

    bare = ScoresWriter(corpus.path / "scores" / "bare", corpus)
    bare.create()
    bare.finish(checkpoint="step", seq_len=SEQ_LEN, packing="document")
    assert run(corpus, "workers=1", "metric=loss", "scores=bare", "name=x") == 2
    error = capsys.readouterr().err
    assert error.startswith("domain a, window 0: found loss nan, expected a finite number for every window.")
    assert run(corpus, "workers=1", "metric=loss", "scores=none", "name=x") == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_function_of_the_users(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two processes, which find it where this one does."""
    module = tmp_path / "my_metric.py"
    module.write_text("def distinct(window_W):\n    return len(set(window_W.tolist()))\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(corpus, "workers=2", "metric=my_metric:distinct") == 0
    for domain, values in enumerate(measured(corpus, "distinct-64")):
        assert values.tolist() == [len(set(window)) for window in windows_of(corpus, domain)]
    capsys.readouterr()
    assert run(corpus, "metric=my_metric:distinct") == 0
    assert "is finished. Nothing to do" in capsys.readouterr().out
    module.write_text("def distinct(window_W):\n    return 1\n")
    assert run(corpus, "metric=my_metric:distinct") == 2
    assert "found a megafab-difficulty made from another request (function)" in capsys.readouterr().err
    assert run(corpus, "workers=1", "metric=my_metric:distinct", "overwrite=true") == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metric=hardness", "metric=hardness: found an unknown metric"),
        ("metric=loss", "scores: found nothing, expected a name, as metric=loss"),
        ("scores=ref", "scores=ref: found metric=rarity, expected metric=loss"),
        ("workers=0", "workers=0: found a value too small"),
        ("name=a/b", "name=a/b: found no name of a directory"),
        ("seq_len=10000000", "found at most "),
        ("metric=nowhere:f", "metric=nowhere:f: found no module nowhere"),
    ],
)
def test_mistakes_get_one_line(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run(corpus, override) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_killed_build_continues(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed where it has counted all tokens and measured some ranges; then only the others are measured."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from data_pipeline import difficulty\n"
        "from launch import cli\n"
        "difficulty.RANGE_TOKENS = 10_000\n"
        "measure = difficulty.measure_range\n"
        "difficulty.measure_range = lambda one: (time.sleep(0.1), measure(one))[1]\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = [
        "data",
        "difficulty",
        f"path={corpus.path}",
        f"seq_len={SEQ_LEN}",
        "name=killed",
        "workers=1",
    ]
    work = corpus.path / "difficulty" / ".killed.building"
    build = subprocess.Popen(
        [sys.executable, str(slow), *arguments], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}
    )
    deadline = time.monotonic() + 60
    while len(list((work / "pieces").glob("*.npy"))) < 3:
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert not (corpus.path / "difficulty" / "killed").exists()
    finished = {path.stem for path in (work / "pieces").glob("*.npy")}

    counted, redone = [], []
    measure, count = difficulty.measure_range, difficulty.count_range
    monkeypatch.setattr(
        difficulty, "measure_range", lambda one: (redone.append(one.path.stem), measure(one))[1]
    )
    monkeypatch.setattr(difficulty, "count_range", lambda one: (counted.append(one), count(one))[1])
    assert cli.main(arguments) == 0
    assert "continuing the interrupted build" in capsys.readouterr().out
    assert redone
    assert not finished & set(redone)
    assert not counted
    assert not work.exists()
    assert run(corpus, "workers=1", "name=at_once") == 0
    one, other = (
        json.loads((corpus.path / "difficulty" / name / "manifest.json").read_text())
        for name in ("killed", "at_once")
    )
    assert one == other
