"""Shards to batches: which windows a step reads, on which rank, and the few integers that resume it.

A sample is a window of `seq_len + 1` consecutive tokens of one domain, starting at a multiple of
`seq_len`: the last label of a window is the first token of the next. Global sample g belongs to the
domain that `mixture.draw` says; it is that domain's k-th sample, k being the count of earlier ones, and
`order.visit` says which window the k-th is. So the state is the number of samples and a count by domain.
A curriculum draws among the windows that it admits instead (`data/clusters.py`), and adds their clusters.
Samples that are skipped (`data/skips.py`) are drawn and counted, but not read.

Shape suffixes: B rows of a data rank, L sequence length, W = L + 1 tokens of a window, D domains,
G samples of a step over all data ranks, N the same with those it passes over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megafab.data import mixture, order
from megafab.data.clusters import Clusters, Drawn
from megafab.data.config import Packing
from megafab.data.format import window_count
from megafab.data.packing import pack, put_in_front
from megafab.data.plan import Column, DataPlan
from megafab.data.retrieved import Retrieval
from megafab.data.skips import Skips, Stretch
from megafab.errors import UserError
from megafab.run import Batch, StepPlan

if TYPE_CHECKING:
    from megafab.data.format import Corpus


_NONE = Skips()
_LOG = 1000  # stretches of the mixture that are remembered; an online policy makes one a step


@dataclass(frozen=True, slots=True)
class _Step:
    """All that decides what a step reads."""

    first_sample: int
    counts_D: tuple[int, ...]
    global_batch: int
    micro_batch: int
    weights_D: tuple[float, ...]
    replayed: tuple[int, ...]
    clusters_D: tuple[Clusters, ...] | None
    skips: Skips


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """This data rank's rows, and the samples, counts and clusters after the step."""

    batch: Batch
    samples: int
    counts_D: tuple[int, ...]
    clusters_D: tuple[Clusters, ...] | None


