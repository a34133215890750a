"""Random layerwise token dropping (random-LTD): middle layers compute a random part of the tokens.

Yao et al. 2022, "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale
Transformers" (arXiv 2211.11586); as a part of DeepSpeed's data efficiency library, Li et al. 2022 (arXiv
2212.03597). Each dropping layer draws, for each sequence, r of its S positions without replacement, computes
these alone, in order, and lets the others pass by. All layers but the first and the last drop. r grows by
step t, monotonically (the papers' MSLG), from `start` to S in T = `steps`, 0.7 of the run unless given:

    r(t) = min(S, floor(start + (S - start) t / T to a multiple of round_to)),      S from t = T on

A position keeps its rotation and its document where its neighbours are dropped. Evaluation and generation
use all tokens. From r = S on the layers are those of a model without this technique, bit for bit.

What is kept is a hash of (seed, step, layer, global sample index): it does not depend on the topology, the
micro-batch or how often a layer is computed, and there is no state. A step counts as many tokens of the mean
layer as the layers computed, (S (L - n) + r n) / L of a sequence with n of L layers dropping: in these
`train.count=layer_tokens` measures a run and its learning rate (the papers' LayerToken schedule).

Shape suffixes: N dropping layers of a model chunk, B rows of a micro-batch, R kept positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from megafab.data.order import random_bits, stream_key
from megafab.loss.ledger import LedgerReport
from megafab.model.dropping import dropping_layers, drops_tokens, rows_of
from megafab.model.gpt import GPT
from megafab.platform import platform
from megafab.run import Progress, StepPlan
from megafab.techniques.base import Clock, Facts, RunPlan, Technique
from megafab.techniques.config import TokenDroppingConfig
from megafab.topology.mesh import Mesh


class TokenDropping(Technique):
    """Says how many tokens are kept, draws which, and has the layers leave the others out."""

    name = "token_dropping"
    writes = frozenset({"model", "kept_tokens"})
    after = ("sequence_curriculum",)
    config: TokenDroppingConfig

    def __init__(self, config: TokenDroppingConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._layers = frozenset(config.dropping(facts.shape.config.layers))
        share = facts.steps if config.steps < 1 else 1
        self._steps = max(1, round(config.steps * share))
        self._clock = Clock()

    def state_dict(self) -> dict[str, Any]:
        """The steps until all are kept."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where they are a share of the run, that of the run it was: a longer one drops no more again."""
        if self.config.steps < 1:
            self._steps = int(state["steps"])

    def on_plan(self, plan: RunPlan, mesh: Mesh) -> None:
        """The layers that drop can."""
        model = plan.model
        spec_of = model.layer_spec
        model.layer_spec = lambda n: drops_tokens(spec_of(n)) if n in self._layers else spec_of(n)

    def on_build(self, stages: Sequence[torch.nn.Module], clock: Clock) -> None:
        """Draws at the entry to a chunk, when the clock shows its micro-batch."""
        self._clock = clock
        for stage in stages:
            layers = dropping_layers(cast(GPT, stage))
            if layers:
                stage.register_forward_pre_hook(self._entry(layers), with_kwargs=True)

    def on_schedule(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """How many tokens are kept, and what the step then costs."""
        config, whole = self.config, plan.seq_len
        kept = kept_tokens(config.start, self._steps, config.round_to, whole, plan.step)
        if kept == whole:
            return plan
        count, dropping = self.facts.shape.config.layers, len(self._layers)
        per_token = self.facts.shape.flops_per_token(whole, kept={n: kept for n in self._layers})
        return replace(
            plan,
            kept_tokens=kept,
            mean_kept_tokens=(whole * (count - dropping) + kept * dropping) // count,
            flops=per_token * plan.tokens,
        )

    def metrics(self, losses: LedgerReport) -> Mapping[str, Any]:
        """The tokens of a sequence that the dropping layers computed."""
        plan = self._clock.plan
        assert plan is not None, "metrics are those of a step"
        return {"kept_tokens": plan.seq_len if plan.kept_tokens is None else plan.kept_tokens}

    def _entry(self, layers: Sequence[int]):
        def entry(stage: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
            plan = self._clock.plan
            if not stage.training or plan is None or plan.kept_tokens is None:
                return None
            kept_NBR = kept_positions(self.facts.seed, plan, self._clock.samples, layers)
            rows_NRB = rows_of(torch.from_numpy(kept_NBR)).to(platform.device, non_blocking=True)
            return args, {**kwargs, "extra_block_kwargs": {"context": rows_NRB}}

        return entry


def kept_tokens(start: int, steps: int, round_to: int, whole: int, step: int) -> int:
    """r(t) of the module for sequences of `whole` tokens; those no longer than `start` stay whole."""
    if step >= steps or whole <= start:
        return whole
    return min(whole, (start + (whole - start) * step // steps) // round_to * round_to)


def kept_positions(seed: int, plan: StepPlan, samples: Sequence[int], layers: Sequence[int]) -> np.ndarray:
    """The positions that each layer keeps of each row, ascending: int64 [N, B, R].

    Of S hashes, one a position, the R smallest: every subset is as likely as another, and independent of
    those of other layers, rows and steps.

    Args:
        seed: of the run.
        plan: the step's, with `kept_tokens`.
        samples: global index of the sample of each row; the rows of one sample stand together.
        layers: global numbers of the layers.
    """
    kept, parts = plan.kept_tokens, plan.rows_per_sample
    assert kept is not None
    assert len(samples) % parts == 0
    rows_B = np.array(samples, np.int64) * parts + np.arange(len(samples)) % parts
    step_key = np.array([stream_key(seed, TokenDropping.name, plan.step)], np.uint64)
    layer_keys_N = random_bits(step_key, np.array(layers))
    row_keys_NB = random_bits(layer_keys_N[:, None], rows_B)
    hashes_NBS = random_bits(row_keys_NB[..., None], np.arange(plan.seq_len))
    return np.sort(np.argpartition(hashes_NBS, kept - 1, axis=-1)[..., :kept], axis=-1)
