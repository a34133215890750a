"""`megafab data difficulty`: how hard each window of the training split is, by one metric.

    request -> token counts (parallel, for rarity) -> values (parallel) -> sorted domains (parallel) -> rename

A window is what the loader reads as one sample: `seq_len + 1` tokens from a multiple of `seq_len` on. The
metrics are those of Li et al. 2022, "DeepSpeed Data Efficiency" (arXiv 2212.03597), section 3.1, for packed
text; small is easy:

    seqlen        mean length of the pieces of documents in the window, in tokens: how far a prediction can
                  look back. Windows are full, so that their own length, which the paper takes, says nothing
    rarity        sum over the window's tokens of -log(share of the token in the training split)
    compression   zlib's size of the window's decoded text over its UTF-8 bytes: a reference that needs no
                  model; 0 for a window without text
    loss          mean over the window of a reference model's losses (`megafab score`), where it has any
    a function    what it returns for the window's ids, int64 [W]

Work happens beside the result, as for a corpus (`workspace.py`); a build that was killed continues.

Shape suffixes: N windows of a range, W = seq_len + 1 tokens of a window, V token ids.
"""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import METRICS, DifficultyConfig, check_difficulty
from data_pipeline.pool import Pool
from data_pipeline.progress import Progress
from data_pipeline.tokenize import Counts
from data_pipeline.workspace import Workspace, is_finished, outages_interrupt, save_array
from megafab.data.derived import DIFFICULTY
from megafab.data.difficulty import DifficultyIndex, commit, write_domain
from megafab.data.format import Corpus, window_count
from megafab.data.scores import Scores
from megafab.data.tokenizer import Tokenizer
from megafab.errors import UserError
from megafab.function import load_function

RANGE_TOKENS = 1 << 22  # measured by one process at a time
_LEVEL = 6  # of zlib


def build(config: DifficultyConfig) -> None:
    """Build the index that `config` asks for, unless it is there already.

    Raises:
        UserError: bad configuration or input, one line each; nothing is left behind.
        Interrupted: the machine failed (disk full, process killed); the next call continues.
    """
    check_difficulty(config)
    corpus = Corpus.open(Path(config.path).expanduser())
    require_windows(corpus, config.seq_len)
    out = corpus.path / DIFFICULTY.folder / config.out_name
    request = _request(config, corpus)
    if not is_finished(DIFFICULTY, out, request, config.overwrite):
        with outages_interrupt(out), Workspace(out, request) as work, Pool(config.workers) as pool:
            _build(config, corpus, request, work, pool)
            work.publish()
    _report(out, corpus, config.seq_len)


def require_windows(corpus: Corpus, seq_len: int) -> None:
    """Refuses a corpus of which no domain has a window.

    Raises:
        UserError: naming the longest domain.
    """
    longest = max(corpus.tokens("train"), default=0)
    if not window_count(longest, seq_len):
        found, expected = f"at most {longest} tokens a domain", f"seq_len + 1 = {seq_len + 1} in one at least"
        raise UserError(f"path={corpus.path}", found, expected, "a smaller seq_len, or more text")


