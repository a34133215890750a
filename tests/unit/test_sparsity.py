"""Masks, pruning and their accounts: against numbers made by hand, plain sorting and closed forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from checkpoint_files import state_of
from torch import Tensor

from launch import cli
from megafab.checkpoint import store, tools, writer
from megafab.checkpoint.pieces import LogicalTensor, flat_slice, whole
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.errors import UserError
from megafab.loss.ledger import LossLedger
from megafab.model.config import Activation, ModelConfig, MoEConfig
from megafab.model.names import is_maskable, parameter_shapes
from megafab.model.shape import ModelShape
from megafab.run import Progress, StepOutcome, StepPlan, Verdict
from megafab.techniques import masks as masks_module
from megafab.techniques.base import Facts
from megafab.techniques.config import GradualPruningConfig, Ramp, SparsityPattern, StaticSparsityConfig
from megafab.techniques.gradual_pruning import GradualPruning, budget, mask_smallest
from megafab.techniques.masks import Account, Masks, masked, random_mask
from megafab.techniques.static_sparsity import StaticSparsity
from megafab.topology.layout import Layout

UNSTRUCTURED, TWO_FOUR = SparsityPattern.unstructured, SparsityPattern.two_four
TINY = ModelConfig(name="tiny", layers=2, hidden=16, heads=2, seq_len=8, vocab=128, ffn=24)
SHAPE = ModelShape.of(TINY)
PLAN = StepPlan(0, 0.1, 0.0, 4, 2, 2, 8, (1.0,), flops=SHAPE.flops_per_token() * 32)


def facts(steps: int = 20, whole_matrices: bool = False) -> Facts:
    plans = [dataclasses.replace(PLAN, step=step) for step in range(steps)]
    one = (1.0,), (100,), (400,)
    return Facts(7, SHAPE, ("d",), *one, steps, whole_matrices=whole_matrices, plans=lambda: plans)


class Editor:
    """A WeightEditor over plain flat tensors: the slices of a lone rank with one moment."""

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.masters, self.committed = dict(masters), 0
        self._moments = {name: {"m": torch.ones_like(value)} for name, value in masters.items()}

    def names(self) -> Sequence[str]:
        return list(self.masters)

    def master(self, name: str) -> Tensor:
        return self.masters[name]

    def moments(self, name: str) -> Mapping[str, Tensor]:
        return self._moments[name]

    def sum(self, counts: Tensor) -> Tensor:
        return counts

    def describe(self, name: str, value: Tensor) -> LogicalTensor:
        return flat_slice(value, 0, Layout.whole(parameter_shapes(SHAPE)[name]), owner=True)

    def commit(self) -> None:
        self.committed += 1


def editor() -> Editor:
    generator = torch.Generator().manual_seed(3)
    return Editor(
        {
            name: torch.randn(math.prod(size), generator=generator)
            for name, size in parameter_shapes(SHAPE).items()
        }
    )


def take_step(technique: StaticSparsity | GradualPruning, weights: Editor, step: int) -> None:
    ledger = LossLedger(("d",), (), device=torch.device("cpu"), sum_ranks=lambda sums: sums)
    plan = dataclasses.replace(PLAN, step=step)
    technique.on_step(plan, StepOutcome(True, Verdict(), 1.0), ledger, weights)


# -- what is masked, and what it would cost ------------------------------------------------------------------


def test_the_layers_matrices_are_masked_and_nothing_else() -> None:
    moe = MoEConfig(experts=2, top_k=1, ffn=8, shared_ffn=8, every=2)
    model = dataclasses.replace(TINY, moe=moe, bias=True, qk_norm=True)
    found = [name for name in parameter_shapes(ModelShape.of(model)) if is_maskable(name)]
    expert, layers = "mlp.experts.local_experts", "decoder.layers"
    assert found == [
        *(f"{layers}.0.self_attention.linear_{part}.weight" for part in ("qkv", "proj")),
        *(f"{layers}.0.{expert}.{n}.linear_{part}.weight" for n in (0, 1) for part in ("fc1", "fc2")),
        *(f"{layers}.0.mlp.shared_experts.linear_{part}.weight" for part in ("fc1", "fc2")),
        *(f"{layers}.1.self_attention.linear_{part}.weight" for part in ("qkv", "proj")),
        *(f"{layers}.1.mlp.linear_{part}.weight" for part in ("fc1", "fc2")),
    ]


GPT2_SMALL, GPT3_XL, GPT_6_7B, SMALL = (
    (12, 768, 2048, 50257),
    (24, 2048, 2048, 50257),
    (32, 4096, 2048, 50257),
    (4, 128, 128, 512),
)


@pytest.mark.parametrize(
    ("sizes", "speedups"),
    [
        (GPT2_SMALL, (1.357, 1.653, 1.901)),
        (GPT3_XL, (1.665, 2.494, 3.558)),
        (GPT_6_7B, (1.813, 3.053, 5.180)),
        (SMALL, (1.667, 2.500, 3.571)),
    ],
)
def test_the_papers_flops(sizes: tuple[int, ...], speedups: tuple[float, ...]) -> None:
    """F(s) = (1 - s) 24 L d^2 + 4 L S d + 2 d V a token forward; SPDF's 2.5x is GPT-3 XL at 75%."""
    layers, hidden, length, vocab = sizes
    model = ModelConfig(
        name="gpt",
        layers=layers,
        hidden=hidden,
        heads=hidden // 64,
        seq_len=length,
        vocab=vocab,
        vocab_multiple=1,
        activation=Activation.gelu,
    )
    shape = ModelShape.of(model)
    found = [shape.flops_per_token() / shape.flops_per_token(density=1 - s) for s in (0.5, 0.75, 0.9)]
    assert [round(one, 3) for one in found] == list(speedups)
    if sizes == SMALL:
        assert shape.flops_per_token() == 5_898_240


