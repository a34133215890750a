"""Initial weights as a function of (seed, global parameter name), never of the topology.

Each tensor is drawn on the host in bands of rows, every band from its own generator keyed by seed, name
and band number; a rank draws only the bands its slice touches. Matrices are normal with `init_std`, the
two projections that write into the residual stream with init_std / sqrt(2 x layers) (Radford et al.
2019, section 2.3); norm gains are one; biases are zero. So is the projection by which a layer adds what it
sees of neighbours (`retro.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from megafab.model.config import ModelConfig
from megafab.model.names import is_gate
from megafab.topology.layout import Block, Layout

if TYPE_CHECKING:
    from megafab.model.tags import TaggedParameter

_BAND = 256  # rows


def initialize(parameters: Iterable[TaggedParameter], config: ModelConfig, seed: int) -> None:
    """Fill the parameters in place."""
    with torch.no_grad():
        for tagged in parameters:
            local = torch.empty(tagged.layout.local_shape)
            for block in tagged.layout.blocks:
                where = tuple(slice(o, o + n) for o, n in zip(block.local_offset, block.shape, strict=True))
                local[where] = _block(tagged.name, block, tagged.layout.global_shape, config, seed)
            tagged.parameter.copy_(local)


def values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial values of a whole parameter by its global name; fp32."""
    (block,) = Layout.whole(shape).blocks
    return _block(name, block, shape, config, seed)


def generator(seed: int, name: str, band: int = 0) -> torch.Generator:
    """What the `band`-th part of what `name` stands for is drawn with."""
    digest = hashlib.blake2b(f"{seed}:{name}:{band}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _block(
    name: str, block: Block, global_shape: tuple[int, ...], config: ModelConfig, seed: int
) -> torch.Tensor:
    if len(global_shape) == 1:
        is_norm_gain = "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight")
        return torch.full(block.shape, 1.0 if is_norm_gain else 0.0)
    if is_gate(name):
        return torch.zeros(block.shape)
    std = config.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.layers)
    rows, columns = global_shape
    first, count = block.global_offset[0], block.shape[0]
    bands = []
    for band in range(first // _BAND, -(-(first + count) // _BAND)):
        height = min(_BAND, rows - band * _BAND)
        drawn = torch.empty(height, columns).normal_(0.0, std, generator=generator(seed, name, band))
        bands.append(drawn)
    offset = first - first // _BAND * _BAND
    left = block.global_offset[1]
    return torch.cat(bands)[offset : offset + count, left : left + block.shape[1]]
