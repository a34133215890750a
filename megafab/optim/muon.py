"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    m <- mu m + (1 - mu) g
    u = (1 - mu) g + mu m                              Nesterov; without it u = m
    X = NewtonSchulz(u)                                about U V^T, where u = U S V^T
    w <- (1 - lr weight_decay) w - lr scale X

Scales: `moonlight` 0.2 sqrt(max(m, n)) (Liu et al. 2025, "Muon is Scalable for LLM Training",
arXiv 2502.16982, eq. 4), which makes the update's RMS that of AdamW's, about 0.2, whatever the shape, so that
AdamW's learning rate and decay carry over; `keller` sqrt(max(1, m / n)), Jordan's.
"""

from __future__ import annotations

import math

import torch

from megafab.optim.config import MuonConfig, MuonScale
from megafab.optim.matrix import Fusion, MatrixParameter

# Of the quintic that lifts small singular values fastest and leaves all of them about 1 (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The Newton-Schulz iteration: singular values near 1, between 0.5 and 1.3 or so after 5 steps.

    Args:
        matrix: [m, n], of any scale; 0 stays 0.
        steps: iterations of the quintic a X + (b A + c A^2) X, where A = X X^T.
        dtype: to compute in. It forgives bfloat16.

    Returns:
        [m, n] in `dtype`.
    """
    a, b, c = _COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon:
    """See the module's docstring, and `optim.matrix.MatrixOptimizer` for the methods.

    Args:
        config: its settings.
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(self, config: MuonConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype

    def start(self, weight: torch.Tensor, fusion: Fusion) -> MatrixParameter:
        """One moment: the momentum."""
        return MatrixParameter(weight, fusion, {"muon_m": torch.zeros_like(weight)}, {})

    def cost(self, fusion: Fusion, columns: int) -> float:
        """Multiply-adds of one iteration: 2 s^2 l + s^3 for the shorter side s and the longer l."""
        sides = ((min(shape), max(shape)) for shape in fusion.shapes(columns))
        return float(sum(2 * short**2 * long + short**3 for short, long in sides))

    def update(
        self, parameter: MatrixParameter, gradient: torch.Tensor, *, lr: float, decay: float, updates: int
    ) -> None:
        """One update in place."""
        config, momentum = self._config, parameter.moments["muon_m"]
        momentum.lerp_(gradient, 1 - config.momentum)
        direction = gradient.lerp(momentum, config.momentum) if config.nesterov else momentum
        matrices = parameter.fusion.split(direction)
        steps = [
            orthogonalize(matrix, config.ns_steps, self._dtype).float() * self._scale(*matrix.shape)
            for matrix in matrices
        ]
        parameter.weight.mul_(1 - lr * decay).add_(parameter.fusion.join(steps), alpha=-lr)

    def _scale(self, rows: int, columns: int) -> float:
        if self._config.scale is MuonScale.moonlight:
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))
