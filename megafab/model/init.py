"""Initial weights as a function of (seed, global parameter name), never of the topology.

Each tensor is drawn on the host in bands of rows, every band from its own generator keyed by seed, name
and band number; a rank draws only the bands its slice touches. Matrices are normal with `init_std`, the
two projections that write into the residual stream with init_std / sqrt(2 x layers) (Radford et al.
2019, section 2.3); norm gains are one; biases are zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from megafab.model.config import ModelConfig
from megafab.model.tags import TaggedParameter
from megafab.topology.layout import Block

_BAND = 256  # rows


def initialize(parameters: Iterable[TaggedParameter], config: ModelConfig, seed: int) -> None:
    """Fill the parameters in place."""
    with torch.no_grad():
        for tagged in parameters:
            local = torch.empty(tagged.layout.local_shape)
            for block in tagged.layout.blocks:
                where = tuple(slice(o, o + n) for o, n in zip(block.local_offset, block.shape, strict=True))
                local[where] = _values(tagged.name, block, tagged.layout.global_shape, config, seed)
            tagged.parameter.copy_(local)


def _values(
    name: str, block: Block, global_shape: tuple[int, ...], config: ModelConfig, seed: int
) -> torch.Tensor:
    if len(global_shape) == 1:
        is_norm_gain = "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight")
        return torch.full(block.shape, 1.0 if is_norm_gain else 0.0)
    std = config.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.layers)
    rows, columns = global_shape
    first, count = block.global_offset[0], block.shape[0]
    bands = []
    for band in range(first // _BAND, -(-(first + count) // _BAND)):
        generator = torch.Generator().manual_seed(_key(seed, name, band))
        height = min(_BAND, rows - band * _BAND)
        bands.append(torch.empty(height, columns).normal_(0.0, std, generator=generator))
    offset = first - first // _BAND * _BAND
    left = block.global_offset[1]
    return torch.cat(bands)[offset : offset + count, left : left + block.shape[1]]


def _key(seed: int, name: str, band: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}:{band}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
