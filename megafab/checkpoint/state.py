"""What a run must remember to go on as if it had never stopped, and when it writes that down.

Tensors come as logical tensors: the engine's master weights and moments, and those of techniques. All else
is JSON, the same on every rank: progress, position in the data, techniques' counters. Nothing is per rank,
so a checkpoint means the same whatever the topology that wrote it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from megafab.checkpoint import identity, provenance, store
from megafab.checkpoint.changes import MEANING, changes, of_weights, retrieves, shown
from megafab.checkpoint.config import Carry, CheckpointConfig, StartConfig
from megafab.checkpoint.pieces import LogicalTensor
from megafab.checkpoint.snapshot import Background, Snapshot
from megafab.checkpoint.team import Team
from megafab.errors import UserError
from megafab.model.names import is_retro
from megafab.run import Progress
from megafab.telemetry.rows import METRICS_FILE

log = logging.getLogger(__name__)


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

    With `config.asynchronous`, a save copies the state and returns; a thread writes the copy. One save at a
    time is under way: the next one, and the end of the context, wait for it. Where it failed, the error is
    logged at once, and the next save is made and waited for in place: if that fails too, it raises.

    Args:
        config: when to save, what to keep, where to go on from.
        start: what a run begins with that does not go on.
        run_dir: checkpoints are in its `checkpoints/`.
        engine: owner of weights and optimizer.
        loader: owner of the position in the data.
        techniques: the bus of those that are on.
        data: the identity of the data (`identity.py`), which must agree for a resume to be exact.
        resolved: the whole configuration as plain values, to be found beside the weights.
        topology: sizes of the parallel axes, for the reader; a resume does not depend on them.
        rates: says of a checkpoint's configuration and progress what the learning rate was there, and what it
            is in the steps that follow the second progress.
        message: shows one line to the user; from any thread.
        saved: is told of each save, once it is committed: its step, and the seconds since it was begun; from
            any thread.
        group: process group of host memory; None: all ranks.
    """

    def __init__(
        self,
        *,
        config: CheckpointConfig,
        start: StartConfig,
        run_dir: Path,
        engine: EngineState,
        loader: LoaderState,
        techniques: TechniquesState,
        data: identity.Identity,
        resolved: Mapping[str, Any],
        topology: Mapping[str, int],
        rates: Callable[[Mapping[str, Any], Progress, Progress], str],
        message: Callable[[str], None],
        saved: Callable[[int, float], None],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._config, self._start = config, start
        self._run_dir, self._directory = Path(run_dir), Path(run_dir) / "checkpoints"
        self._engine, self._loader, self._techniques = engine, loader, techniques
        self._data, self._resolved, self._topology = dict(data), resolved, dict(topology)
        self._rates, self._message, self._saved = rates, message, saved
        self._group, self._team = group, Team(group)
        self._lineage: list[dict[str, Any]] = []
        self._snapshot, self._background = Snapshot(), Background()
        # A group of the thread's own: two threads that talk in one would take each other's messages.
        separate = config.asynchronous and not self._team.alone
        self._thread_group = _new_group_like(group) if separate else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save under way; not when the process is told to end at once.

        Raises:
            UserError: it failed, and no other error is on its way.
        """
        if kind is None:
            failed = self._settled()
            if failed is not None:
                raise failed
        elif issubclass(kind, Exception):  # perhaps of this rank alone: nothing may wait for the others
            self._background.wait()

    def save(self, progress: Progress, *, wait: bool = False) -> Path:
        """Commit a checkpoint of this moment; with `wait`, or without `asynchronous`, before it returns.

        Returns: where it is, or will be.

        Raises:
            UserError: it could not be written (disk full, permission); earlier ones are untouched.
        """
        begin = time.perf_counter()
        failed = self._settled()
        if failed is not None:
            self._message(f"{failed}; saving after step {progress.step} in place")
        state, tensors = self._state(progress), self._tensors()
        if wait or failed is not None or not self._config.asynchronous:
            path = self._write(progress.step, tensors, state, self._group)
            taken = time.perf_counter() - begin
            self._message(f"saved {path} in {taken:.1f} s")
            self._saved(progress.step, taken)
            return path
        copies, state = self._snapshot.take(tensors), copy.deepcopy(state)
        copied = time.perf_counter() - begin

        def write() -> None:
            try:
                path = self._write(progress.step, copies, state, self._thread_group)
            except Exception as error:
                if self._team.leads:
                    log.error("%s; training goes on until the next save", error)
                raise
            taken = time.perf_counter() - begin
            self._message(f"saved {path} in {taken:.1f} s; training waited {copied:.2f} s")
            self._saved(progress.step, taken)

        self._background.start(write)
        return store.path_of(self._directory, progress.step)

    def restore(self) -> Progress:
        """Bring the run to where `checkpoint.resume` says, else `start`; `Progress()` if there is neither.

        With `auto` or a run directory, a damaged checkpoint is passed over with a warning and the one before
        it taken; every file is hashed before any is trusted, the ranks sharing the work. A run that was
        started from a path and has saved since goes on from there, so that the same command continues it.

        Other data, another model and another optimizer are refused, and masked weights without the technique
        that masks them; other settings that changed are told and take effect. `start.checkpoint`, and a
        checkpoint of weights alone, begin a new run with them and their masks, which must have the same model
        and tokenizer.

        Raises:
            UserError: a path without a checkpoint, damage, other data, tensors that do not fit the model; or
                `none` where there is a run already.
        """
        path, named = self._chosen()
        if path is None:
            if self._team.one(self._has_rows):
                self._message(f"{self._run_dir} has no checkpoint yet: the run begins again")
            if self._start.checkpoint is None:
                return Progress()
            where = Path(self._start.checkpoint)
            path = self._intact(self._team.one(lambda: store.locate(where, key="start.checkpoint")))
            state = self._team.one(lambda: store.read_state(path))
            return self._begin(path, state, self._start, f"start.checkpoint={where} ({path})")
        if self._start.checkpoint is not None:
            self._team.one(lambda: self._require_own_start(path))
        where = f"checkpoint.resume={self._config.resume} ({path})"
        state = self._team.one(lambda: store.read_state(path))
        if state["weights_only"]:
            return self._begin(path, state, StartConfig(), where)
        changed = list(changes(state["config"], self._resolved))
        _require_same_model(where, changed, "resume with it, or begin a new run.dir")
        self._masking(path, where)
        changed_data = identity.differences(state["data"], self._data)
        if changed_data and not self._config.allow_data_change:
            raise UserError(
                where,
                f"other data than the checkpoint's: {'; '.join(changed_data)}",
                "the same samples in the same order, for the resumed run to equal the unbroken one",
                "undo the change, begin a new run.dir, or accept it: checkpoint.allow_data_change=true",
            )
        self._require_same_optimizer(path, where)
        self._message(f"resuming from {path}")
        if changed:
            told = (f"{key} from {shown(then)} to {shown(now)}" for key, then, now in changed)
            self._message(f"changed since the checkpoint: {', '.join(told)}")
        axes = [
            f"{a} {state['topology'][a]} to {n}"
            for a, n in self._topology.items()
            if state["topology"][a] != n
        ]
        if axes:
            self._message(f"the topology changed: {', '.join(axes)}")
        self._techniques.load_state_dict(state["techniques"])
        store.load(path, self._tensors(only=state["techniques"]), group=self._group)
        self._engine.load_state_dict(state["engine"])
        position = state["loader"]
        if changed_data:
            self._message(f"the data changed: {'; '.join(changed_data)}")
            position = identity.carried_on(position, self._loader.state_dict(), state["data"], self._data)
        self._loader.load_state_dict(position)
        self._remember(path, state, named)
        progress = Progress.from_state(state["progress"])
        self._message(self._rates(state["config"], progress, progress))
        return progress

    def _write(
        self,
        step: int,
        tensors: Mapping[str, LogicalTensor],
        state: Mapping[str, Any],
        group: dist.ProcessGroup | None,
    ) -> Path:
        keep, keep_every = self._config.keep, self._config.keep_every
        return store.save(
            self._directory, step, tensors, state, keep=keep, keep_every=keep_every, group=group
        )

    def _settled(self) -> UserError | None:
        """Wait for the save under way; why it could not be written, if so, the same on all ranks."""
        if not self._config.asynchronous:
            return None
        mine = self._background.wait()
        first = next((error for error in self._team.each(lambda: mine) if error is not None), None)
        if first is not None and not isinstance(first, UserError):
            raise first
        return first

    def _state(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": dataclasses.asdict(progress),
            "loader": self._loader.state_dict(),
            "engine": self._engine.state_dict(),
            "techniques": self._techniques.state_dict(),
            "weights_only": False,
            "data": self._data,
            "config": self._resolved,
            "topology": self._topology,
            "versions": provenance.versions(),
            "written_at": provenance.now(),
            "lineage": self._lineage,
        }

    def _chosen(self) -> tuple[Path | None, bool]:
        """The checkpoint to start from, and whether it was named rather than found in this run."""
        where, team = self._config.resume, self._team
        own = team.one(lambda: store.candidates(self._directory))
        if where == "none":
            team.one(lambda: self._require_unused(own))
            return None, False
        if where == "auto":
            paths = own
        else:
            paths = team.one(lambda: store.locate(Path(where)))
            if own and team.one(lambda: self._has_gone_on(own, paths)):
                self._message(f"this run has gone on from {where}: it continues where it was")
                paths = own
        if paths is own and own:
            problem = team.one(lambda: store.check_latest(self._directory))
            if problem:
                self._message(f"{problem}; nothing depends on it, and the next save writes it again")

        return self._intact(paths) if paths else None, paths is not own

    def _intact(self, paths: Sequence[Path]) -> Path:
        """The first that is not damaged; every file is hashed, the ranks sharing the work."""
        team = self._team

        def check(path: Path) -> dict[str, str]:
            parts = team.each(lambda: store.verify(path, part=team.rank, parts=team.size))
            return {name: problem for part in parts for name, problem in part.items()}

        path, damaged = store.first_intact(paths, check)
        for problem in damaged:
            self._message(f"passing over a damaged checkpoint: {problem}")
        assert path is not None  # there are some, and it raises where all are damaged
        return path

    def _require_unused(self, own: Sequence[Path]) -> None:
        if own or self._has_rows():
            raise UserError(
                f"checkpoint.resume=none, run.dir={self._run_dir}",
                f"a run there already, {own[0].name} its last checkpoint" if own else "a run there already",
                "an empty run directory, for nothing of another run to be lost",
                "checkpoint.resume=auto goes on with it; or give run.dir another place",
            )

    def _has_rows(self) -> bool:
        rows = self._run_dir / METRICS_FILE
        return rows.exists() and rows.stat().st_size > 0

    def _has_gone_on(self, own: Sequence[Path], sources: Sequence[Path]) -> bool:
        """Whether this run began from one of `sources` and has saved since.

        Raises:
            UserError: it is another run.
        """
        origins = {str(path.resolve()) for path in sources}
        for path in own:
            with contextlib.suppress(OSError, ValueError, LookupError):  # damaged: ask an older one
                if any(entry["from"] in origins for entry in store.read_state(path)["lineage"]):
                    return True
                break
        if all(path.resolve().parent == self._directory.resolve() for path in sources):
            return False  # it goes back
        raise UserError(
            f"checkpoint.resume={self._config.resume}, run.dir={self._run_dir}",
            f"a run there already that did not begin from it, {own[0].name} its last checkpoint",
            "an empty run directory, for nothing of another run to be lost",
            "checkpoint.resume=auto goes on with what is there; or give run.dir another place",
        )

    def _begin(self, path: Path, state: Mapping[str, Any], start: StartConfig, where: str) -> Progress:
        """A new run with the weights of the checkpoint at `path`, and what else `start` keeps of it."""
        model_changes = of_weights(state["config"]["model"], self._resolved["model"])
        _require_same_model(where, model_changes, "take that, or make others of them: megafab ckpt grow")
        changed = identity.tokenizer_differences(state["data"], self._data)
        if changed and not self._config.allow_data_change:
            raise UserError(
                where,
                f"another tokenizer than that of the weights: {'; '.join(changed)}",
                "theirs: each row of the embedding belongs to one of its ids",
                "name a corpus of that tokenizer, or accept it: checkpoint.allow_data_change=true",
            )
        kept = start.optimizer is Carry.keep
        retrieved, retrieving = map(retrieves, (state["config"]["model"], self._resolved["model"]))
        new_layers = retrieving and not retrieved
        if kept and new_layers:
            found = "weights without the layers that look at neighbours"
            expected = "moments of all parameters"
            raise UserError(f"start.optimizer=keep, {where}", found, expected, "start.optimizer=reset")
        if kept:
            self._require_same_optimizer(path, where)
        position = self._carried_on(state, where) if start.data is Carry.keep else None
        masking = self._masking(path, where)
        told = f", masks of {', '.join(masking)}" if masking else ""
        if retrieved != retrieving:
            told += f", layers that look at neighbours {'added' if retrieving else 'left out'}"
        self._message(
            f"starting from {path}: optimizer {start.optimizer.value}, place in the data "
            f"{start.data.value}{told}"
        )
        if position is not None:
            changed = identity.differences(state["data"], self._data)
        if changed:
            self._message(f"the data changed: {'; '.join(changed)}")
        if masking:
            self._techniques.load_state_dict({name: state["techniques"][name] for name in masking})
        tensors = self._tensors(only=masking)
        masks = store.masks(tensors)
        mine = self._engine.sharded_state() if kept else ()
        wanted = {
            name: tensor
            for name, tensor in tensors.items()
            if (name.startswith(store.WEIGHT) or name in masks or name in mine)
            and not (new_layers and is_retro(name.partition("/")[2]))
        }
        store.load(path, wanted, group=self._group)
        self._engine.load_state_dict(state["engine"] if kept else self._engine.state_dict())
        if position is not None:
            self._loader.load_state_dict(position)
        self._remember(path, state, named=True)
        parent = Progress.from_state(state["progress"])
        progress = Progress(before=parent.totals)
        self._message(self._rates(state["config"], parent, progress))
        return progress

    def _carried_on(self, state: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The place in the data of a run that reads on from that of a checkpoint.

        Raises:
            UserError: there is no domain that can be read on.
        """
        found, loader = "a checkpoint of weights alone", state["loader"]
        if state["data"]:
            position = identity.carried_on(loader, self._loader.state_dict(), state["data"], self._data)
            if any(position["counts"].values()) or not any(loader["counts"].values()):
                return position
            found = f"other windows: {'; '.join(identity.differences(state['data'], self._data))}"
        expected, fix = "a domain that is read on from where it was, in the same order", "start.data=reset"
        raise UserError(f"start.data=keep, {where}", found, expected, fix)

    def _require_own_start(self, own: Path) -> None:
        """A run that has begun with `start.checkpoint` does not begin with another.

        Where that is gone, or damaged since, the run goes on with what it has.
        """
        where = Path(str(self._start.checkpoint))
        try:
            sources = [store.read_state(path)["written_at"] for path in store.locate(where)]
            lineage = {entry["written_at"] for entry in store.read_state(own)["lineage"]}
        except (UserError, OSError, ValueError, LookupError):
            self._message(f"start.checkpoint={where} cannot be read any more: the run goes on with its own")
            return
        if not lineage & set(sources):
            raise UserError(
                f"start.checkpoint={where}, run.dir={self._run_dir}",
                f"a run there already that did not begin with it, {own.name} its last checkpoint",
                "the checkpoint that the run began with",
                "leave start.checkpoint as it was, or give run.dir another place",
            )

    def _remember(self, path: Path, state: Mapping[str, Any], named: bool) -> None:
        """Where the weights come from: every checkpoint that was named, not those of a run that went on."""
        origin = {"from": str(path.resolve()), "step": state["progress"]["step"]}
        origin["written_at"] = state["written_at"]
        self._lineage = [*state["lineage"], *([origin] if named else [])]

    def _masking(self, path: Path, where: str) -> list[str]:
        """The techniques under whose masks the weights of a checkpoint are.

        Raises:
            UserError: one of them is off, and training would make the weights dense without a word.
        """
        names = self._team.one(lambda: store.tensor_names(path))
        masking = sorted({technique for technique, _ in store.masks(names).values()})
        for technique in masking:
            if technique not in self._techniques.state_dict():
                raise UserError(
                    where,
                    f"weights under the masks of {technique}, which is off",
                    "the technique, or weights that were made dense on purpose",
                    f"technique=[{technique}]; or megafab ckpt densify {path} to=DIR, then "
                    "start.checkpoint=DIR",
                )
        return masking

    def _require_same_optimizer(self, path: Path, where: str) -> None:
        """What the optimizer keeps of each parameter is what the checkpoint has of it."""
        mine = {name.partition("/")[0] for name in self._engine.sharded_state()}
        kept = sorted(set[str]().union(*self._team.each(lambda: mine)))
        names = self._team.one(lambda: store.tensor_names(path))
        saved = sorted({name.partition("/")[0] for name in names} - {"techniques"})
        if saved != kept:
            raise UserError(
                where,
                "a checkpoint of weights alone"
                if saved == ["weight"]
                else f"{', '.join(saved)} of each parameter, as another optimizer keeps them",
                f"{', '.join(kept)}, as optim.name={self._resolved['optim']['name']} does",
                "take the optimizer that the checkpoint was written with, or begin a new run.dir with "
                "start.optimizer=reset",
            )

    def _tensors(self, only: Container[str] | None = None) -> dict[str, LogicalTensor]:
        """All logical tensors by name; a technique's are under `techniques/<its name>/`."""
        theirs = self._techniques.sharded_state(self._engine.weights(), only)
        return {
            **self._engine.sharded_state(),
            **{store.TECHNIQUES + name: tensor for name, tensor in theirs.items()},
        }


def _require_same_model(where: str, changed: Iterable[tuple[str, Any, Any]], fix: str) -> None:
    for key, then, now in changed:
        # Of a newer key an older checkpoint has no value; null does name layers that look at neighbours.
        if key in MEANING and (then is not None or key == "model.retro.layers"):
            raise UserError(
                f"{key}={shown(now)}, {where}",
                f"weights trained with {key}={shown(then)}",
                "the same model",
                f"{key}={shown(then)}: {fix}",
            )


def _new_group_like(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    made = dist.new_group(backend=dist.get_backend(group))
    assert isinstance(made, dist.ProcessGroup)  # this rank is in it
    return made
