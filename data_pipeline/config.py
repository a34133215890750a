"""What `megafab data` is told, and the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from megafab.data.derived import NAME
from megafab.errors import ConfigError, ConfigErrors
from megafab.function import FORM, is_named

METRICS = ("seqlen", "rarity", "compression", "loss")


class TokenizerType(Enum):
    """`bpe` and `unigram` are trained on the sources; `file` is given."""

    bpe = "bpe"
    unigram = "unigram"
    file = "file"


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Which tokenizer to train, or where a given one is."""

    type: TokenizerType = TokenizerType.bpe
    vocab: int = 8192  # ids, the 256 bytes and EOD included; a given tokenizer brings its own
    path: str | None = None  # type=file: a SentencePiece .model, a tokenizer.json, or a directory with one
    sample_bytes: int = 8_000_000  # text it is trained on, drawn from all domains alike


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """Everything `megafab data` is told. `workers`, `part` and `overwrite` do not change the result."""

    # Domain name -> path, glob, `datasets` id, or a list of them; null: the standard library of this Python.
    sources: dict[str, Any] | None = None
    out: str = MISSING  # directory of the corpus; appears when it is complete
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text_key: str = "text"  # where JSONL and Parquet rows keep their text
    valid_fraction: float = 0.01  # share of distinct documents held out; 0: no validation split
    seed: int = 1234  # order of documents within a shard
    skip_bad: bool = False  # count and report bad documents instead of stopping at the first
    workers: int = 2  # processes
    # K/N: tokenize only the K-th of N parts, K from 0. Other commands, on other machines too, do the others;
    # then the same command without part= puts the corpus together.
    part: str | None = None
    stdlib_bytes: int = 8_000_000  # per domain of the default corpus
    overwrite: bool = False  # replace a corpus that was built from another request


@dataclass(frozen=True, slots=True)
class DifficultyConfig:
    """Everything `megafab data difficulty` is told. `workers` and `overwrite` do not change the result."""

    path: str = MISSING  # directory of the corpus
    seq_len: int = MISSING  # tokens of a window: model.seq_len of the runs that will read it
    metric: str = (
        "rarity"  # seqlen, rarity, compression, loss, or a function of yours: package.module:function
    )
    scores: str | None = (
        None  # of metric=loss: what `megafab score` made, its name below the corpus or its path
    )
    name: str | None = None  # of the result; null: METRIC-SEQ_LEN
    workers: int = 2  # processes
    overwrite: bool = False  # replace a result of the same name that was made from something else

    @property
    def out_name(self) -> str:
        """The name of the result."""
        return self.name or f"{self.metric.rpartition(':')[2]}-{self.seq_len}"


def check_difficulty(config: DifficultyConfig) -> None:
    """Refuse what cannot be computed, all problems at once.

    Raises:
        ConfigErrors: at least one value is out of range or contradicts another.
    """
    loss, metric = config.metric == "loss", config.metric
    problems = [
        at_least("workers", config.workers, 1),
        at_least("seq_len", config.seq_len, 1),
        None
        if metric in METRICS or is_named(metric)
        else ConfigError(
            f"metric={metric}",
            "an unknown metric",
            f"{', '.join(METRICS)}, or a function as {FORM}",
            "metric=rarity, for example",
        ),
        ConfigError("scores", "nothing", "a name, as metric=loss", "scores=NAME, made by megafab score")
        if loss and not config.scores
        else None,
        ConfigError(f"scores={config.scores}", f"metric={metric}", "metric=loss", "leave scores out")
        if config.scores and not loss
        else None,
        None
        if NAME.fullmatch(config.out_name)
        else ConfigError(
            f"name={config.name}", "no name of a directory", "letters, digits, '_', '-', '.'", "another name"
        ),
    ]
    if any(problems):
        raise ConfigErrors([problem for problem in problems if problem is not None])


def _bad_part(config: BuildConfig) -> ConfigError | None:
    try:
        part_of(config)
    except ConfigError as error:
        return error
    return None


def part_of(config: BuildConfig) -> tuple[int, int]:
    """(K, N) of `part=K/N`; (0, 1) for all.

    Raises:
        ConfigError: it is something else.
    """
    number, slash, of = (config.part or "0/1").partition("/")
    if slash and number.isdecimal() and of.isdecimal() and int(number) < int(of):
        return int(number), int(of)
    expected = "K/N with K from 0 to N - 1"
    raise ConfigError(f"part={config.part}", "no part", expected, "part=0/8 for the first of eight")


def check(config: BuildConfig) -> None:
    """Refuse what cannot be built, all problems at once.

    Raises:
        ConfigErrors: at least one value is out of range or contradicts another.
    """
    problems = [problem for problem in _problems(config) if problem is not None]
    if problems:
        raise ConfigErrors(problems)


def _problems(config: BuildConfig) -> list[ConfigError | None]:
    given = config.tokenizer.type is TokenizerType.file
    path = config.tokenizer.path
    vocab, sample = config.tokenizer.vocab, config.tokenizer.sample_bytes
    return [
        at_least("workers", config.workers, 1),
        at_least("stdlib_bytes", config.stdlib_bytes, 100_000),
        at_least("tokenizer.sample_bytes", sample, 10_000),
        None if given else at_least("tokenizer.vocab", vocab, 259),
        None
        if 0 <= config.valid_fraction < 1
        else ConfigError(
            f"valid_fraction={config.valid_fraction}",
            "a share out of range",
            "0 <= share < 1",
            "valid_fraction=0.01",
        ),
        ConfigError("tokenizer.path", "nothing", "a path, as tokenizer.type=file", "tokenizer.path=FILE")
        if given and not path
        else None,
        ConfigError(
            f"tokenizer.path={path}",
            f"tokenizer.type={config.tokenizer.type.value}",
            "tokenizer.type=file when a path is given",
            "tokenizer.type=file, or leave tokenizer.path out",
        )
        if path and not given
        else None,
        _bad_part(config),
        *[_bad_domain(name, value) for name, value in (config.sources or {}).items()],
        ConfigError("sources={}", "no domain", "at least one", "sources={name: PATH}, or leave sources out")
        if config.sources is not None and not config.sources
        else None,
    ]


def at_least(key: str, value: int, least: int) -> ConfigError | None:
    """The problem of a value that is smaller than it may be."""
    if value >= least:
        return None
    return ConfigError(f"{key}={value}", "a value too small", f"at least {least}", f"{key}={least}")


def _bad_domain(name: Any, value: Any) -> ConfigError | None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        expected = "letters, digits, '_', '-' and '.', as files are named by it"
        return ConfigError(f"sources.{name}", f"the domain name {name!r}", expected, "rename the domain")
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) and entry for entry in values):
        expected = "a path, a glob, a datasets id, or a list of these"
        return ConfigError(f"sources.{name}", repr(value), expected, f"sources={{{name}: PATH}}")
    return None
