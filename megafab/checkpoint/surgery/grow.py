"""`megafab ckpt grow`: the checkpoint of a larger model out of that of a smaller one, a tensor at a time.

The parent may have been written at any layout, since tensors are logical, and a run begins from the grown
checkpoint at any layout, on any engine, at step 0. The state beside it keeps the parent's progress, its
position in the data, and in the lineage what grew out of what.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megafab import judge
from megafab.checkpoint import provenance, tools, writer
from megafab.checkpoint.config import GrowConfig, Moments
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.checkpoint.store import WEIGHT, masks
from megafab.checkpoint.surgery import learned
from megafab.checkpoint.surgery.origins import Origins
from megafab.config import growth
from megafab.config.overrides import model_overrides
from megafab.config.schema import RunConfig
from megafab.config.tree import build, to_tree
from megafab.data.format import Corpus
from megafab.errors import UserError
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape
from megafab.run import Progress
from megafab.telemetry.meter import Meter

PRESERVED = 1e-5  # of a logit in fp32: the function counts as kept where none moves by as much

Say = Callable[[str], None]


def grow(path: Path, to: Path, config: GrowConfig, message: Say) -> Path:
    """Make the checkpoint of the model that the one at `path` grows into; returns it.

    Memory: a few tensors. The judge holds one model at a time, a learned operator both and their gradients.
    Both make a job of one rank and end it: call this on one process, outside any other job.

    Args:
        path: a step directory.
        to: the directory to make; the checkpoint is in its `checkpoints/`, under the parent's step.
        config: what it becomes.
        message: is told what the logits do, and how to go on.

    Raises:
        ConfigErrors: the model cannot grow so.
        UserError: a damaged checkpoint, or a claim of preservation that the logits do not bear out. Nothing
            is made then.
    """
    reader = tools.open_intact(path)
    _require_dense(reader)
    parent, ids = sizes(reader)
    _require_model(reader, parent)
    model = growth.grown(parent, config, ids=ids)
    grown = ModelShape.of(model, parent.vocab)
    origins = Origins(parent, grown, config, ids=ids)
    if config.judge:
        fix = "set judge=false, or grow on a larger machine"
        judge.require_memory("judge=true", 4 * grown.parameters, "to run the models", fix)
    corpus, missing = _corpus(reader, parent, config)
    before, after = _run(reader), replace(_run(reader), model=model)
    state = _state(reader, parent, grown, config, ids)
    with writer.fresh_directory(to) as draft:
        weights: Mapping[str, torch.Tensor] = {}
        if growth.learns(config):
            if corpus is None:
                raise UserError(
                    "a learned operator", missing, "text to learn from", "name a corpus: data=DIR"
                )
            weights = learned.learn(after, origins, reader, config, corpus, message)
        making = _Making(reader, origins, weights, moments=config.optimizer is Moments.copy)
        made = writer.write(draft, state["progress"]["step"], making.tensors, making.band, state)
        making.close()
        if config.judge:
            tokens, what = judge.text(corpus, seq_len=model.seq_len, vocab=ids)
            what += f", for there is no text: {missing}" if corpus is None else ""
            small = judge.logits(before, path, tokens, parent.vocab)
            large = judge.logits(after, made, tokens, grown.vocab)
            _hold(small[..., :ids], large, tokens, what, config, message)
        else:
            message("judge=false: the logits were not compared")
    checkpoint = to / made.relative_to(draft)
    how = tools.growth_in_words(state["lineage"][-1]["growth"])
    message(f"{checkpoint}: {grown.parameters:,} parameters, {how}")
    return checkpoint


def command(checkpoint: Path) -> str:
    """What begins a run with a grown checkpoint."""
    reader = Reader(checkpoint)
    grew = reader.state["lineage"][-1]["growth"]["sizes"]
    other = " checkpoint.allow_data_change=true" if "vocab" in grew else ""
    overrides = " ".join(
        map(shlex.quote, (f"start.checkpoint={checkpoint}", *model_overrides(_run(reader).model)))
    )
    return f"megafab train {overrides} data.path=DIR{other}"


def sizes(reader: Reader) -> tuple[ModelShape, int]:
    """The sizes of a checkpoint's model, and the ids of its tokenizer (all rows, where it names none)."""
    rows = reader.weights["embedding.word_embeddings.weight"].shape[0]
    return ModelShape.of(_run(reader).model, rows), reader.state["data"].get("vocab_size", rows)


def _corpus(reader: Reader, parent: ModelShape, config: GrowConfig) -> tuple[Corpus | None, str]:
    """Text to judge on and to learn from; None and the reason, where there is none or none is asked for."""
    if not (config.judge or growth.learns(config)):
        return None, "judge=false"
    corpus, missing = judge.corpus(config.data, reader.state)
    if corpus is not None and corpus.vocab_size > parent.vocab:
        found, expected = f"{corpus.vocab_size:,} ids", f"at most {parent.vocab:,}, the rows of the embedding"
        raise UserError(f"data={corpus.path}", found, expected, "name a corpus of the model's tokenizer")
    return corpus, missing


