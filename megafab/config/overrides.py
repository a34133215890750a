"""A model's configuration as a command line, for people to begin a run with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from megafab.config.load import load
from megafab.config.tree import to_tree
from megafab.model.config import ModelConfig, Norm


def model_overrides(model: ModelConfig) -> Iterator[str]:
    """What `megafab train` must be told for this model: a preset, and what differs from it."""
    preset = "gpt_tiny" if model.norm is Norm.layernorm else "llama_tiny"
    yield f"model={preset}"
    base = dict(_flat(to_tree(load([f"model={preset}", "data.path=unused"]).model)))
    for key, value in _flat(to_tree(model)):
        if value != base[key]:
            yield f"model.{key}={json.dumps(value).replace(chr(34), '')}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            yield prefix + key, value