def _request(config: DifficultyConfig, corpus: Corpus) -> dict[str, Any]:
    """What the index depends on, and nothing else: two equal requests give equal indices."""
    request: dict[str, Any] = {
        "corpus": corpus.fingerprint,
        "seq_len": config.seq_len,
        "metric": config.metric,
        "range_tokens": RANGE_TOKENS,
    }
    if config.scores is not None:
        request["scores"] = Scores.open(config.scores, corpus).fingerprint
    if config.metric not in METRICS:
        load_function("metric", config.metric)
        file = importlib.import_module(config.metric.partition(":")[0]).__file__
        assert file is not None
        request["function"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return request


@dataclass(frozen=True, slots=True)
class _Job:
    """What all ranges of a build have in common."""

    corpus: Path
    fingerprint: str  # of the corpus, which may have been replaced since a process opened it
    seq_len: int
    metric: str
    scores: str | None
    pieces: Path
    surprisal: Path  # float64 [V], of rarity


@dataclass(frozen=True, slots=True)
class _Range:
    """Consecutive windows of a domain; `tokens` are those counted with them: all are, once."""

    job: _Job
    domain: int
    number: int
    first: int
    windows: int
    tokens: int

    @property
    def path(self) -> Path:
        """Where the values of its windows are when it is done: float32 [N]."""
        return self.job.pieces / f"{self.domain:05d}-{self.number:07d}.npy"


def _ranges(job: _Job, corpus: Corpus) -> Iterator[_Range]:
    """All ranges, in the order of the corpus."""
    each = max(1, RANGE_TOKENS // job.seq_len)
    for domain, tokens in enumerate(corpus.tokens("train")):
        windows = window_count(tokens, job.seq_len)
        for number, first in enumerate(range(0, max(windows, 1), each)):
            count = min(each, windows - first)
            end = (first + count) * job.seq_len if first + count < windows else tokens
            yield _Range(job, domain, number, first, count, end - first * job.seq_len)


def _build(
    config: DifficultyConfig, corpus: Corpus, request: Mapping[str, Any], work: Workspace, pool: Pool
) -> None:
    surprisal = work.root / "surprisal.npy"
    job = _Job(
        *(corpus.path.absolute(), corpus.fingerprint, config.seq_len, config.metric, config.scores),
        *(work.pieces, surprisal),
    )
    ranges = list(_ranges(job, corpus))
    if config.metric == "rarity":
        save_array(surprisal, _surprisal(_count(ranges, corpus, work, pool)))
    _measure(ranges, pool)
    work.result.mkdir()
    tasks = [
        (work.result, name, tuple(one.path for one in ranges if one.domain == domain))
        for domain, name in enumerate(corpus.domains)
    ]
    domains = list(pool.map(_sort, tasks))
    facts = {"request": dict(request)}
    commit(work.result, corpus, domains, metric=config.metric, seq_len=config.seq_len, **facts)


def _count(ranges: list[_Range], corpus: Corpus, work: Workspace, pool: Pool) -> np.ndarray:
    """How often each id is in the training split: int64 [V]. Sums so far are kept for a restart."""
    path = work.root / "counts.npy"
    # The last entry is the number of ranges that are in the sums.
    sums = np.load(path) if path.exists() else np.zeros(corpus.vocab_size + 1, np.int64)
    done = int(sums[-1])
    with _TokenProgress("count", sum(corpus.tokens("train"))) as progress:
        for one in ranges[:done]:
            progress.add(one.tokens, Counts(tokens=one.tokens), fresh=False)
        for one, counts in zip(ranges[done:], pool.map(count_range, ranges[done:]), strict=True):
            sums[:-1] += counts
            sums[-1] += 1
            save_array(path, sums)
            progress.add(one.tokens, Counts(tokens=one.tokens), fresh=True)
    return sums[:-1]


def _surprisal(counts_V: np.ndarray) -> np.ndarray:
    """-log of each id's share, in nats; of those that never occur, which nobody looks up, 0."""
    shares_V = counts_V / counts_V.sum()
    return -np.log(shares_V, out=np.zeros(len(counts_V)), where=counts_V > 0)


def _measure(ranges: list[_Range], pool: Pool) -> None:
    """The values of every range that is not done yet, on all workers."""
    with _TokenProgress("measure", sum(one.tokens for one in ranges)) as progress:
        left = []
        for one in ranges:
            if one.path.exists():
                progress.add(one.tokens, Counts(tokens=one.tokens), fresh=False)
            else:
                left.append(one)
        for tokens in pool.map(measure_range, left):
            progress.add(tokens, Counts(tokens=tokens), fresh=True)


class _TokenProgress(Progress):
    """Progress in tokens, which is all that is known of a range."""

    def _counts(self) -> str:
        return f"{self._all.tokens / 1e6:,.2f}M tokens, {self._rate(self._fresh.tokens):,.0f} tokens/s"


def _report(out: Path, corpus: Corpus, seq_len: int) -> None:
    """What was measured, domain by domain."""
    index = DifficultyIndex.open(out, corpus, seq_len)
    for name, values_N in zip(corpus.domains, index.values, strict=True):
        if not len(values_N):
            print(f"  {name}: no window of {seq_len + 1} tokens")
            continue
        ends = ", ".join(
            f"{word} {float(values_N[int(share * (len(values_N) - 1))]):.4g}"
            for word, share in (("easiest", 0), ("median", 0.5), ("hardest", 1))
        )
        print(f"  {name}: {len(values_N):,} windows, {ends}")
    print(f"{out} is finished: difficulty by {index.manifest['metric']}")


# What follows runs in the workers.


def count_range(one: _Range) -> np.ndarray:
    """How often each id is among the tokens of a range: int64 [V]."""
    corpus = _open(one.job.corpus, one.job.fingerprint)
    ids = corpus.domain("train", one.domain).read(one.first * one.job.seq_len, one.tokens)
    return np.bincount(ids, minlength=corpus.vocab_size)


def measure_range(one: _Range) -> int:
    """Writes the values of a range; returns its tokens."""
    values_N = _values(one) if one.windows else np.empty(0)
    unusable = np.flatnonzero(~np.isfinite(values_N))
    if len(unusable):
        corpus = _open(one.job.corpus, one.job.fingerprint)
        where = f"domain {corpus.domains[one.domain]}, window {one.first + int(unusable[0])}"
        found = f"{one.job.metric} {values_N[unusable[0]]}"
        fix = "correct the function"
        if one.job.metric == "loss":
            fix = f"scores of every window: megafab score with seq_len={one.job.seq_len}"
        raise UserError(where, found, "a finite number for every window", fix)
    save_array(one.path, values_N.astype(np.float32))
    return one.tokens


def _sort(task: tuple[Path, str, tuple[Path, ...]]) -> dict[str, Any]:
    result, name, paths = task
    return write_domain(result, name, np.concatenate([np.load(path) for path in paths]))


def _values(one: _Range) -> np.ndarray:
    """The metric of each window: float [N]."""
    job = one.job
    stream = _open(job.corpus, job.fingerprint).domain("train", one.domain)
    start, count, length = one.first * job.seq_len, one.windows * job.seq_len, job.seq_len
    if job.metric == "seqlen":
        # A document that begins at a window's first token is not listed, and begins no second piece there.
        starts = stream.document_starts(start, count + 1)
        return (length + 1) / (1 + np.bincount((starts - 1) // length, minlength=one.windows))
    if job.metric == "loss":
        assert job.scores is not None
        losses_NL = _scores(job.corpus, job.fingerprint, job.scores).read(one.domain, start, count)
        return _mean(losses_NL.reshape(one.windows, length).astype(np.float64))
    ids = stream.read(start, count + 1)
    if job.metric == "rarity":
        return _windows(np.load(job.surprisal)[ids], length).sum(axis=1)
    if job.metric == "compression":
        measure = partial(_compression, _tokenizer(job.corpus, job.fingerprint))
    else:
        measure = load_function("metric", job.metric)
    return np.array([measure(window_W) for window_W in _windows(ids, length)], np.float64)


def _windows(values: np.ndarray, length: int) -> np.ndarray:
    """The windows of a range [N, W] as a view: each begins with the last value of the one before it."""
    return np.lib.stride_tricks.sliding_window_view(values, length + 1)[::length]


def _mean(losses_NL: np.ndarray) -> np.ndarray:
    """Over the positions that have a loss; nan for a window where none has."""
    known_NL = np.isfinite(losses_NL)
    count_N = known_NL.sum(axis=1)
    sum_N = np.where(known_NL, losses_NL, 0).sum(axis=1)
    return np.divide(sum_N, count_N, out=np.full(len(sum_N), np.nan), where=count_N > 0)


def _compression(tokenizer: Tokenizer, window_W: np.ndarray) -> float:
    text = tokenizer.decode(window_W.tolist()).encode()
    return len(zlib.compress(text, _LEVEL)) / len(text) if text else 0.0


@lru_cache(maxsize=1)
def _open(path: Path, fingerprint: str) -> Corpus:
    """Once a process; the fingerprint tells apart what one directory held at different times."""
    return Corpus.open(path)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    return Tokenizer.load(_open(path, fingerprint).tokenizer_dir)


@lru_cache(maxsize=1)
def _scores(path: Path, fingerprint: str, name: str) -> Scores:
    return Scores.open(name, _open(path, fingerprint))
