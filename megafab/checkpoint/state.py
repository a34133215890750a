"""What a run must remember to go on as if it had never stopped, and when it writes that down.

Tensors come as logical tensors: the engine's master weights and moments, and those of techniques. All else
is JSON, the same on every rank: progress, position in the data, techniques' counters. Nothing is per rank,
so a checkpoint means the same whatever the topology that wrote it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megafab.checkpoint import store
from megafab.checkpoint.config import CheckpointConfig
from megafab.checkpoint.pieces import LogicalTensor
from megafab.errors import UserError
from megafab.run import Progress

# What a checkpoint's weights mean, and names and shapes of tensors may not tell.
_MEANING = tuple(
    f"model.{name}"
    for name in (
        *("layers", "heads", "norm", "norm_eps", "activation", "position", "rope_base", "bias", "qk_norm"),
        *("tied_embeddings", "moe.experts", "moe.top_k", "moe.shared_ffn", "moe.every"),
    )
)
# Where a run is kept and shown, and how it is spread: a resume may change these without a word.
_INCIDENTAL = ("run", "launch", "tracking", "checkpoint", "parallel")


class EngineState(Protocol):
    """What an engine shows of itself (`engine/base.py`)."""

    def weights(self) -> Any:
        """Its editor of master weights, by which techniques describe their own tensors."""
        ...

    def sharded_state(self) -> Mapping[str, LogicalTensor]:
        """Master weights and moments, as views."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The rest: JSON-able, the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called once the views were filled: also makes what is derived from them agree."""
        ...


class LoaderState(Protocol):
    """The position in the data."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from there."""
        ...


class TechniquesState(Protocol):
    """What the techniques remember (`techniques/bus.py`)."""

    def state_dict(self) -> dict[str, Any]:
        """The replicated state of each technique by its name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives it back, and tells of techniques that come or go; called before `sharded_state`."""
        ...

    def sharded_state(self, weights: Any, only: Container[str] | None = None) -> Mapping[str, LogicalTensor]:
        """Tensors shaped like parameters, as views: of the techniques named in `only`, or of all."""
        ...