def _run(reader: Reader) -> RunConfig:
    return build(RunConfig, dict(reader.state["config"]))


def _require_dense(reader: Reader) -> None:
    if masks(reader.tensors):
        fix = f"megafab ckpt densify {reader.path} to=DIR, and grow that"
        raise UserError(str(reader.path), "weights under masks", "those of a dense model", fix)


def _require_model(reader: Reader, parent: ModelShape) -> None:
    """What is in the checkpoint is what its configuration describes, no more and no less."""
    expected = parameter_shapes(parent)
    found = {name: info.shape for name, info in reader.weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise UserError(
            f"{reader.path}, weight {odd[0]}",
            f"shape {found[odd[0]]}" if odd[0] in found else "none",
            f"shape {expected[odd[0]]}"
            if odd[0] in expected
            else "none: the model's configuration has no such",
            "grow a checkpoint without techniques that change the model's weights",
        )


class _Making:
    """The tensors of the grown checkpoint: listed at once, made when they are asked for."""

    def __init__(
        self, reader: Reader, origins: Origins, learned: Mapping[str, torch.Tensor], *, moments: bool
    ) -> None:
        self._reader, self._origins, self._learned = reader, origins, learned
        self._states = origins.states(reader) if moments else {}
        self._held: tuple[str, torch.Tensor] | None = None
        weights = {WEIGHT + name: TensorInfo(s, torch.float32, 1) for name, s in origins.shapes.items()}
        self.tensors = {**weights, **{name: state.info for name, state in self._states.items()}}
        self._meter = Meter("grow", sum(info.nbytes for info in self.tensors.values()))

    def band(self, name: str, band: tuple[int, int]) -> torch.Tensor:
        """Rows of a tensor; the last one is held, since its bands come in a row."""
        if self._held is None or self._held[0] != name:
            self._held = None  # let go of one before there is another
            self._held = name, self._tensor(name)
        rows = self._held[1][band[0] : band[0] + band[1]].contiguous()
        self._meter.add(rows.nbytes)
        return rows

    def close(self) -> None:
        """All is written."""
        self._held = None
        self._meter.close()

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self._states:
            return self._origins.state(self._states[name], self._reader)
        weight = name.removeprefix(WEIGHT)
        return self._learned[weight] if self._learned else self._origins.weight(weight, self._reader)


def _state(
    reader: Reader, parent: ModelShape, grown: ModelShape, config: GrowConfig, ids: int
) -> dict[str, Any]:
    """What stands beside the tensors.

    A run begins anew from them even with moments, since they are of another model. What techniques remember
    is of the parent, and their tensors have its shapes: it stays behind.
    """
    state = provenance.derived_state("grow", [(reader.path, reader.state)], weights_only=True)
    state["config"] = {**state["config"], "model": to_tree(grown.config)}
    state["techniques"] = {}
    depth, width = growth.depth_of(config), growth.width_of(config)
    pairs = {
        "layers": (parent.config.layers, grown.config.layers),
        "hidden": (parent.config.hidden, grown.config.hidden),
        "heads": (parent.config.heads, grown.config.heads),
        "kv_heads": (parent.kv_heads, grown.kv_heads),
        "ffn": (parent.ffn, grown.ffn),
        "vocab": (ids, config.vocab or ids),
        "experts": (parent.config.moe.experts, grown.config.moe.experts),
    }
    totals = Progress.from_state(state["progress"]).totals
    state["lineage"][-1]["growth"] = {
        "sizes": {key: list(pair) for key, pair in pairs.items() if pair[0] != pair[1]},
        "depth": depth and depth.value,
        "width": width and width.value,
        "g": grown.config.layers / parent.config.layers,
        "optimizer": config.optimizer.value,
        "tokens": totals.tokens,
        "samples": totals.samples,
    }
    return state


def _hold(
    small: torch.Tensor,
    large: torch.Tensor,
    tokens: torch.Tensor,
    what: str,
    config: GrowConfig,
    message: Say,
) -> None:
    """Tell what the logits [rows, length, V] of both models do on `tokens`, and hold the claim to it.

    Where the vocabulary has grown, the logits of the ids that `small` has are compared.
    """
    found = judge.compare(small, large[..., : small.shape[-1]])
    losses = [F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for x in (small, large)]
    message(
        f"logits on {tokens.numel()} tokens of {what}: largest difference {found.max_abs:.2e}, "
        f"KL {found.kl:.2e}, loss {losses[0]:.4f} before and {losses[1]:.4f} after"
    )
    if config.preserving and not found.max_abs < PRESERVED:
        raise UserError(
            "preserving=true",
            f"logits that move by {found.max_abs:.2e}",
            f"less than {PRESERVED:.0e}, in fp32",
            "leave preserving out: the operators keep the function, but not to this many digits",
        )
