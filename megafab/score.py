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
from typing import Any

import numpy as np
import torch

from megafab.config.schema import RunConfig
from megafab.data.config import Packing
from megafab.data.format import Corpus
from megafab.data.loader import WindowReader
from megafab.data.scores import Scores, ScoresWriter
from megafab.generate import load_model
from megafab.loss.cross_entropy import vocab_parallel_nll
from megafab.model.gpt import GPT
from megafab.model.inputs import ModelInputs
from megafab.platform import platform
from megafab.topology import groups as topology
from megafab.topology.groups import Groups
from megafab.topology.mesh import Mesh

_WINDOWS = 256  # of a task
_FINISHED = "finished.jsonl"  # a line that says of what, then one for each finished task


@dataclass(frozen=True, slots=True)
class Job:
    """What is scored, with what. `out` is the directory of the scores."""

    run: RunConfig
    checkpoint: Path
    corpus: Path
    out: Path
    seq_len: int
    packing: Packing
    micro_batch: int


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
        log.write_text(header + "\n")
        finished = []
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


def run_task(task: Task) -> Done:
    """Scores the windows of a task and has them on the disk; the model is loaded by the first."""
    job, model, groups, reader, writer = _tools(task.job)
    predictions, nll = 0, 0.0
    for first in range(task.first, task.first + task.count, job.micro_batch):
        window_B = np.arange(first, min(first + job.micro_batch, task.first + task.count))
        rows = reader.read(np.full(len(window_B), task.domain), window_B, window_B)
        inputs = ModelInputs.of(rows, groups, job.run.parallel.context_method)
        with torch.no_grad():
            logits_LBV = model(
                inputs.tokens_BL, inputs.position_BL, inputs.attention_mask, labels=inputs.labels_BL
            )
            nll_BL = vocab_parallel_nll(logits_LBV, inputs.labels_BL.t(), groups.tensor).t()
        asked_BL = inputs.loss_mask_BL != 0
        predictions += int(asked_BL.sum())
        nll += float(nll_BL[asked_BL].double().sum())
        values_BL = torch.where(asked_BL, nll_BL, torch.nan).cpu().numpy()
        writer.write(task.domain, first * job.seq_len, values_BL.reshape(-1))
    writer.flush()
    return Done(task.domain, task.first, predictions, nll)


_Tools = tuple[Job, GPT, Groups, WindowReader, ScoresWriter]
_made: dict[Path, _Tools] = {}


def _tools(job: Job) -> _Tools:
    """What a process scores with, made once."""
    if job.out not in _made:
        worker = current_process().name.rpartition("-")[2]  # of a pool: SpawnProcess-1, SpawnProcess-2, ...
        platform.start(int(worker) - 1 if worker.isdigit() else 0)
        corpus = Corpus.open(job.corpus)
        model = load_model(job.run, job.checkpoint, corpus.vocab_size)
        reader = WindowReader(corpus, "train", job.seq_len, job.packing)
        groups = topology.initialize(Mesh(1), seed=job.run.train.seed)
        _made[job.out] = job, model, groups, reader, ScoresWriter(job.out, corpus)
    return _made[job.out]


def _tasks(job: Job, corpus: Corpus) -> Iterator[Task]:
    for domain, tokens in enumerate(corpus.tokens("train")):
        windows = max(tokens - 1, 0) // job.seq_len
        for first in range(0, windows, _WINDOWS):
            yield Task(job, domain, first, min(_WINDOWS, windows - first))


def _facts(job: Job) -> dict[str, Any]:
    """What the scores were made with."""
    return {"checkpoint": str(job.checkpoint), "seq_len": job.seq_len, "packing": job.packing.value}


def _finished(log: Path, header: str) -> list[Done] | None:
    """What an interrupted attempt at the same finished; None if there was none."""
    if not log.exists():
        return None
    first, *lines = log.read_text().splitlines() or [""]
    if first != header:
        return None
    return [Done(**json.loads(line)) for line in lines if line.endswith("}")]
