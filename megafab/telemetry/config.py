"""Where a run is shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TrackingKind(Enum):
    """The service that follows a run."""

    wandb = "wandb"
    none = "none"


class WandbMode(Enum):
    """Whether wandb uploads while the run goes on."""

    auto = "auto"  # online when logged in, else offline
    online = "online"
    offline = "offline"


@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """wandb by default; TensorBoard on request; metrics.jsonl always."""

    kind: TrackingKind = TrackingKind.wandb
    mode: WandbMode = WandbMode.auto
    project: str = "megafab"
    entity: str | None = None
    group: str | None = None  # wandb shows the runs of a group together; null: none, or that of the stages
    tensorboard: bool = False


@dataclass(frozen=True, slots=True)
class RunSection:
    """The run's name and directory."""

    name: str = "default"
    dir: str = "runs/${run.name}"
