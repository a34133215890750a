"""Softmax cross-entropy over rows of logits, and its gradient in their place; `csrc/cross_entropy.cu`.

    peak = max(x),  total = sum(exp(x - peak)),  log_z = peak + log(total)
    nll  = log_z - x[label]

One read of a row gives `peak` and `total`, by the online softmax (Milakov and Gimelshein 2018, algorithm 3).
Where rows are shards of a vocabulary, the caller joins these two over the shards before `gradient_`; `peak`
and `total` stay apart, since exp(x - log_z) is off by 1e-3 where logits are 1e4.

All arithmetic is fp32, and so is what is given for each row.

Floor: `statistics` reads the logits; `gradient_` reads and writes them. `nll_and_gradient_` does both for
rows of a whole vocabulary, and finds the row it has just read in the cache: one read and one write.

Shapes: N rows, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megafab.kernels.ops import chosen, define, wide, wide_type


def statistics(logits: Tensor, labels: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`peak`, `total`, `target` and `sum` of every row, each [N].

    Args:
        logits: [N, V], columns `first` to `first` + V - 1 of the vocabulary.
        labels: ids [N]; `target` is the label's logit, 0 where it is no column here.
        first: the id of column 0.
    """
    return chosen("cross_entropy")(logits, labels, first)


def gradient_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    peak: Tensor,
    total: Tensor,
    *,
    nll: Tensor | None,
    log_z: Tensor | None,
    mean: Tensor | None,
    vocabulary: int,
) -> None:
    """Puts the gradient of the logits [N, V] in their place, of rows nobody asks for exactly 0.

        p (nll + log_z) - nll onehot(label) + mean / vocabulary,    p = exp(logit - peak) / total

    Args:
        logits, labels, first: as for `statistics`.
        peak, total: [N], of the whole vocabulary.
        nll, log_z, mean: gradients [N] of the loss, the normaliser and the mean logit; None: of 0.
        vocabulary: how many logits `mean` is the mean of.
    """
    chosen("cross_entropy_gradient_")(logits, labels, first, peak, total, nll, log_z, mean, vocabulary)


def nll_and_gradient_(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    """The loss of rows of a whole vocabulary, [N]; in the place of the logits its gradient times `expected`.

    Args:
        logits: [N, V].
        labels: [N].
        expected: a scalar, the gradient that each loss is going to be given, not 0; `scale_rows_` mends the
            rows that are given another.
    """
    return chosen("nll_and_gradient_")(logits, labels, expected)


def scale_rows_(x: Tensor, expected: Tensor, found: Tensor) -> None:
    """Multiplies the rows of x [N, V] by `found` [N] / `expected`, a scalar.

    Rows where they are equal are not touched, those where `found` is 0 become 0 whatever they are.
    """
    chosen("scale_rows_")(x, expected, found)


# ---- reference ---------------------------------------------------------------------------------------------

_BLOCK = 2**17  # logits; 512 KiB in fp32


def _statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    peak, total, target, sums = (logits.new_empty(len(logits), dtype=wide_type(logits)) for _ in range(4))
    scratch = _scratch(logits)
    for rows in _blocks(logits):
        values = wide(logits[rows])  # a CPU is slow at the maximum of bf16
        own, here = _place(labels[rows], first, values)
        target[rows] = torch.where(here, values.gather(1, own), 0.0).squeeze(1)
        sums[rows] = values.sum(1)
        _, peak[rows], total[rows] = _exponentials(values, scratch)
    return peak, total, target, sums


def _gradient_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    peak: Tensor,
    total: Tensor,
    nll: Tensor | None,
    log_z: Tensor | None,
    mean: Tensor | None,
    vocabulary: int,
) -> None:
    grads = [grad for grad in (nll, log_z, mean) if grad is not None]
    idle = torch.stack(grads).eq(0).all(0) if grads else torch.ones_like(peak, dtype=torch.bool)
    slope = torch.zeros_like(peak)
    for grad in (nll, log_z):
        slope = slope if grad is None else slope + grad
    slope = slope / total
    in_place = logits.dtype is peak.dtype
    scratch = None if in_place else _scratch(logits)
    for rows in _blocks(logits):
        values = logits[rows]
        values = torch.sub(
            values, peak[rows, None], out=values if scratch is None else scratch[: len(values)]
        )
        values.exp_().mul_(slope[rows, None])
        if mean is not None:
            values.add_(mean[rows, None] / vocabulary)
        if nll is not None:
            own, here = _place(labels[rows], first, values)
            values.scatter_add_(1, own, torch.where(here, -nll[rows, None], 0.0))
        if not in_place:
            logits[rows] = values
    _zero_(logits, idle)


