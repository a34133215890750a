"""Which domain a sample comes from.

The domain of global sample g is one uniform number, a hash of (seed, g), looked up in the cumulative
weights in force at that step. Nothing else enters: not the data-parallel size, not the batch the sample
is in, not the samples before it. With blocks, g // block stands for g: a block has one domain.

Replayed domains are not left to chance: of any n blocks in a row they get n times their joint weight, to
within one block, and the uniform number decides inside their group or the other only.

Shape suffixes: D domains, N samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megafab.data.order import stream_key, uniform
from megafab.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megafab.data.format import Corpus

_log = logging.getLogger(__name__)


def weights(
    mixture: Mapping[str, float] | None, corpus: Corpus, temperature: float = 1.0
) -> tuple[float, ...]:
    """The domains' weights in the corpus' order, summing to 1, from `data.mixture`.

    None weighs each domain by its training tokens to the power of `temperature`: 1 is the natural mixture,
    0 gives every domain with tokens the same. A domain that the mixture leaves out gets weight 0, and a log
    line says so.

    Raises:
        ConfigError: an unknown domain; a negative or non-finite weight; no positive weight at all.
        UserError: no mixture is given and the corpus has no training tokens.
    """
    if mixture is None:
        tokens_D = corpus.tokens("train")
        if sum(tokens_D) == 0:
            raise UserError(
                f"data.path={corpus.path}",
                "no training tokens",
                "a corpus with at least one training document",
                "build it again with `megafab data`, and see what its filters dropped",
            )
        most = max(tokens_D)
        return _normalised([(tokens / most) ** temperature if tokens else 0.0 for tokens in tokens_D])
    _check(mixture, corpus.domains)
    left_out = [name for name in corpus.domains if name not in mixture]
    if left_out:
        _log.warning("data.mixture leaves out %s: weight 0, never read", ", ".join(left_out))
    return _normalised([mixture.get(name, 0.0) for name in corpus.domains])


def draw(
    seed: int,
    first_sample: int,
    count: int,
    weights_D: Sequence[float],
    *,
    block: int = 1,
    replayed: Sequence[int] = (),
) -> np.ndarray:
    """The domain of each of the global samples `first_sample .. first_sample + count - 1`: int64 [count].

    Args:
        seed: of the run.
        first_sample, count: which samples.
        weights_D: of the domains; scaled here to sum to 1.
        block: samples in a row that come from one domain.
        replayed: domains whose joint weight is dealt out exactly.
    """
    block_N = np.arange(first_sample, first_sample + count, dtype=np.int64) // block
    uniform_N = uniform(stream_key(seed, "mixture"), block_N)
    weight_D = np.asarray(weights_D, np.float64)
    old_D = np.zeros(len(weight_D), bool)
    old_D[list(replayed)] = True
    # Rounded, so that the last bit of weights that differ from step to step moves no sample of a group.
    share = round(float(weight_D[old_D].sum() / weight_D.sum()), 12)
    if share in (0.0, 1.0):
        return _pick(weight_D, uniform_N)
    old_N = np.floor((block_N + 1) * share) > np.floor(block_N * share)
    return np.where(
        old_N, _pick(np.where(old_D, weight_D, 0), uniform_N), _pick(np.where(old_D, 0, weight_D), uniform_N)
    )


def _pick(weight_D: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
    """Where uniform numbers fall among the cumulative weights."""
    cumulative_D = np.cumsum(weight_D)
    # Dividing makes the last entry exactly 1, which every uniform number is below; "right" steps over
    # domains of weight 0 even when the number falls exactly on their edge.
    cumulative_D /= cumulative_D[-1]
    return np.searchsorted(cumulative_D, uniform_N, side="right")


def limited(
    weights_D: Sequence[float], exhausted_D: Sequence[bool], replayed: Sequence[int] = ()
) -> tuple[float, ...] | None:
    """The weights without the exhausted domains; None where a group that had a weight is left without any.

    The groups are the replayed domains and the others: each keeps its joint weight.
    """
    result_D = list(weights_D)
    for group in (set(replayed), set(range(len(result_D))) - set(replayed)):
        before = math.fsum(result_D[number] for number in group)
        left = math.fsum(result_D[number] for number in group if not exhausted_D[number])
        if before and not left:
            return None
        for number in group:
            result_D[number] *= 0.0 if exhausted_D[number] else before / left if left else 1.0
    return tuple(result_D)


def occurrence(domain_N: np.ndarray) -> np.ndarray:
    """How many earlier entries of `domain_N` equal each entry: int64 [N]."""
    order_N = np.argsort(domain_N, kind="stable")
    sorted_N = domain_N[order_N]
    result_N = np.empty(len(domain_N), np.int64)
    result_N[order_N] = np.arange(len(domain_N)) - np.searchsorted(sorted_N, sorted_N, side="left")
    return result_N


def _check(mixture: Mapping[str, float], domains: tuple[str, ...]) -> None:
    for name, weight in mixture.items():
        if name not in domains:
            raise ConfigError(
                f"data.mixture.{name}",
                "no such domain in the corpus",
                f"one of {', '.join(domains)}",
                "correct the name, or build the corpus with that source",
            )
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(
                f"data.mixture.{name}",
                str(weight),
                "a finite weight >= 0",
                f"data.mixture.{name}=0 leaves the domain out",
            )
    if not any(mixture.values()):
        raise ConfigError(
            "data.mixture",
            "no positive weight",
            f"a positive weight for at least one of {', '.join(domains)}",
            "data.mixture=null weighs domains by their training tokens",
        )


def _normalised(values_D: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(values_D)
    return tuple(float(value) / total for value in values_D)