def test_routers_count_as_dense() -> None:
    moe = ModelShape.of(dataclasses.replace(TINY, moe=MoEConfig(experts=4, top_k=2, ffn=8, shared_ffn=12)))
    rest = 3 * (2 * (2 * 4 * 16 + 4 * 8 * 16) + 2 * 128 * 16)  # routers, attention, head
    matrices = 2 * (4 * 16 * 16 + 2 * 3 * 16 * 8 + 3 * 16 * 12)
    assert moe.flops_per_token(density=0) == rest
    assert moe.flops_per_token(density=0.25) == rest + 0.25 * 3 * 2 * matrices


# -- random masks --------------------------------------------------------------------------------------------


def mask_of(rows: int, columns: int, sparsity: float = 0.75, **changes: object) -> Tensor:
    settings = {"seed": 5, "name": "w", "pattern": UNSTRUCTURED, "offset": (0, 0), "box": (rows, columns)}
    return random_mask(shape=(rows, columns), sparsity=sparsity, **{**settings, **changes})  # pyright: ignore


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "_BAND", 64)


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (41, 13), (2, 100)])
def test_the_number_of_zeros_is_exact_in_the_matrix_and_in_its_bands(
    small_bands: None, sparsity: float, size: tuple[int, int]
) -> None:
    mask = mask_of(*size, sparsity)
    assert int((~mask).sum()) == round(sparsity * size[0] * size[1])
    height = max(1, 64 // size[1])
    for begin in range(0, size[0], height):
        end = min(begin + height, size[0])
        zeros = round(sparsity * end * size[1]) - round(sparsity * begin * size[1])
        assert int((~mask[begin:end]).sum()) == zeros


def test_bands_by_hand(small_bands: None) -> None:
    """13 columns in bands of 4 rows, 52 elements: 5.2 zeros end a band, then 10.4, 15.6, 17 in all."""
    mask = mask_of(13, 13, 0.1)
    assert [int((~band).sum()) for band in mask.split(4)] == [5, 5, 6, 1]


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_FOUR])
def test_boxes_are_cuts_of_one_mask(small_bands: None, pattern: SparsityPattern) -> None:
    whole = mask_of(20, 24, 0.5, pattern=pattern)
    for top, left, height, width in ((0, 0, 20, 24), (3, 0, 1, 24), (5, 9, 13, 7), (19, 23, 1, 1)):
        box = mask_of(20, 24, 0.5, pattern=pattern, offset=(top, left), box=(height, width))
        assert torch.equal(box, whole[top : top + height, left : left + width])


