"""The loader against its definition, one sample at a time, and its exactness under everything else."""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import EOD, counting_documents, write_corpus

from megafab.data import order
from megafab.data.config import Packing
from megafab.data.format import Corpus
from megafab.data.loader import Loader, validation_batches
from megafab.data.mixture import draw
from megafab.data.plan import DataPlan, Difficulty
from megafab.data.skips import Skips, Stretch
from megafab.errors import UserError
from megafab.run import Batch, StepPlan

SEED, SEQ_LEN = 11, 8
WEIGHTS = (0.5, 0.3, 0.2)
FIRST = {"books": 1, "code": 10_001, "web": 20_001}
# (domain, window) of the first samples, worked out with Python integers apart from the product's code.
GOLDEN = [
    *[(0, 79), (1, 45), (2, 4), (2, 7), (2, 5), (0, 32), (0, 13), (1, 60)],
    *[(1, 13), (2, 1), (2, 2), (0, 70), (0, 24), (0, 60), (1, 62), (0, 86)],
]
FIELDS = ("tokens_BL", "labels_BL", "loss_mask_BL", "position_BL", "document_BL", "domain_B", "sample_B")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three domains of documents of 1 to 25 tokens, in many shards; the last one has 9 windows."""
    rng = np.random.default_rng(0)
    lengths = {"books": rng.integers(1, 26, size=60), "code": rng.integers(1, 26, size=40)}
    lengths["web"] = np.array([25, 13, 1, 1, 8, 20, 5, 4, 3])  # 80 tokens: the last 7 start no window
    documents = {name: counting_documents(part.tolist(), FIRST[name]) for name, part in lengths.items()}
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents, shard_documents=7)


def plan(
    step: int = 0,
    *,
    global_batch: int = 8,
    micro_batch: int = 2,
    data_ranks: int = 1,
    weights: tuple[float, ...] = WEIGHTS,
    seq_len: int = SEQ_LEN,
) -> StepPlan:
    return StepPlan(
        step=step,
        lr=1e-3,
        weight_decay=0.0,
        global_batch=global_batch,
        micro_batch=micro_batch,
        micro_batches=global_batch // micro_batch // data_ranks,
        seq_len=seq_len,
        domain_weights=weights,
    )


def make_loader(corpus: Corpus, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "split": "train",
        "seed": SEED,
        "seq_len": SEQ_LEN,
        "packing": Packing.document,
        "data_rank": 0,
        "data_ranks": 1,
        "prefetch": False,
    }
    return Loader(corpus, **(options | changes))


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The rows of all batches in the order of samples."""
    whole = Batch.concatenate(batches)
    order_N = whole.sample_B.argsort()
    return {name: getattr(whole, name)[order_N] for name in FIELDS}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name in FIELDS:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def stream_of(corpus: Corpus, domain: int, split: str = "train") -> np.ndarray:
    stream = corpus.domain(split, domain)
    return stream.read(0, stream.tokens)


def test_batches_follow_the_definition(corpus: Corpus):
    """Every field of 200 samples, worked out token by token from the streams and the scalar order."""
    rows = joined([loader.take(plan()) for loader in [make_loader(corpus)] for _ in range(25)])
    streams = [stream_of(corpus, domain) for domain in range(3)]
    seen = [0, 0, 0]
    for sample in range(200):
        domain = int(draw(SEED, sample, 1, WEIGHTS)[0])
        size = (len(streams[domain]) - 1) // SEQ_LEN
        key = order.stream_key(SEED, "windows", corpus.domains[domain])
        window = order.visit(np.array([seen[domain]]), np.array([size]), np.array([key], np.uint64))[0]
        seen[domain] += 1
        tokens = streams[domain][window * SEQ_LEN : (window + 1) * SEQ_LEN + 1].tolist()
        assert rows["sample_B"][sample] == sample
        assert rows["domain_B"][sample] == domain
        assert rows["tokens_BL"][sample].tolist() == tokens[:-1]
        assert rows["labels_BL"][sample].tolist() == tokens[1:]
        position = document = 0
        for at, token in enumerate(tokens[:-1]):
            assert rows["position_BL"][sample, at] == position
            assert rows["document_BL"][sample, at] == document
            assert rows["loss_mask_BL"][sample, at] == float(token != EOD)
            position, document = (0, document + 1) if token == EOD else (position + 1, document)
    assert min(seen) > 20


