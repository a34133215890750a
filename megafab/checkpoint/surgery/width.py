"""A tensor of a wider model from that of the parent, by one of three operators on the units of its axes.

Du et al. 2024 (arXiv 2405.15319), with what makes `direct` and `zero` keep the function exactly. R rows are
outputs, C columns inputs; d channels of the residual stream become D.

`direct` (Net2Net, Chen et al. 2016, arXiv 1511.05641). New units are copies. What leads to a unit is
copied, what leads away from it is shared between the copies: W'[i, j] = W[s(i), s(j)] share(j). Tied
embeddings are read as rows and as columns; there the final norm, which nothing but the output reads, gets
the shares. Norms see the same statistics only if every channel is copied equally often: if D is a multiple
of d.

`zero`. New channels carry nothing that a norm would let through, and new neurons and heads, drawn as a new
model's, are read with weights of zero:

    reader W' = [[W, draw], [draw, draw]]      writer W' = [[W, 0], [0, 0]]      table E' = [E, 0]

The paper has zeros in the lower left of every matrix. For readers that would be a saddle: a gated neuron
whose gate and value are both zero has no gradient, nor has a head whose query and key are; and a ReLU at
exactly zero has none. With the zeros behind the unit, its outgoing weights learn at once and it after them.

RMSNorm then divides by a mean square that is d/D of what it was: its gain times sqrt(d/D) and its epsilon
times d/D make up for that exactly. LayerNorm also subtracts the mean, which zeros would change: there each
new channel carries the mean of the old ones (Wang et al. 2024, arXiv 2310.07999: average expansion), which
stays so along the stream, since all that is added to it is linear in the writers' rows; the norm takes it
off, and the variance is d/D of what it was. A norm of queries and keys has not grown but has the same new
epsilon: queries and keys times sqrt(d/D), which it divides out again.

`random`. New entries are drawn as a new model's.

New rows of the vocabulary are the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"): their logits then are a mean of logits, and none of them a likely token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from megafab.checkpoint.config import Width
from megafab.checkpoint.surgery.axes import Axis, Role, Use, role_of
from megafab.checkpoint.surgery.maps import Map, maps, split_qkv
from megafab.model.config import Norm
from megafab.model.shape import ModelShape


class Widening:
    """Makes the tensors of a wider model, one at a time.

    Args:
        parent: the sizes of the old model.
        grown: those of the new one; its layers and experts do not matter.
        width: the operator; None or `learned`: only the vocabulary grows here, if that.
        split: share of the first copy, under `direct`.
        ids: of the tokenizer of the old model, after which its rows are padding; None: the vocabulary stays.
    """

    def __init__(
        self, parent: ModelShape, grown: ModelShape, width: Width | None, *, split: float, ids: int | None
    ) -> None:
        self._width, self._ids = width, ids
        by_units = width in (Width.direct, Width.zero, Width.random)
        self._maps = maps(parent, grown, split=split if width is Width.direct else None) if by_units else {}
        self._tied = parent.config.tied_embeddings
        self._averages = width is Width.zero and parent.config.norm is Norm.layernorm
        thinned = width is Width.zero and Axis.hidden in self._maps
        self._thinning = math.sqrt(parent.config.hidden / grown.config.hidden) if thinned else 1.0
        self._grown = grown

    def weight(self, name: str, tensor: torch.Tensor, drawn: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The wider tensor.

        Args:
            name: of the parameter in the new model.
            tensor: its parent's, fp32.
            drawn: gives what a new model would begin with, in the new shape.
        """
        role = role_of(name)
        tensor = self._with_rows(role, tensor, mean=True)
        along = self._along(role)
        if not any(along):
            wider = tensor
        elif self._width is Width.direct:
            wider = self._copied(name, role, tensor, along)
        elif self._width is Width.zero and role.given_out is not None:
            wider = _placed(tensor, along)
            stream = along[role.given_out]
            if self._averages and stream is not None:
                old = wider.index_select(role.given_out, stream.old)
                wider.index_copy_(role.given_out, stream.fresh, _mean(old, role.given_out, len(stream.fresh)))
        else:
            wider = _placed(tensor, along, drawn)
        return self._thinned(name, role, wider, 1)

    def moment(self, name: str, tensor: torch.Tensor, *, second: bool) -> torch.Tensor:
        """The wider moment of a parameter: zeros for what is new.

        Where a weight was multiplied by a factor to keep the function, its gradient is divided by it, and so
        is its first moment; the second one (`second`) is divided by the square.
        """
        role = role_of(name)
        tensor = self._with_rows(role, tensor, mean=False)
        along = self._along(role)
        wider = _placed(tensor, along) if any(along) else tensor
        return self._thinned(name, role, wider, -2 if second else -1)

    def copies(self, name: str) -> torch.Tensor:
        """Which entries of a matrix are made of later copies of units, as a mask that broadcasts to it."""
        rows, columns = (self._maps.get(axis) for axis in role_of(name).axes)
        mask = torch.zeros(1, 1, dtype=torch.bool)
        mask = mask if rows is None else mask | rows.later[:, None]
        return mask if columns is None else mask | columns.later

    def _along(self, role: Role) -> list[Map | None]:
        return [self._maps.get(axis) for axis in role.axes]

    def _with_rows(self, role: Role, tensor: torch.Tensor, *, mean: bool) -> torch.Tensor:
        if self._ids is None or role.axes[0] is not Axis.vocab:
            return tensor
        known, more = tensor[: self._ids], self._grown.vocab - self._ids
        return torch.cat((known, _mean(known, 0, more) if mean else known.new_zeros(more, known.shape[1])))

    def _copied(self, name: str, role: Role, tensor: torch.Tensor, along: list[Map | None]) -> torch.Tensor:
        before_output = self._tied and name.startswith("decoder.final_layernorm.")
        for axis, units in enumerate(along):
            if units is not None:
                tensor = tensor.index_select(axis, units.source)
                if axis == role.taken_in or before_output:
                    tensor = tensor * units.share
        return tensor

    def _thinned(self, name: str, role: Role, tensor: torch.Tensor, power: int) -> torch.Tensor:
        """With the factors by which `zero` keeps what norms give, to the `power`."""
        if self._thinning == 1.0:
            return tensor
        factor = self._thinning**power
        if role.use is Use.norm and name.endswith(".weight"):
            return tensor * factor
        if role.axes[0] is Axis.qkv and self._grown.config.qk_norm:
            queries, keys, _ = split_qkv(torch.arange(len(tensor)), self._grown)
            factors = torch.ones(len(tensor))
            factors[torch.cat((queries.flatten(), keys.flatten()))] = factor
            return tensor * factors.view(-1, *(1,) * (tensor.dim() - 1))
        return tensor


def _mean(tensor: torch.Tensor, axis: int, times: int) -> torch.Tensor:
    """The mean along an axis, `times` times."""
    mean = tensor.mean(axis, keepdim=True, dtype=torch.float64).to(tensor.dtype)
    return mean.repeat_interleave(times, axis)


def _placed(
    tensor: torch.Tensor, along: Sequence[Map | None], around: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """`tensor` where its entries are in the wider one, amid what `around` gives; None: zeros."""
    places = [
        torch.arange(size) if units is None else units.old
        for size, units in zip(tensor.shape, along, strict=True)
    ]
    shape = [
        size if units is None else len(units.source) for size, units in zip(tensor.shape, along, strict=True)
    ]
    wider = around() if around else tensor.new_zeros(shape)
    wider[torch.meshgrid(*places, indexing="ij")] = tensor
    return wider