def test_names_seeds_and_bands_draw_apart(small_bands: None) -> None:
    """Independent masks of half of 64 agree in about half of the places."""
    one = mask_of(64, 16, 0.5)
    for other in (mask_of(64, 16, 0.5, name="v"), mask_of(64, 16, 0.5, seed=6), one.roll(4, 0)):
        assert 0.4 < (one == other).float().mean() < 0.6


def test_every_place_is_as_likely(small_bands: None) -> None:
    counts = sum(mask_of(4, 16, 0.75, seed=seed).float() for seed in range(800))
    assert isinstance(counts, Tensor)
    # 200 expected of 800, standard deviation 12; the largest of 64 stays within 5 of them.
    assert (counts - 200).abs().max() < 60


def test_two_of_every_four_inputs_are_kept_and_every_pair_as_often() -> None:
    mask = mask_of(300, 40, 0.5, pattern=TWO_FOUR)
    groups = mask.view(-1, 4)
    assert (groups.sum(dim=1) == 2).all()
    pairs = Counter(tuple(group) for group in groups.nonzero()[:, 1].view(-1, 2).tolist())
    assert len(pairs) == 6
    assert all(500 - 120 < count < 500 + 120 for count in pairs.values())  # standard deviation 20


def test_masks_stay_what_they_are() -> None:
    """Another mask for the same seed would be another experiment: pinned."""
    for pattern, rows in PINNED.items():
        mask = mask_of(len(rows), 8, 0.5, pattern=pattern)
        assert ["".join(map(str, row)) for row in mask.int().tolist()] == rows


PINNED = {
    UNSTRUCTURED: ["01101000", "01000110", "11001000", "01111111"],
    TWO_FOUR: ["11001001", "10011100"],
}


# -- static sparsity -----------------------------------------------------------------------------------------


def test_weights_moments_and_gradients_are_held_to_the_mask() -> None:
    weights, technique = editor(), StaticSparsity(StaticSparsityConfig(sparsity=0.6), facts())
    before = {name: master.clone() for name, master in weights.masters.items()}
    technique.on_start(Progress(), weights)
    gradients = {name: torch.full_like(master, 2.0) for name, master in before.items()}
    technique.on_reduced(gradients)
    for name, master in weights.masters.items():
        zeros = masked(master.numel(), 0.6) if is_maskable(name) else 0
        kept = master != 0
        assert int((~kept).sum()) == zeros
        assert torch.equal(master, before[name] * kept), "what is kept keeps its value"
        assert torch.equal(weights.moments(name)["m"], kept.float())
        assert torch.equal(gradients[name], 2.0 * kept)
    assert weights.committed == 1


def test_a_gradient_that_is_not_finite_still_shows() -> None:
    weights, technique = editor(), StaticSparsity(StaticSparsityConfig(sparsity=0.6), facts())
    technique.on_start(Progress(), weights)
    gradients = {name: torch.full_like(master, math.inf) for name, master in weights.masters.items()}
    technique.on_reduced(gradients)
    assert not any(gradient.isfinite().any() for gradient in gradients.values())


@pytest.mark.parametrize("whole_matrices", [False, True])
def test_only_updates_of_whole_matrices_need_masking_again(whole_matrices: bool) -> None:
    weights = editor()
    technique = StaticSparsity(StaticSparsityConfig(sparsity=0.6), facts(whole_matrices=whole_matrices))
    technique.on_start(Progress(), weights)
    name = next(name for name in weights.names() if is_maskable(name))
    weights.master(name).fill_(1.0)
    take_step(technique, weights, 0)
    assert int((weights.master(name) == 0).sum()) == (
        masked(weights.master(name).numel(), 0.6) * whole_matrices
    )
    assert weights.committed == 1 + whole_matrices


