"""Where every tensor of a grown model comes from.

A tensor of the parent, made wider (`width.py`), in a layer that is a layer of the parent (`depth.py`), as a
part of it (`upcycle.py`); or a draw, as a new model would begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megafab.checkpoint.config import GrowConfig
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.checkpoint.store import TECHNIQUES, WEIGHT
from megafab.checkpoint.surgery import depth as depth_operators
from megafab.checkpoint.surgery import upcycle
from megafab.checkpoint.surgery.axes import Use, role_of
from megafab.checkpoint.surgery.width import Widening
from megafab.config import growth
from megafab.errors import UserError
from megafab.model import init
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a weight comes from.

    `source` is the parent's weight, None: it is drawn as a new model's. `copy`: another weight before it has
    the same source. `silent`: it is zero, so that nothing reaches the residual stream through it.
    """

    source: str | None
    copy: bool = False
    silent: bool = False


class Origins:
    """The weights of a grown model.

    Args:
        parent, grown: the sizes.
        config: the operators.
        ids: of the parent's tokenizer.
    """

    def __init__(self, parent: ModelShape, grown: ModelShape, config: GrowConfig, *, ids: int) -> None:
        self.parent, self.grown = parent, grown
        self.depth, self.width = growth.depth_of(config), growth.width_of(config)
        self.seed = growth.SEED if config.seed is None else config.seed
        self.shapes = parameter_shapes(grown)
        self._noise, self._upcycles = config.noise, config.experts is not None
        self._layers = depth_operators.layers(parent, grown.config.layers, self.depth)
        split = growth.SPLIT if config.split is None else config.split
        known = ids if config.vocab is not None else None
        self._widening = Widening(parent, grown, self.width, split=split, ids=known)

    def of(self, name: str) -> Origin:
        """The origin of a weight of the grown model, by its global name."""
        if not name.startswith(_LAYERS):
            return Origin(name)
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        layer = self._layers[int(number)]
        part = upcycle.part(rest) if self._upcycles else upcycle.Part(rest)
        known = layer.source is not None and part.source is not None
        return Origin(
            f"{_LAYERS}{layer.source}.{part.source}" if known else None,
            copy=layer.copy or part.copy,
            silent=part.silent or (layer.silent and role_of(name).use is Use.writer),
        )

    def weight(self, name: str, reader: Reader) -> torch.Tensor:
        """The weight of the grown model, out of what `reader` has of the parent's."""
        origin = self.of(name)
        if origin.silent:
            return torch.zeros(self.shapes[name])
        if origin.source is None:
            return self.drawn(name)
        tensor = self.widened(name, reader.read(WEIGHT + origin.source))
        if self._noise is None or tensor.dim() == 1:
            return tensor
        copied = torch.ones(1, 1) if origin.copy else self._widening.copies(name).float()
        if not copied.any():
            return tensor
        generator = init.generator(self.seed, f"noise/{name}")
        return tensor + torch.randn(tensor.shape, generator=generator) * copied * (self._noise * tensor.std())

    def widened(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A weight of the parent in the grown model's width; `name` is its place there."""
        return self._widening.weight(name, tensor, lambda: self.drawn(name))

    def drawn(self, name: str) -> torch.Tensor:
        """What a new model of the grown sizes would begin with."""
        return init.values(name, self.shapes[name], self.grown.config, self.seed)

    def states(self, reader: Reader) -> dict[str, State]:
        """What an optimizer keeps of the grown model's weights, by full name.

        Raises:
            UserError: the parent has nothing of the kind, or something that cannot grow.
        """
        by_weight: dict[str, list[State]] = {}
        for full, info in reader.tensors.items():
            kind, _, rest = full.partition("/")
            if not full.startswith((WEIGHT, TECHNIQUES)):
                whole = rest in reader.weights and info.shape == reader.weights[rest].shape
                weight = rest if rest in reader.weights else rest.rpartition("/")[0]
                suffix = rest.removeprefix(weight)
                by_weight.setdefault(weight, []).append(State(kind, weight, suffix, full, info, whole))
        if not by_weight:
            fix = "optimizer=reset"
            raise UserError("optimizer=copy", f"weights only in {reader.path}", "a run's checkpoint", fix)
        return {state.full: state for name in self.shapes for state in self._states_of(name, by_weight)}

    def _states_of(self, name: str, by_weight: Mapping[str, list[State]]) -> Iterator[State]:
        origin = self.of(name)
        assert origin.source is not None  # operators that draw whole weights have no moments (config.growth)
        for state in by_weight.get(origin.source, ()):
            if not state.moment and (self.width is not None or origin.silent):
                raise UserError(
                    "optimizer=copy",
                    f"{state.kind} of {state.weight}, of another shape than the weight",
                    "moments, which grow as the weight does",
                    "optimizer=reset, or depth=stack or interleave alone",
                )
            info = TensorInfo(self.shapes[name], state.info.dtype, 1) if state.moment else state.info
            yield State(state.kind, name, state.suffix, state.source, info, state.moment)

    def state(self, state: State, reader: Reader) -> torch.Tensor:
        """One of `states`, out of what `reader` has of the parent's."""
        if self.of(state.weight).silent:
            return torch.zeros(state.info.shape, dtype=state.info.dtype)
        tensor = reader.read(state.source)
        second = state.kind.endswith("_v")
        return self._widening.moment(state.weight, tensor, second=second) if state.moment else tensor


@dataclass(frozen=True, slots=True)
class State:
    """A tensor that an optimizer keeps of a weight.

    `kind` is the optimizer's name for it, `suffix` tells those of one weight apart, `source` is the parent's
    tensor. A `moment` has the weight's shape; anything else belongs to a matrix of it (`optim/matrix.py`).
    """

    kind: str
    weight: str
    suffix: str
    source: str
    info: TensorInfo
    moment: bool

    @property
    def full(self) -> str:
        """Its name in checkpoints."""
        return f"{self.kind}/{self.weight}{self.suffix}"


_LAYERS = "decoder.layers."
