"""What changed in the configuration since a checkpoint was written, and what of it must not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# What a checkpoint's weights mean, and names and shapes of tensors may not tell.
MEANING = tuple(
    f"model.{name}"
    for name in (
        *("layers", "heads", "norm", "norm_eps", "activation", "position", "rope_base", "bias", "qk_norm"),
        *("tied_embeddings", "moe.experts", "moe.top_k", "moe.shared_ffn", "moe.every"),
        *("retro.chunk", "retro.layers", "retro.encoder_layers"),
    )
)
# Where a run is kept and shown, and how it is spread: a resume may change these without a word.
_INCIDENTAL = ("run", "launch", "tracking", "checkpoint", "start", "parallel")


def changes(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value then, value now) where two configurations differ; a key that is missing is null."""
    for name in dict.fromkeys((*now, *then)):
        key, old, new = prefix + name, then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{key}.")
        elif old != new and key.partition(".")[0] not in _INCIDENTAL:
            yield key, old, new


def of_weights(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """`changes` of a model, for weights that another run begins with.

    Layers that look at neighbours may come to them, or be left out: without neighbours they add nothing.
    """
    both = retrieves(then) and retrieves(now)
    for key, old, new in changes({"model": then}, {"model": now}):
        if both or not key.startswith("model.retro"):
            yield key, old, new


def retrieves(model: Mapping[str, Any]) -> bool:
    """Whether a model has layers that look at neighbours; those of older checkpoints say nothing of it."""
    return bool(model.get("retro", {}).get("chunk"))


def shown(value: Any) -> str:
    """A value as a command line has it."""
    return json.dumps(value).replace('"', "")
