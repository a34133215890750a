"""Where the layers of a deeper model come from: Du et al. 2024 (arXiv 2405.15319).

Layers of a mixture of experts that has experts in every n-th layer only are taken n at a time, so that each
stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from megafab.checkpoint.config import Depth
from megafab.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the deeper model: the old one it is made of, and how.

    `source` None: it is drawn as a new model's. `copy`: the old layer stands elsewhere too. `silent`: it adds
    nothing to the residual stream, so that it is an identity.
    """

    source: int | None
    copy: bool = False
    silent: bool = False


def layers(parent: ModelShape, count: int, depth: Depth | None) -> list[Layer]:
    """The layers of a model of `count`, from the first.

    `stack` puts layer k mod l of the old l at k. The others spread the old layers evenly: `interleave`
    repeats each of them on the spot; `zero` silences the repetitions, as LLaMA Pro does (Wu et al. 2024,
    arXiv 2401.02415); `random` draws new layers in their places.

    Args:
        parent: the sizes of the old model.
        count: layers to come.
        depth: the operator that is not learned; None: the layers stay as they are.
    """
    old, unit = parent.config.layers, max(1, parent.config.moe.every if parent.config.moe.experts else 1)
    if depth is None:
        return [Layer(layer) for layer in range(old)]
    if depth is Depth.stack:
        return [Layer(layer % old, copy=layer >= old) for layer in range(count)]
    found, seen = list[Layer](), set[int]()
    for layer in range(count):
        source = layer // unit * (old // unit) // (count // unit) * unit + layer % unit
        copy = source in seen
        seen.add(source)
        drawn = copy and depth is Depth.random
        found.append(Layer(None if drawn else source, copy and not drawn, copy and depth is Depth.zero))
    return found
