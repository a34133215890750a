"""The safetensors format, one tensor in memory at a time: a length, a JSON header, then the values.

https://github.com/huggingface/safetensors#format. Written here rather than by its own package because that
wants every tensor of a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafab.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a tensor before there are values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    directory: Path, entries: Mapping[str, Entry], values: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> list[str]:
    """Write tensors as one file, or as numbered files with an index; returns the names of the files.

    Args:
        directory: where to.
        entries: every tensor, in the order in which it will come.
        values: the tensors in that order.
        max_bytes: of values in a file; one tensor alone may exceed it.
    """
    files: list[dict[str, Entry]] = [{}]
    used = 0
    for name, entry in entries.items():
        if files[-1] and used + entry.nbytes > max_bytes:
            files.append({})
            used = 0
        files[-1][name] = entry
        used += entry.nbytes
    several = len(files) > 1
    names = [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" if several else SINGLE
        for number in range(1, len(files) + 1)
    ]
    coming = iter(values)
    for name, content in zip(names, files, strict=True):
        _write_file(directory / name, content, coming)
    if several:
        total = sum(entry.nbytes for entry in entries.values())
        where = {tensor: name for name, content in zip(names, files, strict=True) for tensor in content}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write_file(path: Path, entries: Mapping[str, Entry], values: Iterator[tuple[str, torch.Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        span = [offset, offset + entry.nbytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            given, tensor = next(values)
            assert (given, tuple(tensor.shape), tensor.dtype) == (name, entry.shape, entry.dtype), given
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class Files:
    """The tensors of a directory of safetensors files, by name; read one at a time.

    Raises:
        UserError: no such files, a file that is damaged, or a number type other than floating point.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.entries: dict[str, Entry] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        for path in _paths(directory):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _LARGEST_HEADER:
                    raise ValueError("a header too long")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if path.stat().st_size != 8 + length + end:
                raise ValueError(f"{path.stat().st_size} bytes where the header says {8 + length + end}")
            for name, entry in header.items():
                self.entries[name] = Entry(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                begin, stop = entry["data_offsets"]
                if stop - begin != self.entries[name].nbytes:
                    raise ValueError(f"{stop - begin} bytes for {name}")
                self._where[name] = path, 8 + length + begin
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from error
        except KeyError as error:
            raise _unusable(path, f"the number type or key {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise _unusable(path, f"damaged content ({error})") from None

    def rename(self, change: Callable[[str], str]) -> None:
        """Give the tensors other names."""
        self.entries = {change(name): entry for name, entry in self.entries.items()}
        self._where = {change(name): where for name, where in self._where.items()}

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor, in the type they are stored in."""
        entry, (path, offset) = self.entries[name], self._where[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        if out.numel():
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                view = out.view(-1).view(torch.uint8).numpy().data
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise _unusable(path, "a file that ends too early")
                    view = view[count:]
        return out


def _paths(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _unusable(index, "damaged content") from None
        return [directory / name for name in sorted(names)]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    found = "no such directory" if not directory.exists() else "no safetensors files"
    expected = f"a directory with {SINGLE}, or with {INDEX} and its files"
    raise UserError(str(directory), found, expected, "give the directory that save_pretrained wrote")


def _unusable(path: Path, found: str) -> UserError:
    return UserError(str(path), found, "a whole safetensors file of F32, BF16 or F16", "restore the file")
