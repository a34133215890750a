"""A domain of noise and one of a single page: what captures the mixture, and which settings do not let it.

What megafab/techniques/README.md calls safe is tested here in runs that learn, and so is the failure of what
it does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from training import rows, train

pytestmark = pytest.mark.multiproc

MODEL = (
    *("model=llama_tiny", "model.layers=2", "model.hidden=64", "model.heads=2", "model.kv_heads=2"),
    *("model.ffn=128", "model.seq_len=32", "train.steps=60", "train.global_batch=24", "train.micro_batch=24"),
    *("optim.lr=1e-2", "schedule.warmup=5", "tracking=none", "checkpoint.save_last=false"),
    *("eval.samples=8", "data.temperature=0"),
)
MIXING = ("technique=[online_mixing]", "techniques.online_mixing.warmup_steps=10")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Random tokens; the same page over and over; and tokens of which each has few successors."""
    rng = np.random.default_rng(0)
    page = rng.integers(1, 128, 200)
    successors = rng.integers(1, 128, (128, 4))

    def text(length: int) -> np.ndarray:
        tokens = [1]
        for choice in rng.integers(0, 4, length):
            tokens.append(int(successors[tokens[-1], choice]))
        return np.array([*tokens, 0])

    def documents(count: int) -> dict[str, list[np.ndarray]]:
        return {
            "page": [np.append(page, 0) for _ in range(count)],
            "text": [text(200) for _ in range(count)],
            "noise": [np.append(rng.integers(1, 128, 200), 0) for _ in range(count)],
        }

    path = tmp_path_factory.mktemp("noise") / "corpus"
    return write_corpus(path, documents(120), documents(4), vocab_size=128).path


@pytest.fixture(scope="module")
def last_row(ranks, data, tmp_path_factory):
    """The last row of a run."""

    def last_row(*overrides: str) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp("run")
        arguments = [*MODEL, *overrides, f"data.path={data}", f"run.dir={directory}"]
        assert ranks.run(train, arguments, world=1, init=False) == [0]
        return rows(directory)[-1]

    return last_row


def test_noise_captures_a_mixture_rewarded_by_perplexity(last_row):
    weights = last_row(*MIXING)["domain_weight"]
    assert weights["noise"] > 0.5
    assert weights["page"] < 0.2


def test_a_reward_above_the_losses_of_a_plain_run_keeps_noise_from_it(last_row):
    plain = last_row()["valid_domain_loss"]
    assert plain["page"] < plain["text"] < plain["noise"]
    reference = ", ".join(f"{domain}: {loss:.4f}" for domain, loss in plain.items())
    weights = last_row(
        *(*MIXING, "techniques.online_mixing.reward=excess"),
        f"techniques.online_mixing.reference={{{reference}}}",
    )["domain_weight"]
    assert max(weights["noise"], weights["page"]) < 0.4


def test_a_page_that_is_known_loses_its_weight(last_row):
    weights = last_row(
        "technique=[sample_reweighting]",
        *("techniques.sample_reweighting.temperature=0.4", "techniques.sample_reweighting.warmup_steps=10"),
    )["sample_reweighting"]["weight"]
    assert weights["page"] < 0.6
    assert weights["noise"] == pytest.approx(max(weights.values())), "the highest losses have the same weight"
