"""Curricula: what is admitted, that it is drawn evenly, and that nothing but the samples decides it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import counting_documents, write_corpus

from megafab.checkpoint.identity import carried_on, identity
from megafab.data import difficulty, order
from megafab.data.config import Packing
from megafab.data.difficulty import DifficultyIndex
from megafab.data.format import Corpus, window_count
from megafab.data.loader import Loader
from megafab.data.packing import pack
from megafab.data.plan import DataPlan
from megafab.errors import UserError
from megafab.loss.ledger import LedgerReport
from megafab.model.config import ModelConfig
from megafab.model.shape import ModelShape
from megafab.run import Batch, Progress, StepPlan
from megafab.techniques.base import Facts, Key, RunPlan
from megafab.techniques.config import (
    CurriculumConfig,
    DifficultyKind,
    PacingConfig,
    PacingShape,
    SequenceCurriculumConfig,
    SequenceMode,
)
from megafab.techniques.curriculum import Curriculum
from megafab.techniques.sequence_curriculum import SequenceCurriculum, reshaped

SEED, SEQ_LEN = 5, 8
SHAPE = ModelShape.of(ModelConfig(name="tiny", layers=2, hidden=8, heads=1, seq_len=SEQ_LEN, vocab=128))
NONE = LedgerReport({}, {"nll": {}})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Domains of 30 and 41 windows."""
    lengths = {"books": [13] * 19, "code": [7] * 47}
    documents = {name: counting_documents(each) for name, each in lengths.items()}
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents, shard_documents=5)


def metric(domain: int, windows: int) -> np.ndarray:
    """Distinct values in an order of their own."""
    key = np.array([order.stream_key("test", domain)], np.uint64)
    return (order.permute(np.arange(windows), np.array([windows]), key) / 4).astype(np.float32)


@pytest.fixture(scope="module")
def index(corpus: Corpus) -> DifficultyIndex:
    path = corpus.path / "difficulty" / "made-up"
    path.mkdir(parents=True)
    counts = [window_count(tokens, SEQ_LEN) for tokens in corpus.tokens("train")]
    domains = [
        difficulty.write_domain(path, name, metric(domain, windows))
        for domain, (name, windows) in enumerate(zip(corpus.domains, counts, strict=True))
    ]
    difficulty.commit(path, corpus, domains, metric="made up", seq_len=SEQ_LEN)
    return DifficultyIndex.open("made-up", corpus, SEQ_LEN)


def plan(
    step: int, admitted: tuple[int, ...] | None, *, batch: int = 8, micro: int = 2, data_ranks: int = 1
) -> StepPlan:
    count = batch // micro // data_ranks
    weights = (0.4, 0.6)
    return StepPlan(step, 1e-3, 0.0, batch, micro, count, SEQ_LEN, weights, admitted=admitted)


def make_loader(corpus: Corpus, index: DifficultyIndex, **changes: Any) -> Loader:
    options: dict[str, Any] = {"data_rank": 0, "data_ranks": 1, "prefetch": False} | changes
    data = DataPlan(corpus, difficulty=index.order)
    return Loader(
        corpus, split="train", seed=SEED, seq_len=SEQ_LEN, packing=Packing.document, plan=data, **options
    )