def test_a_checkpoints_masks_are_taken_as_they_are() -> None:
    weights, first = editor(), StaticSparsity(StaticSparsityConfig(sparsity=0.6), facts())
    first.on_start(Progress(), weights)
    take_step(first, weights, 0)
    state = json.loads(json.dumps(first.state_dict()))
    other = dataclasses.replace(facts(), seed=8)
    second, again = StaticSparsity(StaticSparsityConfig(sparsity=0.6), other), editor()
    second.load_state_dict(state)
    for name, tensor in second.sharded_state(again).items():
        tensor.pieces[0].tensor.copy_(first.sharded_state(weights)[name].pieces[0].tensor)
    second.on_start(Progress(1), again)
    assert all(torch.equal(again.master(name), weights.master(name)) for name in weights.names())
    assert second.state_dict() == state, "the seed is that of the masks, not of the new run"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StaticSparsityConfig(sparsity=0.7), r"sparsity=0\.7: found .* masked with sparsity=0\.75"),
        (StaticSparsityConfig(TWO_FOUR, sparsity=0.75), "pattern=two_four: found .* pattern=unstructured"),
        (StaticSparsityConfig(seed=8), "seed=8: found .* masked with seed=7, .*megafab ckpt densify"),
    ],
)
def test_other_masks_than_the_checkpoints_are_refused(config: StaticSparsityConfig, message: str) -> None:
    first = StaticSparsity(StaticSparsityConfig(), facts())
    with pytest.raises(UserError, match=message):
        StaticSparsity(config, facts()).load_state_dict(first.state_dict())


def test_what_sparsity_would_save_is_counted_apart() -> None:
    weights, technique = editor(), StaticSparsity(StaticSparsityConfig(sparsity=0.75), facts())
    technique.on_start(Progress(), weights)
    take_step(technique, weights, 0)
    sparse = SHAPE.flops_per_token(density=0.25)
    numbers = technique.metrics(None)  # type: ignore[arg-type]
    assert numbers["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert numbers["theoretical_flops"] == pytest.approx(32 * sparse)
    assert numbers["theoretical_speedup"] == pytest.approx(SHAPE.flops_per_token() / sparse)


def test_tokens_that_layers_left_out_meet_no_masked_weight() -> None:
    account = Account()
    half = dataclasses.replace(PLAN, kept_tokens=4, mean_kept_tokens=6, flops=1000.0)
    account.add(half, saved=10.0, active=50)
    # 4 sequences of 8 tokens, of which the mean layer computed 6.
    assert account == Account(32, 1000.0, 1000.0 - 10 * 24, 50 * 32, 50 * (1000.0 - 240))


# -- which weights are pruned --------------------------------------------------------------------------------


def smallest(values: Tensor, kept: Tensor, more: int) -> Tensor:
    """The mask by plain sorting: stable, so that of equal ones the first go."""
    order = torch.where(kept, values.abs(), -1.0).sort(stable=True).indices
    result = kept.clone()
    result[order[: int((~kept).sum()) + more]] = False
    return result


TIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "no ties": lambda values: values,
    "many": lambda values: (3 * values).round(),
    "all": torch.ones_like,
    "signs": lambda values: values.sign() * 0.5,
    "subnormal": lambda values: values * 1e-39,
    "zeros": lambda values: values * (values > 0.8),
}


@pytest.mark.parametrize("kind", TIES)
def test_the_smallest_are_masked_as_by_sorting_and_of_equal_ones_the_first(kind: str) -> None:
    weights, masks = editor(), Masks(SHAPE)
    for name in masks.sizes:
        weights.masters[name] = TIES[kind](weights.masters[name])
    kept = {name: torch.ones(size, dtype=torch.bool) for name, size in masks.sizes.items()}
    for shares in ((0.1, 0.0, 0.5), (0.25, 0.4, 0.0), (0.5, 0.6, 0.0)):  # of three matrices in turn
        more = [int(shares[n % 3] * size) for n, size in enumerate(masks.sizes.values())]
        mask_smallest(masks, weights, more)
        for count, name in zip(more, masks.sizes, strict=True):
            kept[name] = smallest(weights.masters[name], kept[name], count)
            assert torch.equal(masks.parts(weights)[name], kept[name]), name


