"""Which kernels the layers call in this process: decided once, said in one line.

On a CPU always the reference. On a GPU `auto` takes the CUDA kernels where they can be built, else the
reference with a line that says what to install; `cuda` and `apex` are errors where they cannot be had.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megafab.errors import UserError

# What defines the operators.
from megafab.kernels import (  # noqa: F401
    activation,
    build,
    cross_entropy,
    dropout,
    multi_tensor,
    norm,
    ops,
    rope,
    rows,
    softmax,
)
from megafab.kernels.config import Kernels
from megafab.platform import platform


def set_up(kernels: Kernels, message: Callable[[str], None] = lambda text: None) -> str:
    """Have the layers call the kernels that the configuration asks for.

    Args:
        kernels: the choice.
        message: told one line where this takes long.

    Returns:
        What was chosen, operator by operator.

    Raises:
        UserError: the choice cannot be had here.
    """
    chosen = dict.fromkeys(ops.OPS, "reference")
    why = ""
    if platform.is_cuda and kernels is not Kernels.reference:
        lacking = build.missing()
        if lacking is not None and kernels is Kernels.cuda:
            raise build.unavailable("kernels=cuda", lacking)
        if lacking is not None:
            why = f"; for CUDA kernels install {lacking}"
        else:
            try:
                _load(message)
                chosen = dict.fromkeys(ops.OPS, "cuda")
            except UserError as error:
                if kernels is Kernels.cuda:
                    raise
                why = f"; {error}"
    elif kernels in (Kernels.cuda, Kernels.apex):
        raise build.unavailable(f"kernels={kernels.value}", "a GPU that torch can use")
    functions = _apex() if kernels is Kernels.apex else {}
    for name, kind in chosen.items():
        ops.choose(name, ops.REFERENCE if kind == "reference" else ops.KERNELS)
    for name, function in functions.items():
        ops.replace(name, function)
        chosen[name] = "apex"
    return _describe(chosen) + why


def _load(message: Callable[[str], None]) -> None:
    library = build.library([build.target_of_device()], message)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        found = f"a library that does not load: {str(error).splitlines()[0]}"
        expected = "one that this torch can use"
        raise UserError(str(library), found, expected, "delete it, or set kernels=reference") from error


def _apex() -> Mapping[str, Callable[..., Any]]:
    """What apex has: its norms, with gradients of their own."""
    if importlib.util.find_spec("apex") is None:
        raise build.unavailable("kernels=apex", "apex, from github.com/NVIDIA/apex")
    from apex.normalization import fused_layer_norm as apex  # pyright: ignore[reportMissingImports]

    def alone(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor]:
        if bias is None:
            return (apex.fused_rms_norm_affine(x, weight, weight.shape, eps),)
        return (apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps),)

    def summed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
        total = x + residual
        return *alone(total, weight, bias, eps), total

    return {"norm": alone, "add_norm": summed}


def _describe(chosen: Mapping[str, str]) -> str:
    """`cuda: norm, rope; apex: ...`, the forward operators by what computes them."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in chosen.items():
        if not name.endswith("_backward"):
            by_kind.setdefault(kind, []).append(name)
    if len(by_kind) == 1:
        return next(iter(by_kind))
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_kind.items())
