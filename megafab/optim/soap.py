"""SOAP: Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, arXiv 2409.11321, algorithm 3).

For a matrix w [m, n] with gradient g, statistics L [m, m] and R [n, n] and their eigenvectors QL, QR:

    first update:   L = (1 - b) g g^T,  R = (1 - b) g^T g,  QL, QR their eigenvectors; w stays
    update t >= 1:  m <- beta1 m + (1 - beta1) g
                    v <- beta2 v + (1 - beta2) (QL^T g QR)^2
                    w <- w - lr sqrt(1 - beta2^t) / (1 - beta1^t) QL [QL^T m QR / (sqrt(v) + eps)] QR^T
                    w <- w - lr weight_decay w
                    L <- b L + (1 - b) g g^T,  R <- b R + (1 - b) g^T g
                    every `frequency` updates: Q <- orthonormal factor of L Q, one step of power iteration,
                    columns and v ordered by their eigenvalues first

The momentum m stays in the space of the weights, v in the eigenbasis. A side longer than `max_dim` has no
statistics and the identity for Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megafab.optim.config import OptimConfig
from megafab.optim.matrix import Fusion, MatrixParameter

# Two guards against rounding errors, which SOAP weighs like any other direction and which differ between
# topologies. Both are in shares of the mean eigenvalue and leave the eigenvectors of larger ones alone.
#
# Where eigenvalues coincide (a gradient has no more than min(m, n) of them), the first basis is decided by
# adding shares from 0 to this to the diagonal.
_TIE_BREAK = 1e-6
# The power iteration takes L + this for L, so that it does not turn what is below the resolution of fp32.
_RIDGE = 1e-5

_Factors = Mapping[tuple[str, str], torch.Tensor]
_Basis = tuple[torch.Tensor | None, torch.Tensor | None]  # QL, QR; None: the identity


class SOAP:
    """See the module's docstring, and `optim.matrix.MatrixOptimizer` for the methods.

    Args:
        config: betas, eps and SOAP's own settings.
    """

    def __init__(self, config: OptimConfig) -> None:
        assert config.soap is not None
        assert config.eps is not None
        self._settings, self._eps = config.soap, config.eps
        self._beta1, self._beta2 = config.beta1, config.beta2

    def start(self, weight: torch.Tensor, fusion: Fusion) -> MatrixParameter:
        """m, v and, for each preconditioned side of each matrix, statistics and eigenvectors."""
        moments, factors = {"soap_m": torch.zeros_like(weight)}, {("soap_v", ""): torch.zeros_like(weight)}
        for name, shape in zip(fusion.names, fusion.shapes(weight.shape[1]), strict=True):
            for side, size in zip(("left", "right"), shape, strict=True):
                if size <= self._settings.max_dim:
                    factors[f"soap_{side}", name] = weight.new_zeros(size, size)
                    factors[f"soap_q_{side}", name] = torch.eye(size, out=weight.new_empty(size, size))
        return MatrixParameter(weight, fusion, moments, factors)

    def cost(self, fusion: Fusion, columns: int) -> float:
        """Multiply-adds: four products a side of each update, and the power iteration's share of one."""
        cost = 0.0
        for m, n in fusion.shapes(columns):
            sides = [size for size in (m, n) if size <= self._settings.max_dim]
            cost += sum(4.0 * m * n * size + 4.0 * size**3 / self._settings.frequency for size in sides)
        return cost + fusion.groups * sum(fusion.rows) * columns

    def update(
        self, parameter: MatrixParameter, gradient: torch.Tensor, *, lr: float, decay: float, updates: int
    ) -> None:
        """One update in place; the first only begins the statistics."""
        fusion, weight = parameter.fusion, parameter.weight
        gradients = fusion.split(gradient)
        if updates == 0:
            for name, g in zip(fusion.names, gradients, strict=True):
                self._observe(parameter.factors, name, g)
                _begin_basis(parameter.factors, name, g)
            return
        momentum, second = parameter.moments["soap_m"], parameter.factors["soap_v", ""]
        momentum.lerp_(gradient, 1 - self._beta1)
        directions, seconds = [], []
        for name, g, m, v in zip(
            fusion.names, gradients, fusion.split(momentum), fusion.split(second), strict=True
        ):
            basis = _basis(parameter.factors, name)
            v = v.lerp(_rotate(g, basis).square(), 1 - self._beta2)
            directions.append(_rotate_back(_rotate(m, basis) / (v.sqrt() + self._eps), basis))
            self._observe(parameter.factors, name, g)
            if updates % self._settings.frequency == 0:
                v = self._turn_basis(parameter.factors, name, v)
            seconds.append(v)
        second.copy_(fusion.join(seconds))
        step = lr * math.sqrt(1 - self._beta2**updates) / (1 - self._beta1**updates)
        weight.add_(fusion.join(directions), alpha=-step).mul_(1 - lr * decay)

    def _observe(self, factors: _Factors, name: str, gradient: torch.Tensor) -> None:
        """Add a gradient to the statistics."""
        for side, rows in (("left", gradient), ("right", gradient.T)):
            statistics = factors.get((f"soap_{side}", name))
            if statistics is not None:
                beta = self._settings.shampoo_beta
                statistics.addmm_(rows, rows.T, beta=beta, alpha=1 - beta)

    def _turn_basis(self, factors: _Factors, name: str, second: torch.Tensor) -> torch.Tensor:
        """One step of power iteration from the old eigenvectors; returns v in their new order.

        The order is that in which the QR factorisation removes directions from those behind them.
        """
        for axis, side in enumerate(("left", "right")):
            statistics = factors.get((f"soap_{side}", name))
            if statistics is not None:
                vectors = factors[f"soap_q_{side}", name]
                ridge = _RIDGE * statistics.trace() / len(statistics)
                products = statistics @ vectors + ridge * vectors
                order = (vectors * products).sum(dim=0).argsort(descending=True)
                second = second.index_select(axis, order)
                vectors.copy_(torch.linalg.qr(products[:, order])[0])
        return second


def _begin_basis(factors: _Factors, name: str, gradient: torch.Tensor) -> None:
    """The eigenvectors of the statistics of one gradient, largest eigenvalue first."""
    for side, rows in (("left", gradient), ("right", gradient.T)):
        vectors = factors.get((f"soap_q_{side}", name))
        if vectors is not None:
            statistics = rows.double() @ rows.double().T
            shares = torch.linspace(_TIE_BREAK, 0, len(rows), dtype=torch.float64, device=rows.device)
            statistics.diagonal().add_(shares * statistics.trace() / len(rows))
            vectors.copy_(torch.linalg.eigh(statistics)[1].flip(1))


def _basis(factors: _Factors, name: str) -> _Basis:
    return factors.get(("soap_q_left", name)), factors.get(("soap_q_right", name))


def _rotate(x: torch.Tensor, basis: _Basis) -> torch.Tensor:
    """QL^T x QR."""
    left, right = basis
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def _rotate_back(x: torch.Tensor, basis: _Basis) -> torch.Tensor:
    """QL x QR^T."""
    left, right = basis
    x = x if left is None else left @ x
    return x if right is None else x @ right.T