class Loader:
    """The batches of one split, step by step, for one data rank.

    The order of samples is a function of (seed, corpus, mixture log): the number of data ranks, the
    micro-batch, prefetching and interruptions do not enter. Every data rank keeps the same state.

    Args:
        corpus: the shards.
        split: `train` or `valid`.
        seed: of the mixture's draws and of the order of windows.
        seq_len: L.
        packing: how documents share a row.
        data_rank: this replica's number among `data_ranks`. The m-th micro-batches of all data ranks together
            are the m-th `micro_batch * data_ranks` samples of the step, so that what is decided over such a
            group depends on its size only.
        data_ranks: the number of model replicas.
        prefetch: read the next step's rows in a thread while the current step computes.
        plan: what techniques have asked for; None: nothing.
        block: samples in a row that come from one domain.
        max_epochs: a domain that was read this often is left out from then on; None: no limit.
        skips: samples to pass over.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        split: str,
        seed: int,
        seq_len: int,
        packing: Packing,
        data_rank: int,
        data_ranks: int,
        prefetch: bool,
        plan: DataPlan | None = None,
        block: int = 1,
        max_epochs: float | None = None,
        skips: Skips = _NONE,
    ) -> None:
        assert 0 <= data_rank < data_ranks
        self._plan = plan or DataPlan(corpus)
        self._block, self._max_epochs = block, max_epochs
        self._corpus, self._split, self._seed = corpus, split, seed
        self._seq_len, self._packing = seq_len, packing
        self._data_rank, self._data_ranks = data_rank, data_ranks
        self._reader = WindowReader(corpus, split, seq_len, packing, self._plan.columns, self._plan.retrieval)
        seeds = self._plan.order_seeds
        self._window_keys_D = np.array(
            [order.stream_key(seeds.get(name, seed), "windows", name) for name in corpus.domains], np.uint64
        )
        self._samples = 0
        self._counts_D = (0,) * len(corpus.domains)
        self._clusters_D = (Clusters(),) * len(corpus.domains) if self._plan.difficulty else None
        self._log: list[tuple[int, tuple[float, ...]]] = []
        self._given, self._found = skips, Skips()
        self._last: Stretch | None = None
        self._prefetch = prefetch
        self._ahead: _Ahead | None = None

    def take(self, plan: StepPlan) -> Batch:
        """This data rank's rows of the next step, in sample order; the state moves on by a global batch.

        Raises:
            UserError: a domain with a positive weight has not enough tokens for one window, or has fewer
                windows admitted than before.
        """
        assert plan.micro_batch * plan.micro_batches * self._data_ranks == plan.global_batch, plan
        step = _Step(
            self._samples,
            self._counts_D,
            plan.global_batch,
            plan.micro_batch,
            tuple(plan.domain_weights),
            plan.replayed,
            self._admit(plan),
            self._skips,
        )
        new_weights = not self._log or self._log[-1][1] != step.weights_D
        if new_weights:
            require_windows(self._corpus, self._split, self._seq_len, step.weights_D)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.step == step:
            read = ahead.result()
        else:
            if ahead is not None:
                ahead.join()
            read = self._read(step)
        if new_weights:
            self._log = [*self._log[-_LOG:], (step.first_sample, step.weights_D)]
        counts_D = tuple(np.subtract(read.counts_D, step.counts_D).tolist())
        self._last = Stretch(step.first_sample, read.samples - step.first_sample, counts_D)
        self._samples, self._counts_D, self._clusters_D = read.samples, read.counts_D, read.clusters_D
        if self._prefetch:
            guess = replace(
                step, first_sample=read.samples, counts_D=read.counts_D, clusters_D=read.clusters_D
            )
            self._ahead = _Ahead(guess, self._read)
        return read.batch

    def limit(self, plan: StepPlan) -> StepPlan:
        """The plan without the domains that were read `max_epochs` times; the others share their weight.

        An epoch of a domain under a curriculum is what is admitted of it. Replayed domains share among
        themselves: their joint weight is not to be changed.

        Decided between steps: a step may read past the limit by what is left of it.

        Raises:
            UserError: no domain is left to take another's share.
        """
        if self._max_epochs is None:
            return plan
        windows_D = self._reader.windows_D.copy()
        if plan.admitted is not None:
            easy_D = ~np.isin(np.arange(len(windows_D)), plan.replayed)
            windows_D[easy_D] = np.minimum(windows_D, plan.admitted)[easy_D]
        exhausted_D = self._counts_D >= self._max_epochs * windows_D
        weights_D = mixture.limited(plan.domain_weights, exhausted_D.tolist(), plan.replayed)
        if weights_D is None:
            whose = "replayed domains or all others" if plan.replayed else "domains"
            raise UserError(
                f"data.max_epochs={self._max_epochs:g}",
                f"all {whose} read that often after {self._samples:,} samples",
                "samples left for the rest of the run",
                "raise data.max_epochs, add text, or end the run earlier: train.steps, train.tokens",
            )
        return replace(plan, domain_weights=weights_D)

    def skip(self, first: int, count: int) -> None:
        """Pass over `count` samples from `first` on, which is none that was read already.

        The state remembers it. What was read ahead is read again.
        """
        assert first >= self._samples, (first, self._samples)
        self._found |= Skips.of([(first, count)])

    @property
    def last(self) -> Stretch:
        """The samples that the last step went through. Only after a `take`."""
        assert self._last is not None
        return self._last

    @property
    def consumed(self) -> dict[str, dict[str, float]]:
        """What was read or skipped, by domain: `samples`, and `epochs` as a fraction of its windows."""
        epochs_D = np.divide(self._counts_D, np.maximum(self._reader.windows_D, 1))
        return {
            name: {"samples": count, "epochs": float(epochs)}
            for name, count, epochs in zip(self._corpus.domains, self._counts_D, epochs_D, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, the same on every data rank, and small.

        `samples` and `counts` resume the order; `mixture_log` holds [first sample, weights] of the last
        stretches of constant weights, and `epochs` is for the reader; `order` is what the counts refer to,
        checked by `load_state_dict`. Under a curriculum, `clusters` has [edge, visits] of each by domain.
        `skips` has [first, count] of the samples passed over: those given, and those found since.
        """
        epochs_D = self._counts_D // np.maximum(self._reader.windows_D, 1)
        clusters = {}
        if self._clusters_D is not None:
            clusters["clusters"] = {
                name: [list(pair) for pair in zip(one.edges, one.visits, strict=True)]
                for name, one in zip(self._corpus.domains, self._clusters_D, strict=True)
            }
        return {
            "samples": self._samples,
            "counts": dict(zip(self._corpus.domains, self._counts_D, strict=True)),
            "epochs": dict(zip(self._corpus.domains, epochs_D.tolist(), strict=True)),
            "mixture_log": [[first, list(weights_D)] for first, weights_D in self._log],
            "order": self._order(),
            "skips": {"given": self._given.pairs, "found": self._found.pairs},
            **clusters,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last sample of `state`; the next `take` is what it would have been.

        Raises:
            UserError: the state counts windows of other shards, or in another order, so that continuing
                would repeat some and skip others without a word; or samples are to be skipped that it has
                read, or the other way round.
        """
        for what, now in self._order().items():
            then = state["order"].get(what)
            if then != now:
                raise UserError(
                    f"the checkpoint's data state, {what}",
                    f"{then} there and {now} in this run",
                    "the same, so that the order of samples continues",
                    "resume with the data, seed and sequence length of the checkpoint, "
                    "or start a new stage, which counts from 0",
                )
        self._samples = int(state["samples"])
        skips = state.get("skips", {"given": [], "found": []})  # older checkpoints say nothing of them
        self._found = Skips.of(skips["found"])
        self._require_same_skips(Skips.of(skips["given"]) | self._found)
        self._counts_D = tuple(int(state["counts"][name]) for name in self._corpus.domains)
        self._log = [(int(first), tuple(weights_D)) for first, weights_D in state["mixture_log"]]
        if self._clusters_D is not None:
            self._clusters_D = tuple(
                Clusters(tuple(edge for edge, _ in pairs), tuple(visits for _, visits in pairs))
                for pairs in map(state["clusters"].get, self._corpus.domains)
            )

    @property
    def _skips(self) -> Skips:
        return self._given | self._found

    def _require_same_skips(self, then: Skips) -> None:
        """What lies behind cannot be read or passed over any more."""
        past, now = then.before(self._samples), self._skips.before(self._samples)
        if past != now:
            raise UserError(
                f"data.skip={self._given.pairs}",
                f"a run of {self._samples:,} samples so far that has passed over {past.pairs} of them",
                f"the same ranges up to there, and not {now.pairs}",
                "change data.skip for later samples only, or begin a new run.dir",
            )

    def close(self) -> None:
        """Waits for the read in progress, if any, and drops it."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    def _order(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus.fingerprint,
            "split": self._split,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "block": self._block,
            "order_seeds": self._plan.order_seeds,
            "difficulty": self._plan.difficulty and self._plan.difficulty.fingerprint,
            "retrieval": self._plan.retrieval and self._plan.retrieval.facts,
        }

    def _admit(self, plan: StepPlan) -> tuple[Clusters, ...] | None:
        """The clusters with what the plan admits."""
        assert (plan.admitted is None) == (self._clusters_D is None), plan.admitted
        if plan.admitted is None or self._clusters_D is None:
            return None
        for name, one, count in zip(self._corpus.domains, self._clusters_D, plan.admitted, strict=True):
            if count < one.admitted:
                raise UserError(
                    f"the curriculum, domain {name}",
                    f"{count} windows admitted for step {plan.step + 1}",
                    f"at least the {one.admitted} of earlier steps, of this run or of the checkpoint",
                    "a difficulty that never falls; resume with the pacing of the checkpoint",
                )
        return tuple(one.admit(count) for one, count in zip(self._clusters_D, plan.admitted, strict=True))

    def _read(self, step: _Step) -> _Read:
        """The rows of this data rank, and the state after the step. Changes nothing."""
        first = step.first_sample
        kept_G = step.skips.kept(first, step.global_batch) - first  # among the N samples gone through
        count = int(kept_G[-1]) + 1
        domain_N = mixture.draw(
            self._seed, first, count, step.weights_D, block=self._block, replayed=step.replayed
        )
        counts_D = np.array(step.counts_D, np.int64)
        index_N = counts_D[domain_N] + mixture.occurrence(domain_N)
        after_D = tuple((counts_D + np.bincount(domain_N, minlength=len(counts_D))).tolist())

        mine = kept_G.reshape(-1, self._data_ranks, step.micro_batch)[:, self._data_rank].ravel()
        domain_B = domain_N[mine]
        windows_B = self._reader.windows_D[domain_B]
        window_B = order.visit(index_N[mine], windows_B, self._window_keys_D[domain_B])
        clusters_D = step.clusters_D
        if clusters_D is not None:
            # What is replayed keeps the order it was first read in.
            easy_B = ~np.isin(domain_B, step.replayed)
            window_B[easy_B], clusters_D = self._draw(
                clusters_D, domain_N, index_N, mine[easy_B], spared=step.replayed
            )
        batch = self._reader.read(domain_B, window_B, first + mine)
        return _Read(batch, first + count, after_D, clusters_D)

    def _draw(
        self,
        clusters_D: tuple[Clusters, ...],
        domain_N: np.ndarray,
        index_N: np.ndarray,
        mine: np.ndarray,
        *,
        spared: Sequence[int],
    ) -> tuple[np.ndarray, tuple[Clusters, ...]]:
        """The windows of the samples `mine`, drawn among those admitted, and the clusters after all of N.

        Domains in `spared` are not drawn from, and have none of `mine`.
        """
        difficulty = self._plan.difficulty
        assert difficulty is not None
        parts, after_D = [], list(clusters_D)
        for domain in np.setdiff1d(domain_N, spared).tolist():
            name, here = self._corpus.domains[domain], np.flatnonzero(domain_N == domain)
            seed = self._plan.order_seeds.get(name, self._seed)
            drawn, after_D[domain] = clusters_D[domain].draw(seed, name, index_N[here])
            parts.append((here, drawn))
        place_B = Drawn.gather(parts, len(domain_N), mine).place()
        windows = difficulty.windows
        pairs = zip(domain_N[mine].tolist(), place_B.tolist(), strict=True)
        return np.array([windows[domain][place] for domain, place in pairs], np.int64), tuple(after_D)