class _Part(Editor):
    """The ranges that one of several ranks holds, of a matrix cut in columns, of one cut in gate and up."""

    def __init__(self, rank: int, world: int, values: Mapping[str, Tensor]) -> None:
        self._layouts, self._starts, flat = {}, {}, {}
        for name, value in values.items():
            rows, columns = value.shape
            tensor, data = rank % 2, rank // 2
            dim, stride = (0, 2) if name.endswith("fc1.weight") else (1, 1)
            local = (rows // 2, columns) if dim == 0 else (rows, columns // 2)
            layout = Layout.split(local, dim, 2, tensor, stride)
            mine = torch.empty(local)
            for block in layout.blocks:
                inside, outside = (
                    tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))
                    for offset in (block.local_offset, block.global_offset)
                )
                mine[inside] = value[outside]
            cut = mine.numel() // 3 + 1  # in the middle of a row
            self._layouts[name], self._starts[name] = layout, cut * data
            flat[name] = mine.view(-1)[cut:] if data else mine.view(-1)[:cut]
        super().__init__(flat)

    def describe(self, name: str, value: Tensor) -> LogicalTensor:
        return flat_slice(value, self._starts[name], self._layouts[name], owner=True)

    def sum(self, counts: Tensor) -> Tensor:
        torch.distributed.all_reduce(counts)
        return counts


def tied_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: (4 * torch.randn(size, generator=generator)).round()
        for name, size in Masks(SHAPE).shapes.items()
    }


def prune_in_parts(rank: int, world: int) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    masks, weights = Masks(SHAPE), _Part(rank, world, tied_weights())
    mask_smallest(masks, weights, [masked(size, 0.4) for size in masks.sizes.values()])
    return {
        name: [(piece.offset, piece.tensor) for piece in weights.describe(name, part).pieces]
        for name, part in masks.parts(weights).items()
    }


def test_ranks_mask_the_same_weights_however_the_matrices_are_cut(ranks) -> None:
    parts = ranks.run(prune_in_parts, world=4)
    for name, value in tied_weights().items():
        mask = torch.zeros(value.shape, dtype=torch.bool)
        for offset, piece in (one for part in parts for one in part[name]):
            mask[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] = piece
        flat = value.view(-1)
        want = smallest(flat, torch.ones_like(flat, dtype=torch.bool), masked(flat.numel(), 0.4))
        assert torch.equal(mask.view(-1), want), name


# -- when they are pruned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "middle"), [(Ramp.linear, 0.8 * 0.25), (Ramp.cubic, 0.8 * (1 - 0.75**3))], ids=lambda x: str(x)
)
def test_the_ramp_by_hand(ramp: Ramp, middle: float) -> None:
    technique = GradualPruning(GradualPruningConfig(sparsity=0.8, ramp=ramp), facts())
    at = technique._sparsity_at
    assert [at(0.0), at(0.25), at(0.75), at(1.0)] == [0, 0, 0.8, 0.8]
    assert at(0.375) == pytest.approx(middle)
    assert all(at(n / 100) <= at((n + 1) / 100) for n in range(100))


def test_the_budget_by_hand() -> None:
    """Half of the weights go once half of the compute is spent.

    Ten steps of 100, 80 of them maskable. Pruned after k steps the run costs 100 k + 60 (10 - k), and k is
    the first step after which half of that is spent: with k = 4 it is 760, of which 300 are less than half
    and 400 are more; with k = 3 it were 720, of which 300 are less.
    """
    total = budget([(100.0, 80.0)] * 10, lambda spent: 0.5 if spent >= 0.5 else 0.0, every=1)
    assert total == pytest.approx(760, rel=1e-12)
    # After every third step only: after 6, and 600 + 4 x 60 = 840; not after 3, since 300 is less than half.
    total = budget([(100.0, 80.0)] * 10, lambda spent: 0.5 if spent >= 0.5 else 0.0, every=3)
    assert total == pytest.approx(840, rel=1e-12)
    # With 2 steps behind, dense, the third step of the run is the first of the rest.
    total = budget([(100.0, 80.0)] * 8, lambda spent: 0.5 if spent >= 0.5 else 0.0, 3, first=2, spent=200.0)
    assert total == pytest.approx(840, rel=1e-12)
    assert budget([], lambda spent: 0.5, 1, first=4, spent=70.0) == 70


