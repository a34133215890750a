"""`megafab score`: the losses are those of the engine, and a killed attempt goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus
from training import SHORT_RUN, train

from megafab.data.format import Corpus
from megafab.data.scores import Scores

pytestmark = pytest.mark.multiproc

ROOT = Path(__file__).parents[2]
SEQ_LEN = 32
MODEL = (
    *("model=llama_tiny", "model.layers=2", "model.hidden=32", "model.heads=2", "model.kv_heads=2"),
    *("model.ffn=64", f"model.seq_len={SEQ_LEN}", "train.steps=4"),
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "score", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory) -> tuple[Corpus, Path]:
    """A corpus of two domains with frequent and rare tokens, and a run that has learnt a little of it."""
    root, generator = tmp_path_factory.mktemp("score"), np.random.default_rng(0)

    def documents(count: int) -> list[np.ndarray]:
        lengths = generator.integers(5, 90, count)
        return [np.append(1 + (127 * generator.random(n) ** 2).astype(int), 0) for n in lengths]

    parts = {"books": documents(180), "code": documents(90)}
    corpus = write_corpus(root / "corpus", parts, {"books": documents(9)}, vocab_size=128)
    arguments = [
        *MODEL,
        *SHORT_RUN[1:],
        "eval.samples=4",
        f"data.path={corpus.path}",
        f"run.dir={root / 'run'}",
    ]
    assert ranks.run(train, arguments, world=1, init=False) == [0]
    return corpus, root / "run"


def engine_losses(rank: int, world: int, run_dir: Path) -> dict[str, float]:
    """The mean loss of each domain's training windows, as the engine evaluates them."""
    from megafab.build import build
    from megafab.config.load import from_yaml
    from megafab.data.loader import WindowReader
    from megafab.engine.base import nll_only
    from megafab.platform import platform

    platform.start(rank, 1)
    config = from_yaml(run_dir / "config.yaml")
    corpus = Corpus.open(config.data.path)
    run = build(config, ranks=world)
    run.checkpoints.restore()
    reader = WindowReader(corpus, "train", SEQ_LEN, config.data.packing)
    losses: dict[str, float] = {}
    for number, windows in enumerate(reader.windows_D.tolist()):
        window_B = np.arange(windows)
        batch = reader.read(np.full(windows, number), window_B, window_B)
        losses |= run.engine.evaluate(batch, 1, nll_only).reduced().domain_loss
    return losses


def test_scores_are_the_losses_of_the_engine(ranks, reference):
    corpus, run_dir = reference
    done = subprocess.run(
        command(f"checkpoint={run_dir}", "name=whole", "workers=2"),
        env=ENVIRONMENT, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = {name: float(loss) for name, loss in re.findall(r"(\w+): ([\d.]+) nats", done.stdout)}
    (want,) = ranks.run(engine_losses, run_dir, world=1)
    assert told == pytest.approx(want, abs=6e-5)
    scores = Scores.open("whole", corpus)
    for number, tokens in enumerate(corpus.tokens("train")):
        values = scores.read(number, 0, tokens)
        assert np.nanmean(values) == pytest.approx(want[corpus.domains[number]], rel=1e-3), "float16 is kept"
        starts = corpus.domain("train", number).document_starts(0, tokens)
        predicted = np.arange(1, tokens)  # the position before each document begins predicts nothing
        nothing = set((starts - 1).tolist()) | set(range((tokens - 1) // SEQ_LEN * SEQ_LEN, tokens))
        assert np.flatnonzero(np.isnan(values)).tolist() == sorted(nothing)
        assert len(predicted) > len(nothing)


def finished(path: Path) -> Iterator[int]:
    """How many tasks are noted as finished, asked again and again for a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        yield len(path.read_text().splitlines()) - 1 if path.exists() else 0
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_attempt_goes_on(reference):
    corpus, run_dir = reference
    arguments = [f"checkpoint={run_dir}", "name=killed", "micro_batch=2"]
    log = corpus.path / "scores" / "killed" / "finished.jsonl"
    with subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
        assert any(count >= 2 for count in finished(log))
        process.send_signal(signal.SIGKILL)
    before = log.read_text().splitlines()
    assert len(before) < 1 + 7, "it was not over yet"
    again = subprocess.run(command(*arguments), env=ENVIRONMENT, text=True, capture_output=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert not log.exists()
    assert Scores.open("killed", corpus).fingerprint == Scores.open("whole", corpus).fingerprint


def test_other_scores_of_the_same_name_stay(reference):
    corpus, run_dir = reference
    done = subprocess.run(
        command(f"checkpoint={run_dir}", "name=whole", "seq_len=16"),
        env=ENVIRONMENT, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "name=whole: found scores there with another seq_len, expected none, or the same. "
        "Fix: give another name=, or remove it"
    )
