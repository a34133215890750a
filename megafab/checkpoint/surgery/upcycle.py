"""From a dense model to a mixture of experts: Komatsuzaki et al. 2023 (arXiv 2212.05055).

Every expert begins as the feed-forward layer in whose place it stands; the router is drawn as a new model's.
Experts that are alike compute the same whichever of them is chosen, so that the function stays where the
weights of the chosen sum to 1: with a softmax over two or more chosen ones, as ours is (`model/plan.py`), not
with a single one, which counts with its probability among all. They become different by the tokens they see.

A shared expert, which the paper does not have, is drawn as a new model's, but for its output: that begins at
zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter of a layer with experts: the dense layer's that it is made of, and how (`depth.Layer`)."""

    source: str | None
    copy: bool = False
    silent: bool = False


def part(name: str) -> Part:
    """Where a parameter of a layer comes from, by its name in the layer, in a parent without experts."""
    if expert := _EXPERT.fullmatch(name):
        return Part(f"mlp.{expert[2]}", copy=expert[1] != "0")
    if name.startswith(("mlp.router.", "mlp.shared_experts.")):
        return Part(None, silent=".shared_experts.linear_fc2." in name)
    return Part(name)