class Checkpoints:
    """Saves a run and brings it back. All methods are collectives over the ranks of `group`.

    Args:
        config: when to save, what to keep, where to start from.
        run_dir: checkpoints are in its `checkpoints/`.
        engine: owner of weights and optimizer.
        loader: owner of the position in the data.
        techniques: the bus of those that are on.
        data: fingerprints that must agree for a resume to be exact: `corpus` and `tokenizer`.
        resolved: the whole configuration as plain values, to be found beside the weights.
        topology: sizes of the parallel axes, for the reader; a resume does not depend on them.
        message: shows one line to the user.
        group: process group of host memory; None: all ranks.
    """

    def __init__(
        self,
        *,
        config: CheckpointConfig,
        run_dir: Path,
        engine: EngineState,
        loader: LoaderState,
        techniques: TechniquesState,
        data: Mapping[str, str],
        resolved: Mapping[str, Any],
        topology: Mapping[str, int],
        message: Callable[[str], None],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._config = config
        self._directory = Path(run_dir) / "checkpoints"
        self._engine, self._loader, self._techniques = engine, loader, techniques
        self._data, self._resolved, self._topology = dict(data), resolved, dict(topology)
        self._message = message
        self._group, self._team = group, store.Team(group)
        self._lineage: list[dict[str, Any]] = []

    def save(self, progress: Progress) -> Path:
        """Commit a checkpoint of this moment; on return it is on the disk.

        Raises:
            UserError: it could not be written (disk full, permission); earlier ones are untouched.
        """
        begin = time.perf_counter()
        state = {
            "progress": dataclasses.asdict(progress),
            "loader": self._loader.state_dict(),
            "engine": self._engine.state_dict(),
            "techniques": self._techniques.state_dict(),
            "data": self._data,
            "config": self._resolved,
            "topology": self._topology,
            "versions": _versions(),
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "lineage": self._lineage,
        }
        tensors = self._tensors()
        path = store.save(
            self._directory, progress.step, tensors, state, keep=self._config.keep, group=self._group
        )
        self._message(f"saved {path} in {time.perf_counter() - begin:.1f} s")
        return path

    def restore(self) -> Progress:
        """Bring the run to where `checkpoint.resume` says; `Progress()` if there is nothing to resume from.

        With `auto` or a run directory, a damaged checkpoint is passed over with a warning and the one before
        it taken; every file is hashed before any is trusted, the ranks sharing the work.

        Another model is refused; other settings that changed are told and take effect.

        Raises:
            UserError: a path without a checkpoint, damage, other data, or tensors that do not fit the model.
        """
        path = self._chosen()
        if path is None:
            return Progress()
        state = self._team.one(lambda: store.read_state(path))
        self._require_same_data(path, state)
        changes = list(_changes(state["config"], self._resolved))
        self._require_same_model(path, changes)
        self._message(f"resuming from {path}")
        if changes:
            told = (f"{key} from {_shown(then)} to {_shown(now)}" for key, then, now in changes)
            self._message(f"changed since the checkpoint: {', '.join(told)}")
        if state["topology"] != self._topology:
            self._message(f"the topology was {state['topology']}, it is {self._topology}")
        self._techniques.load_state_dict(state["techniques"])
        store.load(path, self._tensors(only=state["techniques"]), group=self._group)
        self._engine.load_state_dict(state["engine"])
        self._loader.load_state_dict(state["loader"])
        progress = Progress(**state["progress"])
        self._lineage = [
            *state["lineage"],
            {"from": str(path), "step": progress.step, "written_at": state["written_at"]},
        ]
        return progress

    def _chosen(self) -> Path | None:
        where, team = self._config.resume, self._team
        if where == "none":
            return None
        if where == "auto":
            paths = team.one(lambda: store.candidates(self._directory))
        else:
            paths = team.one(lambda: store.locate(Path(where)))

        def check(path: Path) -> dict[str, str]:
            parts = team.each(lambda: store.verify(path, part=team.rank, parts=team.size))
            return {name: problem for part in parts for name, problem in part.items()}

        path, damaged = store.first_intact(paths, check)
        for problem in damaged:
            self._message(f"passing over a damaged checkpoint: {problem}")
        return path

    def _require_same_data(self, path: Path, state: Mapping[str, Any]) -> None:
        saved = state["data"]
        for what in sorted(saved.keys() | self._data.keys()):
            if saved.get(what) != self._data.get(what):
                raise UserError(
                    f"checkpoint.resume={self._config.resume} ({path}), {what}",
                    f"fingerprint {saved.get(what)} there and {self._data.get(what)} in this run's data.path",
                    "the same data, for the resumed run to equal the unbroken one",
                    "point data.path at the data of the checkpoint, or begin a new run.dir",
                )

    def _require_same_model(self, path: Path, changes: Sequence[tuple[str, Any, Any]]) -> None:
        for key, then, now in changes:
            if key in _MEANING and then is not None:
                raise UserError(
                    f"{key}={_shown(now)}, checkpoint.resume={self._config.resume} ({path})",
                    f"weights trained with {key}={_shown(then)}",
                    "the same model",
                    f"resume with {key}={_shown(then)}, or begin a new run.dir",
                )

    def _tensors(self, only: Container[str] | None = None) -> dict[str, LogicalTensor]:
        """All logical tensors by name; a technique's are under `techniques/<its name>/`."""
        theirs = self._techniques.sharded_state(self._engine.weights(), only)
        return {
            **self._engine.sharded_state(),
            **{f"techniques/{name}": tensor for name, tensor in theirs.items()},
        }


def _changes(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value then, value now) where two configurations differ; a key that is missing is null."""
    for name in dict.fromkeys((*now, *then)):
        key, old, new = prefix + name, then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{key}.")
        elif old != new and key.partition(".")[0] not in _INCIDENTAL:
            yield key, old, new


def _shown(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("megafab", "torch", "megatron-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            versions[package] = "unknown"
    return versions
