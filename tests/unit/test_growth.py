"""Models that grow: which sizes, from which units, to which numbers; without running any model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import tensors_of, write_checkpoint

from launch.cli import main
from megafab.checkpoint import store, writer
from megafab.checkpoint.config import Depth, GrowConfig, Moments, Width
from megafab.checkpoint.reader import TensorInfo
from megafab.checkpoint.surgery import advice, depth, upcycle
from megafab.checkpoint.surgery.axes import Axis
from megafab.checkpoint.surgery.grow import grow
from megafab.checkpoint.surgery.learned import LearnedGrowth
from megafab.checkpoint.surgery.maps import heads, maps, shares
from megafab.checkpoint.surgery.origins import Origins
from megafab.checkpoint.surgery.width import Widening
from megafab.config.growth import grown, obstacles
from megafab.config.tree import to_tree
from megafab.errors import ConfigErrors, UserError
from megafab.model import init
from megafab.model.config import Activation, ModelConfig, MoEConfig, Norm, Position
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape
from megafab.telemetry.meter import Meter

MODEL = ModelConfig(
    name="small", layers=3, hidden=8, heads=4, kv_heads=2, ffn=12, seq_len=16, vocab=128, head_dim=2
)
GPT = dataclasses.replace(
    MODEL, norm=Norm.layernorm, activation=Activation.gelu, position=Position.learned, bias=True
)
MOE = dataclasses.replace(MODEL, layers=4, moe=MoEConfig(experts=2, every=2, shared_ffn=4))
IDS = 120


def shape(**changes: Any) -> ModelShape:
    return ModelShape.of(dataclasses.replace(MODEL, **changes))


def into(model: ModelConfig = MODEL, **config: Any) -> ModelShape:
    """The sizes that a model grows into."""
    parent = ModelShape.of(model)
    return ModelShape.of(grown(parent, GrowConfig(**config), ids=IDS), parent.vocab)


# -- what a model may grow into ------------------------------------------------------------------------------


def test_every_size_of_a_grown_model_is_spelled_out():
    parent = ModelConfig(name="m", layers=2, hidden=48, heads=8, kv_heads=4, seq_len=16)
    model = grown(ModelShape.of(parent, 100), GrowConfig(layers=6, hidden=64, heads=12), ids=100)
    assert (model.layers, model.hidden, model.heads, model.kv_heads) == (6, 64, 12, 6)
    assert (model.head_dim, model.ffn) == (6, 128), "as they were, not as hidden=64 would have them"
    assert model.norm_eps == 1e-5 * 48 / 64
    assert (
        grown(ModelShape.of(parent, 100), GrowConfig(hidden=96, width=Width.direct), ids=100).norm_eps == 1e-5
    )


def test_a_vocabulary_may_grow_into_its_padding():
    assert into(vocab=125).vocab == 128
    assert into(vocab=129).vocab == 256


def test_experts_by_default():
    assert into(experts=4).config.moe == MoEConfig(experts=4, top_k=2, every=1, shared_ffn=0)
    given = into(experts=4, top_k=1, every=2, shared_ffn=6).config.moe
    assert given == MoEConfig(experts=4, top_k=1, every=2, shared_ffn=6)


WIDE = {"hidden": 16}
REFUSED: dict[str, tuple[ModelConfig, dict[str, Any], str]] = {
    "nothing": (MODEL, {}, "growth: found no size that grows, expected a size larger than the parent's. "),
    "no growth": (MODEL, {"layers": 3}, "layers=3: found 3, expected at least 4: the parent has 3. "),
    "smaller": (MODEL, {"ffn": 8}, "ffn=8: found 8, expected at least 13: the parent has 12. "),
    "no more ids": (
        MODEL,
        {"vocab": 120},
        "vocab=120: found 120, expected at least 121: the parent has 120.",
    ),
    "odd heads": (MODEL, {"heads": 5}, "heads=5: found 5, expected a multiple of 2, the query heads to a "),
    "odd keys": (MODEL, {"heads": 8, "kv_heads": 3}, "kv_heads=3: found 3, expected a divisor of heads=8. "),
    "no place": (
        *(MODEL, {"kv_heads": 4}),
        "kv_heads=4: found 1 query heads to a key-value head, of 2, expected a place for every head of the "
        "parent beside its key-value head. Fix: heads=8, or kv_heads=4 and width=direct",
    ),
    "experts' width": (MOE, {"ffn": 16}, "ffn=16: found 2 experts, expected a dense parent: experts keep "),
    "experts' layers": (MOE, {"layers": 5}, "layers=5: found 5, expected a multiple of model.moe.every=2, "),
    "more experts": (MOE, {"experts": 4}, "experts=4: found 2 experts, expected a dense parent. "),
    "biases": (GPT, {"experts": 4}, "experts=4: found model.bias=true, expected model.bias=false: Megatron"),
    "one expert": (MODEL, {"experts": 1, "top_k": 1}, "experts=1: found 1, expected at least 2. "),
    "top k": (MODEL, {"experts": 2, "top_k": 3}, "top_k=3: found experts=2, expected between 1 and the numb"),
    "every": (MODEL, {"experts": 2, "every": 0}, "every=0: found 0, expected at least 1. "),
    "learned experts": (
        MODEL,
        {"experts": 2, "layers": 6, "depth": Depth.learned},
        "experts=2: found a learned operator, expected operators that are not learned, or a dense model. ",
    ),
    "depth": (MODEL, {**WIDE, "depth": Depth.zero}, "depth=zero: found no layers=, expected layers to add. "),
    "width": (MODEL, {"layers": 6, "width": Width.zero}, "width=zero: found no hidden, heads, kv_heads or f"),
    "top k, dense": (MODEL, {**WIDE, "top_k": 2}, "top_k=2: found no experts=, expected experts to choose f"),
    "shared, dense": (MODEL, {**WIDE, "shared_ffn": 2}, "shared_ffn=2: found no experts=, expected experts "),
    "split": (MODEL, {**WIDE, "split": 0.3}, "split=0.3: found no width=direct, expected copies to share "),
    "split of all": (
        MODEL,
        {**WIDE, "width": Width.direct, "split": 1.0},
        "split=1.0: found 1.0, expected between 0 and 1, both excluded. ",
    ),
    "noise": (MODEL, {**WIDE, "noise": 0.1}, "noise=0.1: found nothing that is copied, expected copies: "),
    "noise, learned": (
        MODEL,
        {"layers": 6, "ffn": 20, "width": Width.learned, "noise": 0.1},
        "noise=0.1: found nothing that is copied, ",
    ),
    "no noise": (MODEL, {"layers": 6, "noise": 0.0}, "noise=0.0: found 0.0, expected more than 0. "),
    "seed": (MODEL, {"layers": 6, "seed": 3}, "seed=3: found nothing that is drawn, expected an operator t"),
    "steps": (MODEL, {"layers": 6, "steps": 3}, "steps=3: found no operator that learns, expected depth=le"),
    "no steps": (
        MODEL,
        {"layers": 6, "depth": Depth.learned, "steps": 0},
        "steps=0: found 0, expected at least 1. ",
    ),
    "data": (MODEL, {"layers": 6, "judge": False, "data": "x"}, "data=x: found judge=false, expected someth"),
    "moments": (
        MODEL,
        {**WIDE, "width": Width.direct, "layers": 6, "depth": Depth.random, "optimizer": Moments.copy},
        "optimizer=copy: found depth=random, width=direct, expected depth=stack, interleave or zero, or ",
    ),
    "moments of experts": (
        MODEL,
        {"experts": 2, "optimizer": Moments.copy},
        "optimizer=copy: found experts=2, expected ",
    ),
    "a claim without a judge": (
        MODEL,
        {**WIDE, "preserving": True, "judge": False},
        "preserving=true: found judge=false, expected a judge to hold the claim to. ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str):
    model, config, line = REFUSED[name]
    with pytest.raises(ConfigErrors) as caught:
        into(model, **config)
    assert str(caught.value).startswith(line)
    assert len(caught.value.problems) == 1


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigErrors) as caught:
        into(layers=2, split=0.5, steps=3, width=Width.zero)
    assert [problem.where for problem in caught.value.problems] == [
        *("layers=2", "width=zero", "split=0.5", "steps=3"),
    ]


# operators: what stands in the way of the function, "": nothing
CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"layers": 6, "depth": Depth.zero, "hidden": 12, "ffn": 13, "heads": 8, "vocab": 125}, ""),
    ({"hidden": 24, "ffn": 13, "heads": 6, "width": Width.direct}, ""),
    ({"kv_heads": 4, "width": Width.direct}, ""),
    ({"experts": 4, "shared_ffn": 3}, ""),
    ({"layers": 6}, "depth=stack, which changes the function"),
    ({"hidden": 12, "width": Width.direct}, "hidden=12 by width=direct, which copies some channels more"),
    ({"hidden": 12, "width": Width.random}, "width=random, which changes"),
    ({"experts": 4, "top_k": 1}, "top_k=1, with which an expert counts with its probability"),
    ({"hidden": 16, "width": Width.direct, "noise": 0.01}, "noise=0.01"),
]


@pytest.mark.parametrize(("config", "reason"), CLAIMS)
def test_a_claim_that_cannot_hold_is_refused_before_anything_is_read(config: dict[str, Any], reason: str):
    found = obstacles(shape(), GrowConfig(**config))
    if not reason:
        assert found == []
        into(**config, preserving=True)
        return
    assert len(found) == 1
    with pytest.raises(ConfigErrors) as caught:
        into(**config, preserving=True)
    assert str(caught.value).startswith(f"preserving=true: found {reason}")


# -- depth ---------------------------------------------------------------------------------------------------


def sources(model: ModelConfig, count: int, operator: Depth) -> list[int | None]:
    return [layer.source for layer in depth.layers(ModelShape.of(model), count, operator)]


def test_the_order_of_layers():
    assert sources(MODEL, 9, Depth.stack) == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert sources(MODEL, 7, Depth.stack) == [0, 1, 2, 0, 1, 2, 0]
    assert sources(MODEL, 6, Depth.interleave) == [0, 0, 1, 1, 2, 2]
    assert sources(MODEL, 5, Depth.interleave) == [0, 0, 1, 1, 2]
    assert sources(MODEL, 6, Depth.zero) == [0, 0, 1, 1, 2, 2]
    assert sources(MODEL, 6, Depth.random) == [0, None, 1, None, 2, None]


def test_only_the_repetitions_are_copies_and_silent():
    found = depth.layers(shape(), 6, Depth.zero)
    assert [layer.silent for layer in found] == [False, True, False, True, False, True]
    assert [layer.copy for layer in found] == [False, True, False, True, False, True]
    stacked = depth.layers(shape(), 6, Depth.stack)
    assert [(layer.copy, layer.silent) for layer in stacked] == [(False, False)] * 3 + [(True, False)] * 3


@pytest.mark.parametrize("operator", [Depth.stack, Depth.interleave, Depth.zero])
def test_layers_with_experts_stay_what_they_are(operator: Depth):
    parent = ModelShape.of(MOE)
    for count in (6, 8, 12):
        made = into(MOE, layers=count, depth=operator)
        for layer, origin in enumerate(depth.layers(parent, count, operator)):
            assert origin.source is not None
            assert made.is_moe_layer(layer) == parent.is_moe_layer(origin.source)


# -- units ---------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    assert shares([0, 1, 0, 1], 0.4) == pytest.approx([0.4, 0.4, 0.6, 0.6])
    assert shares([0, 0, 0, 1], 0.4) == pytest.approx([0.4, 0.24, 0.36, 1.0])
    four = shares([0] * 4, 0.4)
    assert sum(four) == pytest.approx(1)
    assert len(set(four)) == 4, "no two copies alike: symmetry is broken"


def test_heads_of_groups():
    # 4 query heads on 2 key-value heads: [0 1] [2 3].
    assert heads(shape(), shape(heads=8, kv_heads=4), copies=True) == ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1])
    assert heads(shape(), shape(heads=6, kv_heads=3), copies=True) == ([0, 1, 2, 3, 0, 1], [0, 1, 0])
    assert heads(shape(), shape(heads=6), copies=True) == ([0, 1, 0, 2, 3, 2], [0, 1])
    assert heads(shape(), shape(heads=6), copies=False) == ([0, 1, -1, 2, 3, -1], [0, 1])
    assert heads(shape(), shape(heads=6, kv_heads=3), copies=False) == ([0, 1, 2, 3, -1, -1], [0, 1, -1])
    # Every query head gets a key-value head of its own, a copy of the one that it shared.
    assert heads(shape(), shape(kv_heads=4), copies=True) == ([0, 2, 1, 3], [0, 1, 0, 1])


def test_rows_of_queries_keys_and_values_by_hand():
    # One head of size 2 and its key-value head: rows 0 1 are its query, 2 3 its key, 4 5 its value.
    one = shape(heads=1, kv_heads=1)
    found = maps(one, shape(heads=2, kv_heads=1), split=0.4)
    assert found[Axis.qkv].source.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert found[Axis.qkv].later.tolist() == [False, False, True, True, False, False, False, False]
    assert found[Axis.heads].source.tolist() == [0, 1, 0, 1]
    assert found[Axis.heads].share.tolist() == pytest.approx([0.4, 0.4, 0.6, 0.6])
    found = maps(one, shape(heads=2, kv_heads=2), split=None)
    assert found[Axis.qkv].source.tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 6]


def test_gates_and_values_grow_apart():
    found = maps(shape(ffn=2), shape(ffn=3), split=None)
    assert found[Axis.fc1].source.tolist() == [0, 1, -1, 2, 3, -1]
    assert found[Axis.ffn].source.tolist() == [0, 1, -1]
    plain = {"activation": Activation.relu}
    assert maps(shape(ffn=2, **plain), shape(ffn=3, **plain), split=0.4)[Axis.fc1].source.tolist() == [
        0,
        1,
        0,
    ]


# -- tensors by hand -----------------------------------------------------------------------------------------

LAYER = "decoder.layers.0"
FC1, FC2 = f"{LAYER}.mlp.linear_fc1.weight", f"{LAYER}.mlp.linear_fc2.weight"
TWO = {"hidden": 2, "ffn": 2, "heads": 1, "kv_heads": 1, "activation": Activation.gelu}


def widened(
    name: str, values: Any, width: Width | None, after: dict[str, Any], fill: float = 9.0, **model: Any
) -> list[Any]:
    """A tensor of a model of two channels and two neurons, made wider amid draws that are all `fill`."""
    parent, to = shape(**TWO, **model), shape(**TWO | after, **model)
    widening = Widening(parent, to, width, split=0.4, ids=None)
    drawn = torch.full(parameter_shapes(to)[name], fill)
    return widening.weight(name, torch.tensor(values), lambda: drawn).tolist()


def test_direct_copies_rows_and_shares_columns():
    matrix = [[1.0, 2.0], [3.0, 4.0]]
    found = widened(FC1, matrix, Width.direct, {"hidden": 4, "ffn": 3})
    rows = [[0.4, 0.8, 0.6, 1.2], [1.2, 1.6, 1.8, 2.4], [0.4, 0.8, 0.6, 1.2]]
    assert torch.allclose(torch.tensor(found), torch.tensor(rows))
    found = widened(FC2, matrix, Width.direct, {"hidden": 4, "ffn": 3})
    rows = [[0.4, 2.0, 0.6], [1.2, 4.0, 1.8]] * 2
    assert torch.allclose(torch.tensor(found), torch.tensor(rows))
    table = widened("embedding.position_embeddings.weight", [[5.0, 6.0]], Width.direct, {"hidden": 4}, **POS)
    assert table == [[5.0, 6.0, 5.0, 6.0]]
    gain = "decoder.final_layernorm.weight"
    assert widened(gain, [1.0, 2.0], Width.direct, {"hidden": 4}) == [1, 2, 1, 2]
    tied = widened(gain, [1.0, 2.0], Width.direct, {"hidden": 4}, tied_embeddings=True)
    assert tied == pytest.approx([0.4, 0.8, 0.6, 1.2])


POS = {"position": Position.learned, "seq_len": 1}


def test_zero_leaves_what_a_reader_draws_and_what_a_writer_must_not_say():
    matrix = [[1.0, 2.0], [3.0, 4.0]]
    after = {"hidden": 3, "ffn": 3}
    assert widened(FC1, matrix, Width.zero, after) == [[1, 2, 9], [3, 4, 9], [9, 9, 9]]
    assert widened(FC2, matrix, Width.zero, after) == [[1, 2, 0], [3, 4, 0], [0, 0, 0]]
    table = "embedding.position_embeddings.weight"
    assert widened(table, [[5.0, 6.0]], Width.zero, after, **POS) == [[5, 6, 0]]


def test_zero_under_layer_norm_carries_the_mean():
    norm = {"norm": Norm.layernorm, "bias": True}
    matrix = [[1.0, 2.0], [3.0, 4.0]]
    after = {"hidden": 4, "ffn": 3}
    assert widened(FC2, matrix, Width.zero, after, **norm) == [[1, 2, 0], [3, 4, 0], [2, 3, 0], [2, 3, 0]]
    assert widened(FC2.replace("weight", "bias"), [1.0, 4.0], Width.zero, after, **norm) == [1, 4, 2.5, 2.5]
    table = "embedding.position_embeddings.weight"
    assert widened(table, [[5.0, 7.0]], Width.zero, after, **norm, **POS) == [[5, 7, 6, 6]]
    assert widened(FC1.replace("weight", "bias"), [1.0, 4.0], Width.zero, after, 0.0, **norm) == [1, 4, 0]


def test_zero_corrects_norms():
    # d/D = 1/4: gains times 1/2.
    gain = f"{LAYER}.input_layernorm.weight"
    assert widened(gain, [2.0, 4.0], Width.zero, {"hidden": 8}, 1.0) == [1, 2, *[0.5] * 6]
    assert widened(gain, [2.0, 4.0], Width.zero, {"ffn": 8}, 1.0) == [2, 4]
    shift = f"{LAYER}.input_layernorm.bias"
    norm = {"norm": Norm.layernorm}
    assert widened(shift, [2.0, 4.0], Width.zero, {"hidden": 4}, 0.0, **norm) == [2, 4, 0, 0]
    # Of queries and keys that are normed themselves, under the epsilon that changed; not of values.
    qkv, rows = f"{LAYER}.self_attention.linear_qkv.weight", [[1.0, 1.0]] * 6
    found = widened(qkv, rows, Width.zero, {"hidden": 8}, 1.0, qk_norm=True)
    assert found == [[0.5] * 8] * 4 + [[1] * 8] * 2
    assert widened(qkv, rows, Width.zero, {"hidden": 8}, 1.0) == [[1] * 8] * 6


def test_random_draws_all_that_is_new():
    assert widened(FC2, [[1.0, 2.0], [3.0, 4.0]], Width.random, {"hidden": 3, "ffn": 3}) == [
        *([1, 2, 9], [3, 4, 9], [9, 9, 9]),
    ]
    assert widened(f"{LAYER}.input_layernorm.weight", [2.0, 4.0], Width.random, {"hidden": 3}) == [2, 4, 9]


def test_new_rows_of_the_vocabulary_are_the_mean_and_so_is_what_was_padding():
    parent, to = shape(**TWO), ModelShape.of(dataclasses.replace(MODEL, **TWO, vocab=129))
    widening = Widening(parent, to, None, split=0.4, ids=IDS)
    table = torch.randn(128, 2, generator=torch.Generator().manual_seed(1))
    made = widening.weight("output_layer.weight", table, lambda: torch.empty(0))
    assert made.shape == (256, 2)
    assert torch.equal(made[:IDS], table[:IDS])
    assert torch.allclose(made[IDS:], table[:IDS].mean(0).expand(256 - IDS, -1))
    assert not widening.moment("output_layer.weight", table, second=False)[IDS:].any()


def test_moments_get_zeros_and_the_inverse_of_what_the_weight_was_multiplied_by():
    parent, to = shape(**TWO), shape(**TWO | {"hidden": 8})
    widening = Widening(parent, to, Width.zero, split=0.4, ids=None)
    gain = "decoder.final_layernorm.weight"
    assert widening.moment(gain, torch.tensor([1.0, 2.0]), second=False).tolist() == [2, 4, *[0] * 6]
    assert widening.moment(gain, torch.tensor([1.0, 2.0]), second=True).tolist() == [4, 8, *[0] * 6]
    assert widening.moment(FC2, torch.ones(2, 2), second=True).sum(1).tolist() == [2, 2, *[0] * 6]


def test_parts_of_a_layer_with_experts():
    assert upcycle.part("mlp.experts.local_experts.0.linear_fc1.weight") == upcycle.Part(
        "mlp.linear_fc1.weight"
    )
    last = upcycle.part("mlp.experts.local_experts.11.linear_fc2.weight")
    assert last == upcycle.Part("mlp.linear_fc2.weight", copy=True)
    assert upcycle.part("mlp.router.weight") == upcycle.Part(None)
    assert upcycle.part("mlp.shared_experts.linear_fc1.weight") == upcycle.Part(None)
    assert upcycle.part("mlp.shared_experts.linear_fc2.weight") == upcycle.Part(None, silent=True)
    assert upcycle.part("mlp.linear_fc1.weight") == upcycle.Part("mlp.linear_fc1.weight")


# -- learned maps --------------------------------------------------------------------------------------------


def learned_of(model: ModelConfig, **config: Any) -> tuple[LearnedGrowth, Origins, dict[str, torch.Tensor]]:
    """The maps as they begin, and random weights of the parent."""
    parent, to = ModelShape.of(model), into(model, **config)
    origins = Origins(parent, to, GrowConfig(**config), ids=IDS)
    generator = torch.Generator().manual_seed(2)
    weights = {n: torch.randn(s, generator=generator) for n, s in parameter_shapes(parent).items()}
    return LearnedGrowth(origins, weights), origins, weights


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(GPT, qk_norm=True)], ids=["llama", "gpt"])
def test_maps_that_add_nothing_put_every_weight_where_zero_puts_it(model: ModelConfig):
    sizes = {"hidden": 12, "heads": 8, "kv_heads": 4, "ffn": 14}
    learned, origins, weights = learned_of(model, **sizes, width=Width.learned)
    with torch.no_grad():
        for matrix in learned.maps.values():
            matrix.copy_(torch.eye(*matrix.shape))
        found = learned.weights()
    placed = Widening(ModelShape.of(model), origins.grown, Width.zero, split=0.4, ids=None)
    assert set(learned.maps) == {"hidden", "query", "key", "value", "output", "ffn"}
    assert found.keys() == origins.shapes.keys()
    for name, tensor in found.items():
        assert tensor.shape == origins.shapes[name]
        if "norm" not in name and "linear_qkv" not in name:  # which zero corrects
            assert torch.equal(tensor, placed.moment(name, weights[name], second=False)), name
    head = found["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert torch.equal(
        head[: 4 * 2][:, :8], weights["decoder.layers.0.self_attention.linear_qkv.weight"][: 4 * 2]
    )
    assert not head[-4 * 2 :].any()


def test_maps_begin_as_the_identity_above_draws_and_mixtures_as_stacking():
    learned, _, weights = learned_of(MODEL, layers=6, depth=Depth.learned, ffn=500, width=Width.learned)
    matrix = learned.maps["ffn"]
    assert torch.equal(matrix[:12], torch.eye(12))
    assert float(matrix[12:].detach().std()) == pytest.approx(500**-0.5, rel=0.05)
    with torch.no_grad():
        learned.mixtures["self_attention/linear_proj/weight"][5] = torch.tensor([2.0, 0.0, -1.0])
        found = learned.weights()
    name = "decoder.layers.{}.self_attention.linear_proj.weight"
    assert torch.equal(found[name.format(4)], weights[name.format(1)])
    by_hand = 2 * weights[name.format(0)] - weights[name.format(2)]
    assert torch.allclose(found[name.format(5)], by_hand)


# -- advice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.581e9), (7e9, 2e12, 1.1113e10), (13e9, 2e12, 1.5844e10), (70e9, 2e12, 4.2475e10)],
)
def test_the_fit_gives_the_papers_predictions(parameters: float, tokens: float, expected: float):
    assert advice.fitted(parameters, 6 * parameters * tokens) == pytest.approx(expected, rel=1e-4)
    found = advice.advise(int(parameters), g=4, tokens=tokens)
    assert (found.tokens, found.reason) == (found.fitted, "")
    by_flops = advice.advise(int(parameters), g=4, flops=6 * parameters * tokens)
    assert (by_flops.tokens, by_flops.share) == (pytest.approx(found.tokens), pytest.approx(found.share))


def test_advice_is_clamped_where_the_fit_does_not_reach():
    small = advice.advise(5_000_000, g=4, tokens=1e8)
    assert small.fitted == pytest.approx(5.06e10, rel=1e-3), "500 times the budget"
    assert (small.tokens, small.share) == (pytest.approx(3e7), pytest.approx(0.075))
    assert "the fit begins at 1e+20 FLOPs" in small.reason
    short = advice.advise(3_000_000_000, g=2, tokens=7e9)
    assert short.flops > advice.TRUSTED
    assert short.fitted > 1.4e9
    assert (short.tokens, short.reason) == (pytest.approx(1.4e9), "at most 10 % of the target's budget")


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "every", 3600.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"vocab_size": IDS, "corpus": "c0de", "tokenizer": "beef", "mixture": {"books": 1.0}}
    return write_checkpoint(tmp_path_factory.mktemp("run") / "run", MODEL, data=data, techniques={"ema": {}})


def made(source: Path, to: Path, **config: Any) -> dict[str, torch.Tensor]:
    """The tensors of what a checkpoint grows into, unjudged."""
    return tensors_of(grow(source, to / "to", GrowConfig(judge=False, **config), lambda _: None))


@pytest.mark.parametrize(
    ("operator", "order"), [(Depth.stack, [0, 1, 2, 0, 1, 2]), (Depth.interleave, [0, 0, 1, 1, 2, 2])]
)
def test_layers_equal_their_sources_bit_for_bit_and_so_do_their_moments(source, tmp_path, operator, order):
    found = made(source, tmp_path, layers=6, depth=operator, optimizer=Moments.copy)
    old = tensors_of(source)
    assert len(found) == 3 * len(parameter_shapes(into(layers=6)))
    for name, tensor in found.items():
        kind, _, weight = name.partition("/decoder.layers.")
        number, _, rest = weight.partition(".")
        origin = f"{kind}/decoder.layers.{order[int(number)]}.{rest}" if number else name
        assert torch.equal(tensor, old[origin]), name


def test_identity_layers_write_nothing_and_have_no_moments(source, tmp_path):
    found, old = (
        made(source, tmp_path, layers=6, depth=Depth.zero, optimizer=Moments.copy),
        tensors_of(source),
    )
    for kind in ("weight", "adam_m", "adam_v"):
        for part in ("self_attention.linear_proj", "mlp.linear_fc2"):
            assert not found[f"{kind}/decoder.layers.3.{part}.weight"].any()
            kept = old[f"{kind}/decoder.layers.1.{part}.weight"]
            assert torch.equal(found[f"{kind}/decoder.layers.2.{part}.weight"], kept)
    fc1 = "weight/decoder.layers.3.mlp.linear_fc1.weight"
    assert torch.equal(found[fc1], old[fc1.replace(".3.", ".1.")])


def test_what_is_drawn_is_what_a_new_model_begins_with(source, tmp_path):
    found = made(source, tmp_path, layers=6, depth=Depth.random, hidden=12, width=Width.random, seed=5)
    model = into(layers=6, hidden=12, width=Width.random).config
    sizes = parameter_shapes(ModelShape.of(model))
    for name in ("decoder.layers.3.mlp.linear_fc2.weight", "decoder.layers.3.input_layernorm.weight"):
        assert torch.equal(found[f"weight/{name}"], init.values(name, sizes[name], model, 5))
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    assert torch.equal(found[f"weight/{name}"][8:], init.values(name, sizes[name], model, 5)[8:])


def test_every_expert_begins_as_the_feed_forward_layer(source, tmp_path):
    found, old = made(source, tmp_path, experts=3, every=2, shared_ffn=4), tensors_of(source)
    assert found.keys() == {
        f"weight/{name}" for name in parameter_shapes(into(experts=3, every=2, shared_ffn=4))
    }
    for layer in (0, 2):
        for part in ("linear_fc1", "linear_fc2"):
            dense = old[f"weight/decoder.layers.{layer}.mlp.{part}.weight"]
            for expert in range(3):
                name = f"weight/decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{part}.weight"
                assert torch.equal(found[name], dense)
        assert found[f"weight/decoder.layers.{layer}.mlp.router.weight"].std() > 0.01
        assert not found[f"weight/decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight"].any()
    assert torch.equal(
        found["weight/decoder.layers.1.mlp.linear_fc1.weight"], old["weight/" + FC1.replace("0", "1", 1)]
    )


def test_noise_is_on_copies_only_and_of_the_size_that_was_asked_for(tmp_path):
    model = dataclasses.replace(MODEL, hidden=64, ffn=96)
    source = write_checkpoint(tmp_path / "run", model)
    old = tensors_of(source)
    found = made(source, tmp_path / "stack", layers=6, noise=0.2)
    first, again = (found[f"weight/decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in (1, 4))
    assert torch.equal(first, old["weight/decoder.layers.1.mlp.linear_fc1.weight"])
    assert float((again - first).std() / first.std()) == pytest.approx(0.2, rel=0.05)
    gain = "decoder.layers.4.input_layernorm.weight"
    assert torch.equal(found[f"weight/{gain}"], old[f"weight/{gain.replace('4', '1')}"])
    plain = made(source, tmp_path / "plain", ffn=128, width=Width.direct)
    noisy = made(source, tmp_path / "noisy", ffn=128, width=Width.direct, noise=0.01)
    change = noisy[f"weight/{FC1}"] - plain[f"weight/{FC1}"]
    gate = change.view(2, 128, 64)
    assert not gate[:, :96].any()
    assert float(gate[:, 96:].std() / plain[f"weight/{FC1}"].std()) == pytest.approx(0.01, rel=0.05)


def test_the_state_says_what_grew_out_of_what(source, tmp_path, capsys):
    path = grow(source, tmp_path / "to", GrowConfig(layers=12, hidden=12, judge=False), lambda _: None)
    then, now = store.read_state(source), store.read_state(path)
    assert store.verify(path) == {}
    assert path == tmp_path / "to" / "checkpoints" / "step_00000007"
    assert (now["weights_only"], now["techniques"], now["progress"]) == (True, {}, then["progress"])
    model = now["config"]["model"]
    assert (model["layers"], model["hidden"], model["kv_heads"], model["norm_eps"]) == (
        12,
        12,
        2,
        1e-5 * 8 / 12,
    )
    (entry,) = now["lineage"]
    assert (entry["from"], entry["step"], entry["operation"]) == (str(source.resolve()), 7, "grow")
    assert entry["growth"] == {
        "sizes": {"layers": [3, 12], "hidden": [8, 12]},
        "depth": "stack",
        "width": "zero",
        "g": 4.0,
        "optimizer": "reset",
        "tokens": 7 * 512,
        "samples": 7 * 8,
    }
    assert main(["ckpt", "inspect", str(path)]) == 0
    assert "grow (layers 3 to 12, hidden 8 to 12, depth=stack, width=zero): " in capsys.readouterr().out


def test_a_grown_checkpoint_grows_again(source, tmp_path):
    path = grow(source, tmp_path / "one", GrowConfig(layers=6, judge=False), lambda _: None)
    path = grow(path, tmp_path / "two", GrowConfig(ffn=20, judge=False), lambda _: None)
    lineage = store.read_state(path)["lineage"]
    assert [list(entry["growth"]["sizes"]) for entry in lineage] == [["layers"], ["ffn"]]


def test_factors_of_matrices_are_copied_with_their_layers_and_nothing_else(tmp_path):
    source = write_checkpoint(tmp_path / "run", MODEL, kinds=["weight"])
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    tensors = {**tensors_of(source), f"soap_m/{name}": torch.ones(8, 12), f"soap_left/{name}": torch.eye(8)}
    tensors[f"soap_q_left/{name}/gate"] = torch.eye(8) * 2
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype, 1) for key, tensor in tensors.items()}
    state = store.read_state(source)
    source = writer.write(
        tmp_path / "soap", 7, infos, lambda key, band: tensors[key][band[0] : sum(band)], state
    )
    found = made(source, tmp_path / "a", layers=6, optimizer=Moments.copy)
    for key, tensor in tensors.items():
        assert torch.equal(found[key.replace("layers.1", "layers.4")], tensor)
    for config in ({"layers": 6, "depth": Depth.zero}, {"ffn": 20}):
        with pytest.raises(
            UserError, match="optimizer=copy: found soap_left of .*, of another shape than the w"
        ):
            made(source, tmp_path / "b", optimizer=Moments.copy, **config)
    assert not (tmp_path / "b").exists() or list((tmp_path / "b").iterdir()) == []


def test_moments_that_are_not_there_cannot_be_copied(tmp_path):
    source = write_checkpoint(tmp_path / "run", MODEL, kinds=["weight"])
    with pytest.raises(UserError, match="optimizer=copy: found weights only in "):
        made(source, tmp_path, layers=6, optimizer=Moments.copy)
    assert not (tmp_path / "to").exists()


def test_a_damaged_checkpoint_does_not_grow(source, tmp_path):
    shutil.copytree(source, tmp_path / source.name)
    file = tmp_path / source.name / "tensors" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="found tensors/__0_0.distcp: XXH3 "):
        made(tmp_path / source.name, tmp_path, layers=6)
    assert not (tmp_path / "to").exists()


def test_weights_that_the_configuration_does_not_describe_do_not_grow(tmp_path):
    other = dataclasses.replace(MODEL, ffn=16)
    source = write_checkpoint(tmp_path / "run", MODEL, config={"model": to_tree(other)})
    with pytest.raises(
        UserError, match=r"mlp.linear_fc1.weight: found shape \(24, 8\), expected shape \(32, 8\)"
    ):
        made(source, tmp_path, layers=6)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["layers=6"], "to: found no value, expected text. Fix: add to=... to the command"),
        (
            ["to=x", "layers=6", "depth=twice"],
            "depth=twice: found text twice, expected one of stack, interleave",
        ),
        (
            ["to=x", "layers=6", "tokens=9"],
            "tokens=9: found no advise=true, expected advice to give for it. ",
        ),
        (["advise=true"], "advise=true: found 0 budgets for the grown model, expected one. "),
        (
            ["advise=true", "tokens=9", "flops=9"],
            "advise=true: found 2 budgets for the grown model, expected ",
        ),
        (
            ["advise=true", "tokens=9", "to=x"],
            "to=x: found advise=true, which makes nothing, expected one of ",
        ),
        (["advise=true", "tokens=0"], "tokens=0: found 0, expected at least 1. "),
        (["to=x"], "growth: found no size that grows, "),
    ],
)
def test_a_mistake_is_one_line(source, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert main(["ckpt", "grow", str(source), *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line)
    assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


def test_advice_for_a_checkpoint(source, capsys):
    assert main(["ckpt", "grow", str(source), "advise=true", "tokens=1e6"]) == 0
    count = into(layers=12).parameters
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"target    {count:,} parameters, 1e+06 tokens, {6e6 * count:.3g} FLOPs"
    assert lines[1] == "g         4"
    assert lines[3].startswith("d         3e+05 tokens for the base, 7.5% of the budget: the fit begins at ")
    assert lines[4] == "base      has had 3,584 tokens: train it on 2.96e+05 more, then grow"
    assert main(["ckpt", "grow", str(source), "advise=true", "tokens=1e4", "layers=24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("g         8: outside 2 to 4, ")
    assert lines[4].endswith("train it on 2.42e+03 more, then grow")
