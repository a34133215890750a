"""Growth by learned linear maps: LiGO (Wang et al. 2023, arXiv 2303.00980).

A weight of the wider model is W' = B_out W B_in^T, that of a deeper one W'_k = sum_j D_kj W_j. The maps B
of the residual stream, of the neurons and of the heads are shared by all layers, each kind of weight has
its own D; they are trained for some steps on text, by the loss of the grown model, with the parent's
weights as they are. B begins as the identity above draws of variance 1 / rows, D as stacking. A map of
heads mixes whole heads, so that what a head computes from positions stays a function of positions.

The parent's weights, those of the grown model, their gradients and the activations of a batch are in memory
at once, on this one process.

Shapes: d channels, H query heads, G key-value heads, F neurons, l layers; with a stroke those to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch.func import functional_call

from megafab import judge
from megafab.checkpoint.config import Depth, GrowConfig, Width
from megafab.checkpoint.reader import Reader
from megafab.checkpoint.store import WEIGHT
from megafab.checkpoint.surgery.axes import Axis, role_of
from megafab.checkpoint.surgery.maps import join_qkv, split_qkv
from megafab.checkpoint.surgery.origins import Origins
from megafab.config import growth
from megafab.config.schema import RunConfig
from megafab.data.format import Corpus
from megafab.errors import UserError
from megafab.model import init
from megafab.platform import platform
from megafab.topology import groups as topology
from megafab.topology.mesh import Mesh

_REPORTS = 5  # lines that tell the loss
_LAYERS = "decoder.layers."


class LearnedGrowth(torch.nn.Module):
    """The maps, and the weights that they make of the parent's.

    Args:
        origins: what is not learned: the other operator, and where new rows of the vocabulary come from.
        parent: the weights of the parent by global name.
    """

    def __init__(self, origins: Origins, parent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._origins = origins
        self._base = {name: origins.widened(name, tensor) for name, tensor in parent.items()}
        old, new = origins.parent, origins.grown
        counts = {
            "hidden": (old.config.hidden, new.config.hidden),
            **{name: (old.config.heads, new.config.heads) for name in ("query", "output")},
            **{name: (old.kv_heads, new.kv_heads) for name in ("key", "value")},
            "ffn": (old.ffn, new.ffn),
        }
        wide = origins.width is Width.learned
        self.maps = torch.nn.ParameterDict(
            {name: self._map(name, a, b) for name, (a, b) in counts.items() if wide and a != b}
        )
        parts = {_part(name) for name in parent if name.startswith(_LAYERS)}
        deep = origins.depth is Depth.learned
        stacked = torch.eye(old.config.layers).repeat(-(-new.config.layers // old.config.layers), 1)
        self.mixtures = torch.nn.ParameterDict(
            # A dot parts the names of modules.
            {
                part.replace(".", "/"): torch.nn.Parameter(stacked[: new.config.layers].clone())
                for part in parts
                if deep
            }
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight of the grown model by global name, as a function of the maps."""
        wide = {name: self._widened(name, tensor) for name, tensor in self._base.items()}
        return {name: self._weight(name, wide) for name in self._origins.shapes}

    def _weight(self, name: str, wide: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.mixtures and name.startswith(_LAYERS):
            part, number = _part(name), int(name.split(".")[2])
            layers = range(self._origins.parent.config.layers)
            stack = torch.stack([wide[f"{_LAYERS}{layer}.{part}"] for layer in layers])
            return torch.tensordot(self.mixtures[part.replace(".", "/")][number], stack, dims=1)
        origin = self._origins.of(name)
        if origin.silent:
            return torch.zeros(self._origins.shapes[name])
        return self._origins.drawn(name) if origin.source is None else wide[origin.source]

    def _widened(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for axis, kind in enumerate(role_of(name).axes):
            tensor = self._applied(kind, tensor.transpose(0, axis)).transpose(0, axis)
        return tensor

    def _applied(self, kind: Axis, t: torch.Tensor) -> torch.Tensor:
        """The map of an axis, on the first of `t`."""
        maps, rest, old = self.maps, t.shape[1:], self._origins.parent
        if kind is Axis.hidden and "hidden" in maps:
            return torch.tensordot(maps["hidden"], t, dims=1)
        if kind is Axis.heads and "output" in maps:
            by_head = t.reshape(old.config.heads, old.head_dim, *rest)
            return torch.tensordot(maps["output"], by_head, dims=1).flatten(0, 1)
        if kind is Axis.qkv and not maps.keys().isdisjoint(("query", "key", "value")):
            parts = zip(("query", "key", "value"), split_qkv(t, old), strict=True)
            mapped = [torch.tensordot(maps[n], p, dims=1) if n in maps else p for n, p in parts]
            return join_qkv(mapped, self._origins.grown)
        if kind in (Axis.ffn, Axis.fc1) and "ffn" in maps:
            halves = t.reshape(-1, old.ffn, *rest).transpose(0, 1)
            return torch.tensordot(maps["ffn"], halves, dims=1).transpose(0, 1).flatten(0, 1)
        return t

    def _map(self, name: str, old: int, new: int) -> torch.nn.Parameter:
        drawn = torch.randn(new - old, old, generator=init.generator(self._origins.seed, f"learned/{name}"))
        return torch.nn.Parameter(torch.cat((torch.eye(old), drawn / new**0.5)))


def learn(
    run: RunConfig,
    origins: Origins,
    reader: Reader,
    config: GrowConfig,
    corpus: Corpus,
    message: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Train the maps; the grown model's weights by global name, on the host.

    Args:
        run: the parent's configuration with the grown model.
        origins: of what is not learned.
        reader: of the parent.
        config: steps, learning rate and batch.
        corpus: the text.
        message: is told the loss, on text that the steps do not see.

    Raises:
        UserError: no text is long enough, or there is not enough memory.
    """
    needed = 4 * (origins.parent.parameters + 3 * origins.grown.parameters)
    fix = "grow with an operator that is not learned, or on a larger machine"
    judge.require_memory("a learned operator", needed, "for both models and gradients", fix)
    steps = growth.STEPS if config.steps is None else config.steps
    lr = growth.LR if config.lr is None else config.lr
    batch = growth.BATCH if config.batch is None else config.batch
    parent = {name: reader.read(WEIGHT + name) for name in reader.weights}
    learned = LearnedGrowth(origins, parent)
    platform.start(0)
    from megafab.generate import new_model  # Megatron-core must find the platform prepared

    model = new_model(run, origins.grown.vocab, topology.initialize(Mesh(1), seed=origins.seed)).eval()
    positions = torch.arange(run.model.seq_len).expand(batch, -1).to(platform.device)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        weights = {name: weight.to(platform.device) for name, weight in learned.weights().items()}
        tokens = tokens.to(platform.device)
        logits = functional_call(model, weights, (tokens[:, :-1], positions, None)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    optimizer = torch.optim.Adam(learned.parameters(), lr)
    windows = _windows(corpus, run.model.seq_len, batch, origins.seed)
    apart = next(windows)  # to tell the loss on, the same text each time
    for step in range(steps + 1):
        if step % max(1, steps // _REPORTS) == 0 or step == steps:
            with torch.no_grad():
                message(f"learning to grow: {step}/{steps} steps, loss {loss_of(apart):.4f}")
        if step < steps:
            optimizer.zero_grad()
            loss_of(next(windows)).backward()
            optimizer.step()
    topology.shutdown()
    with torch.no_grad():
        return {name: weight.contiguous() for name, weight in learned.weights().items()}


def _windows(corpus: Corpus, length: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Ids [batch, length + 1] without end, from anywhere in the training split, each place as likely."""
    streams = [corpus.domain("train", index) for index in range(len(corpus.domains))]
    places = torch.tensor([max(0, stream.tokens - length) for stream in streams])
    if not places.any():
        expected = f"a domain of more than {length} tokens, as model.seq_len={length} needs"
        raise UserError(f"data={corpus.path}", "no such domain", expected, "name a larger corpus")
    step = 0
    while True:
        generator = init.generator(seed, "learned/text", step)
        chosen = torch.randint(int(places.sum()), (batch,), generator=generator)
        ends = places.cumsum(0)
        domains = torch.searchsorted(ends, chosen, right=True)
        starts = chosen - (ends - places)[domains]
        rows = zip(domains.tolist(), starts.tolist(), strict=True)
        yield torch.stack([torch.from_numpy(streams[d].read(s, length + 1)).long() for d, s in rows])
        step += 1


def _part(name: str) -> str:
    """A layer's parameter by its name in the layer."""
    return name.removeprefix(_LAYERS).partition(".")[2]
