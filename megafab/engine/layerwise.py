"""Layer-wise sharding: each matrix is updated whole, by one of the ranks that hold copies or slices of it.

Muon and SOAP need a whole matrix, so the ranks share out matrices and not ranges of them, by the work they
are, so that each has as much. The same matrices then meet the same arithmetic at every topology. A step:

1. Gradients are summed over the data ranks (core's DDP, without its distributed optimizer).
2. Of a matrix that is split over tensor ranks, the slices of the gradient are sent to the rank that updates
   it, in one all-to-all.
3. Each rank updates its matrices. What is not a layer's matrix is AdamW's, in equal ranges, one a copy.
4. Slices of the new matrices go back to the tensor ranks in one all-to-all, and every rank sends what it has
   updated to the other copies.

Masters and optimizer state are in fp32 on the rank that updates, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megafab.checkpoint import pieces
from megafab.checkpoint.pieces import LogicalTensor
from megafab.engine.config import EngineConfig
from megafab.engine.distributed import gradient_buffers
from megafab.engine.sharded import Memory, memory_of
from megafab.engine.slices import Slice, is_owner
from megafab.model.shape import ModelShape
from megafab.model.tags import TaggedParameter, decays
from megafab.optim import elementwise
from megafab.optim.adamw import AdamW
from megafab.optim.config import OptimConfig, OptimName
from megafab.optim.lion import Lion
from megafab.optim.matrix import Fusion, MatrixOptimizer, is_layer_matrix
from megafab.optim.muon import Muon
from megafab.optim.soap import SOAP
from megafab.topology.groups import Groups
from megafab.topology.layout import Layout

_GRADIENT = "main_grad"  # where core's DDP has a parameter's gradient, fp32 and of the same shape


@dataclass(frozen=True, slots=True)
class Job:
    """A matrix to share out: its work, and whether tensor ranks have slices of it or each the whole."""

    cost: float
    split: bool


def share_out(jobs: Mapping[str, Job], copies: int, tensor: int) -> dict[str, tuple[int, int]]:
    """Who updates which matrix: the largest first, each to whoever has least so far.

    Args:
        jobs: by name.
        copies: ranks with copies.
        tensor: tensor ranks of each copy.

    Returns:
        By name the copy and the tensor rank; what is not split is updated on all tensor ranks of the copy.
    """
    loads = {(copy, rank): 0.0 for copy in range(copies) for rank in range(tensor)}
    owners = {}
    for name in sorted(jobs, key=lambda name: (-jobs[name].cost, name)):
        job = jobs[name]
        if job.split:
            places = [min(loads, key=lambda place: (loads[place], place))]
        else:
            copy = min(range(copies), key=lambda copy: max(loads[copy, rank] for rank in range(tensor)))
            places = [(copy, rank) for rank in range(tensor)]
        owners[name] = places[0]
        for place in places:
            loads[place] += job.cost
    return owners


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
    """A matrix and who updates it, as all ranks with a copy or a slice know it."""

    tagged: TaggedParameter
    fusion: Fusion
    copy: int
    tensor_rank: int

    @property
    def exchanged(self) -> bool:
        """Whether the rank that updates it has to be sent slices."""
        return self.tagged.layout.local_shape != self.tagged.layout.global_shape


class LayerWise:
    """An `engine.sharded.ShardedOptimizer` for Muon and SOAP.

    Args:
        chunks: in core's DDP, without its distributed optimizer.
        tagged: the parameters of all chunks.
        shape: sizes of the model.
        groups: this rank's place.
        engine, optim: settings.
        dtype: of the model's weights; Muon iterates in it.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        tagged: Sequence[TaggedParameter],
        shape: ModelShape,
        groups: Groups,
        engine: EngineConfig,
        optim: OptimConfig,
        dtype: torch.dtype,
    ) -> None:
        self._chunks = chunks
        self._optimizer = _matrix_optimizer(optim, dtype)
        self._adamw_lr = optim.muon.adamw_lr_ratio if optim.muon else 1.0
        self._bucket, self._updates = engine.bucket_parameters, 0
        self._gradients: list[torch.Tensor] = []
        trained = [t for t in tagged if t.parameter.requires_grad]
        # What each copy updates, and so sends to the others: flat views of the model's parameters.
        self._sent: list[tuple[dist.ProcessGroup, list[list[torch.Tensor]]]] = []
        ranges: list[tuple[TaggedParameter, int, torch.Tensor]] = []
        mine: list[_Matrix] = []  # of this rank's copy
        for expert, copies in ((False, groups.data_context), (True, groups.expert_data)):
            here = [t for t in trained if t.expert is expert]
            if not here:
                continue
            sent = [[] for _ in range(copies.size())]
            for t, start, copy, view in _elementwise_ranges(here, copies.size()):
                sent[copy].append(view)
                if copy == copies.rank():
                    ranges.append((t, start, view))
            for matrix in self._matrices_of(here, shape, copies.size(), groups):
                sent[matrix.copy].append(matrix.tagged.parameter.data.view(-1))
                if matrix.copy == copies.rank():
                    mine.append(matrix)
            self._sent.append((copies, sent))
        self._ranges = ranges
        self._masters = [view.float().clone() for _, _, view in ranges]
        self._inner = _adamw(ranges, self._masters, optim)
        self._here = [m for m in mine if not m.exchanged]
        self._exchange = _Exchange([m for m in mine if m.exchanged], groups)
        self._matrices = [*self._here, *self._exchange.mine]
        self._parameters = [
            self._optimizer.start(weight.float().clone(), m.fusion)
            for m, weight in zip(self._matrices, self._gather("data"), strict=True)
        ]
        self.slices = list(self._slices(groups))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._gradients = []

    def prepare(self) -> None:
        """Bring the reduced gradients to the ranks that update."""
        ranges = [
            getattr(t.parameter, _GRADIENT).view(-1)[start : start + view.numel()]
            for t, start, view in self._ranges
        ]
        self._gradients = [*ranges, *(g.view(-1) for g in self._gather(_GRADIENT))]

    def gradients(self) -> Sequence[torch.Tensor]:
        """Of `slices`, flat."""
        return self._gradients

    def step(self, lr: float, weight_decay: float, scale: float) -> None:
        """Update the masters, and the model from them."""
        for group in self._inner.param_groups:
            group["lr"] = lr * self._adamw_lr
            group["weight_decay"] = weight_decay * group["wd_mult"]
        of_ranges = self._gradients[: len(self._ranges)]
        for master, gradient in zip(self._masters, of_ranges, strict=True):
            master.grad = gradient
        elementwise.scale(self._inner, of_ranges, scale)
        self._inner.step()
        self._inner.zero_grad()
        of_matrices = self._gradients[len(self._ranges) :]
        if scale != 1.0 and of_matrices:
            torch._foreach_mul_(of_matrices, scale)  # pyright: ignore
        for parameter, gradient in zip(self._parameters, of_matrices, strict=True):
            gradient = gradient.view_as(parameter.weight)
            self._optimizer.update(parameter, gradient, lr=lr, decay=weight_decay, updates=self._updates)
        self._updates += 1
        self.commit()

    def discard(self) -> None:
        """Forget the gradients."""
        self._gradients = []

    def set_updates(self, updates: int) -> None:
        """Set the counters of both optimizers."""
        self._updates = updates
        elementwise.set_updates(self._inner, updates)

    def commit(self) -> None:
        """Update the model from the masters, on every rank."""
        with torch.no_grad():
            for (_, _, view), master in zip(self._ranges, self._masters, strict=True):
                view.copy_(master)
            weights = [parameter.weight for parameter in self._parameters]
            for matrix, weight in zip(self._here, weights[: len(self._here)], strict=True):
                matrix.tagged.parameter.copy_(weight)
            self._exchange.scatter(weights[len(self._here) :])
            for copies, sent in self._sent:
                _send_to_copies(sent, copies, self._bucket)

    def factors(self) -> Mapping[str, LogicalTensor]:
        """State of no single element: `soap_v/NAME`, `soap_left/NAME`, `soap_left/NAME/query`, ..."""
        state = {}
        of_matrices = self.slices[len(self._ranges) :]
        for s, parameter in zip(of_matrices, self._parameters, strict=True):
            for (kind, matrix), value in parameter.factors.items():
                name = f"{kind}/{s.tagged.name}" + (f"/{matrix}" if matrix else "")
                state[name] = pieces.whole(value, Layout.whole(tuple(value.shape)), s.owner)
        return state

    def memory(self) -> Memory:
        """Of a matrix in slices, its owner also has the gradient whole."""
        state = [tensor for s in self.slices for tensor in (s.master, *s.state.values())]
        factors = [value for parameter in self._parameters for value in parameter.factors.values()]
        return memory_of(
            (parameter.data for chunk in self._chunks for parameter in chunk.parameters()),
            [*gradient_buffers(self._chunks), *self._gradients],
            [*state, *factors],
        )

    def _matrices_of(
        self, tagged: Sequence[TaggedParameter], shape: ModelShape, copies: int, groups: Groups
    ) -> list[_Matrix]:
        """The layers' matrices, shared out; the same list on all ranks that hold them."""
        chosen = {t.name: (t, _fusion(t, shape)) for t in tagged if is_layer_matrix(t.name, t.parameter)}
        jobs = {
            name: Job(self._optimizer.cost(fusion, t.layout.global_shape[1]), t.tensor_split)
            for name, (t, fusion) in chosen.items()
        }
        # Experts are whole on every rank, and tensor ranks are among their copies.
        tensor = 1 if tagged[0].expert else groups.mesh.tensor
        owners = share_out(jobs, copies, tensor)
        return [_Matrix(t, fusion, *owners[name]) for name, (t, fusion) in chosen.items()]

    def _gather(self, attribute: str) -> list[torch.Tensor]:
        """Of the matrices this rank updates, the parameters or gradients [R, C], whole."""
        here = [getattr(m.tagged.parameter, attribute) for m in self._here]
        return here + self._exchange.gather(attribute)

    def _slices(self, groups: Groups) -> Iterator[Slice]:
        """Ranges first, then matrices, as `_parameters` has them."""
        moments = elementwise.MOMENTS[OptimName.adamw]
        for (t, start, _), master in zip(self._ranges, self._masters, strict=True):
            state = {kind: self._inner.state[master][key] for kind, key in moments.items()}
            yield Slice(t, start, master, state, is_owner(t, groups))
        for m, parameter in zip(self._matrices, self._parameters, strict=True):
            t = replace(m.tagged, layout=Layout.whole(m.tagged.layout.global_shape))
            owner = m.exchanged or is_owner(t, groups)
            state = {kind: moment.view(-1) for kind, moment in parameter.moments.items()}
            yield Slice(t, 0, parameter.weight.view(-1), state, owner)


