"""What `megafab ckpt` does to checkpoints, on one process: a band of rows at a time, whatever their size.

Memory: a few bands of rows of 64 MiB each (`reader.BAND_BYTES`), whatever the size of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafab.checkpoint import store, writer
from megafab.checkpoint.changes import changes
from megafab.checkpoint.files import Deal
from megafab.checkpoint.provenance import derived_state
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.errors import UserError
from megafab.telemetry.meter import Meter, size

_CHUNK = 1 << 18  # elements compared at once
_VERIFY_PARTS = 64  # in which the files of a checkpoint are hashed, to show how far it is


def describe(path: Path, *, tensors: bool) -> Iterator[str]:
    """What is in the checkpoint at `path`, line by line; with `tensors`, each of them."""
    reader, manifest = Reader(path), store.read_manifest(path)
    state = reader.state
    progress, model, data = state["progress"], state["config"]["model"], state["data"]
    yield str(path)
    counts = f"{progress['samples']:,} samples, {progress['tokens']:,} tokens"
    skipped = f", {progress['skipped']:,} updates skipped" if progress["skipped"] else ""
    yield f"step      {progress['step']:,}: {counts}{skipped}"
    parameters = sum(info.nbytes // info.dtype.itemsize for info in reader.weights.values())
    sizes = {key: model[key] for key in ("layers", "hidden", "heads", "seq_len")}
    yield f"model     {model['name']}: {parameters:,} parameters, " + ", ".join(
        f"{key} {value}" for key, value in sizes.items()
    )
    if state["weights_only"]:
        yield "use       weights only: a run that resumes from it begins anew, at step 0"
    versions = ", ".join(f"{package} {version}" for package, version in state["versions"].items())
    yield f"written   {state['written_at']} by {versions}"
    axes = ", ".join(f"{axis} {count}" for axis, count in state["topology"].items())
    yield f"topology  {axes or 'none: no run has written it'}"
    if data:
        mixture = ", ".join(f"{name} {weight:.3g}" for name, weight in data["mixture"].items())
        yield f"data      corpus {data['corpus'][:12]}, tokenizer {data['tokenizer'][:12]}, mixture {mixture}"
    yield f"lineage   {len(state['lineage'])} earlier"
    for entry in state["lineage"]:
        how = entry.get("operation", "resume")
        share = f" x {entry['weight']:.4g}" if "weight" in entry else ""
        share += f" ({growth_in_words(entry['growth'])})" if "growth" in entry else ""
        yield f"          {how}{share}: {entry['from']}, step {entry['step']:,}, {entry['written_at']}"
    yield from _contents(reader, manifest["files"])
    if tensors:
        width = max(map(len, reader.tensors))
        for name, info in reader.tensors.items():
            shape = " x ".join(map(str, info.shape)) or "scalar"
            dtype, pieces = str(info.dtype).removeprefix("torch."), f"{info.pieces} piece"
            yield f"{name:<{width}}  {dtype:<8} {shape:<20} {pieces}{'s' if info.pieces > 1 else ''}"


def _contents(reader: Reader, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    kinds: dict[str, list[TensorInfo]] = {}
    for name, info in reader.tensors.items():
        parts = name.split("/")
        kinds.setdefault("/".join(parts[:2]) if parts[0] == "techniques" else parts[0], []).append(info)
    for number, (kind, infos) in enumerate(kinds.items()):
        types = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
        total = size(sum(info.stored for info in infos))
        yield f"{'' if number else 'tensors':<9} {kind}: {len(infos)} of {types}, {total}"
    total = size(sum(entry["size"] for entry in files.values()))
    yield f"files     {len(files)}, {total}, each with its hash"


def growth_in_words(growth: Mapping[str, Any]) -> str:
    """What a lineage says of a growth: `layers 4 to 8, depth=stack`."""
    sizes = [f"{key} {before} to {after}" for key, (before, after) in growth["sizes"].items()]
    operators = [f"{key}={growth[key]}" for key in ("depth", "width") if growth[key]]
    return ", ".join([*sizes, *operators])


def verify(paths: Sequence[Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Every file of each checkpoint hashed; what is wrong with it, by file."""
    for path in paths:
        try:
            files = store.read_manifest(path)["files"]
        except UserError:
            yield path, store.quick_check(path)
            continue
        meter = Meter(f"verify {path.name}", sum(entry["size"] for entry in files.values()))
        problems: dict[str, str] = {}
        names, parts = sorted(files), min(len(files), _VERIFY_PARTS)
        for part in range(parts):
            problems.update(store.verify(path, part=part, parts=parts))
            meter.add(sum(files[name]["size"] for name in names[part::parts]))
        meter.close()
        yield path, problems


