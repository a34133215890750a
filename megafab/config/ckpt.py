"""What the verbs of `megafab ckpt` are told, beside the paths they work on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megafab.checkpoint.config import GrowConfig
from megafab.config.tree import MISSING
from megafab.errors import ConfigError


class Format(Enum):
    """What `convert` makes: a directory for `transformers`, or a checkpoint to train from."""

    hf = "hf"
    megafab = "megafab"


class ExportType(Enum):
    """Number type of exported weights; masters are fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Weights(Enum):
    """Which weights of a checkpoint `convert` exports."""

    trained = "trained"  # those that training goes on with
    ema = "ema"  # the average that technique `ema` keeps of them


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """`megafab ckpt inspect PATH`."""

    tensors: bool = False  # list every tensor with its shape, type and number of stored pieces


@dataclass(frozen=True, slots=True)
class VerifyConfig:
    """`megafab ckpt verify PATH`; a run directory stands for all its checkpoints."""


@dataclass(frozen=True, slots=True)
class ReshapeConfig:
    """`megafab ckpt reshape PATH`."""

    to: str = MISSING  # directory to make; checkpoints/step_XXXXXXXX will be in it, as in a run's
    files: int | None = None  # at most so many files of tensors, about equal in size
    max_bytes: int | None = None  # or: so many bytes of tensors a file, one larger tensor alone excepted
    moments: bool = True  # false: the weights only, with which a new run begins


@dataclass(frozen=True, slots=True)
class DiffConfig:
    """`megafab ckpt diff A B`."""

    tensors: bool = False  # list every tensor that differs, not only the ten that differ most


@dataclass(frozen=True, slots=True)
class AverageConfig:
    """`megafab ckpt average A B ...`."""

    to: str = MISSING  # directory to make; checkpoints/step_XXXXXXXX will be in it, as in a run's
    weights: list[float] | None = None  # of each checkpoint, in order; divided by their sum; null: all alike


@dataclass(frozen=True, slots=True)
class DensifyConfig:
    """`megafab ckpt densify PATH`."""

    to: str = MISSING  # directory to make; checkpoints/step_XXXXXXXX will be in it, as in a run's


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """`megafab ckpt convert PATH`."""

    to: str = MISSING  # directory to make
    format: Format = Format.hf  # of what is made
    dtype: ExportType | None = None  # of exported weights; null: fp32, as imported ones always are
    weights: Weights = Weights.trained  # which of the checkpoint's are exported
    max_bytes: int | None = None  # of one safetensors file; null: 5 GB
    max_kl: float | None = None  # largest KL in nats a token; null: 1e-8 in fp32, 1e-2 in 16 bits
    judge: bool = True  # run both models and compare their logits; each in turn needs 4 bytes a parameter
    data: str | None = None  # corpus for the tokenizer and the text to judge on; null: that of the run


@dataclass(frozen=True, slots=True)
class GrowVerbConfig(GrowConfig):
    """`megafab ckpt grow PATH`."""

    to: str | None = None  # directory to make; checkpoints/step_XXXXXXXX will be in it, as in a run's
    advise: bool = False  # make nothing: say how long to train this model before it is stacked
    tokens: int | None = None  # with advise: what the grown model will be trained on
    flops: float | None = None  # with advise: or what its training will cost


def check(config: ReshapeConfig | AverageConfig | ConvertConfig | GrowVerbConfig) -> None:
    """Refuse values that contradict each other or are out of range.

    Raises:
        ConfigError: the first of them.
    """
    if isinstance(config, ReshapeConfig) and config.files is not None and config.max_bytes is not None:
        raise ConfigError(
            f"files={config.files}, max_bytes={config.max_bytes}",
            "two ways to cut",
            "one of them",
            "leave one out",
        )
    if isinstance(config, ConvertConfig):
        _check_conversion(config)
    if isinstance(config, GrowVerbConfig):
        _check_growth(config)
    least = {"files": 1, "max_bytes": 1, "max_kl": 0, "tokens": 1, "flops": 1}
    for key, low in least.items():
        value = getattr(config, key) if key in type(config).__dataclass_fields__ else None
        if value is not None and not value >= low:
            raise ConfigError(f"{key}={value}", f"{value}", f"at least {low}", f"{key}={low} or more")
    if isinstance(config, AverageConfig) and config.weights is not None:
        total = sum(config.weights)
        if any(not weight >= 0 for weight in config.weights) or not 0 < total < float("inf"):
            shown = f"weights={config.weights}"
            raise ConfigError(
                shown, "a weight below 0, or none above", "numbers of 0 or more", "correct them"
            )


def _check_conversion(config: ConvertConfig) -> None:
    if config.format is Format.megafab:
        given = {
            "dtype": config.dtype and config.dtype.value,
            "max_bytes": config.max_bytes,
            "weights": None if config.weights is Weights.trained else config.weights.value,
        }
        for key, value in given.items():
            if value is not None:
                expected, fix = "it with format=hf only: what is made has fp32 masters", "leave it out"
                raise ConfigError(f"{key}={value}", "format=megafab", expected, fix)
    if config.max_kl is not None and not config.judge:
        fix = "judge=true, or leave max_kl out"
        raise ConfigError(f"max_kl={config.max_kl}", "judge=false", "a judge to hold to it", fix)


def _check_growth(config: GrowVerbConfig) -> None:
    budget = {"tokens": config.tokens, "flops": config.flops}
    given = {key: value for key, value in budget.items() if value is not None}
    if config.advise:
        unused = {"to": config.to, "data": config.data, "preserving": config.preserving or None}
        for key, value in unused.items():
            if value is not None:
                found, expected = "advise=true, which makes nothing", "one of them"
                raise ConfigError(f"{key}={value}", found, expected, f"leave {key} or advise out")
        if len(given) != 1:
            found, expected = f"{len(given)} budgets for the grown model", "one"
            raise ConfigError("advise=true", found, expected, "give one of tokens and flops")
    elif given:
        key, value = next(iter(given.items()))
        raise ConfigError(f"{key}={value}", "no advise=true", "advice to give for it", f"leave {key} out")
    elif config.to is None:
        raise ConfigError("to", "no value", "text", "add to=... to the command")
