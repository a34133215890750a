"""How a rank's part of a tensor lies in the whole (logical) tensor: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A box of the local tensor and where it lies in the global one."""

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The boxes that make up a rank's local tensor; together they cover it."""

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Layout:
        """A tensor that the rank holds completely."""
        zero = (0,) * len(shape)
        return Layout(shape, shape, (Block(zero, zero, shape),))

    @staticmethod
    def split(local_shape: tuple[int, ...], dim: int, parts: int, part: int, stride: int = 1) -> Layout:
        """The `part`-th of `parts` equal slices along `dim`.

        With `stride` s the global tensor is s equal bands stacked along `dim`, each sliced on its own:
        the gate and up halves of a gated feed-forward layer (s = 2).
        """
        band = local_shape[dim] // stride
        global_shape = tuple(n * parts if d == dim else n for d, n in enumerate(local_shape))

        def at(offset: int) -> tuple[int, ...]:
            return tuple(offset if d == dim else 0 for d in range(len(local_shape)))

        shape = tuple(band if d == dim else n for d, n in enumerate(local_shape))
        blocks = tuple(Block(at(s * band), at(s * band * parts + part * band), shape) for s in range(stride))
        return Layout(global_shape, local_shape, blocks)