def open_intact(path: Path) -> Reader:
    """A reader of the checkpoint at `path`, every file of which has the recorded hash.

    Raises:
        UserError: it is damaged; nothing may be made of it.
    """
    ((_, problems),) = verify([path])
    if problems:
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(str(path), found, "an intact checkpoint", "take another, or restore the file")
    return Reader(path)


def reshape(path: Path, to: Path, *, deal: Deal | None, moments: bool) -> Path:
    """The checkpoint at `path` again, its tensors dealt to other files; returns the new one.

    Args:
        path: a step directory.
        to: the directory to make; the checkpoint is in its `checkpoints/`.
        deal: `writer.by_size`, `writer.by_count`; null: files of 4 GiB.
        moments: false leaves out all but the weights and, of a sparse model, their masks.
    """
    reader = open_intact(path)
    needed = {*store.masks(reader.tensors), *(store.WEIGHT + name for name in reader.weights)}
    chosen = {name: info for name, info in reader.tensors.items() if moments or name in needed}
    meter = Meter("reshape", sum(info.nbytes for info in chosen.values()))

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        tensor = reader.read(name, band)
        meter.add(tensor.nbytes)
        return tensor

    state = derived_state("reshape", [(path, reader.state)], weights_only=not moments)
    with writer.fresh_directory(to) as draft:
        made = writer.write(draft, state["progress"]["step"], chosen, source, state, deal=deal)
        meter.close()
    return to / made.relative_to(draft)


def average(paths: Sequence[Path], to: Path, weights: Sequence[float] | None) -> Path:
    """The weighted mean of the master weights of several checkpoints; returns the new one.

    Polyak and Juditsky 1992; Izmailov et al. 2018 (arXiv 1803.05407); Wortsman et al. 2022 (arXiv
    2203.05482) for runs that differ. Moments belong to a trajectory that the mean is not on, so the result
    has weights only: to evaluate, to export, to begin another run with. Sums are in double precision. Masks
    that all of them have alike are those of the mean; under different ones its weights are dense.

    Args:
        paths: step directories of the same model, at least one.
        to: the directory to make; the checkpoint is in its `checkpoints/`, under the last one's step.
        weights: of each, at least 0 and not all 0; they are divided by their sum. None: all alike.

    Raises:
        UserError: the models differ, or the number of weights is another.
    """
    readers = [open_intact(path) for path in paths]
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths):
        found, expected = f"{len(weights)} weights", f"{len(paths)}, one for each checkpoint"
        raise UserError(f"weights={list(weights)}", found, expected, "give as many weights as paths")
    for reader in readers[1:]:
        _require_same_weights(readers[0], reader)
    last = readers[-1]
    masks = _shared_masks(readers)
    chosen = {store.WEIGHT + name: info for name, info in last.weights.items()}
    chosen |= {name: last.tensors[name] for name in masks}
    meter = Meter("average", len(readers) * sum(info.nbytes for info in chosen.values()))

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        if name in masks:
            meter.add(len(readers) * math.prod((band[1], *chosen[name].shape[1:])))
            return last.read(name, band)
        total: torch.Tensor | None = None
        for reader, weight in zip(readers, weights, strict=True):
            tensor = reader.read(name, band)
            total = torch.zeros(tensor.shape, dtype=torch.float64) if total is None else total
            total.add_(tensor, alpha=weight / sum(weights))
            meter.add(tensor.nbytes)
        assert total is not None
        return total.to(chosen[name].dtype)

    sources = [(reader.path, reader.state) for reader in readers]
    state = derived_state("average", sources, weights_only=True)
    for entry, weight in zip(state["lineage"][-len(paths) :], weights, strict=True):
        entry["weight"] = weight / sum(weights)
    with writer.fresh_directory(to) as draft:
        made = writer.write(draft, state["progress"]["step"], chosen, source, state)
        meter.close()
    return to / made.relative_to(draft)


