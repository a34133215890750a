"""What the kernels are checked on: each public function of `megafab.kernels` with inputs that reach all its paths.

Both the tests and `kernels.py` beside this file compare what a case gives with its reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megafab.kernels import ops
from megafab.kernels.cross_entropy import gradient_, nll_and_gradient_, scale_rows_, statistics
from megafab.kernels.norm import add_norm, norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# ||result - exact|| / ||exact||, the exact of the same rounded inputs: a few roundings of each type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """A function of tensors.

    Attributes:
        name: of the case.
        ops: the operators it calls.
        call: from the inputs to a tensor or several; what changes in place counts as a result, copied before.
        make: the inputs; floating point ones of the kind that `Make` was made with. Those that require a gradient
            get one.
        large: many elements; for the slow tests.
        small: few enough for finite differences.
    """

    name: str
    ops: tuple[str, ...]
    call: Callable[..., Tensor | Sequence[Tensor]]
    make: Callable[[Make], Sequence[Tensor | None]]
    large: bool = False
    small: bool = False


@dataclass(frozen=True, slots=True)
class Make:
    """Makes inputs, the same ones for every type but for rounding."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Random values; `dtype` for what is not of the case's type."""
        value = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return value.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Random integers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator).to(self.device, dtype)


def inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor | None]:
    """The inputs of a case."""
    return list(case.make(Make(dtype, torch.device(device), torch.Generator().manual_seed(0))))


def results(case: Case, namespace: str, given: Sequence[Tensor | None]) -> list[Tensor]:
    """What the case gives with the operators of a namespace: its results, then the inputs' gradients."""
    before = {name: ops.chosen(name) for name in case.ops}
    for name in case.ops:
        ops.choose(name, namespace)
    try:
        return list(_results(case, given))
    finally:
        for name, op in before.items():
            ops.choose(name, op.namespace)


def _results(case: Case, given: Sequence[Tensor | None]) -> Iterator[Tensor]:
    own = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in given]
    made = case.call(*own)
    made = [made] if isinstance(made, Tensor) else list(made)
    yield from (x.detach() for x in made)
    learning = [x for x in own if x is not None and x.requires_grad]
    reached = [x for x in made if x.requires_grad]
    if learning and reached:
        # Not the same for every element, and of the layout that a transpose leaves.
        grads = [torch.linspace(-1, 1, x.numel(), device=x.device).to(x.dtype).view_as(x) for x in reached]
        yield from torch.autograd.grad(reached, learning, grads)


def exact(case: Case, given: Sequence[Tensor | None]) -> list[Tensor]:
    """The case in float64, on the CPU, by the reference."""
    wide = [
        None if x is None else x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype)
        for x in given
    ]
    for mine, x in zip(wide, given, strict=True):
        if mine is not None and x is not None:
            mine.requires_grad_(x.requires_grad)
    return results(case, ops.REFERENCE, wide)


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; nan passes for nothing."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.detach().cpu().double() - expected.double()).norm()
    size = expected.double().norm()
    return float(difference / size) if size else float(difference)


def _norms() -> Iterator[Case]:
    # Columns: a few threads a row, several rows a block, not in 16 bytes, longer than any block keeps.
    for rows, columns in ((2, 6), (5, 64), (37, 768), (3, 130), (0, 64), (3, 16384), (3, 40000)):
        for kind in ("rms", "layer"):

            def make(
                make: Make, count: int, rows: int = rows, columns: int = columns, kind: str = kind
            ) -> list[Tensor | None]:
                bias = make.normal(columns) if kind == "layer" else None
                return [make.normal(columns), bias, *(make.normal(rows, columns) for _ in range(count))]

            name, size = f"{kind}_norm-{rows}x{columns}", {"large": columns > 10000, "small": columns == 6}
            yield Case(
                name, ("norm",), lambda w, b, x: norm(x, w, b, 1e-5), lambda m, make=make: make(m, 1), **size
            )
            yield Case(
                f"add_{name}",
                ("add_norm",),
                lambda w, b, x, y: add_norm(x, y, w, b, 1e-5),
                lambda m, make=make: make(m, 2),
                **size,
            )


def _cross_entropies() -> Iterator[Case]:
    # Columns: fewer than a warp takes, not in 16 bytes, rounds and a rest, a whole block, more than it keeps.
    for rows, columns in ((4, 24), (3, 130), (5, 4096), (0, 64), (2, 70002), (3, 131072)):
        size = {"large": columns > 10000, "small": columns == 24}
        shard = columns // 2  # the labels of some rows are on no column here

        def rows_of(make: Make, rows: int = rows, columns: int = columns) -> tuple[Tensor, Tensor]:
            return make.normal(rows, columns, grad=False), make.integers(columns, rows)

        def weights(make: Make, rows: int = rows) -> Tensor:
            # The first row is asked for nothing.
            return make.normal(rows, grad=False, dtype=torch.float32) * (torch.arange(rows) > 0).to(
                make.device
            )

        def expected(make: Make) -> Tensor:
            return make.normal(1, grad=False, dtype=torch.float32).abs() + 0.5

        yield Case(
            f"cross_entropy-{rows}x{columns}",
            ("cross_entropy",),
            lambda x, labels, shard=shard: statistics(x, labels, shard),
            lambda m, rows_of=rows_of: rows_of(m),
            **size,
        )
        for given in ("nll", "nll log_z mean"):

            def change(
                x: Tensor, labels: Tensor, *of: Tensor, given: str = given, shard: int = shard
            ) -> Tensor:
                grads = {name: of[0] if name in given else None for name in ("nll", "log_z", "mean")}
                peak, total = of[1:]
                gradient_(x, labels, shard, peak, total, **grads, vocabulary=x.shape[1])
                return x

            def prepared(make: Make, rows_of: Any = rows_of, weights: Any = weights) -> list[Tensor]:
                x, labels = rows_of(make)
                peak = x.float().amax(1)
                return [x, labels, weights(make), peak, (x.float() - peak[:, None]).exp().sum(1)]

            name = f"cross_entropy_gradient-{given.replace(' ', '-')}-{rows}x{columns}"
            yield Case(name, ("cross_entropy_gradient_",), change, prepared, **size)

        yield Case(
            f"nll_and_gradient-{rows}x{columns}",
            ("nll_and_gradient_",),
            lambda x, labels, expected: (nll_and_gradient_(x, labels, expected), x),
            lambda m, rows_of=rows_of, expected=expected: (*rows_of(m), expected(m)),
            **size,
        )

        def rescale(x: Tensor, expected: Tensor, found: Tensor) -> Tensor:
            scale_rows_(x, expected, torch.where(torch.arange(len(x), device=x.device) == 1, expected, found))
            return x

        yield Case(
            f"scale_rows-{rows}x{columns}",
            ("scale_rows_",),
            rescale,
            lambda m, rows_of=rows_of, expected=expected, weights=weights: (
                rows_of(m)[0],
                expected(m),
                weights(m),
            ),
            **size,
        )

    # Exponentials far out of fp32's range.
    yield Case(
        "nll_and_gradient-huge",
        ("nll_and_gradient_",),
        lambda x, labels, expected: (nll_and_gradient_(x, labels, expected), x),
        lambda m: (
            m.normal(3, 130, grad=False).mul_(3000),
            m.integers(130, 3),
            m.normal(1, grad=False, dtype=torch.float32),
        ),
    )


CASES: tuple[Case, ...] = (*_norms(), *_cross_entropies())
