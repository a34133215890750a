"""Masks over a model's matrices, for the techniques that train it sparse, and what sparsity would save.

A mask is a bool tensor like its parameter: True where the weight is trained, False where it is 0. A rank has
the parts of it that lie over its slices of the masters, whichever optimizer cut them, so that a mask costs a
byte a weight divided by the data ranks, and no communication. In checkpoints masks are logical tensors like
any other, a bit a weight (`checkpoint/files.py`).

All arithmetic stays dense: no time is saved here. What a machine that skips zeros would compute is counted
apart from what was computed (`Account`), and the two are never mixed.

Shape suffixes: R rows (outputs) and C columns (inputs) of a matrix, N matrices of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megafab.checkpoint.pieces import MASK, LogicalTensor
from megafab.data.order import random_bits, stream_key
from megafab.kernels.multi_tensor import mask_
from megafab.model.names import is_maskable, parameter_shapes
from megafab.model.shape import ModelShape
from megafab.run import Progress, StepPlan
from megafab.techniques.config import SparsityPattern

if TYPE_CHECKING:
    from megafab.engine.base import WeightEditor

_BAND = 1 << 20  # elements that are drawn at once

# The ways to keep two of four.
_PAIRS = np.array([[i in (a, b) for i in range(4)] for a in range(4) for b in range(a + 1, 4)])

Draw = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]  # name, offset, shape of a box -> bool


class Masks:
    """The masks of a model, all True at first: this rank's parts of them.

    Args:
        shape: of the model.

    Attributes:
        sizes: the number of weights of every matrix of the model that is masked, by global name; in this
            order vectors over the matrices are.
    """

    def __init__(self, shape: ModelShape) -> None:
        shapes = {name: size for name, size in parameter_shapes(shape).items() if is_maskable(name)}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        self._parts: dict[str, Tensor] = {}

    def parts(self, weights: WeightEditor) -> Mapping[str, Tensor]:
        """This rank's part of each mask, bool, shaped like `weights.master`."""
        for name in weights.names():
            if name in self.sizes and name not in self._parts:
                self._parts[name] = torch.ones_like(weights.master(name), dtype=torch.bool)
        return self._parts

    def describe(self, weights: WeightEditor) -> dict[str, LogicalTensor]:
        """The masks as a technique's sharded state."""
        return {MASK + name: weights.describe(name, part) for name, part in self.parts(weights).items()}

    def fill(self, weights: WeightEditor, draw: Draw) -> None:
        """Set every mask to what `draw` says of its boxes."""
        for name, part in self.parts(weights).items():
            for piece in weights.describe(name, part).pieces:
                piece.tensor.copy_(draw(name, piece.offset, tuple(piece.tensor.shape)))

    def apply(self, weights: WeightEditor) -> None:
        """Zero masters and moments where the mask is False, and commit. A collective."""
        values, masks = [], []
        for name, part in self.parts(weights).items():
            for value in (weights.master(name), *weights.moments(name).values()):
                values.append(value)
                masks.append(part)
        mask_(values, masks)
        weights.commit()

    def apply_to(self, gradients: Mapping[str, Tensor]) -> None:
        """Zero reduced gradients where the mask is False.

        By a product, so that what is not finite stays so, and the step is discarded.
        """
        mask_([gradients[name] for name in self._parts], list(self._parts.values()))

    def counted(self, weights: WeightEditor, count: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """A count of elements of each matrix, added up over the job: int64 [N], on the host. A collective.

        Args:
            weights: access to the masters.
            count: of (a matrix's number, this rank's parts of its mask and its master), a 0-d integer.
        """
        counts_N, mine = torch.zeros(len(self.sizes), dtype=torch.int64), {}
        for number, name in enumerate(self.sizes):
            part = self.parts(weights).get(name)
            if part is not None and weights.describe(name, part).owner:
                mine[number] = count(number, part, weights.master(name))
        if mine:
            counts_N[list(mine)] = torch.stack(list(mine.values())).cpu()
        return weights.sum(counts_N).cpu()


def masked(size: int, sparsity: float) -> int:
    """How many of `size` weights are 0."""
    return round(sparsity * size)


def random_mask(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    pattern: SparsityPattern,
    sparsity: float,
    offset: tuple[int, ...],
    box: tuple[int, ...],
) -> Tensor:
    """A box of a random mask that is a function of seed, name, shape, pattern and sparsity alone.

    The rows stand in bands of about 2^20 elements, each drawn by itself; unstructured, band [i, j) of the
    flattened matrix has exactly round(s j) - round(s i) zeros, so that the matrix has round(s R C). Of hashes
    of (seed, name, band, place), the places with the smallest are the zeros: every choice is as likely as
    another. With two_four, the hash of a group of four neighbours in a row says which two are kept.

    Args:
        seed: what to draw from.
        name: global name of the parameter.
        shape: (R, C) of the whole matrix; C is a multiple of 4 for two_four.
        pattern, sparsity: of the mask; the sparsity of two_four is 0.5.
        offset, box: which part of it.

    Returns: bool, of shape `box`; True where the weight is kept.
    """
    rows, columns = shape
    (first, left), (count, width) = offset, box
    height = max(1, _BAND // columns)
    bands = []
    for band in range(first // height, -(-(first + count) // height)):
        begin, end = band * height, min((band + 1) * height, rows)
        key_1 = np.array([stream_key(seed, "sparsity", name, band)], np.uint64)
        if pattern is SparsityPattern.two_four:
            bits = random_bits(key_1, np.arange((end - begin) * columns // 4))
            kept = _PAIRS[(bits >> np.uint64(32)) * np.uint64(len(_PAIRS)) >> np.uint64(32)]
        else:
            zeros = masked(end * columns, sparsity) - masked(begin * columns, sparsity)
            bits = random_bits(key_1, np.arange((end - begin) * columns))
            kept = np.ones(bits.shape, np.bool_)
            if zeros:
                kept[np.argpartition(bits, zeros - 1)[:zeros]] = False
        bands.append(kept.reshape(end - begin, columns))
    start = first % height
    return torch.from_numpy(np.concatenate(bands)[start : start + count, left : left + width])


@dataclass(slots=True)
class Account:
    """What a run has computed, and what it would have with zeros skipped: sums over its steps.

    `dense_flops` are the model FLOPs as executed, `flops` those without the products with masked weights.
    An active parameter is an entry of a maskable matrix that is not masked; `active_tokens` and
    `active_flops` are their number, weighed by the step's tokens and by its `flops`.
    """

    tokens: int = 0
    dense_flops: float = 0.0
    flops: float = 0.0
    active_tokens: float = 0.0
    active_flops: float = 0.0

    @staticmethod
    def dense(progress: Progress, active: int) -> Account:
        """Of a run that had all `active` parameters so far."""
        tokens, flops = progress.tokens, progress.flops
        return Account(tokens, flops, flops, float(active) * tokens, float(active) * flops)

    def add(self, plan: StepPlan, saved: float, active: int) -> None:
        """A step.

        Args:
            plan: the step's.
            saved: training FLOPs of a token in the masked weights (`ModelShape.flops_per_token`).
            active: parameters that were not masked.
        """
        # Where layers left tokens out, they did not meet the masked weights either.
        flops = plan.flops - saved * plan.layer_tokens
        self.tokens += plan.tokens
        self.dense_flops += plan.flops
        self.flops += flops
        self.active_tokens += float(active) * plan.tokens
        self.active_flops += float(active) * flops

    @property
    def numbers(self) -> dict[str, float]:
        """The theoretical numbers for the records: nothing of them was measured."""
        return {"theoretical_flops": self.flops, "theoretical_speedup": self.dense_flops / self.flops}