def _shared_masks(readers: Sequence[Reader]) -> list[str]:
    """The names of the masks of a sparse model, if all checkpoints have the same ones."""
    *others, last = readers
    names = sorted({name for reader in readers for name in store.masks(reader.tensors)})
    same = all(
        name in reader.tensors
        and name in last.tensors
        and reader.tensors[name].like == last.tensors[name].like
        and all(
            torch.equal(reader.read(name, band), last.read(name, band)) for band in last.tensors[name].bands()
        )
        for reader in others
        for name in names
    )
    return names if same else []


def _require_same_weights(first: Reader, other: Reader) -> None:
    mine = {name: info.like for name, info in first.weights.items()}
    theirs = {name: info.like for name, info in other.weights.items()}
    odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if odd:
        raise UserError(
            f"{other.path}, weight {odd[0]}",
            _like(theirs.get(odd[0])),
            f"{_like(mine.get(odd[0]))}, as in {first.path}",
            "average checkpoints of the same model",
        )


def _like(like: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if like is None else f"{str(like[1]).removeprefix('torch.')} of shape {like[0]}"


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How two tensors of one name differ.

    `largest` is max |a - b|, `relative` the norm of a - b over that of a (inf where a is 0), `count` the
    number of elements whose bits differ; `reason` says why they cannot be compared, where they cannot.
    """

    name: str
    largest: float = 0.0
    relative: float = 0.0
    count: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ; `config` has (key, value in a, value in b)."""

    config: tuple[tuple[str, Any, Any], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]  # those that differ
    compared: int

    def __bool__(self) -> bool:
        return bool(self.config or self.only_a or self.only_b or self.tensors)


def diff(a: Path, b: Path) -> Difference:
    """Compare two checkpoints: configuration, names, then every tensor both have.

    Raises:
        UserError: one of them is damaged; what differs would say nothing of the runs.
    """
    one, two = open_intact(a), open_intact(b)
    both = [name for name in one.tensors if name in two.tensors]
    meter = Meter("diff", sum(one.tensors[name].nbytes for name in both))
    found = []
    for name in both:
        difference = _difference(name, one, two)
        if difference is not None:
            found.append(difference)
        meter.add(one.tensors[name].nbytes)
    meter.close()
    return Difference(
        tuple(changes(one.state["config"], two.state["config"])),
        tuple(name for name in one.tensors if name not in two.tensors),
        tuple(name for name in two.tensors if name not in one.tensors),
        tuple(found),
        len(both),
    )


def _difference(name: str, one: Reader, two: Reader) -> TensorDifference | None:
    a, b = one.tensors[name], two.tensors[name]
    if a.like != b.like:
        return TensorDifference(name, reason=f"{_like(a.like)} and {_like(b.like)}")
    largest = squares = norm = 0.0
    count = 0
    for band in a.bands() if a.nbytes else ():
        left, right = one.read(name, band).flatten(), two.read(name, band).flatten()
        for x, y in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True):
            differs = (x.view(torch.uint8) != y.view(torch.uint8)).view(len(x), -1).any(dim=1)
            count += int(differs.sum())
            norm += float(torch.linalg.vector_norm(x.double())) ** 2
            delta = x.double().sub_(y.double())
            squares += float(torch.linalg.vector_norm(delta)) ** 2
            largest = _larger(largest, float(delta.abs_().max()))
    if not count:
        return None
    return TensorDifference(name, largest, (squares / norm) ** 0.5 if norm else float("inf"), count)


def _larger(a: float, b: float) -> float:
    """The larger; NaN if either is."""
    return b if b != b or b > a else a


def show(difference: Difference, *, tensors: bool) -> Iterator[str]:
    """The difference as lines: configuration, names, tensors from the most different."""
    for key, left, right in difference.config:
        yield f"config   {key}: {left} and {right}"
    for side, names in (("first", difference.only_a), ("second", difference.only_b)):
        for only in names if tensors else names[:10]:
            yield f"only in the {side}: {only}"
        if len(names) > 10 and not tensors:
            yield f"only in the {side}: {len(names) - 10} more (tensors=true lists them)"
    ranked = sorted(difference.tensors, key=lambda t: (not t.reason, t.relative == t.relative, -t.relative))
    for t in ranked if tensors else ranked[:10]:
        what = t.reason or (
            f"{t.count:,} elements, largest difference {t.largest:.3e}, relative {t.relative:.3e}"
        )
        yield f"tensor   {t.name}: {what}"
    if len(ranked) > 10 and not tensors:
        yield f"tensor   {len(ranked) - 10} more (tensors=true lists them)"
    yield f"{len(difference.tensors)} of {difference.compared} common tensors differ"
