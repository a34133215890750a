"""The real kernels, compiled for the CPU, where the threads of a block take turns (`emulator.h`).

`load` compiles `megafab/kernels/csrc` with a C++ compiler and CUDA's headers, and registers the result in
`torch.ops.megafab_emulated`, with the schemas, fakes and gradients of `torch.ops.megafab`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from megafab.kernels import build, ops

NAMESPACE = "megafab_emulated"
HERE = Path(__file__).parent


def compile_library(cuda: Path) -> Path:
    """The emulated library; compiled once for the same sources.

    Args:
        cuda: where CUDA's headers are.
    """
    sources = build.sources()
    told = [*sorted(build.CSRC.iterdir()), HERE / "emulator.h"]
    key = hashlib.sha256(
        b"".join(path.read_bytes() for path in told) + torch.__version__.encode()
    ).hexdigest()
    out = Path(tempfile.gettempdir()) / f"megafab-emulated-{os.getuid()}" / key[:16]
    library = out / "emulated.so"
    if library.exists():
        return library
    out.mkdir(parents=True, exist_ok=True)
    torch_root = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-DMEGAFAB_EMULATE",
        f"-I{HERE}",
        "-isystem",
        str(cuda / "include"),
    ]
    for part in ("include", "include/torch/csrc/api/include"):
        flags += ["-isystem", str(torch_root / part)]

    def one(source: Path) -> Path:
        made = out / f"{source.name}.o"
        _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    unfinished = library.with_suffix(".tmp")
    _run(
        [
            "g++",
            "-shared",
            *map(str, objects),
            f"-L{torch_root / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
            "-o",
            str(unfinished),
        ]
    )
    unfinished.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def load() -> None:
    """Registers `torch.ops.megafab_emulated`; what keeps it from that is told once to every caller."""
    error = _load()
    if error is not None:
        raise error


@cache
def _load() -> AssertionError | None:
    tools = build.toolchain()
    assert tools is not None
    try:
        library = compile_library(tools.home)
    except AssertionError as error:
        return error
    for op in ops.OPS.values():
        ops.register(op, NAMESPACE, None)
    torch.ops.load_library(str(library))
    return None
