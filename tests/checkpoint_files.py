"""Checkpoints for tests without a training run: the tensors of a model by global name, written one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megafab.checkpoint import store, writer
from megafab.checkpoint.files import FileReader
from megafab.checkpoint.pieces import whole
from megafab.checkpoint.reader import TensorInfo
from megafab.config.tree import to_tree
from megafab.model.config import ModelConfig
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape
from megafab.run import Progress
from megafab.topology.layout import Layout


def drawn(seed: int, sizes: Mapping[str, tuple[int, ...]]) -> writer.Source:
    """Bands of tensors, each a function of seed, name and place."""

    def source(name: str, rows: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash_of(f"{seed} {name} {rows[0]}"))
        return torch.randn(rows[1], *sizes[name][1:], generator=generator)

    return source


def hash_of(text: str) -> int:
    """A number for a seed, the same in every process."""
    value = 0
    for byte in text.encode():
        value = (value * 257 + byte) % (1 << 61)
    return value


def state_of(model: ModelConfig, step: int, **more: Any) -> dict[str, Any]:
    """What stands beside the tensors of a run's checkpoint."""
    return {
        "weights_only": False,
        "progress": asdict(Progress(step, 8 * step, 512 * step)),
        "loader": {},
        "engine": {"updates": step},
        "techniques": {},
        "data": {},
        "config": {"model": to_tree(model)},
        "topology": {"ranks": 1},
        "versions": {"megafab": "0"},
        "written_at": "2026-01-01T00:00:00Z",
        "lineage": [],
        **more,
    }


def write_checkpoint(
    run_dir: Path,
    model: ModelConfig,
    *,
    seed: int = 0,
    step: int = 7,
    kinds: Sequence[str] = ("weight", "adam_m", "adam_v"),
    **more: Any,
) -> Path:
    """A checkpoint in `run_dir/checkpoints`: of each kind, random tensors like the weights."""
    sizes = {
        f"{kind}/{name}": size
        for kind in kinds
        for name, size in parameter_shapes(ModelShape.of(model)).items()
    }
    tensors = {name: TensorInfo(size, torch.float32, 1) for name, size in sizes.items()}
    return writer.write(run_dir, step, tensors, drawn(seed, sizes), state_of(model, step, **more))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through `store.load`, which training uses."""
    metadata = FileReader(path / store.TENSORS).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    store.load(path, {n: whole(t, Layout.whole(tuple(t.shape)), owner=True) for n, t in found.items()})
    return found