@pytest.mark.parametrize("every", [1, 7, 20])
@pytest.mark.parametrize("ramp", Ramp)
def test_a_run_spends_its_budget_and_prunes_as_it_should(every: int, ramp: Ramp) -> None:
    steps, config = 120, GradualPruningConfig(sparsity=0.75, ramp=ramp, every=every)
    technique, weights = GradualPruning(config, facts(steps)), editor()
    technique.on_start(Progress(), weights)
    seen: list[Mapping[str, float]] = []
    ended = math.inf
    for step in range(steps):
        take_step(technique, weights, step)
        seen.append(technique.metrics(None))  # type: ignore[arg-type]
        if technique.state_dict()["sparsity"] == 0.75:
            ended = min(ended, seen[-1]["compute"])
        for name in technique._masks.sizes:
            zeros = int((weights.master(name) == 0).sum())
            assert zeros == masked(weights.master(name).numel(), technique.state_dict()["sparsity"])
            assert torch.equal(weights.moments(name)["m"], (weights.master(name) != 0).float())
    assert seen[-1]["compute"] == pytest.approx(1.0, abs=1e-9)
    assert seen[-1]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    sparsities = [numbers["sparsity"] for numbers in seen]
    assert sparsities == sorted(sparsities)
    begun = next(numbers["compute"] for numbers in seen if numbers["sparsity"])
    block = every / steps * seen[-1]["theoretical_speedup"]  # of the compute, at most
    assert 0.25 <= begun < 0.25 + block
    assert 0.75 <= ended < 0.75 + block
    changes = [step for step in range(1, steps) if sparsities[step] != sparsities[step - 1]]
    assert changes
    assert all((step + 1) % every == 0 for step in changes)


def test_pruning_goes_on_exactly() -> None:
    config = GradualPruningConfig(ramp=Ramp.linear, every=2)

    def advance(technique: GradualPruning, weights: Editor, start: int, stop: int) -> None:
        technique.on_start(Progress(start), weights)
        for step in range(start, stop):
            for master in weights.masters.values():
                master.mul_(1 + 0.01 * torch.arange(len(master)).cos())
            take_step(technique, weights, step)

    unbroken, weights = GradualPruning(config, facts()), editor()
    advance(unbroken, weights, 0, 20)
    first, one = GradualPruning(config, facts()), editor()
    advance(first, one, 0, 11)
    second, two = GradualPruning(config, facts(999)), Editor(one.masters)  # a longer run: the budget stays
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for name, tensor in second.sharded_state(two).items():
        tensor.pieces[0].tensor.copy_(first.sharded_state(one)[name].pieces[0].tensor)
    advance(second, two, 11, 20)
    assert second.state_dict() == unbroken.state_dict()
    assert all(torch.equal(two.master(name), weights.master(name)) for name in weights.names())


def test_what_ran_without_it_was_dense() -> None:
    """Turned on in the middle of a run, it prunes by the compute of the whole."""
    technique, weights = GradualPruning(GradualPruningConfig(every=1), facts(20)), editor()
    behind = Progress(10, tokens=320, layer_tokens=320, flops=10 * PLAN.flops)
    technique.on_start(behind, weights)
    take_step(technique, weights, 10)
    numbers = technique.metrics(None)  # type: ignore[arg-type]
    assert numbers["theoretical_flops"] == 11 * PLAN.flops
    assert numbers["compute"] > 11 / 20
    for step in range(11, 20):
        take_step(technique, weights, step)
    assert technique.metrics(None)["compute"] == pytest.approx(1.0)  # type: ignore[arg-type]


def test_a_start_from_a_dense_checkpoint_has_a_budget_of_its_own() -> None:
    """The parent stopped before its ramp: its weights are dense, and its compute is not this run's."""
    parent, one = GradualPruning(GradualPruningConfig(every=1), facts(200)), editor()
    parent.on_start(Progress(), one)
    take_step(parent, one, 0)
    fresh, started = (GradualPruning(GradualPruningConfig(every=1), facts(20)) for _ in range(2))
    started.load_state_dict(parent.state_dict())
    fresh.on_start(Progress(), editor())
    started.on_start(Progress(), editor())
    assert started.state_dict() == fresh.state_dict() != parent.state_dict()


