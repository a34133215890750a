"""The identity of a run's data: what counts, and what is carried on when it changes on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpora import counting_documents, write_corpus

from megafab.checkpoint.identity import carried_on, differences, identity
from megafab.data.config import Packing
from megafab.data.loader import Loader
from megafab.data.plan import DataPlan
from megafab.data.skips import Skips
from megafab.errors import UserError
from megafab.run import StepPlan

WEIGHTS = (0.75, 0.25)


def corpus(root: Path, books: int = 400, first: int = 1):
    return write_corpus(
        root,
        {
            "books": counting_documents([40] * (books // 40), first),
            "code": counting_documents([25] * 16, 500),
        },
    )


def described(found, **changes: Any) -> dict[str, Any]:
    settings = {"weights": WEIGHTS, "packing": Packing.document, "seed": 3, "seq_len": 8, "block": 1}
    plan = DataPlan(found, order_seeds=changes.pop("order_seeds", {}))
    return identity(plan, **{**settings, **changes})


@pytest.fixture
def base(tmp_path) -> dict[str, Any]:
    return described(corpus(tmp_path / "base"))


def test_a_copy_elsewhere_is_the_same(base, tmp_path):
    assert differences(base, described(corpus(tmp_path / "copy"))) == []


def test_ids_in_one_domain_count(base, tmp_path):
    now = described(corpus(tmp_path / "other", first=2))
    assert differences(base, now) == ["domain books has other content of the same length (400 tokens)"]


def test_every_setting_counts(base, tmp_path):
    same = corpus(tmp_path / "same")
    changes = {"packing": Packing.concatenate, "seed": 4, "seq_len": 16, "weights": (0.5, 0.5)}
    assert differences(base, described(same, **changes)) == [
        "the weight of books was 0.75 and is 0.5",
        "the weight of code was 0.25 and is 0.5",
        "data.packing was document and is concatenate",
        "train.seed was 3 and is 4",
        "model.seq_len was 8 and is 16",
    ]


def loader(found, seed: int = 3, **more: Any) -> Loader:
    settings: dict[str, Any] = {"split": "train", "seed": seed, "seq_len": 8, "packing": Packing.document}
    return Loader(found, **settings, **more, data_rank=0, data_ranks=1, prefetch=False)


def plan(step: int, weights: tuple[float, ...] = WEIGHTS) -> StepPlan:
    return StepPlan(step, 0.1, 0.0, 4, 4, 1, 8, weights)


def carry(old, new, seed: int = 3) -> tuple[dict[str, Any], dict[str, Any], Loader]:
    """The loader's state after three steps of `old`, as it is carried on to `new`, and a loader of that."""
    first, second = loader(old), loader(new, seed)
    for step in range(3):
        first.take(plan(step))
    then = first.state_dict()
    now = carried_on(then, second.state_dict(), described(old), described(new, seed=seed))
    second.load_state_dict(now)
    return then, now, second


def test_a_domain_that_did_not_change_is_read_on(tmp_path):
    old, new = corpus(tmp_path / "old"), corpus(tmp_path / "new", books=800)
    then, now, continued = carry(old, new)
    assert now["samples"] == then["samples"] == 12
    assert now["counts"] == {"books": 0, "code": then["counts"]["code"]}
    assert continued.take(plan(3)).sample_B.tolist() == [12, 13, 14, 15]


def test_another_seed_begins_every_domain_anew(tmp_path):
    old = corpus(tmp_path / "old")
    then, now, _ = carry(old, old, seed=4)
    assert (now["samples"], now["counts"]) == (12, {"books": 0, "code": 0})
    assert now["order"]["seed"] == 4


def test_a_change_of_the_mixture_alone_repeats_nothing(tmp_path):
    """The samples of a domain go on in its order, whatever their share is from now on."""
    old = corpus(tmp_path / "old")
    then, now, continued = carry(old, old)
    assert now == then
    unbroken = loader(old)
    for step in range(3):
        unbroken.take(plan(step))
    only_code = plan(3, (0.0, 1.0))
    assert continued.take(only_code).tokens_BL.equal(unbroken.take(only_code).tokens_BL)


def test_skipped_samples_stay_skipped_where_a_run_reads_on(tmp_path):
    """Whoever named them: the run that goes on need not name them again, and cannot skip more of the past."""
    old, other = corpus(tmp_path / "old"), corpus(tmp_path / "other", books=800)
    first = loader(old, skips=Skips.of([(2, 3), (50, 9)]))
    for step in range(2):
        first.take(plan(step))
    first.skip(20, 4)
    for facts in (described(old), described(other)):
        state = carried_on(first.state_dict(), loader(old).state_dict(), described(old), facts)
        assert state["skips"] == {"given": [], "found": [[2, 3]]}
    second = loader(old, skips=Skips.of([(2, 3), (15, 2)]))
    second.load_state_dict(state)
    assert second.take(plan(2)).sample_B.tolist() == [11, 12, 13, 14]
    with pytest.raises(UserError, match=r"passed over \[\[2, 3\]\] of them"):
        loader(old, skips=Skips.of([(7, 2)])).load_state_dict(state)


def test_what_decides_the_order_beside_the_shards_is_told(base, tmp_path):
    found = corpus(tmp_path / "copy")
    assert differences(base, described(found, block=4)) == ["data.block was 1 and is 4"]
    other = described(found, order_seeds={"books": 9})
    assert differences(base, other) == ["the order of books was that of seed 3 and is that of seed 9"]
    loader = {"samples": 50, "counts": {"books": 30, "code": 20}, "mixture_log": [], "order": {}}
    fresh = {"samples": 0, "counts": {"books": 0, "code": 0}, "mixture_log": [], "order": {}}
    assert carried_on(loader, fresh, base, other)["counts"] == {"books": 0, "code": 20}