def test_the_order_is_frozen(corpus: Corpus):
    """Runs resume across versions of megafab: these numbers may not change."""
    rows = joined([make_loader(corpus).take(plan(global_batch=16))])
    streams = [stream_of(corpus, domain) for domain in range(3)]
    found = []
    for domain, tokens in zip(rows["domain_B"].tolist(), rows["tokens_BL"].numpy(), strict=True):
        starts = range(0, len(streams[domain]) - SEQ_LEN, SEQ_LEN)
        (window,) = [at // SEQ_LEN for at in starts if (streams[domain][at : at + SEQ_LEN] == tokens).all()]
        found.append((domain, window))
    assert found == GOLDEN


def test_fields_have_the_types_of_a_batch(corpus: Corpus):
    batch = make_loader(corpus).take(plan())
    assert batch.tokens_BL.dtype == batch.labels_BL.dtype == batch.position_BL.dtype == torch.int64
    assert batch.domain_B.dtype == batch.sample_B.dtype == torch.int64
    assert batch.loss_mask_BL.dtype == torch.float32
    assert batch.document_BL.dtype == torch.int32
    assert all(getattr(batch, name).is_contiguous() for name in FIELDS)


def test_concatenated_packing_changes_mask_positions_and_documents_only(corpus: Corpus):
    split = make_loader(corpus).take(plan())
    whole = make_loader(corpus, packing=Packing.concatenate).take(plan())
    for name in ("tokens_BL", "labels_BL", "domain_B", "sample_B"):
        assert torch.equal(getattr(split, name), getattr(whole, name))
    assert whole.loss_mask_BL.min() == 1
    assert whole.document_BL.max() == 0
    assert whole.position_BL.tolist() == [list(range(SEQ_LEN))] * 8


def test_every_epoch_reads_every_window_once(corpus: Corpus):
    """A domain alone: its windows tile the stream, so each epoch's tokens are the stream itself."""
    stream = stream_of(corpus, 2)
    windows = (len(stream) - 1) // SEQ_LEN
    loader = make_loader(corpus)
    rows = joined([loader.take(plan(weights=(0.0, 0.0, 1.0))) for _ in range(windows)])
    epochs = rows["tokens_BL"].reshape(8, windows, SEQ_LEN)
    orders = set()
    for epoch in epochs.tolist():
        assert sorted(epoch) == sorted(stream[: windows * SEQ_LEN].reshape(-1, SEQ_LEN).tolist())
        orders.add(tuple(map(tuple, epoch)))
    assert len(orders) == 8
    assert loader.consumed["web"] == {"samples": 8 * windows, "epochs": 8.0}
    assert loader.consumed["books"] == {"samples": 0, "epochs": 0.0}


@pytest.mark.parametrize("data_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("prefetch", [False, True])
def test_order_does_not_depend_on_topology(corpus: Corpus, data_ranks: int, micro_batch: int, prefetch: bool):
    loaders = [
        make_loader(corpus, data_rank=rank, data_ranks=data_ranks, prefetch=prefetch)
        for rank in range(data_ranks)
    ]
    step = plan(micro_batch=micro_batch, data_ranks=data_ranks)
    rows = joined([loader.take(step) for _ in range(10) for loader in loaders])
    reference = make_loader(corpus)
    assert_same(rows, joined([reference.take(plan()) for _ in range(10)]))
    assert all(loader.state_dict() == reference.state_dict() for loader in loaders)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(("data_ranks", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_a_micro_batch_of_all_data_ranks_is_a_run_of_samples(corpus, data_ranks: int, micro_batch: int):
    step = plan(global_batch=12, micro_batch=micro_batch, data_ranks=data_ranks)
    loaders = [make_loader(corpus, data_rank=rank, data_ranks=data_ranks) for rank in range(data_ranks)]
    rows = [loader.take(step) for loader in loaders]
    for number in range(3):
        part = slice(number * micro_batch, (number + 1) * micro_batch)
        found = [sample for batch in rows for sample in batch.sample_B[part].tolist()]
        assert found == list(range(4 * number, 4 * number + 4))


def test_a_block_has_one_domain(corpus: Corpus):
    rows = joined([loader.take(plan()) for loader in [make_loader(corpus, block=4)] for _ in range(30)])
    blocks = rows["domain_B"].view(-1, 4)
    assert (blocks == blocks[:, :1]).all()
    assert blocks[:, 0].unique().numel() == 3
    assert blocks[:, 0].tolist() == draw(SEED, 0, 60, WEIGHTS).tolist(), "block n stands for sample n"


def test_a_domain_is_left_out_after_its_epochs(corpus: Corpus):
    loader = make_loader(corpus, max_epochs=1.5)
    windows_D = [(len(stream_of(corpus, domain)) - 1) // SEQ_LEN for domain in range(3)]
    weights = []

    def read_on() -> None:
        while True:
            step = loader.limit(plan())
            weights.append(step.domain_weights)
            loader.take(step)

    with pytest.raises(UserError, match=r"data.max_epochs=1.5: found all domains read that often after \d"):
        read_on()
    assert weights[0] == WEIGHTS
    assert all(sum(weights_D) == pytest.approx(1) for weights_D in weights)
    samples = [domain["samples"] for domain in loader.consumed.values()]
    for count, windows in zip(samples, windows_D, strict=True):
        assert 1.5 * windows <= count < 1.5 * windows + 8, "at most a step beyond the limit"
    (one_left,) = {tuple(weight > 0 for weight in weights_D) for weights_D in weights[-1:]}
    assert sum(one_left) == 1


def test_replayed_domains_have_their_share_exactly_and_keep_their_order(corpus: Corpus):
    """0.3 of every 10 samples, whatever the weights of the others do; in the order of another run's seed."""
    seeds = {corpus.domains[0]: 99}
    loader = make_loader(corpus, plan=DataPlan(corpus, order_seeds=seeds))
    batches = []
    for step in range(20):
        share = 0.05 * (step % 5)
        weights = (0.3, 0.7 - share, share)
        batches.append(loader.take(replace(plan(global_batch=10, weights=weights), replayed=(0,))))
    for batch in batches:
        assert (batch.domain_B == 0).sum() == 3
    old = make_loader(corpus, seed=99)
    alone = joined([old.take(plan(global_batch=12, weights=(1.0, 0.0, 0.0))) for _ in range(5)])
    rows = joined(batches)
    assert torch.equal(rows["tokens_BL"][rows["domain_B"] == 0], alone["tokens_BL"])
    with pytest.raises(UserError, match="order_seeds"):
        make_loader(corpus).load_state_dict(loader.state_dict())


class Positions:
    """A column whose values say where they come from."""

    def read(self, domain: int, start: int, count: int) -> np.ndarray:
        return 1000.0 * domain + np.arange(start, start + count)


def test_columns_are_read_with_every_window(corpus: Corpus):
    loader = make_loader(corpus, plan=DataPlan(corpus, columns={"where": Positions()}))
    batch = loader.take(plan())
    for row in range(8):
        domain = int(batch.domain_B[row])
        where = (batch.columns["where"][row] - 1000 * domain).long()
        assert torch.equal(batch.tokens_BL[row], torch.from_numpy(stream_of(corpus, domain))[where])
    assert torch.equal(batch.rows(2, 3).columns["where"], batch.columns["where"][2:3])
    cut = torch.tensor([3, 1])
    assert torch.equal(batch.positions(cut).columns["where"], batch.columns["where"][:, cut])


def test_the_mixture_log_stays_small(corpus: Corpus):
    loader = make_loader(corpus)
    for step in range(1100):
        loader.take(plan(global_batch=1, micro_batch=1, weights=(0.5, 0.5 - step * 1e-4, step * 1e-4)))
    log = loader.state_dict()["mixture_log"]
    assert len(log) < 1100
    assert log[-1][0] == 1099


def test_order_does_not_depend_on_the_global_batch(corpus: Corpus):
    small, large = make_loader(corpus), make_loader(corpus, prefetch=True)
    left = joined([small.take(plan(global_batch=2)) for _ in range(24)])
    right = joined([large.take(plan(global_batch=size)) for size in (4, 4, 8, 16, 16)])
    assert_same(left, right)
    assert small.state_dict() == large.state_dict()


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_at_any_step_is_exact(corpus: Corpus, prefetch: bool):
    whole = make_loader(corpus, prefetch=prefetch)
    states, batches = [], []
    for _ in range(12):
        states.append(json.dumps(whole.state_dict()))
        batches.append(whole.take(plan()))
    whole.close()
    for step, state in enumerate(states):
        resumed = make_loader(corpus, prefetch=prefetch)
        resumed.load_state_dict(json.loads(state))
        rest = [resumed.take(plan()) for _ in range(step, 12)]
        assert_same(joined(rest), joined(batches[step:]))
        assert resumed.state_dict() == whole.state_dict()
        resumed.close()


def test_resume_on_other_data_ranks_is_exact(corpus: Corpus):
    whole = make_loader(corpus)
    for _ in range(5):
        whole.take(plan())
    halves = [make_loader(corpus, data_rank=rank, data_ranks=2, prefetch=True) for rank in range(2)]
    for half in halves:
        half.load_state_dict(whole.state_dict())
    rows = joined([half.take(plan(data_ranks=2)) for _ in range(5) for half in halves])
    assert_same(rows, joined([whole.take(plan()) for _ in range(5)]))
    for half in halves:
        half.close()


def test_going_back_drops_what_was_read_ahead(corpus: Corpus):
    loader = make_loader(corpus, prefetch=True)
    start = loader.state_dict()
    first = joined([loader.take(plan()) for _ in range(3)])
    loader.load_state_dict(start)
    assert_same(first, joined([loader.take(plan()) for _ in range(3)]))
    loader.close()


def test_mixture_and_batch_may_change_from_step_to_step(corpus: Corpus):
    other = (0.1, 0.0, 0.9)
    plans = [plan()] * 3 + [plan(weights=other)] * 2 + [plan(weights=other, global_batch=4)] + [plan()] * 2
    plain, ahead = make_loader(corpus), make_loader(corpus, prefetch=True)
    rows = joined([plain.take(step) for step in plans])
    assert_same(rows, joined([ahead.take(step) for step in plans]))
    state = ahead.state_dict()
    ahead.close()
    assert state == plain.state_dict()
    assert state["mixture_log"] == [[0, list(WEIGHTS)], [24, list(other)], [44, list(WEIGHTS)]]
    # The log alone gives every sample's domain, hence the counts.
    edges = [first for first, _ in state["mixture_log"]] + [state["samples"]]
    domains = np.concatenate(
        [
            draw(SEED, first, edges[number + 1] - first, weights)
            for number, (first, weights) in enumerate(state["mixture_log"])
        ]
    )
    assert rows["domain_B"].tolist() == domains.tolist()
    assert list(state["counts"].values()) == np.bincount(domains, minlength=3).tolist()


def test_state_does_not_grow(corpus: Corpus):
    loader = make_loader(corpus)
    loader.take(plan())
    early = loader.state_dict()
    for _ in range(200):
        loader.take(plan())
    late = loader.state_dict()
    assert late["samples"] == sum(late["counts"].values()) == 201 * 8
    assert late["epochs"]["web"] == late["counts"]["web"] // 9
    digits = re.compile(r"\d+")
    assert digits.sub("0", json.dumps(late)) == digits.sub("0", json.dumps(early))


# --- samples that are skipped -------------------------------------------------------------------------

SKIPPED = [(5, 9), (16, 8), (40, 1), (70, 100)]


def test_ranges_are_joined_and_cut() -> None:
    skips = Skips.of([(5, 3), (0, 2), (8, 1), (20, 5), (21, 2)])
    assert skips.ranges == ((0, 2), (5, 9), (20, 25))
    assert skips.pairs == [[0, 2], [5, 4], [20, 5]]
    assert (skips | Skips.of([(2, 3)])).ranges == ((0, 9), (20, 25))
    assert skips.before(6).ranges == ((0, 2), (5, 6))
    assert skips.before(5).ranges == ((0, 2),)
    for first, count in ((0, 4), (3, 30), (6, 1), (9, 11), (9, 12), (30, 2)):
        kept = [g for g in range(first, 99) if not any(a <= g < b for a, b in skips.ranges)][:count]
        assert skips.kept(first, count).tolist() == kept


@pytest.mark.parametrize("data_ranks", [1, 2])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("changes", [{}, {"block": 2}, {"packing": Packing.concatenate}])
def test_the_stream_without_some_samples(corpus: Corpus, data_ranks: int, prefetch: bool, changes):
    """Its other samples are what they were, in the same order; what is skipped counts as read."""
    whole = make_loader(corpus, **changes)
    rows = joined([whole.take(plan()) for _ in range(30)])
    kept = torch.tensor([not any(a <= g < a + n for a, n in SKIPPED) for g in range(240)])
    loaders = [
        make_loader(
            corpus,
            skips=Skips.of(SKIPPED),
            data_rank=rank,
            data_ranks=data_ranks,
            prefetch=prefetch,
            **changes,
        )
        for rank in range(data_ranks)
    ]
    step, batches = plan(data_ranks=data_ranks), []
    for _ in range(15):
        batches += [loader.take(step) for loader in loaders]
    found = joined(batches)
    assert_same(found, {name: value[kept][:120] for name, value in rows.items()})
    last = int(found["sample_B"][-1])
    for loader in loaders:
        loader.close()
        counts = rows["domain_B"][: last + 1].bincount(minlength=3).tolist()
        assert list(loader.state_dict()["counts"].values()) == counts
        assert loader.state_dict()["samples"] == last + 1


def test_a_curriculum_goes_on_past_skipped_samples(corpus: Corpus):
    windows = tuple(np.arange(n, dtype=np.int64) for n in (90, 60, 9))
    data = DataPlan(corpus, difficulty=Difficulty("index", windows))
    admit = [replace(plan(), admitted=(20 + n, 30, 5 + n // 8)) for n in range(30)]
    whole, other = (make_loader(corpus, plan=data, skips=Skips.of(skip)) for skip in ([], [(16, 24)]))
    rows = joined([whole.take(step) for step in admit[:9]])
    # As many windows are admitted where the whole run had read as far.
    left = joined([other.take(step) for step in (admit[0], admit[1])])
    assert_same(left, {name: value[:16] for name, value in rows.items()})
    again = make_loader(corpus, plan=data, skips=Skips.of([(16, 24)]))
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert_same(joined([again.take(admit[5])]), joined([other.take(admit[5])]))
    visits = sum(visits for pairs in other.state_dict()["clusters"].values() for _, visits in pairs)
    assert visits == other.state_dict()["samples"] == 48


def test_a_domain_is_left_out_after_its_epochs_of_read_and_skipped_samples(corpus: Corpus):
    loader = make_loader(corpus, max_epochs=1.0, skips=Skips.of([(0, 64)]))
    loader.take(loader.limit(plan()))
    assert loader.consumed["web"]["epochs"] > 1
    assert loader.limit(plan()).domain_weights[2] == 0


def test_a_run_learns_in_its_middle_what_to_skip(corpus: Corpus):
    """From there on it is the run that knew, also after a resume."""
    told, learns = make_loader(corpus, skips=Skips.of([(30, 13)])), make_loader(corpus, prefetch=True)
    rows = joined([told.take(plan()) for _ in range(9)])
    batches = [learns.take(plan()) for _ in range(3)]
    learns.skip(30, 13)
    batches += [learns.take(plan()) for _ in range(2)]
    learns.close()
    resumed = make_loader(corpus, skips=Skips.of([(72, 2)]))  # of another range, still to come
    resumed.load_state_dict(json.loads(json.dumps(learns.state_dict())))
    batches += [resumed.take(plan()) for _ in range(2)]
    assert_same(joined(batches), {name: value[:56] for name, value in rows.items()})
    assert resumed.state_dict()["skips"] == {"given": [[72, 2]], "found": [[30, 13]]}
    assert resumed.take(plan()).sample_B.tolist() == [69, 70, 71, 74, 75, 76, 77, 78]


def test_what_a_step_went_through(corpus: Corpus):
    loader = make_loader(corpus, skips=Skips.of([(0, 3), (12, 2)]), prefetch=True)
    counts = np.bincount(draw(SEED, 0, 11, WEIGHTS), minlength=3)
    loader.take(plan())
    assert loader.last == Stretch(0, 11, tuple(counts.tolist()))
    loader.take(plan())
    assert (loader.last.first, loader.last.count) == (11, 10)
    loader.close()


@pytest.mark.parametrize("now", [[], [[4, 8]], [[1, 1], [4, 4]]])
def test_what_was_read_cannot_be_skipped_any_more(corpus: Corpus, now: list[list[int]]):
    loader = make_loader(corpus, skips=Skips.of([(4, 4), (30, 9)]))
    loader.take(plan())
    with pytest.raises(UserError) as caught:
        make_loader(corpus, skips=Skips.of(now)).load_state_dict(loader.state_dict())
    past = Skips.of(now).before(12).pairs
    assert str(caught.value) == (
        f"data.skip={now}: found a run of 12 samples so far that has passed over [[4, 4]] of them, "
        f"expected the same ranges up to there, and not {past}. Fix: change data.skip for later samples "
        "only, or begin a new run.dir"
    )
    make_loader(corpus, skips=Skips.of([(4, 4), (12, 90)])).load_state_dict(loader.state_dict())


def test_a_state_from_before_there_were_skips_is_taken(corpus: Corpus):
    state = {name: value for name, value in make_loader(corpus).state_dict().items() if name != "skips"}
    loader = make_loader(corpus)
    loader.load_state_dict(state)
    assert loader.state_dict()["skips"] == {"given": [], "found": []}


@pytest.mark.parametrize(
    ("changes", "what"), [({"seed": 12}, "seed"), ({"seq_len": 4}, "seq_len"), ({"split": "valid"}, "split")]
)
def test_a_state_of_another_order_is_refused(corpus: Corpus, changes: dict[str, Any], what: str):
    state = make_loader(corpus).state_dict()
    with pytest.raises(UserError, match=f"data state, {what}: .*start a new stage"):
        make_loader(corpus, **changes).load_state_dict(state)


def test_a_state_of_another_corpus_is_refused(corpus: Corpus, tmp_path: Path):
    other = write_corpus(tmp_path, {name: counting_documents([50], first) for name, first in FIRST.items()})
    with pytest.raises(UserError, match="data state, corpus: "):
        make_loader(other).load_state_dict(make_loader(corpus).state_dict())


def test_a_domain_too_short_is_refused_only_where_it_is_drawn_on(tmp_path: Path):
    corpus = write_corpus(tmp_path, {"long": counting_documents([9]), "short": counting_documents([5, 3])})
    loader = make_loader(corpus)
    loader.take(plan(weights=(1.0, 0.0)))
    expected = r"domain short, split train: found 8 tokens, expected at least 9, a window and its last label"
    with pytest.raises(UserError, match=expected):
        loader.take(plan(weights=(0.9, 0.1)))
    assert loader.state_dict()["samples"] == 8


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Corpus, Path]:
    """A corpus whose second domain loses its tokens after it was opened."""
    documents = {"here": counting_documents([30, 40]), "gone": counting_documents([30, 40], 1000)}
    corpus = write_corpus(tmp_path, documents)
    lost = tmp_path / "train" / "gone-00000.bin"
    lost.rename(tmp_path / "kept.bin")
    return corpus, lost


def test_an_error_of_the_prefetch_thread_surfaces_in_take(broken: tuple[Corpus, Path]):
    corpus, lost = broken
    assert draw(11, 0, 2, (0.5, 0.5)).tolist() == [0, 1]  # one sample each, the first from what is there
    one = plan(weights=(0.5, 0.5), global_batch=1, micro_batch=1)
    loader = make_loader(corpus, prefetch=True)
    loader.take(one)
    with pytest.raises(UserError, match=r"gone-00000\.bin: found no such file") as caught:
        loader.take(one)
    assert "_run" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    # Nothing was consumed: once the file is back the same step is taken.
    assert loader.state_dict()["samples"] == 1
    (lost.parents[1] / "kept.bin").rename(lost)
    batch = loader.take(one)
    assert batch.domain_B.tolist() == [1]
    assert batch.sample_B.tolist() == [1]
    loader.close()


def test_an_error_of_a_wrong_guess_is_dropped_with_it(broken: tuple[Corpus, Path]):
    corpus, _ = broken
    loader = make_loader(corpus, prefetch=True)
    loader.take(plan(weights=(0.5, 0.5), global_batch=1, micro_batch=1))
    batch = loader.take(plan(weights=(1.0, 0.0)))
    assert batch.domain_B.tolist() == [0] * 8
    loader.close()


def test_close_leaves_no_thread(corpus: Corpus):
    loader = make_loader(corpus, prefetch=True)
    loader.take(plan())
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "megafab-prefetch"]
    loader.close()


# --- validation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Validation splits of 20 windows, of 3, of 5 tokens (no window), of 1 token and of none."""
    tokens = {"large": [60, 101], "small": [12, 13], "short": [3, 2], "single": [1], "none": []}
    valid = {name: counting_documents(lengths) for name, lengths in tokens.items() if lengths}
    train = {name: counting_documents([50]) for name in tokens}
    return write_corpus(tmp_path_factory.mktemp("held_out"), train, valid)


def validate(
    corpus: Corpus, samples: int, data_ranks: int, micro_batch: int, packing: Packing = Packing.document
) -> list[dict[str, tuple[Batch, ...]]]:
    """Every data rank's batches."""
    return [
        validation_batches(
            corpus,
            samples_per_domain=samples,
            seq_len=SEQ_LEN,
            packing=packing,
            data_rank=rank,
            data_ranks=data_ranks,
            micro_batch=micro_batch,
        )
        for rank in range(data_ranks)
    ]


def real_rows(by_rank: list[dict[str, tuple[Batch, ...]]], name: str) -> dict[str, torch.Tensor]:
    """The rows of one domain over all ranks, padding left out."""
    rows = joined([batch for batches in by_rank for batch in batches[name]])
    return {field: value[rows["sample_B"] >= 0] for field, value in rows.items()}


@pytest.mark.parametrize(("data_ranks", "micro_batch"), [(1, 1), (1, 4), (2, 3), (4, 2), (3, 16)])
def test_validation_does_not_depend_on_topology(held_out: Corpus, data_ranks: int, micro_batch: int):
    reference = validate(held_out, 7, 1, 7)
    by_rank = validate(held_out, 7, data_ranks, micro_batch)
    for name in ("large", "small", "short"):
        assert_same(real_rows(by_rank, name), real_rows(reference, name))
        counts = {len(batches[name]) for batches in by_rank}
        assert len(counts) == 1
        for batches in by_rank:
            for batch in batches[name]:
                assert batch.tokens_BL.shape == (micro_batch, SEQ_LEN)
                padding = batch.sample_B < 0
                assert batch.loss_mask_BL[padding].sum() == 0


def test_validation_reads_fixed_windows_none_twice(held_out: Corpus):
    stream = stream_of(held_out, 0, "valid")
    windows = [stream[start : start + SEQ_LEN].tolist() for start in range(0, 20 * SEQ_LEN, SEQ_LEN)]
    found = real_rows(validate(held_out, 7, 1, 7), "large")["tokens_BL"].tolist()
    assert len(found) == 7
    assert all(row in windows for row in found)
    everything = real_rows(validate(held_out, 1000, 1, 7), "large")["tokens_BL"].tolist()
    assert everything[:7] == found
    assert sorted(everything) == sorted(windows)
    assert everything != windows
    small = real_rows(validate(held_out, 7, 2, 1), "small")["tokens_BL"].tolist()
    assert sorted(small)[-1] == [17, 18, 19, 20, 21, 22, 23, 24]
    assert len(small) == 3


@pytest.mark.parametrize("packing", Packing)
def test_validation_of_a_split_shorter_than_a_window(held_out: Corpus, packing: Packing):
    """The stream is 1 2 0 4 0: four labels, of which `document` drops the one after the first 0."""
    (batch,) = validate(held_out, 7, 1, 1, packing)[0]["short"]
    assert batch.tokens_BL.tolist() == [[1, 2, 0, 4, EOD, EOD, EOD, EOD]]
    assert batch.labels_BL[0, :4].tolist() == [2, 0, 4, 0]
    expected = [1, 1, 0, 1] if packing is Packing.document else [1, 1, 1, 1]
    assert batch.loss_mask_BL.tolist() == [expected + [0, 0, 0, 0]]


def test_validation_of_a_split_without_labels_has_no_batches(held_out: Corpus):
    batches = validate(held_out, 7, 1, 4)[0]
    assert list(batches) == ["large", "small", "short", "single", "none"]
    assert batches["single"] == batches["none"] == ()


def test_validation_of_zero_samples_has_no_batches(held_out: Corpus):
    assert set(validate(held_out, 0, 1, 4)[0].values()) == {()}


# --- the README --------------------------------------------------------------------------------------


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readme = Path(__file__).parents[2] / "megafab" / "data" / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    documents = {name: counting_documents([700] * 5, first) for name, first in FIRST.items()}
    write_corpus(tmp_path / "corpus", documents, documents)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(readme), "exec"), names)  # asserts inside the example
    assert Counter(names["batch"].domain_B.tolist()).total() == 8
