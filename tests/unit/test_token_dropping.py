"""Random layerwise token dropping: how many, which, and what a layer makes of them."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megafab.config.schema import TrainConfig
from megafab.model.config import Activation, ModelConfig, Norm, Position
from megafab.model.shape import ModelShape
from megafab.optim.config import Count, OptimConfig, ScheduleConfig
from megafab.optim.schedules import Schedules
from megafab.run import Progress, StepOutcome, StepPlan, Verdict
from megafab.techniques.base import Clock, Facts
from megafab.techniques.config import TokenDroppingConfig
from megafab.techniques.token_dropping import TokenDropping, kept_positions, kept_tokens

LLAMA = ModelConfig(
    name="llama", layers=4, hidden=64, heads=4, kv_heads=2, ffn=96, seq_len=32, vocab=256, init_std=0.1
)
GPT = dataclasses.replace(
    LLAMA,
    kv_heads=4,
    norm=Norm.layernorm,
    activation=Activation.gelu,
    position=Position.learned,
    bias=True,
    tied_embeddings=True,
)
PLAN = StepPlan(0, 0.1, 0.0, 2, 2, 1, 32, (1.0,))


def technique(model: ModelConfig = LLAMA, **settings: Any) -> TokenDropping:
    shape = ModelShape.of(model)
    config = TokenDroppingConfig(**{"start": 8, "steps": 10, "round_to": 4} | settings)
    return TokenDropping(config, Facts(7, shape, ("a",), (1.0,), (100,), (400,), 20))


# -- how many ------------------------------------------------------------------------------------------------


def test_kept_tokens_as_in_the_papers_recipe():
    # 128 to 2048 by 16 in 200,000 steps (Li et al. 2022, GPT-3 1.3B).
    steps = (0, 50_000, 100_000, 199_999, 200_000, 10**9)
    assert [kept_tokens(128, 200_000, 16, 2048, t) for t in steps] == [128, 608, 1088, 2032, 2048, 2048]


def test_kept_tokens_by_hand():
    # 8 + 24 t / 10 = 8, 10.4, 12.8, 15.2, 17.6, 20, 22.4, 24.8, 27.2, 29.6, 32, down to multiples of 4.
    want = [8, 8, 12, 12, 16, 20, 20, 24, 24, 28, 32]
    assert [kept_tokens(8, 10, 4, 32, t) for t in range(11)] == want


def test_in_the_end_all_are_kept_whatever_the_rounding():
    counts = [kept_tokens(16, 50, 16, 100, t) for t in range(60)]
    assert counts == sorted(counts)
    assert counts[49] == 96
    assert counts[50] == 100


def test_a_sequence_cut_to_the_start_or_shorter_is_whole():
    assert [kept_tokens(16, 50, 16, whole, 3) for whole in (8, 15, 16, 17)] == [8, 15, 16, 16]


# -- which ---------------------------------------------------------------------------------------------------


def drawn(samples: list[int], layers: list[int], kept: int = 8, step: int = 3, parts: int = 1) -> np.ndarray:
    plan = dataclasses.replace(PLAN, step=step, kept_tokens=kept, rows_per_sample=parts)
    return kept_positions(11, plan, samples, layers)


def test_positions_are_distinct_and_in_order():
    kept_NBR = drawn(list(range(50)), [1, 2, 5], kept=12)
    assert kept_NBR.shape == (3, 50, 12)
    assert (np.diff(kept_NBR) > 0).all()
    assert kept_NBR.min() >= 0
    assert kept_NBR.max() < 32


@pytest.mark.parametrize("kept", [1, 8, 31])
def test_every_position_is_kept_as_often_as_another(kept: int):
    """Chi-squared over the positions of 4000 rows, by layer; with 31 degrees of freedom, 61 is p = 0.001."""
    rows, whole = 4000, PLAN.seq_len
    for of_layer in drawn(list(range(rows)), [1, 2, 3], kept=kept):
        counts = np.bincount(of_layer.ravel(), minlength=whole)
        p = kept / whole
        # Positions of one row exclude each other, which makes each count's variance smaller by p.
        chi_squared = ((counts - rows * p) ** 2).sum() / (rows * p * (1 - p)) * (whole - 1) / whole
        assert chi_squared < 61


def test_layers_rows_and_steps_draw_on_their_own():
    """Two draws of 16 in 32 share 8 positions on average; 4000 pairs hold the mean to 0.1."""
    samples = list(range(4000))
    one = drawn(samples, [1, 2], kept=16)
    later = drawn(samples, [1], kept=16, step=4)

    def shared(a_BR: np.ndarray, b_BR: np.ndarray) -> float:
        return float((a_BR[:, :, None] == b_BR[:, None, :]).sum(axis=(1, 2)).mean())

    assert shared(one[0], one[0]) == 16
    assert shared(one[0], one[1]) == pytest.approx(8, abs=0.1)
    assert shared(one[0], later[0]) == pytest.approx(8, abs=0.1)
    assert shared(one[0][1:], one[0][:-1]) == pytest.approx(8, abs=0.1)


def test_who_draws_does_not_matter():
    """Micro-batches, data ranks and pipeline stages are cuts of the same table."""
    whole = drawn([40, 41, 42, 43], [1, 2, 3])
    for rows, layers in itertools.product(
        (slice(0, 1), slice(1, 3), slice(3, 4)), (slice(0, 2), slice(2, 3))
    ):
        part = drawn([40, 41, 42, 43][rows], [1, 2, 3][layers])
        assert (part == whole[layers, rows]).all()


def test_the_rows_of_a_sample_draw_apart():
    kept_NBR = drawn([5, 5, 6, 6], [1], parts=2)[0]
    assert len({row.tobytes() for row in kept_NBR}) == 4
    assert (drawn([6, 6], [1], parts=2)[0] == kept_NBR[2:]).all()


# -- what it costs -------------------------------------------------------------------------------------------


def test_accounting_by_hand():
    plan = dataclasses.replace(PLAN, step=5, global_batch=6)
    changed = technique().on_schedule(plan, Progress(step=5))
    # 20 of 32 in layers 1 and 2 of 4: (32 x 2 + 20 x 2) / 4 = 26 a sequence.
    assert (changed.kept_tokens, changed.mean_kept_tokens, changed.layer_tokens) == (20, 26, 6 * 26)
    # Attention's matrices 64 x 64 x 2 + 64 x 32 x 2, the feed-forward's 3 x 64 x 96; 2 FLOPs each, 3 passes.
    matrices, head = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96), 2 * 256 * 64
    layers = 2 * (32 * matrices + 4 * 32 * 32 * 64) + 2 * (20 * matrices + 4 * 20 * 20 * 64)
    assert changed.flops == 6 * 3 * (layers + 32 * head)


def test_uneven_shares_round_down():
    changed = technique(layers=(2,)).on_schedule(dataclasses.replace(PLAN, step=1, seq_len=31), Progress())
    assert changed.kept_tokens == 8
    assert changed.mean_kept_tokens == (31 * 3 + 8) // 4 == 25


def test_nothing_changes_once_all_are_kept():
    plan = dataclasses.replace(PLAN, step=10, flops=5.0)
    assert technique().on_schedule(plan, Progress()) is plan


@pytest.mark.parametrize(("steps", "want"), [(0.5, 10), (10.0, 10), (0.001, 1), (1.0, 1)])
def test_steps_may_be_a_share_of_the_run(steps: float, want: int):
    one = technique(steps=steps)
    kept = [one.on_schedule(dataclasses.replace(PLAN, step=t), Progress()).kept_tokens for t in range(21)]
    assert kept.index(None) == want


def test_metrics_say_how_many():
    one, clock = technique(), Clock()
    one.on_build([], clock)
    report: Any = SimpleNamespace()
    clock.plan = dataclasses.replace(PLAN, kept_tokens=8)
    assert one.metrics(report) == {"kept_tokens": 8}
    clock.plan = PLAN
    assert one.metrics(report) == {"kept_tokens": 32}


def lives(train: TrainConfig) -> tuple[list[StepPlan], Progress]:
    """Every step of a run with the technique on."""
    schedules = Schedules(
        train,
        OptimConfig(lr=1.0),
        ScheduleConfig(warmup=2, min_ratio=0.1),
        seq_len=32,
        domain_weights=(1.0,),
        data_ranks=1,
    )
    progress, plans, one = Progress(), [], technique(steps=8, start=4)
    while schedules.remaining(progress):
        plans.append(one.on_schedule(schedules.at(progress), progress))
        progress = progress.advance(plans[-1], StepOutcome(True, Verdict(), 1.0))
    return plans, progress


def test_layer_tokens_end_the_run_and_place_its_learning_rate():
    budget = 20 * 2 * 32
    by_tokens, _ = lives(TrainConfig(tokens=budget, global_batch=2))
    plans, progress = lives(TrainConfig(tokens=budget, global_batch=2, count=Count.layer_tokens))
    assert len(by_tokens) == 20
    # Kept 4, 4, 8, 12, 16, 20, 24, 28, then 32, in 2 of 4 layers: 18, 18, 20, 22, 24, 26, 28, 30 of 32.
    missing = 2 * (8 * 32 - (18 + 18 + 20 + 22 + 24 + 26 + 28 + 30))
    assert progress.layer_tokens == len(plans) * 64 - missing
    assert budget <= progress.layer_tokens < budget + 64
    assert len(plans) == 23
    # Warm-up over the layer tokens of two whole steps: 64 / 128, then (36 + 64) / 128, then beyond.
    assert [plan.lr for plan in plans[:2]] == [0.5, 100 / 128]
    assert plans[-1].lr == pytest.approx(0.1)
    assert plans[19].lr > by_tokens[19].lr == pytest.approx(0.1)


# -- the layer -----------------------------------------------------------------------------------------------


def test_rows_taken_and_put_back_have_the_gradients_they_should():
    from megafab.kernels.rows import gather_rows, put_rows

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    new = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0, 1], [4, 5], [6, 9], [10, 11]])
    assert torch.equal(gather_rows(x, rows)[2], torch.stack((x[3, 0], x[4, 1])))
    replaced = put_rows(x, new, rows)
    assert torch.equal(gather_rows(replaced, rows), new)
    assert torch.equal(replaced[1], x[1])
    assert torch.equal(put_rows(x, gather_rows(x, rows), rows), x)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows), x)
    assert torch.autograd.gradcheck(lambda x, new: put_rows(x, new, rows), (x, new))
    # Hidden states may come as a view with another order of axes.
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert torch.equal(put_rows(turned, new, rows), replaced)
    assert torch.autograd.gradcheck(lambda x, new: put_rows(x, new, rows), (turned, new))


def start():
    """The groups of a lone rank."""
    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    return topology.initialize(Mesh(1), seed=3)


def build(groups, model: ModelConfig, dropping: TokenDropping | None, recompute: str = "none"):
    """A chunk on one rank, its clock, and inputs: two rows, the first of two documents."""
    from megafab.model import plan as model_plan
    from megafab.model.inputs import ModelInputs
    from megafab.run import Batch
    from megafab.techniques.base import RunPlan
    from megafab.topology.config import ContextMethod

    plan = model_plan.plan(
        ModelShape.of(model),
        groups,
        precision=torch.float32,
        recompute=recompute,
        sequence_parallel=False,
        context_method=ContextMethod.allgather,
    )
    if dropping:
        dropping.on_plan(RunPlan(plan, data=None), groups.mesh)  # pyright: ignore[reportArgumentType]
    (chunk,) = model_plan.build(plan, groups, 3)
    clock = Clock(PLAN, samples=(4, 5))
    if dropping:
        dropping.on_build([chunk], clock)
    tokens_BL = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    document_BL = (torch.arange(32) >= torch.tensor([[13], [99]])).int()
    position_BL = torch.arange(32) - 13 * document_BL
    one_B = torch.zeros(2, dtype=torch.int64)
    columns = torch.ones(2, 32), position_BL, document_BL, one_B, torch.tensor([4, 5])
    rows = Batch(tokens_BL[:, :-1], tokens_BL[:, 1:], *columns)
    inputs = ModelInputs.of(rows, groups, ContextMethod.allgather)
    return chunk, clock, (inputs.tokens_BL, inputs.position_BL, inputs.attention_mask, inputs.labels_BL)


def passes(chunk, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and all gradients of a loss of theirs."""
    tokens, positions, mask, labels = inputs
    chunk.zero_grad()
    logits = chunk.train()(tokens, positions, mask, labels=labels)
    (logits.float().log_softmax(-1)[..., 7]).sum().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in chunk.parameters()]


