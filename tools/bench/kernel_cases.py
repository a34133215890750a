"""What the kernels are checked on: the functions of `megafab.kernels` with inputs that reach all their paths.

Both the tests and `kernels.py` beside this file compare what a case gives with its reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import megafab.kernels.dropout  # noqa: F401 (defines an operator)
from megafab.kernels import ops
from megafab.kernels.activation import GATED, activate
from megafab.kernels.cross_entropy import gradient_, nll_and_gradient_, scale_rows_, statistics
from megafab.kernels.multi_tensor import adamw_, mask_, sum_of_squares
from megafab.kernels.norm import add_norm, norm
from megafab.kernels.rope import rope_table, rotate, rotate_both_
from megafab.kernels.rows import gather_rows, put_rows
from megafab.kernels.softmax import masked_softmax

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
        make: the inputs; floating point ones of the type that `Make` was made with. Those that require a
            gradient get one.
        large: many elements; for the slow tests.
        small: few enough for finite differences.
        slack: how many times `TOLERANCE` it may be off, where what is kept for backward is rounded.
    """

    name: str
    ops: tuple[str, ...]
    call: Callable[..., Tensor | Sequence[Tensor]]
    make: Callable[[Make], Sequence[Tensor | None]]
    large: bool = False
    small: bool = False
    slack: float = 1.0

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far off it may be."""
        return TOLERANCE[dtype] * self.slack


@dataclass(frozen=True, slots=True)
class Make:
    """Makes inputs, the same ones for every type but for rounding."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Random values; `dtype` for what is not of the case's type."""
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return value.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def permuted(self, high: int, *shape: int) -> Tensor:
        """Different integers from 0 to high - 1."""
        count = torch.Size(shape).numel()
        return torch.randperm(high, generator=self.generator)[:count].view(shape).to(self.device)

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
            ops.replace(name, op)


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
        found = torch.autograd.grad(reached, learning, grads, allow_unused=True)
        yield from (grad for grad in found if grad is not None)


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


def _activations() -> Iterator[Case]:
    for kind in ("gelu", "relu", "squared_relu", "swiglu", "geglu"):
        for rows, width, bias in ((2, 3, True), (7, 64, False), (3, 520, True), (5, 33, True), (0, 8, False)):

            def make(
                make: Make, kind: str = kind, rows: int = rows, width: int = width, bias: bool = bias
            ) -> list[Tensor | None]:
                width *= 2 if kind in GATED else 1
                return [make.normal(rows, width), make.normal(width) if bias else None]

            name = f"{kind}-{rows}x{width}{'-bias' if bias else ''}"
            call = lambda x, bias, kind=kind: activate(x, bias, kind)  # noqa: E731
            yield Case(name, ("activation",), call, make, small=width == 3)


def _dropouts() -> Iterator[Case]:
    for rows, columns, p, bias in (
        (2, 3, 0.3, True),
        (6, 128, 0.1, False),
        (5, 100, 0.5, True),
        (3, 16, 0.0, True),
    ):

        def make(
            make: Make, rows: int = rows, columns: int = columns, bias: bool = bias
        ) -> list[Tensor | None]:
            weights = [make.normal(columns) if bias else None, make.integers(2**40)]
            return [make.normal(rows, columns), make.normal(rows, columns), *weights]

        def call(x: Tensor, residual: Tensor, bias: Tensor | None, seed: Tensor, p: float = p) -> Tensor:
            return ops.chosen("dropout")(x, bias, residual, p, seed if p else None)

        yield Case(f"dropout-{rows}x{columns}-{p}", ("dropout",), call, make, small=columns == 3)


