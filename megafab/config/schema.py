"""The whole configuration of a training run: one frozen tree, section by section.

Each section's dataclass lives beside the code it configures and imports nothing but the standard
library and OmegaConf, so that a configuration can be checked on a login node without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megafab.checkpoint.config import CheckpointConfig, StartConfig
from megafab.data.config import DataConfig, EvalConfig
from megafab.engine.config import EngineConfig
from megafab.kernels.config import Kernels
from megafab.model.config import ModelConfig
from megafab.optim.config import BatchRampConfig, Count, OptimConfig, ScheduleConfig
from megafab.resilience.config import ResilienceConfig
from megafab.techniques.config import TechniquesConfig
from megafab.telemetry.config import RunSection, TrackingConfig
from megafab.topology.config import LaunchConfig, ParallelConfig


class Precision(Enum):
    """Of weights and activations; gradients, masters and moments are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """Which activations are computed again in backward instead of kept."""

    none = "none"
    selective = "selective"  # recompute attention only (Korthikanti et al. 2022)
    full = "full"  # recompute every layer from its input


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long, how much at a time, from which seed. Exactly one of `steps` and `tokens` is set."""

    steps: int | None = None
    tokens: int | None = None
    count: Count = Count.tokens  # which tokens `tokens` counts
    global_batch: int = 8  # sequences per optimizer step, over all ranks
    micro_batch: int = 1  # sequences per forward pass of one model replica
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    seed: int = 1234
    precision: Precision = Precision.fp32
    recompute: Recompute = Recompute.none
    head_chunk: int | None = None  # tokens whose logits exist at a time on a rank; null: a micro-batch's
    log_every: int = 1  # steps between logged steps
    max_skipped: int = 20  # consecutive non-finite steps before the run stops


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything `megafab train` is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: Kernels = Kernels.auto  # what computes between matrix products: megafab/kernels/README.md
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    start: StartConfig = field(default_factory=StartConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    techniques: TechniquesConfig = field(default_factory=TechniquesConfig)
    run: RunSection = field(default_factory=RunSection)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
