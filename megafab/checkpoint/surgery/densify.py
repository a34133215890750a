"""The dense model that a sparse one is: the step from sparse pre-training to dense training.

Thangarasa et al. 2023 (SPDF, arXiv 2303.10464): all weights take part again, those that were masked from 0
on, so that the dense model computes what the sparse one did. Moments, schedule and data begin anew.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megafab.checkpoint import store, writer
from megafab.checkpoint.provenance import derived_state
from megafab.checkpoint.tools import open_intact
from megafab.errors import UserError
from megafab.telemetry.meter import Meter


def densify(path: Path, to: Path) -> Path:
    """The weights of the sparse checkpoint at `path` without its masks; returns the new one.

    Args:
        path: a step directory.
        to: the directory to make; the checkpoint is in its `checkpoints/`, under the same step.

    Raises:
        UserError: there are no masks; a masked weight is not exactly 0; the checkpoint is damaged.
    """
    reader = open_intact(path)
    masks = {store.WEIGHT + weight: name for name, (_, weight) in store.masks(reader.tensors).items()}
    if not masks:
        fix = "resume from it as it is"
        raise UserError(str(path), "no masks", "a checkpoint of a run with static_sparsity or pruning", fix)
    chosen = {name: reader.tensors[name] for name in (store.WEIGHT + weight for weight in reader.weights)}
    meter = Meter("densify", sum(info.nbytes for info in chosen.values()))

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        tensor = reader.read(name, band)
        if name in masks:
            revived = int(tensor.masked_fill(reader.read(masks[name], band), 0).count_nonzero())
            if revived:
                found = f"{revived:,} masked weights that are not 0 in rows {band[0]} to {sum(band) - 1}"
                fix = "take a checkpoint that the run itself has written"
                raise UserError(f"{path}, tensor {name}", found, "0 where the mask is", fix)
        meter.add(tensor.nbytes)
        return tensor

    state = derived_state("densify", [(path, reader.state)], weights_only=True)
    with writer.fresh_directory(to) as draft:
        made = writer.write(draft, state["progress"]["step"], chosen, source, state)
        meter.close()
    return to / made.relative_to(draft)