def _nll_and_gradient_(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    nll = logits.new_empty(len(logits), dtype=wide_type(logits))
    in_place = logits.dtype is nll.dtype
    scratch = None if in_place else _scratch(logits)
    for rows in _blocks(logits):
        values, own = wide(logits[rows]), labels[rows, None]
        target = values.gather(1, own).squeeze(1)
        values, peak, total = _exponentials(values, values if scratch is None else scratch)
        nll[rows] = total.log() + (peak - target)
        values.mul_((expected / total)[:, None])
        values.scatter_add_(1, own, -expected.expand_as(own))
        if not in_place:
            logits[rows] = values
    return nll


def _scale_rows_(x: Tensor, expected: Tensor, found: Tensor) -> None:
    factor = found / expected
    if x.device.type == "cpu":
        for row in (found != expected).nonzero().flatten().tolist():
            x[row].mul_(factor[row])
    else:
        x.mul_(factor[:, None])
    _zero_(x, found == 0)


def _exponentials(values: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(values - peak), written to the first rows of `out`, their peaks and their sums."""
    peak = values.amax(1)
    exponentials = torch.sub(values, peak[:, None], out=out[: len(values)]).exp_()
    return exponentials, peak, exponentials.sum(1)


def _place(labels: Tensor, first: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The column of each label [N, 1], and whether it is one of these."""
    own = labels[:, None] - first
    here = (own >= 0) & (own < values.shape[1])
    return torch.where(here, own, 0), here


def _zero_(x: Tensor, rows: Tensor) -> None:
    if x.device.type == "cpu":
        x[rows] = 0
    else:
        x.masked_fill_(rows[:, None], 0)  # without a wait for the count of rows


def _blocks(values: Tensor) -> Iterator[slice]:
    """Rows to take at a time: a cacheful on a CPU, all of them elsewhere."""
    step = _rows_of_block(values)
    return (slice(start, min(start + step, len(values))) for start in range(0, len(values), step))


def _rows_of_block(values: Tensor) -> int:
    rows = max(1, len(values))
    return min(rows, max(1, _BLOCK // values.shape[1])) if values.device.type == "cpu" else rows


def _scratch(logits: Tensor) -> Tensor:
    """Room for a block in wide numbers."""
    return logits.new_empty(_rows_of_block(logits), logits.shape[1], dtype=wide_type(logits))


# ---- registration ------------------------------------------------------------------------------------------


def _per_row(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=wide_type(logits))


def _statistics_fake(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, ...]:
    return tuple(_per_row(logits) for _ in range(4))


def _nll_and_gradient_fake(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    return _per_row(logits)


def _nothing(*_: object) -> None:
    pass


define(
    "cross_entropy(Tensor logits, Tensor labels, int first)"
    " -> (Tensor peak, Tensor total, Tensor target, Tensor sum)",
    _statistics,
    _statistics_fake,
)
define(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, int first, Tensor peak, Tensor total,"
    " Tensor? nll, Tensor? log_z, Tensor? mean, int vocabulary) -> ()",
    _gradient_,
    _nothing,
)
define(
    "nll_and_gradient_(Tensor(a!) logits, Tensor labels, Tensor expected) -> Tensor",
    _nll_and_gradient_,
    _nll_and_gradient_fake,
)
define("scale_rows_(Tensor(a!) x, Tensor expected, Tensor found) -> ()", _scale_rows_, _nothing)
