"""Every technique by name: a field of `TechniquesConfig` and a class, imported when the field is set."""

from __future__ import annotations

import importlib
from dataclasses import fields

from megafab.techniques.base import Facts, Technique
from megafab.techniques.config import TechniquesConfig

CLASSES = {
    "z_loss": "megafab.techniques.z_loss:ZLoss",
    "label_smoothing": "megafab.techniques.label_smoothing:LabelSmoothing",
    "ema": "megafab.techniques.ema:EMA",
    "online_mixing": "megafab.techniques.online_mixing:OnlineMixing",
    "dynamic_loading": "megafab.techniques.dynamic_loading:DynamicLoading",
    "replay": "megafab.techniques.replay:Replay",
    "sample_reweighting": "megafab.techniques.sample_reweighting:SampleReweighting",
    "token_selection": "megafab.techniques.token_selection:TokenSelection",
    "token_dropping": "megafab.techniques.token_dropping:TokenDropping",
    "curriculum": "megafab.techniques.curriculum:Curriculum",
    "sequence_curriculum": "megafab.techniques.sequence_curriculum:SequenceCurriculum",
    "static_sparsity": "megafab.techniques.static_sparsity:StaticSparsity",
    "gradual_pruning": "megafab.techniques.gradual_pruning:GradualPruning",
    "freezing": "megafab.techniques.freezing:Freezing",
}


def load(name: str) -> type[Technique]:
    """The class of a technique."""
    module, _, attribute = CLASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(config: TechniquesConfig, facts: Facts) -> list[Technique]:
    """The techniques that are on, in the order of the config's fields."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    return [load(name)(setting, facts) for name, setting in settings.items() if setting is not None]