def require_windows(corpus: Corpus, split: str, seq_len: int, weights_D: Sequence[float]) -> None:
    """Refuses a mixture that draws on a domain too short for one window.

    Raises:
        UserError: naming the domain, its tokens and what a window needs.
    """
    for name, tokens, weight in zip(corpus.domains, corpus.tokens(split), weights_D, strict=True):
        if weight > 0 and tokens < seq_len + 1:
            raise UserError(
                f"data.path={corpus.path}, domain {name}, split {split}",
                f"{tokens} tokens",
                f"at least {seq_len + 1}, a window and its last label, because its weight is {weight:.3g}",
                f"leave {name} out of data.mixture, add text to it, or lower model.seq_len",
            )


def validation_batches(
    corpus: Corpus,
    *,
    samples_per_domain: int,
    seq_len: int,
    packing: Packing,
    data_rank: int,
    data_ranks: int,
    micro_batch: int,
    retrieval: Retrieval | None = None,
) -> dict[str, tuple[Batch, ...]]:
    """Each domain's validation micro-batches on this data rank: always the same sequences, none twice.

    A domain's sequences are the first `samples_per_domain` windows of a fixed permutation of its
    validation split, or all of them if it has fewer; a split shorter than one window is one short
    sequence. They are dealt to the data ranks in order and padded with rows whose loss mask is 0 and
    whose `sample_B` is -1, so that every rank has the same number of micro-batches of the same shape
    (their collectives must match) and sums over the mask do not depend on `data_ranks`. A domain with
    nothing to predict has no micro-batches.
    """
    reader = WindowReader(corpus, "valid", seq_len, packing, retrieval=retrieval)
    result = {}
    for domain, name in enumerate(corpus.domains):
        # A short split still has the labels it has; one token predicts nothing.
        windows = max(int(reader.windows_D[domain]), int(corpus.tokens("valid")[domain] >= 2))
        samples = min(samples_per_domain, windows)
        micro_batches = -(-samples // (data_ranks * micro_batch))
        rows = micro_batches * micro_batch
        sample_B = np.arange(data_rank * rows, (data_rank + 1) * rows)
        sample_B[sample_B >= samples] = -1
        key, size = np.array([order.stream_key("validation", name)], np.uint64), np.array([max(windows, 1)])
        window_B = np.where(sample_B < 0, -1, order.permute(np.maximum(sample_B, 0), size, key))
        batch = reader.read(np.full(rows, domain), window_B, sample_B)
        result[name] = tuple(batch.rows(start, start + micro_batch) for start in range(0, rows, micro_batch))
    return result


class WindowReader:
    """Windows of one split as rows of a batch.

    `windows_D` is the number of full windows of each domain.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        seq_len: int,
        packing: Packing,
        columns: Mapping[str, Column] | None = None,
        retrieval: Retrieval | None = None,
    ) -> None:
        self._columns, self._retrieval, self._split = columns or {}, retrieval, split
        self._streams = [corpus.domain(split, domain) for domain in range(len(corpus.domains))]
        self._eod, self._seq_len, self._packing = corpus.eod, seq_len, packing
        self.windows_D = np.array([window_count(n, seq_len) for n in corpus.tokens(split)], np.int64)

    def read(self, domain_B: np.ndarray, window_B: np.ndarray, sample_B: np.ndarray) -> Batch:
        """The batch of these windows; window -1 is padding, and so is what a short stream lacks."""
        window_BW = np.full((len(domain_B), self._seq_len + 1), self._eod, np.int64)
        starts_BW = np.zeros(window_BW.shape, bool)
        labels_B = np.full(len(domain_B), self._seq_len)
        for row, (domain, window) in enumerate(zip(domain_B.tolist(), window_B.tolist(), strict=True)):
            if window < 0:
                labels_B[row] = 0
                continue
            stream, start = self._streams[domain], window * self._seq_len
            count = min(self._seq_len + 1, stream.tokens - start)
            window_BW[row, :count] = stream.read(start, count)
            labels_B[row] = count - 1
            if self._packing is Packing.document:
                starts_BW[row, stream.document_starts(start, count)] = True
        packed = pack(window_BW, starts_BW, self._packing)
        for row in np.flatnonzero(labels_B < self._seq_len):
            packed.loss_mask_BL[row, labels_B[row] :] = 0
        retrieved = None
        if self._retrieval is not None:
            continues_B = self._continues(domain_B, window_B) if self._retrieval.in_context else None
            retrieved, passages = self._retrieval.read(
                self._split, domain_B, window_B, self._seq_len, continues_B
            )
            if passages is not None:
                packed = put_in_front(passages, packed)
        return Batch(
            tokens_BL=torch.from_numpy(packed.tokens_BL),
            labels_BL=torch.from_numpy(packed.labels_BL),
            loss_mask_BL=torch.from_numpy(packed.loss_mask_BL),
            position_BL=torch.from_numpy(packed.position_BL),
            document_BL=torch.from_numpy(packed.document_BL),
            domain_B=torch.from_numpy(np.array(domain_B, np.int64)),
            sample_B=torch.from_numpy(np.array(sample_B, np.int64)),
            columns={
                name: self._column(column, domain_B, window_B) for name, column in self._columns.items()
            },
            retrieved=retrieved,
        )

    def _continues(self, domain_B: np.ndarray, window_B: np.ndarray) -> np.ndarray:
        """Whether the document of each window's first token began before it: bool [B]."""
        starts = (window_B * self._seq_len).tolist()
        return np.array(
            [
                start > 0 and not len(self._streams[domain].document_starts(start - 1, 2))
                for domain, start in zip(domain_B.tolist(), starts, strict=True)
            ]
        )

    def _column(self, column: Column, domain_B: np.ndarray, window_B: np.ndarray) -> torch.Tensor:
        """The values beside full windows [B, L]: those of the training split all are."""
        rows = zip(domain_B.tolist(), window_B.tolist(), strict=True)
        length = self._seq_len
        return torch.from_numpy(np.stack([column.read(d, w * length, length) for d, w in rows]))


class _Ahead:
    """One step read in a daemon thread on the guess that the next plan will ask for it."""

    def __init__(self, step: _Step, read: Callable[[_Step], _Read]) -> None:
        self.step = step
        self._result: _Read | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name="megafab-prefetch", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until the thread has ended, whatever became of it."""
        self._thread.join()

    def result(self) -> _Read:
        """What was read, waiting for it; raises what the thread raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run(self, read: Callable[[_Step], _Read]) -> None:
        try:
            self._result = read(self.step)
        except BaseException as error:  # it belongs to whoever asks for the result
            self._error = error
