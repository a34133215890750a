"""Builds the kernels: a library for the torch that is installed, or just to see that they compile.

The library is built ahead by `make kernels` or at first use, never at import, and kept in a folder named
after its sources, torch, CUDA and the GPUs it is for. Without a GPU the same command compiles every source
for every target and prints what the compiler says of its registers.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megafab.errors import UserError

CSRC = Path(__file__).parent / "csrc"
# Ampere, Hopper with its own instructions, Blackwell.
TARGETS = ("80", "90a", "100")
_NAME = "megafab_kernels"
_FLAGS = ("-O3", "-std=c++17")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """CUDA's compiler, by where CUDA is."""

    home: Path

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @property
    def version(self) -> str:
        """Of nvcc, which is asked."""
        said = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release ([\d.]+)", said)
        return version[1] if version else "unknown"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes on one target, as ptxas reports it; spills and stack in bytes a thread."""

    kernel: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int


def sources() -> list[Path]:
    """All files that are compiled."""
    return sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])


def toolchain() -> Toolchain | None:
    """The CUDA toolkit of CUDA_HOME, of nvcc on PATH or in /usr/local/cuda; None if there is none."""
    found = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parents[1], "/usr/local/cuda"]
    for home in (Path(home) for home in homes if home):
        # nvcc on PATH may be a script that starts another.
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return Toolchain(home)
    return None


def missing() -> str | None:
    """What would have to be installed for `library` to build; None: nothing."""
    if torch.version.cuda is None:
        return "a torch with CUDA"
    if toolchain() is None:
        return f"the CUDA toolkit {torch.version.cuda} (nvcc), with CUDA_HOME where it is"
    for program in ("ninja", "g++"):
        if shutil.which(program) is None:
            return program
    return None


def target_of_device() -> str:
    """The target for this process' GPU."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def unavailable(where: str, lacking: str) -> UserError:
    """That kernels were asked for which cannot be had."""
    return UserError(where, "none here", lacking, "install it, or set kernels=auto")


def library_path(targets: Sequence[str]) -> Path:
    """Where the library is, once it is built."""
    tools = toolchain()
    assert tools is not None
    told = "\0".join((torch.__version__, str(torch.version.cuda), tools.version, *_FLAGS, *targets))
    code = b"".join(path.read_bytes() for path in sorted(CSRC.iterdir()))
    return _cache() / hashlib.sha256(told.encode() + code).hexdigest()[:16] / f"{_NAME}.so"


def library(targets: Sequence[str], message: Callable[[str], None]) -> Path:
    """The kernels as a library for this torch, built if it is not there yet; one process does, others wait.

    Args:
        targets: what they are for.
        message: told one line where it is to be built.

    Raises:
        UserError: it does not compile.
    """
    built, tools = library_path(targets), toolchain()
    assert tools is not None
    if built.exists():
        return built
    message(f"kernels: compiling for sm_{', sm_'.join(targets)}, once for this machine: about two minutes")
    built.parent.mkdir(parents=True, exist_ok=True)
    # The kernel lets go of it when this process ends, however it ends; torch's own lock would stay.
    with (built.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            try:
                _build(built, tools, targets)
            except (RuntimeError, OSError) as error:
                log = built.parent / "error.log"
                log.write_text(str(error))
                raise UserError(
                    "kernels",
                    f"they do not compile with nvcc {tools.version} for torch {torch.__version__}: see {log}",
                    f"the CUDA toolkit that torch was built with, {torch.version.cuda}",
                    "install it, or set kernels=reference",
                ) from error
    return built


def _build(built: Path, tools: Toolchain, targets: Sequence[str]) -> None:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(tools.home)  # torch has looked for it at import, by other rules
    out = built.parent / "build"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    cpp_extension.load(
        _NAME,
        [str(path) for path in sources()],
        extra_cflags=["-O2"],
        extra_cuda_cflags=[*_FLAGS, *_architectures(targets)],
        build_directory=str(out),
        is_python_module=False,
    )
    # A link: it appears whole, and is the file that this process has loaded already.
    os.link(out / f"{_NAME}.so", built)


def compile_all(out: Path, targets: Sequence[str] = TARGETS) -> list[Usage]:
    """Compiles every kernel for every target, into objects in `out`, without a GPU or a torch with CUDA.

    Raises:
        UserError: there is no nvcc, or a source does not compile.
    """
    tools = toolchain()
    if tools is None:
        raise UserError("nvcc", "none", "the CUDA toolkit", "install it, and set CUDA_HOME to where it is")
    out.mkdir(parents=True, exist_ok=True)

    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS  # what torch adds to ours

    def one(source: Path) -> list[Usage]:
        command = [str(tools.nvcc), *COMMON_NVCC_FLAGS, *_FLAGS, *_architectures(targets)]
        command += ["-Xptxas", "-v", "-Xcompiler", "-fPIC"]
        command += ["-c", str(source), "-o", str(out / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log = out / f"{source.stem}.log"
            log.write_text(done.stderr)
            raise UserError(str(source), f"it does not compile: see {log}", "CUDA C++", "mend it")
        return _usages(done.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [usage for usages in pool.map(one, sorted(CSRC.glob("*.cu"))) for usage in usages]


def _architectures(targets: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "megafab" / "kernels"


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def _usages(report: str) -> list[Usage]:
    """The kernels of a report of `ptxas -v`."""
    usages, kernel, target, stack, spills = [], "", "", 0, 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            kernel, target = entry.groups()
        elif frame := _STACK.search(line):
            stack, spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif (used := _USED.search(line)) and kernel:
            usages.append(Usage(kernel, target, int(used[1]), int(used[2] or 0), stack, spills))
            kernel = ""
    return _demangled(usages)


def _demangled(usages: list[Usage]) -> list[Usage]:
    if not usages or shutil.which("c++filt") is None:
        return usages
    names = "\n".join(usage.kernel for usage in usages)
    said = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    plain = (name.replace("(anonymous namespace)::", "").partition("(")[0] for name in said.splitlines())
    return [
        replace(usage, kernel=name.replace("void megafab::", ""))
        for name, usage in zip(plain, usages, strict=True)
    ]


def main() -> None:
    """Builds the library where torch has CUDA; else compiles the kernels and prints what they take."""
    lacking = missing()
    if lacking is None:
        targets = [target_of_device()] if torch.cuda.is_available() else TARGETS
        print(library(targets, print))
        return
    usages = compile_all(_cache() / "objects")
    wide = max(len(usage.kernel) for usage in usages)
    print(f"{'kernel':<{wide}}  target   registers  shared  stack  spills")
    for u in usages:
        print(
            f"{u.kernel:<{wide}}  {u.target:<7}  {u.registers:>9}  {u.shared:>6}  {u.stack:>5}  {u.spills:>6}"
        )
    count, targets = len(usages) // len(TARGETS), ", ".join(f"sm_{target}" for target in TARGETS)
    print(f"{count} kernels compile for {targets}; to use them, install {lacking}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
