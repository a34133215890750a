"""The table of operators: for each a schema, a reference, a fake and a gradient; CUDA comes from `csrc`.

An operator is defined in two namespaces of `torch.ops`:

- `megafab`: on a GPU the kernel, once its library is loaded (`dispatch.py`); on a CPU the reference.
- `megafab_reference`: the reference on every device, which is also what kernels are checked against.

`chosen(name)` is what layers call, made of one of the two by `direct`. Gradients call backward operators of
their own namespace, so that a comparison compares both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KERNELS, REFERENCE = "megafab", "megafab_reference"


@dataclass(frozen=True, slots=True)
class Op:
    """An operator; `register` puts it into a namespace.

    Attributes:
        name: of the operator.
        schema: its arguments and results, as torch writes them.
        reference: computes it with torch's own operators, on any device.
        fake: the results' shapes and types without the work.
        keep: `(ctx, inputs, output)`, what backward needs; None: it has no gradient.
        backward: `(ops, ctx, *grads)`, the gradient of each argument, by the operators `ops` of a namespace;
            of a result that nobody used the gradient may be None.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    keep: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None


OPS: dict[str, Op] = {}
_LIBRARIES: list[torch.library.Library] = []  # operators live as long as these do
_CHOSEN: dict[str, Any] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Add an operator to the table and to both namespaces; its reference is chosen, until `choose`."""
    name = schema.partition("(")[0]
    OPS[name] = op = Op(name, schema, reference, fake, keep, backward)
    register(op, KERNELS, "CPU")
    register(op, REFERENCE, "CompositeExplicitAutograd")
    choose(name, REFERENCE)


def register(op: Op, namespace: str, key: str | None) -> None:
    """Define `op` in a namespace of `torch.ops`.

    Args:
        op: what to define.
        namespace: where.
        key: the dispatch key that the reference answers for; None: a library will bring its own.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(op.schema)
    if key is not None:
        library.impl(op.name, op.reference, key)
    name = f"{namespace}::{op.name}"
    torch.library.register_fake(name, op.fake, lib=library)
    if op.backward is not None:
        ops, backward = getattr(torch.ops, namespace), op.backward
        torch.library.register_autograd(
            name, lambda ctx, *grads: backward(ops, ctx, *grads), setup_context=op.keep, lib=library
        )


def choose(name: str, namespace: str) -> None:
    """Have layers call the operator of a namespace."""
    replace(name, direct(name, namespace))


@functools.cache
def direct(name: str, namespace: str) -> Callable[..., Any]:
    """The operator with its gradient, without the general wrapping that `register` asks of torch.

    That wrapping, and a trip through torch's dispatcher to a reference in Python, cost several times what a
    small operator does.
    """
    op, ops = OPS[name], _Namespace(namespace)
    call = getattr(ops, name)
    if op.backward is None:
        return call
    keep, backward = op.keep, op.backward
    assert keep is not None

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = call(*inputs)
            keep(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.count = len(inputs)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * ctx.count
            return backward(ops, ctx, *grads)

    return Direct.apply


class _Namespace:
    """What computes the operators of a namespace, as attributes, whenever they are defined."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self._name == REFERENCE:
            return OPS[name].reference
        return getattr(getattr(torch.ops, self._name), name).default


def replace(name: str, function: Callable[..., Any]) -> None:
    """Have layers call a function in place of an operator; of its results the first ones do."""
    _CHOSEN[name] = function


def chosen(name: str) -> Any:
    """The operator that layers are to call."""
    return _CHOSEN[name]


def dense(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors, copied where they do not lie dense in memory."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def wide_type(tensor: torch.Tensor) -> torch.dtype:
    """In what a reference computes: float32, or float64 where that is what it was given."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in `wide_type`."""
    return tensor.to(wide_type(tensor))
