"""How the model is spread over ranks. Data parallelism is what is left."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ContextMethod(Enum):
    """How attention runs over a sequence that is split over context ranks."""

    ulysses = "ulysses"  # all-to-all: heads are split while attention runs (DeepSpeed-Ulysses)
    allgather = "allgather"  # keys and values are gathered, queries stay split (Llama 3)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Sizes of the parallel axes."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline rank; more than 1 is the interleaved schedule
    context: int = 1
    expert: int = 1
    sequence: bool = False  # split norms and dropout over the tensor axis too (needs tensor > 1)
    context_method: ContextMethod = ContextMethod.allgather


class Device(Enum):
    """What the ranks compute on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Ranks this command starts itself; with torchrun or srun, the number they started."""

    ranks: int = 1
    nodes: int | None = None  # of a Slurm job, with as many ranks on each; null: as many as the ranks fill
    device: Device = Device.auto
    threads: int | None = None  # CPU threads per rank; null: cores / ranks
    timeout_minutes: int = 30  # a rank that waits longer for the others ends the job