def _matrix_optimizer(optim: OptimConfig, dtype: torch.dtype) -> MatrixOptimizer:
    if optim.muon is not None:
        return Muon(optim.muon, dtype)
    return SOAP(optim)


def _adamw(
    ranges: Sequence[tuple[TaggedParameter, int, torch.Tensor]],
    masters: Sequence[torch.Tensor],
    optim: OptimConfig,
) -> AdamW | Lion:
    groups: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for (t, _, _), master in zip(ranges, masters, strict=True):
        groups[decays(t.name, t.parameter)].append(master)
    inner = elementwise.make(optim, [{"params": g, "wd_mult": float(d)} for d, g in groups.items()])
    elementwise.prime(inner, masters)
    return inner


def _fusion(t: TaggedParameter, shape: ModelShape) -> Fusion:
    """Which matrices core keeps in this parameter."""
    rows = t.layout.global_shape[0]
    if t.name.endswith("linear_qkv.weight"):
        queries = shape.config.heads // shape.kv_heads * shape.head_dim
        return Fusion(("query", "key", "value"), shape.kv_heads, (queries, shape.head_dim, shape.head_dim))
    if shape.gated and t.name.endswith("linear_fc1.weight"):
        return Fusion(("gate", "up"), 1, (rows // 2, rows // 2))
    return Fusion.none(rows)


def _elementwise_ranges(
    tagged: Sequence[TaggedParameter], copies: int
) -> Iterator[tuple[TaggedParameter, int, int, torch.Tensor]]:
    """What AdamW updates, each parameter in a range a copy: (parameter, start, copy, flat view)."""
    for t in tagged:
        if not is_layer_matrix(t.name, t.parameter):
            flat = t.parameter.data.view(-1)
            bounds = [flat.numel() * copy // copies for copy in range(copies + 1)]
            for copy, (start, stop) in enumerate(itertools.pairwise(bounds)):
                if stop > start:
                    yield t, start, copy, flat[start:stop]


class _Exchange:
    """Sends slices of matrices to the tensor ranks that update them, and of the new ones back.

    Args:
        matrices: those that this copy updates and its tensor ranks have slices of.
        groups: this rank's place.

    Attributes:
        mine: the matrices this rank updates.
    """

    def __init__(self, matrices: Sequence[_Matrix], groups: Groups) -> None:
        self._group, ranks = groups.tensor, groups.mesh.tensor
        rank = groups.mesh.tensor_rank(groups.rank)
        self._matrices = sorted(matrices, key=lambda m: m.tensor_rank)
        self.mine = [m for m in self._matrices if m.tensor_rank == rank]
        self._sizes = [_numel(m for m in self._matrices if m.tensor_rank == r) for r in range(ranks)]
        self._mine_sizes = [_numel(self.mine)] * ranks
        self._layouts = [[_layout(m.tagged.layout, ranks, r) for m in self.mine] for r in range(ranks)]

    def gather(self, attribute: str) -> list[torch.Tensor]:
        """The matrices of `mine`, [R, C], from `attribute` of the parameters on all tensor ranks."""
        if not self._matrices:
            return []
        send = torch.cat([getattr(m.tagged.parameter, attribute).reshape(-1) for m in self._matrices])
        received = self._all_to_all(send, self._mine_sizes, self._sizes)
        wholes = [received.new_empty(m.tagged.layout.global_shape) for m in self.mine]
        for flat, layouts in zip(received.split(self._mine_sizes), self._layouts, strict=True):
            parts = flat.split([m.tagged.parameter.numel() for m in self.mine])
            for whole, part, layout in zip(wholes, parts, layouts, strict=True):
                for inside, outside in _boxes(layout):
                    whole[outside] = part.view(layout.local_shape)[inside]
        return wholes

    def scatter(self, wholes: Sequence[torch.Tensor]) -> None:
        """Fill the parameters on all tensor ranks from the matrices of `mine`."""
        if not self._matrices:
            return
        dtype = self._matrices[0].tagged.parameter.dtype
        parts = []
        for layouts in self._layouts:
            for whole, layout in zip(wholes, layouts, strict=True):
                part = whole.new_empty(layout.local_shape, dtype=dtype)
                for inside, outside in _boxes(layout):
                    part[inside] = whole[outside]
                parts.append(part.view(-1))
        send = torch.cat(parts) if parts else self._matrices[0].tagged.parameter.new_empty(0)
        received = self._all_to_all(send, self._sizes, self._mine_sizes)
        parameters = [m.tagged.parameter for m in self._matrices]
        for parameter, part in zip(parameters, received.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))

    def _all_to_all(self, send: torch.Tensor, receive: list[int], sent: list[int]) -> torch.Tensor:
        received = send.new_empty(sum(receive))
        dist.all_to_all_single(received, send, receive, sent, group=self._group)
        return received


def _numel(matrices: Iterator[_Matrix] | Sequence[_Matrix]) -> int:
    return sum(m.tagged.parameter.numel() for m in matrices)


def _layout(layout: Layout, ranks: int, rank: int) -> Layout:
    """How the slice of another tensor rank lies in the same matrix."""
    shapes = zip(layout.local_shape, layout.global_shape, strict=True)
    (dim,) = (dim for dim, (local, whole) in enumerate(shapes) if local != whole)
    return Layout.split(layout.local_shape, dim, ranks, rank, len(layout.blocks))


def _boxes(layout: Layout) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Each block of a layout as indices into the local and the global tensor."""
    for block in layout.blocks:
        local, whole = (
            tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))
            for offset in (block.local_offset, block.global_offset)
        )
        yield local, whole


def _send_to_copies(sent: Sequence[Sequence[torch.Tensor]], copies: dist.ProcessGroup, bucket: int) -> None:
    """Fill every view from the copy that updated it, all copies sending at once, a bucket each at a time.

    Args:
        sent: by copy, the flat views it updates.
        copies: the ranks that hold them.
        bucket: elements of one message, or a little more.
    """
    if copies.size() == 1:
        return
    for messages in itertools.zip_longest(*(_buckets(views, bucket) for views in sent), fillvalue=()):
        running = []
        for copy, views in enumerate(messages):
            if views:
                size = sum(view.numel() for view in views)
                flat = torch.cat(list(views)) if copy == copies.rank() else views[0].new_empty(size)
                work = dist.broadcast(flat, group_src=copy, group=copies, async_op=True)
                running.append((work, copy, flat, views))
        for work, copy, flat, views in running:
            work.wait()
            if copy != copies.rank():
                parts = flat.split([view.numel() for view in views])
                torch._foreach_copy_(list(views), list(parts))  # pyright: ignore


def _buckets(views: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    filled = 0
    for view in views:
        bucket.append(view)
        filled += view.numel()
        if filled >= size:
            yield bucket
            bucket, filled = [], 0
    if bucket:
        yield bucket
