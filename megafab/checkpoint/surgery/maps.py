"""Which old unit each unit of a wider model comes from, axis by axis.

New units are copies of old ones in turn (0, 1, ..., d-1, 0, 1, ...), or new ones. A query head belongs to a
key-value head, its group; when groups are added, a new one takes the key, the value and the queries of an old
one, and when groups get more query heads, copies are made within the group: attention sees the same keys.

Shapes: H query heads, G groups (key-value heads), D head size, F neurons; those of the wider model with a
stroke: H', G', F'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megafab.checkpoint.surgery.axes import Axis
from megafab.model.shape import ModelShape

NEW = -1


@dataclass(frozen=True, slots=True)
class Map:
    """Where the entries of one axis come from.

    `source` [new] has the old index of each, or `NEW`; `share` [new] how much of the old one's outgoing
    weight it gets, so that the shares of all copies of one sum to 1; `later` [new] marks all copies but the
    first of each.
    """

    source: torch.Tensor
    share: torch.Tensor
    later: torch.Tensor

    @property
    def old(self) -> torch.Tensor:
        """Places of the entries that have a source."""
        return (self.source != NEW).nonzero().flatten()

    @property
    def fresh(self) -> torch.Tensor:
        """Places of those that have none."""
        return (self.source == NEW).nonzero().flatten()


def maps(parent: ModelShape, grown: ModelShape, *, split: float | None) -> dict[Axis, Map]:
    """The map of every axis that grows but the vocabulary.

    Args:
        parent: sizes as they are.
        grown: sizes to come.
        split: new units are copies, the first of which keeps this share of the old one's outgoing weights;
            None: they are new.
    """
    copies = split is not None
    found: dict[Axis, Map] = {}
    if grown.config.hidden != parent.config.hidden:
        found[Axis.hidden] = _map(_units(parent.config.hidden, grown.config.hidden, copies), split)
    if (grown.config.heads, grown.kv_heads) != (parent.config.heads, parent.kv_heads):
        queries, groups = heads(parent, grown, copies=copies)
        found[Axis.heads] = _each(_map(queries, split), parent.head_dim)
        found[Axis.qkv] = _qkv(parent, grown, queries, groups)
    if grown.ffn != parent.ffn:
        neurons = _units(parent.ffn, grown.ffn, copies)
        found[Axis.ffn] = _map(neurons, split)
        found[Axis.fc1] = found[Axis.ffn]
        if grown.gated:
            ups = [NEW if unit == NEW else parent.ffn + unit for unit in neurons]
            found[Axis.fc1] = _map([*neurons, *ups], split)
    return found


def heads(parent: ModelShape, grown: ModelShape, *, copies: bool) -> tuple[list[int], list[int]]:
    """Old query head of each of H', old group of each of G'."""
    before, now = (shape.config.heads // shape.kv_heads for shape in (parent, grown))
    groups = _units(parent.kv_heads, grown.kv_heads, copies)
    used: Counter[int] = Counter()  # places filled so far, by old group
    queries: list[int] = []
    for group in groups:
        for _ in range(now):
            place, used[group] = used[group], used[group] + 1
            known = group != NEW and (copies or place < before)
            queries.append(group * before + place % before if known else NEW)
    return queries, groups


def shares(source: Sequence[int], split: float) -> list[float]:
    """Parts of 1 for the copies of each unit, by breaking a stick: no two of them alike, unless `split` is.

    Of two copies the first gets `split`; of three the first gets it, the second as much of what is left, the
    third the rest (Wang et al. 2024, arXiv 2310.07999: unequal shares break symmetry).
    """
    total, seen, found = Counter(source), Counter[int](), list[float]()
    for unit in source:
        place, seen[unit] = seen[unit], seen[unit] + 1
        left = (1 - split) ** place
        found.append(left if place == total[unit] - 1 else left * split)
    return found


def _units(old: int, new: int, copies: bool) -> list[int]:
    return [unit % old if copies else unit if unit < old else NEW for unit in range(new)]


def _map(source: Sequence[int], split: float | None) -> Map:
    first = {unit: place for place, unit in reversed(list(enumerate(source)))}
    later = [unit != NEW and first[unit] != place for place, unit in enumerate(source)]
    share = [1.0] * len(source) if split is None else shares(source, split)
    return Map(torch.tensor(source), torch.tensor(share), torch.tensor(later))


def _each(units: Map, size: int) -> Map:
    """The map of elements, `size` of them to a unit."""
    first = torch.where(units.source == NEW, NEW, units.source * size)
    source = first[:, None] + torch.where(first == NEW, 0, 1)[:, None] * torch.arange(size)
    return Map(source.flatten(), *(x.repeat_interleave(size) for x in (units.share, units.later)))


def _qkv(parent: ModelShape, grown: ModelShape, queries: Sequence[int], groups: Sequence[int]) -> Map:
    """The rows of linear_qkv: the old rows' numbers, dealt out as the rows themselves would be."""
    rows = torch.arange((parent.config.heads + 2 * parent.kv_heads) * parent.head_dim)
    parts = split_qkv(rows, parent)
    # NEW is the last index: a row of its own number.
    padded = (torch.cat((part, torch.full_like(part[:1], NEW))) for part in parts)
    chosen = zip(padded, (queries, groups, groups), strict=True)
    source = join_qkv([part[torch.tensor(units)] for part, units in chosen], grown)
    return _map(source.tolist(), None)


def split_qkv(t: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """linear_qkv's tensor [(H + 2G) x D, ...] as queries [H, D, ...], keys and values [G, D, ...]."""
    each, rest = shape.config.heads // shape.kv_heads, t.shape[1:]
    by_group = t.reshape(shape.kv_heads, each + 2, shape.head_dim, *rest)
    queries = by_group[:, :each].reshape(-1, shape.head_dim, *rest)
    return queries, by_group[:, each], by_group[:, each + 1]


def join_qkv(parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """The opposite of `split_qkv`."""
    rest = parts[0].shape[2:]
    by_group = [part.reshape(shape.kv_heads, -1, shape.head_dim, *rest) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)