@pytest.mark.parametrize(
    ("ramp", "sparsity", "by_tokens", "by_compute"),
    [
        *(
            (Ramp.linear, s, t, c)
            for s, t, c in ((0.5, 0.693, 0.75), (0.75, 0.460, 0.625), (0.9, 0.248, 0.55))
        ),
        *((Ramp.cubic, s, None, c) for s, c in ((0.5, 0.6875), (0.75, 0.53125), (0.9, 0.4375))),
    ],
)
def test_both_readings_of_the_mean_parameter_count(
    ramp: Ramp, sparsity: float, by_tokens: float | None, by_compute: float
) -> None:
    """Where all compute is in maskable matrices: the closed forms of a ramp from 25% to 75% of the compute.

    Linear, the mean over tokens is harmonic: 1 / (0.25 + 0.25 / (1 - s) - 0.5 ln(1 - s) / s).
    """
    ramp_of = GradualPruning(GradualPruningConfig(sparsity=sparsity, ramp=ramp), facts())._sparsity_at
    steps, flops, size = 3_000, PLAN.flops, 10**9
    total = budget([(flops, flops)] * steps, ramp_of, every=1)
    account, s = Account(), 0.0
    for _ in range(steps):
        account.add(PLAN, s * flops / PLAN.layer_tokens, size - masked(size, s))
        s = max(s, ramp_of(account.flops / total))
    assert account.active_flops / account.flops / size == pytest.approx(by_compute, abs=1e-3)
    found = account.active_tokens / account.tokens / size
    if by_tokens is not None:
        closed = 1 / (0.25 + 0.25 / (1 - sparsity) - 0.5 * math.log(1 - sparsity) / sparsity)
        assert closed == pytest.approx(by_tokens, abs=1e-3)
        assert found == pytest.approx(closed, abs=1e-3)
    # C = 6 N D, exactly, with the mean over tokens: here 6 N D is the dense compute times the mean density.
    assert account.flops == pytest.approx(account.dense_flops * found)


# -- in checkpoints ------------------------------------------------------------------------------------------


def write_sparse(run_dir: Path, mask: Mapping[str, Tensor], spoil: bool = False) -> Path:
    """A checkpoint of a sparse model; with `spoil`, one masked weight is not 0."""
    tensors = {}
    generator = torch.Generator().manual_seed(9)
    for name, size in parameter_shapes(SHAPE).items():
        weight = torch.randn(size, generator=generator)
        if name in mask:
            weight *= mask[name]
            tensors[f"techniques/static_sparsity/mask/{name}"] = mask[name]
        tensors[f"weight/{name}"], tensors[f"adam_m/{name}"] = weight, torch.ones(size)
    if spoil:
        name = next(iter(mask))
        row, column = (~mask[name]).nonzero()[-1].tolist()
        tensors[f"weight/{name}"][row, column] = -1e-30

    def source(name: str, band: tuple[int, int]) -> Tensor:
        return tensors[name][band[0] : sum(band)]

    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype, 1) for name, tensor in tensors.items()}
    return writer.write(run_dir, 7, infos, source, state_of(TINY, 7, techniques={"static_sparsity": {}}))


@pytest.fixture
def mask() -> dict[str, Tensor]:
    shapes = Masks(SHAPE).shapes
    return {n: random_mask(1, n, size, UNSTRUCTURED, 0.7, (0, 0), size) for n, size in shapes.items()}


def test_bools_take_a_bit_each_and_come_back_in_any_cut(tmp_path: Path) -> None:
    mask = torch.rand(1000, 333, generator=torch.Generator().manual_seed(2)) < 0.5
    layout = Layout.whole((1000, 333))
    parts = {
        "mask": flat_slice(mask.view(-1), 0, layout, owner=True),
        "scalar": whole(torch.tensor(True), Layout.whole(()), owner=True),
    }
    path = store.save(tmp_path, 1, parts, {}, keep=1)
    stored = sum(file.stat().st_size for file in (path / "tensors").glob("*.distcp"))
    assert 333_000 / 8 <= stored < 333_000 / 8 + 4000
    assert store.verify(path) == {}
    reader = Reader(path)
    assert reader.read("scalar").item() is True
    for first, rows in ((0, 1000), (1, 1), (3, 7), (999, 1), (8, 16), (5, 0)):
        assert torch.equal(reader.read("mask", (first, rows)), mask[first : first + rows])
    # A range that begins and ends within a row, and a block of columns.
    part = torch.zeros(2000, dtype=torch.bool)
    store.load(path, {"mask": flat_slice(part, 1234, layout, owner=True)})
    assert torch.equal(part, mask.view(-1)[1234:3234])
    columns = torch.zeros(1000 * 111, dtype=torch.bool)
    store.load(path, {"mask": flat_slice(columns, 0, Layout.split((1000, 111), 1, 3, 1), owner=True)})
    assert torch.equal(columns.view(1000, 111), mask[:, 111:222])