def _ropes() -> Iterator[Case]:
    def both(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return ops.chosen("rope")(q, k, rope_table(position, q.shape[-1], 100.0, q.dtype), False)

    def alone(q: Tensor, k: Tensor, position: Tensor) -> Tensor:
        return rotate(q, rope_table(position[:1], q.shape[-1], 100.0, q.dtype))

    def in_place(mixed: Tensor, _: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """Query and key as parts of one tensor, beside values that stay."""
        q, k, v = (mixed * 2).chunk(3, dim=-1)
        q, k = rotate_both_(q, k, rope_table(position, q.shape[-1], 100.0, q.dtype))
        return q, k, v

    for length, batch, heads, groups, dim in (
        (2, 1, 1, 1, 4),
        (5, 2, 4, 2, 64),
        (3, 2, 3, 1, 20),
        (3, 1, 2, 2, 128),
    ):

        def make(
            make: Make,
            sizes: tuple[int, int] = (length, batch),
            heads: int = heads,
            groups: int = groups,
            dim: int = dim,
        ) -> list[Tensor | None]:
            q, k = (make.normal(*sizes, count, dim) for count in (heads, groups))
            return [q, k, make.integers(50, sizes[1], sizes[0])]

        name, small = f"{length}x{batch}x{heads}x{dim}", dim == 4
        yield Case(f"rope-{name}", ("rope",), both, make, small=small)
        yield Case(f"rope-alone-{name}", ("rope",), alone, make, small=small)
        tripled = lambda m, make=make, dim=dim: make(m, dim=3 * dim)  # noqa: E731
        yield Case(f"rope-in-place-{name}", ("rope_", "rope"), in_place, tripled)


def _softmaxes() -> Iterator[Case]:
    for sizes, mask, causal in (
        ((1, 2, 2, 3), (1, 1, 2, 3), False),
        ((2, 2, 3, 40), (2, 1, 3, 40), True),
        ((1, 3, 5, 37), None, True),
        ((2, 1, 2, 700), (2, 1, 1, 700), False),
        ((1, 1, 2, 20000), None, False),
    ):

        def make(make: Make, sizes=sizes, mask=mask) -> list[Tensor | None]:
            allowed = None if mask is None else make.integers(2, *mask).bool()
            return [make.normal(*sizes), allowed]

        def call(scores: Tensor, mask: Tensor | None, causal: bool = causal) -> Tensor:
            return masked_softmax(scores, mask, 0.7, causal=causal)

        name = f"masked_softmax-{'x'.join(map(str, sizes))}{'-causal' if causal else ''}"
        yield Case(name, ("masked_softmax",), call, make, small=sizes[-1] == 3, slack=8)


# Lengths of the tensors of a list: odd ones, none, and more than a block takes at a time.
LISTS = {
    "none": (0, 0),
    "few": (3, 5),
    "many": (1, 130, 0, 7, 64, 33, 256, 0),
    "long": (20_003, 12, 16_384, 5),
}


def _cut(flat: Tensor, sizes: Sequence[int], apart: bool) -> list[Tensor]:
    """Tensors of these sizes: views at odd offsets, or each at an address that 16 bytes divide."""
    parts = flat.detach()[1:].split(sizes)
    return [part.clone() for part in parts] if apart else list(parts)


def _adamw_case(name: str, sizes: Sequence[int], apart: bool, copies: bool, scaled: bool) -> Case:
    size = sum(sizes) + 1

    def make(make: Make) -> list[Tensor | None]:
        fp32 = {"grad": False, "dtype": torch.float32}
        second = make.normal(size, **fp32).square()
        scale = make.normal(**fp32).abs() if scaled else None
        given = [make.normal(size, **fp32), make.normal(size, grad=False), make.normal(size, **fp32), second]
        return [*given, make.normal(size, grad=False) if copies else None, scale]

    def call(*inputs: Tensor | None) -> list[Tensor]:
        *given, scale = inputs
        lists = [[] if x is None else _cut(x, sizes, apart) for x in given]
        adamw_(*lists, scale=scale, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, step=3)
        return [torch.cat(lists[i]) for i in (0, 2, 3, 4) if lists[i]]  # all but the gradients

    return Case(name, ("adamw_",), call, make, small=size < 10)


def _multi_tensor() -> Iterator[Case]:
    for name, sizes in LISTS.items():
        for apart in (True, False):
            where = f"{name}-{'apart' if apart else 'views'}"
            # Views of one tensor are no list that torch's own checks take.
            small = {"small": name == "few" and apart}
            size = sum(sizes) + 1
            for copies, scaled in ((True, True), (False, False)):
                more = ("-copies" if copies else "") + ("-scaled" if scaled else "")
                case = _adamw_case(f"adamw-{where}{more}", sizes, apart, copies, scaled)
                yield replace(case, **small)

            def squares(x: Tensor, sizes: Sequence[int] = sizes, apart: bool = apart) -> Tensor:
                return sum_of_squares(_cut(x, sizes, apart))

            def masked(
                x: Tensor, mask: Tensor, sizes: Sequence[int] = sizes, apart: bool = apart
            ) -> list[Tensor]:
                values = _cut(x, sizes, apart)
                mask_(values, _cut(mask, sizes, apart))
                return [torch.cat(values).nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)]

            def values(make: Make, size: int = size) -> list[Tensor | None]:
                values = make.normal(size, grad=False, dtype=torch.float32)
                for place, odd in enumerate((float("nan"), float("inf"), -float("inf"))):
                    values[place + 1 :: 5] = odd
                return [values, make.integers(2, size, dtype=torch.bool)]

            yield Case(
                f"sum_of_squares-{where}",
                ("sum_of_squares",),
                squares,
                lambda m, size=size: [m.normal(size, grad=False)],
                **small,
            )
            yield Case(f"mask-{where}", ("mask_",), masked, values, **small)
    for odd in (float("nan"), float("inf"), -float("inf")):

        def not_finite(make: Make, odd: float = odd) -> list[Tensor | None]:
            x = make.normal(77, grad=False)
            x[50] = odd
            return [x]

        yield Case(
            f"sum_of_squares-{odd}",
            ("sum_of_squares",),
            lambda x: sum_of_squares([x[:40], x[40:]]).isfinite(),
            not_finite,
        )


def _rows() -> Iterator[Case]:
    # Hidden sizes: in 16 bytes, in 4 or 2, and more than a block has threads for; some, all or no rows.
    for shape, kept in (
        ((5, 2, 4), (3, 2)),
        ((6, 3, 256), (4, 3)),
        ((7, 2, 33), (7, 2)),
        ((40, 6), (0,)),
        ((9, 4104), (4,)),
    ):

        def make(
            make: Make, new: bool, shape: tuple[int, ...] = shape, kept: tuple[int, ...] = kept
        ) -> list[Tensor | None]:
            rows = make.permuted(torch.Size(shape[:-1]).numel(), *kept)
            made = [make.normal(*kept, shape[-1])] if new else []
            return [make.normal(*shape), *made, rows]

        size = "x".join(map(str, shape))
        small = {"small": shape[-1] == 4}
        yield Case(
            f"gather_rows-{size}", ("gather_rows",), gather_rows, lambda m, make=make: make(m, False), **small
        )
        yield Case(f"put_rows-{size}", ("put_rows",), put_rows, lambda m, make=make: make(m, True), **small)


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


CASES: tuple[Case, ...] = (
    *_norms(),
    *_activations(),
    *_dropouts(),
    *_ropes(),
    *_softmaxes(),
    *_multi_tensor(),
    *_rows(),
    *_cross_entropies(),
)