def compare_at_full_length(rank: int, world: int, model: ModelConfig) -> tuple[bool, bool, bool]:
    """Equal to the plain model: with all kept; in evaluation while dropping; in training while dropping."""
    groups = start()
    plain, _, inputs = build(groups, model, None)
    want, gradients = passes(plain, inputs)
    chunk, clock, _ = build(groups, model, technique(model))
    got, got_gradients = passes(chunk, inputs)
    same = torch.equal(got, want) and all(map(torch.equal, got_gradients, gradients))
    clock.plan = dataclasses.replace(PLAN, kept_tokens=8)
    tokens, positions, mask, labels = inputs
    with torch.no_grad():
        evaluated = chunk.eval()(tokens, positions, mask, labels=labels)
    return same, torch.equal(evaluated, want), torch.equal(passes(chunk, inputs)[0], want)


@pytest.mark.multiproc
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_keeping_all_is_the_plain_model_to_the_bit(ranks, model: ModelConfig):
    assert ranks.run(compare_at_full_length, model) == [(True, True, False)]


def compare_attention(rank: int, world: int) -> tuple[float, bool, bool]:
    """Layer 1, fed the same hidden states with and without dropping.

    How far the attention logits of kept pairs are apart, whether the mask is that of these pairs, and whether
    the other tokens, and only they, pass by unchanged.
    """
    from megafab.model.dropping import rows_of

    chunk, _, (tokens, positions, mask, _) = build(start(), LLAMA, technique())
    layer = chunk.decoder.layers[1]
    hidden, table, *_ = chunk._preprocess(tokens, positions)
    seen = []
    attention = layer.self_attention.core_attention
    attention.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1], args[3])))
    kept_NBR = torch.from_numpy(drawn([4, 5], [1], kept=12))
    layer(hidden, attention_mask=mask, rotary_pos_emb=table)
    out, _ = layer(hidden, attention_mask=mask, rotary_pos_emb=table, context=rows_of(kept_NBR))

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lbhd,sbhd->bhls", query, key.repeat_interleave(2, dim=2))

    (query, key, whole_mask), (kept_query, kept_key, kept_mask) = seen
    full, few = scores(query, key), scores(kept_query, kept_key)
    apart, masks, passed = 0.0, True, True
    for b, kept in enumerate(kept_NBR[0]):
        pairs = full[b][:, kept][:, :, kept]
        apart = max(apart, (few[b] - pairs).abs().max().item() / pairs.abs().max().item())
        masks &= torch.equal(kept_mask[b, 0], whole_mask[b, 0][kept][:, kept])
        others = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
        passed &= torch.equal(out[others, b], hidden[others, b])
        passed &= not (out[kept, b] == hidden[kept, b]).any()
    return apart, masks, passed