def test_tools_know_masks(
    tmp_path: Path, mask: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sparse(tmp_path / "run", mask)
    stored = sum(one.numel() for one in mask.values()) // 8
    assert cli.main(["ckpt", "inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"techniques/static_sparsity: {len(mask)} of bool, {stored} B" in shown
    again = tools.reshape(path, tmp_path / "files", deal=writer.by_count(3), moments=True)
    assert not tools.diff(path, again)
    weights = tools.reshape(path, tmp_path / "weights", deal=None, moments=False)
    kept = {f"techniques/static_sparsity/mask/{name}" for name in mask}
    assert set(Reader(weights).tensors) == kept | {f"weight/{name}" for name in parameter_shapes(SHAPE)}
    name = next(iter(mask))
    other = write_sparse(tmp_path / "other", {**mask, name: mask[name].flip(0)})
    different = {one.name: one for one in tools.diff(path, other).tensors}
    found = different[f"techniques/static_sparsity/mask/{name}"]
    assert (found.count, found.largest) == (int((mask[name] != mask[name].flip(0)).sum()), 1.0)


def test_an_average_has_the_masks_that_all_have(tmp_path: Path, mask: dict[str, Tensor]) -> None:
    first, same = (write_sparse(tmp_path / name, mask) for name in ("first", "same"))
    name = next(iter(mask))
    other = write_sparse(tmp_path / "other", {**mask, name: mask[name].flip(0)})
    sparse = Reader(tools.average([first, same], tmp_path / "sparse", None))
    for key, kept in mask.items():
        assert torch.equal(sparse.read(f"techniques/static_sparsity/mask/{key}"), kept)
        assert torch.equal(sparse.read(f"weight/{key}") != 0, kept)
    for paths in ([first, other], [other, first], [first, write_sparse(tmp_path / "plain", {})]):
        dense = Reader(tools.average(paths, tmp_path / f"dense{paths[1].parts[-3]}", None))
        assert set(dense.tensors) == {f"weight/{name}" for name in parameter_shapes(SHAPE)}


def test_densify_keeps_the_weights_and_nothing_else(
    tmp_path: Path, mask: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    path, to = write_sparse(tmp_path / "run", mask), tmp_path / "dense"
    assert cli.main(["ckpt", "densify", str(tmp_path / "run"), f"to={to}"]) == 0
    made = to / "checkpoints" / "step_00000007"
    assert capsys.readouterr().out == f"{made}\n"
    assert store.verify(made) == {}
    sparse, dense = Reader(path), Reader(made)
    assert set(dense.tensors) == {f"weight/{name}" for name in sparse.weights}
    assert all(torch.equal(dense.read(name), sparse.read(name)) for name in dense.tensors)
    assert dense.state["weights_only"]
    assert [(entry["operation"], entry["from"]) for entry in dense.state["lineage"]] == [
        ("densify", str(path.resolve()))
    ]


def test_densify_refuses_what_is_not_sparse(
    tmp_path: Path, mask: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = write_sparse(tmp_path / "spoiled", mask, spoil=True)
    assert cli.main(["ckpt", "densify", str(spoiled), f"to={tmp_path / 'dense'}"]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert f"tensor weight/{next(iter(mask))}: found 1 masked weights that are not 0 in rows 0 to " in error
    assert not (tmp_path / "dense").exists()
    plain = write_sparse(tmp_path / "plain", {})
    assert cli.main(["ckpt", "densify", str(plain), f"to={tmp_path / 'dense'}"]) == cli.USER_ERROR
    assert "found no masks, expected a checkpoint of a run with" in capsys.readouterr().err
