"""Which engine steps the model, and how it talks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class EngineName(Enum):
    """Which library holds gradients and optimizer."""

    megatron = "megatron"
    deepspeed = "deepspeed"


class Offload(Enum):
    """What ZeRO keeps in the host's memory instead of the accelerator's."""

    none = "none"
    optimizer = "optimizer"  # masters and moments, updated by the CPU (Ren et al. 2021)
    parameters = "parameters"  # these and, with ZeRO 3, the partitioned parameters
    nvme = "nvme"  # on disks (Rajbhandari et al. 2021); refused, see the rules


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`megatron`: Megatron-core's DDP and distributed optimizer. `deepspeed`: ZeRO, stages 1 to 3.

    What only ZeRO knows is null under `megatron`.
    """

    name: EngineName = EngineName.megatron
    zero_stage: int | None = None  # deepspeed: shard 1 optimizer, 2 and gradients, 3 and parameters
    offload: Offload = Offload.none  # deepspeed: what lives in the host's memory
    persistent_parameters: int | None = None  # ZeRO 3: smaller ones stay gathered; elements, null: 100,000
    overlap_grad_reduce: bool = True  # reduce each gradient bucket while backward goes on
    overlap_param_gather: bool = False  # megatron: gather updated parameters during the next forward
    bucket_parameters: int = 40_000_000  # parameters per communication bucket