@pytest.mark.multiproc
def test_kept_pairs_see_each_other_as_in_the_whole_sequence(ranks):
    ((apart, masks, passed),) = ranks.run(compare_attention)
    assert apart < 1e-5
    assert masks
    assert passed


def compare_recomputed(rank: int, world: int, model: ModelConfig) -> list[bool]:
    """Whether each recomputation gives the gradients of none, though the clock moves on before backward."""
    results, groups = [], start()
    for recompute in ("none", "selective", "full"):
        chunk, clock, (tokens, positions, mask, labels) = build(groups, model, technique(model), recompute)
        clock.plan = dataclasses.replace(PLAN, kept_tokens=8)
        groups.seed_dropout(5)
        loss = chunk.train()(tokens, positions, mask, labels=labels).float().square().mean()
        clock.plan, clock.samples = dataclasses.replace(PLAN, step=1, kept_tokens=12), (90, 91)
        loss.backward()
        results.append([parameter.grad for parameter in chunk.parameters()])
    return [all(map(torch.equal, result, results[0])) for result in results[1:]]


@pytest.mark.multiproc
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_that_is_computed_again_keeps_the_same_tokens(ranks, dropout: float):
    model = dataclasses.replace(LLAMA, dropout=dropout)
    assert ranks.run(compare_recomputed, model) == [[True, True]]


def counted_flops(rank: int, world: int, model: ModelConfig, recompute: str) -> tuple[int, float, float]:
    """FLOPs of a step at half the tokens, as torch counts them and as we do; and those of a whole step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    one = technique(model, start=16, steps=1000)
    chunk, clock, inputs = build(start(), model, one, recompute)
    shape = one.facts.shape
    whole = shape.flops_per_token(recompute=recompute) * PLAN.tokens
    plan = one.on_schedule(dataclasses.replace(PLAN, flops=whole), Progress())
    assert plan.kept_tokens == 16
    clock.plan = plan
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        passes(chunk, inputs)
    kept = {layer: 16 for layer in one.config.dropping(model.layers)}
    ours = plan.flops
    if recompute != "none":
        ours = shape.flops_per_token(recompute=recompute, kept=kept) * plan.tokens
    return counter.get_total_flops(), ours, whole


@pytest.mark.multiproc
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_flops_as_torch_counts_them(ranks, model: ModelConfig, recompute: str):
    ((counted, ours, whole),) = ranks.run(counted_flops, model, recompute)
    assert counted == pytest.approx(ours, rel=0.02)
    assert counted < 0.85 * whole, "it must show"
