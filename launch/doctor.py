"""`megafab doctor`: what is installed, what each missing part would buy, and whether this node can train.

Takes no arguments. The last line is the verdict, from a real step: a process group on the device's
backend, a matrix product with its gradients, and an all-reduce. Exit code 0 when the node can train, else 1.
"""

from __future__ import annotations

import importlib.util
import platform as python_platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from megafab.errors import ConfigError


class Part(NamedTuple):
    """Something that may be missing: how it is found, what it buys, how to get it."""

    name: str
    buys: str
    install: str
    module: str = ""  # import name, where the distribution's name is another


# Without one of these, nothing trains.
REQUIRED = (
    Part("torch", "everything", "make setup"),
    Part("megatron-core", "the model's parts and the parallel schedules", "make setup", "megatron.core"),
    Part("hydra-core", "the configuration", "make setup", "hydra"),
    Part("numpy", "reading the shards", "make setup"),
    Part("sentencepiece", "SentencePiece tokenizers", "make setup"),
    Part("tokenizers", "tokenizer.json tokenizers", "make setup"),
)
OPTIONAL = (
    Part("apex", "kernels=apex: its norms", "build it from github.com/NVIDIA/apex"),
    Part("ninja", "building the CUDA kernels", "pip install 'megafab[gpu]'"),
    Part("deepspeed", "engine=deepspeed: ZeRO and offload", "pip install deepspeed"),
    Part("wandb", "following runs in the browser", "pip install wandb"),
    Part("tensorboard", "tracking.tensorboard=true", "pip install tensorboard"),
    Part("datasets", "training text from the Hugging Face Hub", "pip install datasets"),
    Part("pyarrow", "Parquet sources", "pip install 'megafab[data]'"),
    Part("zstandard", ".zst sources", "pip install 'megafab[data]'"),
    Part(
        "faiss-cpu",
        "megafab data retrieval, megafab generate with retrieval",
        "pip install faiss-cpu",
        "faiss",
    ),
    Part("transformers", "the judge of megafab ckpt convert", "pip install 'megafab[eval]'"),
)
COMMANDS = (
    Part("g++", "building the CUDA kernels", "install a C++ compiler"),
    Part("nvcc", "building the CUDA kernels", "install the CUDA toolkit"),
    Part("sbatch", "megafab submit: jobs on a Slurm cluster", "log in to one"),
    Part("srun", "ranks on a Slurm cluster", "log in to one"),
)


def main(overrides: list[str]) -> int:
    """Print the report; returns 0 when this node can train, else 1."""
    if overrides:
        raise ConfigError(overrides[0], "an argument", "none", "megafab doctor")
    print(f"python  {python_platform.python_version()} ({sys.executable})")
    for title, parts, find in (
        ("required", REQUIRED, _installed),
        ("optional", OPTIONAL, _installed),
        ("commands", COMMANDS, lambda part: shutil.which(part.name)),
    ):
        print(f"\n{title}")
        for part in parts:
            print(_line(part, find(part)))
    print("\nthis node")
    missing = (f"{part.name} is missing" for part in REQUIRED if _installed(part) is None)
    failures = (text for check in CHECKS for text in _report(check))
    problem = next(missing, None) or next(failures, None)
    print(f"\nthis node can train: {'yes' if problem is None else f'no ({problem})'}")
    return 0 if problem is None else 1


def _line(part: Part, found: str | None) -> str:
    if found is None:
        return f"  {part.name:<20} missing: {part.buys}. To get it: {part.install}"
    return f"  {part.name:<20} {found}"


def _installed(part: Part) -> str | None:
    """The version of an installed package; None when it is absent. Nothing is imported."""
    try:
        found = version(part.name)
    except PackageNotFoundError:
        return None
    top = (part.module or part.name).partition(".")[0]
    return found if importlib.util.find_spec(top) else None


def _report(check: Callable[[], str]) -> Iterator[str]:
    """Run one check and print what it says; yields the reason when it fails."""
    name = check.__name__.strip("_").replace("_", " ")
    try:
        print(f"  {name:<20} {check()}")
    except Exception as error:  # whatever is broken here is what the user wants to read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"  {name:<20} FAILED: {reason}")
        yield f"{name}: {reason}"


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads (torch {torch.__version__})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {', '.join(sorted(set(names)))} (torch {torch.__version__})"


def _megatron() -> str:
    from megafab.platform import SUPPORTED_CORE, platform

    platform.install()
    found = version("megatron-core")
    if found in SUPPORTED_CORE:
        return f"megatron-core {found} runs here, on {platform.device.type} with {platform.backend}"
    return f"megatron-core {found} runs on GPUs; the CPU shim is written for {', '.join(SUPPORTED_CORE)}"


def _one_step() -> str:
    """A group of one rank, a matrix product and its gradient, a reduction: what every step is made of."""
    import torch
    import torch.distributed as dist

    from megafab.platform import platform

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)
    try:
        weight = torch.ones(64, 64, device=platform.device, requires_grad=True)
        loss = (weight @ weight).sum()
        loss.backward()
        assert weight.grad is not None
        dist.all_reduce(weight.grad)
        # d/dW sum(W W) at W = 1 is 2 x 64 in every element.
        if not torch.equal(weight.grad, torch.full_like(weight.grad, 128.0)):
            raise RuntimeError(f"a gradient of {float(weight.grad[0, 0])} where 128 is right")
        platform.synchronize()
    finally:
        dist.destroy_process_group()
    return f"matrix product, gradient and all-reduce over {platform.backend} are right"


def _tracking() -> str:
    """Whether runs will be followed online."""
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed; use tracking=none"
    from megafab.telemetry.sinks import wandb_logged_in

    if wandb_logged_in():
        return "logged in: runs are online"
    return "not logged in: runs are kept offline (wandb login to change that)"


CHECKS = (_devices, _megatron, _one_step, _tracking)