def windows_of(corpus: Corpus, batch: Batch) -> list[tuple[int, int]]:
    """(domain, window) of each row, found again by its tokens: an EOD takes the place of a number."""
    found = []
    for domain, tokens in zip(batch.domain_B.tolist(), batch.tokens_BL.tolist(), strict=True):
        at = next(at for at, token in enumerate(tokens) if token)
        found.append((domain, (tokens[at] - 1 - at) // SEQ_LEN))
    return found


def grow(step: int) -> tuple[int, int]:
    """What a pacing might admit: it grows on steps 4, 8 and 12."""
    return ((3, 1), (10, 1), (10, 25), (30, 41))[min(step // 4, 3)]


# -- the sampler ---------------------------------------------------------------------------------------------


def test_samples_follow_the_definition(corpus: Corpus, index: DifficultyIndex) -> None:
    """One at a time: the domain's k-th sample draws a cluster by a hash of k, and visits it on."""
    loader, drawn = make_loader(corpus, index), [0, 0]
    visits: Counter[tuple[int, int]] = Counter()
    edges: list[list[int]] = [[], []]
    for step in range(14):
        for domain, count in enumerate(grow(step)):
            edges[domain] += [count] if count not in edges[domain] else []
        for domain, window in windows_of(corpus, loader.take(plan(step, grow(step)))):
            name, ends = corpus.domains[domain], edges[domain]
            key = order.stream_key(SEED, "clusters", name)
            number = int(order.uniform(key, np.array([drawn[domain]]))[0] * ends[-1])
            first, last = next((a, b) for a, b in zip([0, *ends], ends, strict=False) if a <= number < b)
            key = np.array([order.stream_key(SEED, "windows", name, first)], np.uint64)
            visit = np.array([visits[domain, first]])
            place = first + order.visit(visit, np.array([last - first]), key)[0]
            assert window == index.windows[domain][place]
            drawn[domain] += 1
            visits[domain, first] += 1
    assert len(visits) == 6
    state = loader.state_dict()["clusters"]
    for domain, name in enumerate(corpus.domains):
        starts = [0, *edges[domain]]
        pairs = zip(starts, edges[domain], strict=False)
        assert state[name] == [[end, visits[domain, start]] for start, end in pairs]


def test_only_what_is_admitted_is_drawn(corpus: Corpus, index: DifficultyIndex) -> None:
    loader = make_loader(corpus, index)
    seen: set[tuple[int, int]] = set()
    for step in range(30):
        rows = windows_of(corpus, loader.take(plan(step, grow(step))))
        for domain, window in rows:
            assert window in index.windows[domain][: grow(step)[domain]].tolist()
        seen |= set(rows)
    assert len(seen) > 60


def test_one_cluster_visits_every_window_once_an_epoch(corpus: Corpus, index: DifficultyIndex) -> None:
    loader = make_loader(corpus, index)
    rows = [row for step in range(40) for row in windows_of(corpus, loader.take(plan(step, (30, 41))))]
    for domain, size in ((0, 30), (1, 41)):
        mine = [window for where, window in rows if where == domain]
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_replayed_domain_keeps_its_first_order(corpus: Corpus, index: DifficultyIndex) -> None:
    """Whatever is admitted of it: sample k of it is what it was in a run without a curriculum."""
    loader = make_loader(corpus, index)
    batches = [loader.take(replace(plan(step, (1, 3 + step)), replayed=(0,))) for step in range(20)]
    plain = Loader(
        corpus, split="train", seed=SEED, seq_len=SEQ_LEN, packing=Packing.document,
        data_rank=0, data_ranks=1, prefetch=False,
    )  # fmt: skip
    first = [replace(plan(step, None), domain_weights=(1.0, 0.0)) for step in range(20)]
    want = [window for step in first for window in windows_of(corpus, plain.take(step))]
    found = [pair for batch in batches for pair in windows_of(corpus, batch)]
    old = [pair for pair in found if pair[0] == 0]
    assert old == want[: len(old)]
    easy = set(index.windows[1][:22].tolist())
    assert {window for domain, window in found if domain == 1} <= easy
    assert loader.state_dict()["clusters"]["books"] == [[1, 0]]


def test_every_admitted_window_is_equally_likely(corpus: Corpus, index: DifficultyIndex) -> None:
    """Chi-square over 25 windows that were admitted in three clusters: below the 99.9 % point of 24 degrees.

    Clusters are drawn at random and read without repetition, which only makes counts more even.
    """
    loader = make_loader(corpus, index)
    for step, count in enumerate((4, 15, 25)):
        loader.take(plan(step, (1, count)))
    counts = Counter(
        window
        for step in range(3, 203)
        for domain, window in windows_of(corpus, loader.take(plan(step, (1, 25), batch=16)))
        if domain == 1
    )
    assert counts.keys() == set(index.windows[1][:25].tolist())
    mean = counts.total() / 25
    assert mean > 70
    assert sum((count - mean) ** 2 for count in counts.values()) / mean < 51.2
    clusters = loader.state_dict()["clusters"]["code"]
    shares = np.array([visits for _, visits in clusters]) / sum(visits for _, visits in clusters)
    assert shares == pytest.approx([4 / 25, 11 / 25, 10 / 25], abs=0.03)


@pytest.mark.parametrize("data_ranks", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [False, True])
def test_topology_and_prefetch_do_not_matter(
    corpus: Corpus, index: DifficultyIndex, data_ranks: int, prefetch: bool
) -> None:
    """Nor does a resume on other ranks, at a step where the set grows or between two."""
    loader = make_loader(corpus, index)
    states, wanted = [], []
    for step in range(14):
        states.append(json.dumps(loader.state_dict()))
        wanted.append(loader.take(plan(step, grow(step))))
    for first in (0, 5, 8):
        ranks = [
            make_loader(corpus, index, data_rank=rank, data_ranks=data_ranks, prefetch=prefetch)
            for rank in range(data_ranks)
        ]
        for rank in ranks:
            rank.load_state_dict(json.loads(states[first]))
        for step in range(first, 14):
            parts = [rank.take(plan(step, grow(step), micro=1, data_ranks=data_ranks)) for rank in ranks]
            rows = Batch.concatenate(parts)
            by_sample = rows.sample_B.argsort()
            assert torch.equal(rows.tokens_BL[by_sample], wanted[step].tokens_BL)
        for rank in ranks:
            assert rank.state_dict() == loader.state_dict()
            rank.close()


def test_what_does_not_continue_is_refused(corpus: Corpus, index: DifficultyIndex) -> None:
    loader = make_loader(corpus, index)
    loader.take(plan(0, (10, 10)))
    state = loader.state_dict()
    with pytest.raises(
        UserError, match=r"domain code: found 9 windows admitted for step 2, expected at least"
    ):
        loader.take(plan(1, (10, 9)))
    other = replace(index, manifest={**index.manifest, "fingerprint": "another"})
    with pytest.raises(UserError, match=r"data state, difficulty: found \w+ there and another in this run"):
        make_loader(corpus, other).load_state_dict(state)
    plain = Loader(
        *(corpus,),
        **{"split": "train", "seed": SEED, "seq_len": SEQ_LEN, "packing": Packing.document},
        **{"data_rank": 0, "data_ranks": 1, "prefetch": False},
    )
    with pytest.raises(UserError, match=r"data state, difficulty: found \w+ there and None"):
        plain.load_state_dict(state)
    old = plain.state_dict()
    assert "clusters" not in old
    plain.load_state_dict(old)


def test_another_mixture_carries_the_clusters_on(corpus: Corpus, index: DifficultyIndex) -> None:
    def described(seed: int) -> dict[str, Any]:
        settings = {"packing": Packing.document, "seed": seed, "seq_len": SEQ_LEN, "block": 1}
        return identity(DataPlan(corpus, difficulty=index.order), weights=(0.4, 0.6), **settings)

    loader = make_loader(corpus, index)
    for step in range(6):
        loader.take(plan(step, grow(step)))
    then, fresh = loader.state_dict(), make_loader(corpus, index).state_dict()
    assert carried_on(then, fresh, described(SEED), described(SEED))["clusters"] == then["clusters"]
    assert carried_on(then, fresh, described(SEED), described(9))["clusters"] == {"books": [], "code": []}


# -- what is admitted ----------------------------------------------------------------------------------------


def technique(corpus: Corpus, kind: DifficultyKind, **pacing: Any) -> Curriculum:
    facts = Facts(SEED, SHAPE, corpus.domains, (0.4, 0.6), corpus.tokens("train"), (1, 1), 10)
    config = CurriculumConfig("made-up", kind, PacingConfig(**pacing))
    curriculum = Curriculum(config, facts)
    unused: Any = None
    curriculum.on_plan(RunPlan(unused, DataPlan(corpus)), unused)
    return curriculum


def admitted(curriculum: Curriculum, steps: int) -> list[tuple[int, ...]]:
    plans = (curriculum.on_schedule(plan(step, None), Progress()) for step in range(steps))
    return [one.admitted for one in plans if one.admitted is not None]


def test_percentiles_admit_shares_that_grow_to_all(corpus: Corpus, index: DifficultyIndex) -> None:
    curriculum = technique(corpus, DifficultyKind.percentile, start=1, end=100, steps=10)
    counts = admitted(curriculum, 12)
    # 10, 20, 30 ... percent (1 + 99 * t / 10, rounded down) of 30 and 41 windows, rounded up.
    assert counts[:3] == [(3, 5), (6, 9), (9, 13)]
    assert counts == sorted(counts)
    assert counts[9:] == [(30, 41)] * 3
    assert curriculum.metrics(NONE) == {"difficulty": 100, "admitted": {"books": 1.0, "code": 1.0}}
    tiny = technique(corpus, DifficultyKind.percentile, start=0.001, end=1, steps=10, round_to=0.001)
    assert admitted(tiny, 1) == [(1, 1)], "a domain is never without a window"


def test_thresholds_admit_what_is_no_harder(corpus: Corpus, index: DifficultyIndex) -> None:
    curriculum = technique(corpus, DifficultyKind.threshold, start=0, end=11, steps=11)
    counts = admitted(curriculum, 12)
    assert counts == sorted(counts)
    for step, each in enumerate(counts, 1):
        for domain, (count, windows) in enumerate(zip(each, (30, 41), strict=True)):
            values = metric(domain, windows)
            assert count == (values <= min(step, 11)).sum()
            easiest = set(np.flatnonzero(values <= min(step, 11)).tolist())
            assert set(index.windows[domain][:count].tolist()) == easiest
    assert counts[-1] == (30, 41)


def test_a_threshold_below_all_of_a_domain_is_refused(corpus: Corpus, index: DifficultyIndex) -> None:
    curriculum = technique(corpus, DifficultyKind.threshold, start=-2, end=9, steps=1000)
    with pytest.raises(
        UserError, match=r"domain books: found no window whose made up is at most -2, .* has 0\."
    ):
        admitted(curriculum, 1)
    without = replace(plan(0, None), domain_weights=(0.0, 1.0))
    with pytest.raises(UserError, match="domain code"):
        curriculum.on_schedule(without, Progress())


def test_an_index_of_other_windows_or_with_a_damaged_file_is_refused(
    corpus: Corpus, index: DifficultyIndex, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"found windows of 8 tokens, expected windows of 4\..*seq_len=4"):
        DifficultyIndex.open("made-up", corpus, 4)
    with pytest.raises(UserError, match=r"difficulty/none: found no such directory"):
        DifficultyIndex.open("none", corpus, SEQ_LEN)
    (tmp_path / "manifest.json").write_bytes((index.path / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"books\.windows\.npy: found no usable file"):
        DifficultyIndex.open(tmp_path, corpus, SEQ_LEN)
    for path in index.path.glob("*.npy"):
        np.save(tmp_path / path.name, np.load(path)[:-1])
    with pytest.raises(UserError, match=r"books\.windows\.npy: found \(29,\) of int64, expected \(30,\)"):
        DifficultyIndex.open(tmp_path, corpus, SEQ_LEN)


# -- sequences -----------------------------------------------------------------------------------------------


def sequences(mode: SequenceMode, levels: tuple[float, ...]) -> SequenceCurriculum:
    """One step of each length."""
    pacing = PacingConfig(
        PacingShape.step, levels=levels, last_steps=tuple(range(1, len(levels))), round_to=1
    )
    facts = Facts(SEED, SHAPE, ("books", "code"), (0.4, 0.6), (100, 100), (1, 1), 10)
    return SequenceCurriculum(SequenceCurriculumConfig(mode, pacing), facts)


def rows(packing: Packing) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Two rows of three documents each, their windows, and where documents start."""
    window_BW = np.arange(100, 118).reshape(2, 9)
    starts_BW = np.zeros((2, 9), bool)
    starts_BW[0, [3, 6]] = starts_BW[1, [4, 5]] = True
    packed = pack(window_BW, starts_BW, packing)
    arrays = {name: torch.from_numpy(getattr(packed, name)) for name in packed.__slots__}
    ids = torch.tensor([0, 1])
    where = torch.arange(16.0).reshape(2, 8)
    return Batch(**arrays, domain_B=ids, sample_B=ids + 6, columns={"where": where}), window_BW, starts_BW


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8])
def test_a_piece_is_a_row_as_packing_makes_them(packing: Packing, length: int) -> None:
    batch, window_BW, starts_BW = rows(packing)
    pieces = -(-8 // length)
    cut = reshaped(batch, length)
    assert cut.sample_B.tolist() == [6] * pieces + [7] * pieces
    assert cut.domain_B.tolist() == [0] * pieces + [1] * pieces
    asked = []
    for row in range(2):
        for piece in range(pieces):
            start, at = min(piece * length, 8 - length), row * pieces + piece
            part = slice(start, start + length + 1)
            want = pack(window_BW[row : row + 1, part], starts_BW[row : row + 1, part], packing)
            assert cut.tokens_BL[at].tolist() == want.tokens_BL[0].tolist()
            assert cut.labels_BL[at].tolist() == want.labels_BL[0].tolist()
            assert cut.position_BL[at].tolist() == want.position_BL[0].tolist()
            assert cut.document_BL[at].tolist() == want.document_BL[0].tolist()
            assert cut.columns["where"][at].tolist() == [8 * row + start + i for i in range(length)]
            labels = cut.labels_BL[at][cut.loss_mask_BL[at] != 0].tolist()
            assert set(labels) <= set(want.labels_BL[0][want.loss_mask_BL[0] != 0].tolist())
            asked += labels
    assert sorted(asked) == sorted(batch.labels_BL[batch.loss_mask_BL != 0].tolist()), "each label once"
    assert cut.document_BL.dtype == batch.document_BL.dtype
    assert cut.loss_mask_BL.dtype == batch.loss_mask_BL.dtype


def test_the_plan_says_what_is_computed() -> None:
    key, lengths = Key((0,)), (2.0, 3.0, 8.0)
    batch = rows(Packing.document)[0]
    modes: dict[SequenceMode, tuple[list[int], Callable[[int], int]]] = {
        SequenceMode.truncate: ([1, 1, 1], lambda length: 8 * length),
        SequenceMode.reshape: ([4, 3, 1], lambda length: 8 * length * -(-8 // length)),
    }
    for mode, (pieces, tokens) in modes.items():
        curriculum = sequences(mode, lengths)
        for step, length in enumerate((2, 3, 8)):
            changed = curriculum.on_schedule(plan(step, None), Progress())
            assert (changed.seq_len, changed.rows_per_sample) == (length, pieces[step])
            assert changed.tokens == tokens(length)
            assert changed.flops == SHAPE.flops_per_token(length) * changed.tokens
            cut = curriculum.on_batch(batch, changed, key)
            assert cut.tokens_BL.shape == (2 * pieces[step], length)
            assert curriculum.metrics(NONE) == {"seq_len": length}
        assert curriculum.on_batch(batch, changed, key) is batch, "whole sequences are left as they are"
    truncate = sequences(SequenceMode.truncate, (3.0,))
    cut = truncate.on_batch(batch, truncate.on_schedule(plan(0, None), Progress()), key)
    assert torch.equal(cut.labels_BL, batch.labels_BL[:, :3])
    assert torch.equal(cut.loss_mask_BL, batch.loss_mask_BL[:, :3])
