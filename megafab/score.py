"""The loss of every token of a corpus under a reference model, kept beside the tokens (`data/scores.py`).

The training split is cut into windows as training cuts it, and each is one forward pass. Ranges of windows
are the tasks; finished ones are noted, so that the same command continues what was interrupted. A worker
process holds the whole model: a reference is a small one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import current_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.data.scores import Scores, ScoresWriter
from megafab.platform import platform

if TYPE_CHECKING:
    from megafab.scorer import Scorer

_WINDOWS = 64  # of a task
_FINISHED = "finished.jsonl"  # a line that says of what, then one for each finished task


@dataclass(frozen=True, slots=True)
class Job:
    """What is scored, with what. `seal` is that of the checkpoint's manifest, which tells one model from
    another in the same place; `out` is the directory of the scores, `threads` are those of a process.
    """

    run: RunConfig
    checkpoint: Path
    seal: str
    corpus: Path
    out: Path
    seq_len: int
    micro_batch: int
    threads: int


@dataclass(frozen=True, slots=True)
class Task:
    """Windows `first .. first + count - 1` of a domain."""

    job: Job
    domain: int
    first: int
    count: int

    @property
    def tokens(self) -> int:
        """Positions of its windows."""
        return self.count * self.job.seq_len


@dataclass(frozen=True, slots=True)
class Done:
    """A finished task: what was predicted, and the sum of its losses in nats."""

    domain: int
    first: int
    predictions: int
    nll: float


def score(
    job: Job,
    each: Callable[[Callable[[Task], Done], Iterable[Task]], Iterable[Done]],
    told: Callable[[int, int], None],
) -> tuple[Scores, dict[str, float]]:
    """Scores the corpus; returns the scores and the mean loss of each domain.

    Args:
        job: what to do.
        each: runs tasks in order, such as `map` or a pool's.
        told: is given tokens done and tokens in all, finished ones of an earlier attempt included.

    Raises:
        UserError: the corpus or the checkpoint cannot be read.
    """
    corpus = Corpus.open(job.corpus)
    tasks = list(_tasks(job, corpus))
    writer = ScoresWriter(job.out, corpus)
    log = job.out / _FINISHED
    header = json.dumps({"corpus": corpus.fingerprint, **_facts(job)})
    finished = _finished(log, header)
    if finished is None:
        writer.create()
        finished = []
    # Written anew: its last line may have been cut.
    log.write_text(
        "".join(f"{line}\n" for line in (header, *(json.dumps(asdict(done)) for done in finished)))
    )
    known = {(done.domain, done.first) for done in finished}
    left = [task for task in tasks if (task.domain, task.first) not in known]
    total = sum(task.tokens for task in tasks)
    tokens = total - sum(task.tokens for task in left)
    with open(log, "a") as lines:
        for task, done in zip(left, each(run_task, left), strict=True):
            finished.append(done)
            print(json.dumps(asdict(done)), file=lines, flush=True)
            tokens += task.tokens
            told(tokens, total)
    scores = writer.finish(**_facts(job))
    log.unlink()
    losses = {}
    for number, name in enumerate(corpus.domains):
        mine = [done for done in finished if done.domain == number]
        predictions = sum(done.predictions for done in mine)
        if predictions:
            losses[name] = sum(done.nll for done in mine) / predictions
    return scores, losses


_scorers: dict[Path, Scorer] = {}


def run_task(task: Task) -> Done:
    """Scores the windows of a task; the first one loads the model."""
    job = task.job
    if job.out not in _scorers:
        worker = current_process().name.rpartition("-")[2]  # of a pool: SpawnProcess-1, SpawnProcess-2, ...
        platform.start(int(worker) - 1 if worker.isdigit() else 0, job.threads)
        from megafab.scorer import Scorer  # once the platform has started, as all that needs core

        corpus = Corpus.open(job.corpus)
        _scorers[job.out] = Scorer(
            job.run, job.checkpoint, corpus, job.out, seq_len=job.seq_len, micro_batch=job.micro_batch
        )
    predictions, nll = _scorers[job.out].run(task.domain, task.first, task.count)
    return Done(task.domain, task.first, predictions, nll)


def _tasks(job: Job, corpus: Corpus) -> Iterator[Task]:
    for domain, tokens in enumerate(corpus.tokens("train")):
        windows = max(tokens - 1, 0) // job.seq_len
        for first in range(0, windows, _WINDOWS):
            yield Task(job, domain, first, min(_WINDOWS, windows - first))


def _facts(job: Job) -> dict[str, Any]:
    """What the scores were made with."""
    return {
        "checkpoint": str(job.checkpoint),
        "seal": job.seal,
        "seq_len": job.seq_len,
        "packing": job.run.data.packing.value,
    }


def _finished(log: Path, header: str) -> list[Done] | None:
    """What an interrupted attempt at the same finished; None if there was none."""
    if not log.exists():
        return None
    first, *lines = log.read_text().splitlines() or [""]
    if first != header:
        return None
    return [Done(**json.loads(line)) for line in lines if line.endswith("}")]
