"""What a rule between sections of the configuration is: an id, what it looks at, what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megafab.config.schema import RunConfig
from megafab.errors import ConfigError
from megafab.model.shape import ModelShape
from megafab.optim.schedules import BatchRamp
from megafab.topology.config import ContextMethod


class Violation(NamedTuple):
    """One broken rule: the four parts of a `ConfigError`."""

    where: str
    found: str
    expected: str
    fix: str


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What the rules need to know of a corpus, from its manifest, or why there is nothing to know.

    `tokens` are those of the training split by domain, in the manifest's order.
    """

    path: str
    vocab_size: int = 0
    tokens: dict[str, int] = field(default_factory=dict[str, int])
    fingerprint: str = ""
    valid_tokens: dict[str, int] | None = None
    problem: Violation | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rule looks at: the configuration, the job's size and, when data are at hand, the corpus."""

    config: RunConfig
    ranks: int
    corpus: CorpusFacts | None = None

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        parallel = self.config.parallel
        return parallel.tensor * parallel.pipeline * parallel.context

    @property
    def data_ranks(self) -> int:
        """Replicas of the model; 1 when the ranks do not divide, which `ranks` reports."""
        return max(1, self.ranks // self.model_ranks)

    @property
    def data(self) -> CorpusFacts | None:
        """The corpus, when there is one to speak of."""
        return None if self.corpus is None or self.corpus.problem else self.corpus

    @property
    def total_steps(self) -> int | None:
        """The run's length in steps; None where a rule of its own has something to say first."""
        train = self.config.train
        if (train.steps is None) == (train.tokens is None):
            return None
        if train.steps is not None:
            return train.steps
        try:
            ramp = BatchRamp(train.batch_ramp, train.global_batch)
        except ConfigError:
            return None
        return ramp.steps_until(-(-(train.tokens or 0) // self.config.model.seq_len))

    @property
    def kv_heads(self) -> int:
        """Key-value heads of the model."""
        return self.config.model.kv_heads or self.config.model.heads

    @property
    def sequence_unit(self) -> tuple[int, str]:
        """What the length of every sequence is a multiple of, and the axes of the mesh that ask for it."""
        p = self.config.parallel
        # All-gather gives each context rank an early and a late chunk, to even out the causal work.
        chunks = 2 if p.context > 1 and p.context_method is ContextMethod.allgather else 1
        unit, axes = p.context * chunks, [f"parallel.context={p.context} ({p.context_method.name})"]
        if p.sequence:
            unit = math.lcm(unit, p.context * p.tensor)
            axes.append(f"parallel.tensor={p.tensor} (parallel.sequence)")
        return unit, " and ".join(axes[p.context == 1 :])

    @property
    def shape(self) -> ModelShape | None:
        """The model's sizes; None without a vocabulary."""
        vocab = self.data.vocab_size if self.data else None
        if self.config.model.vocab is None and vocab is None:
            return None
        return ModelShape.of(self.config.model, vocab)


Find = Callable[[Facts], Iterator[Violation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the table. Rules with `relates` compare sizes, and wait until every size is a valid one."""

    id: str
    find: Find
    relates: bool


Enter = Callable[[Find], Find]


def table(rules: list[Rule]) -> Callable[..., Enter]:
    """The decorator that enters a function into `rules`: `@rule("id")`, `@rule("id", relates=False)`."""

    def rule(id: str, *, relates: bool = True) -> Enter:
        def enter(find: Find) -> Find:
            rules.append(Rule(id, find, relates))
            return find

        return enter

    return rule


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key; None below a section that is null."""
    for name in key.split("."):
        config = None if config is None else getattr(config, name)
    return config


class Range(NamedTuple):
    """The values that a key may have."""

    key: str
    low: float
    high: float
    text: str
    open_low: bool = False
    open_high: bool = False

    def violations(self, facts: Facts) -> Iterator[Violation]:
        """One, when the value is another."""
        value = value_at(facts.config, self.key)
        if value is not None and not self._holds(value):
            where, fix = f"{self.key}={value:g}", f"give {self.key} a value {self.text}"
            yield Violation(where, f"{value:g}", self.text, fix)

    def _holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below


def positive(key: str) -> Range:
    """More than 0."""
    return Range(key, 0, math.inf, "more than 0", open_low=True)


def not_negative(key: str) -> Range:
    """0 or more."""
    return Range(key, 0, math.inf, "0 or more")


def below_one(key: str) -> Range:
    """At least 0 and below 1."""
    return Range(key, 0, 1, "at least 0 and below 1", open_high=True)
