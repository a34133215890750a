"""What optimizers of whole matrices work on: parameters of the layers, taken apart into their matrices.

Megatron keeps several matrices in one parameter: the query, key and value projections, the gate and the up
projection. They are different maps with spectra of their own, and are orthogonalised or preconditioned each
by itself, as they are where they stand in parameters of their own.

Shapes: R rows (outputs), C columns (inputs) of a parameter; m x n one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the rows of a parameter are dealt to its matrices: in `groups` equal bands, `rows` of each in turn.

    linear_qkv of G query groups has G bands with the rows of the group's queries, its key and its value.
    `names` tells the matrices apart in checkpoints.
    """

    names: tuple[str, ...]
    groups: int
    rows: tuple[int, ...]  # of each matrix in one band

    @staticmethod
    def none(rows: int) -> Fusion:
        """One matrix that is the whole parameter."""
        return Fusion(("",), 1, (rows,))

    def split(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The matrices of [R, C], each [m, C]: views where there is one group, else copies."""
        columns = parameter.shape[1]
        bands = parameter.view(self.groups, sum(self.rows), columns).split(self.rows, dim=1)
        return [band.reshape(-1, columns) for band in bands]

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The opposite of `split`: [R, C]."""
        columns = matrices[0].shape[1]
        bands = [m.view(self.groups, -1, columns) for m in matrices]
        return torch.cat(bands, dim=1).view(-1, columns)

    def shapes(self, columns: int) -> list[tuple[int, int]]:
        """(m, n) of each matrix."""
        return [(self.groups * rows, columns) for rows in self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class MatrixParameter:
    """A parameter with its state, whole, in fp32, on the rank that updates it.

    `moments` are [R, C], one of each weight, by their name in checkpoints; `factors` are all other state, by
    their name and that of the matrix they belong to (`Fusion.names`; empty: the whole parameter).
    """

    weight: torch.Tensor  # [R, C]
    fusion: Fusion
    moments: Mapping[str, torch.Tensor]
    factors: Mapping[tuple[str, str], torch.Tensor]


class MatrixOptimizer(Protocol):
    """Updates `MatrixParameter`s. It has no other state, so that ranks can share them out as they like."""

    def start(self, weight: torch.Tensor, fusion: Fusion) -> MatrixParameter:
        """`weight` with the state it has before the first update."""
        ...

    def cost(self, fusion: Fusion, columns: int) -> float:
        """Work of one update, in a unit of its own: to give each rank as much as the others."""
        ...

    def update(
        self, parameter: MatrixParameter, gradient: torch.Tensor, *, lr: float, decay: float, updates: int
    ) -> None:
        """One update in place.

        Args:
            parameter: what to update.
            gradient: [R, C], fp32; left as it is.
            lr: learning rate.
            decay: decoupled weight decay.
            updates: how many this parameter has had before.
        """
        ...


_LAYER = re.compile(r"decoder\.layers\.\d+\.")


def is_layer_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is for a matrix optimizer: a layer's matrix, but not the router.

    Embeddings and the head are tables with a row a token, seen or not seen in a batch, and the router's rows
    are as independent; those, norms and biases are AdamW's.
    """
    in_layer = _LAYER.match(name) is not None and not name.endswith("router.weight")
    return in_layer and parameter.dim() == 2
