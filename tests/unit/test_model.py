"""The model: how many parameters and FLOPs, from which numbers it starts, and who can see whom in it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from megafab.config.load import config_groups, load
from megafab.data.config import Packing
from megafab.data.packing import pack
from megafab.model.config import Activation, ModelConfig, MoEConfig, Norm, Position
from megafab.model.shape import ModelShape
from megafab.run import Batch
from megafab.topology.config import ContextMethod
from megafab.topology.mesh import Mesh

LLAMA = ModelConfig(
    name="llama", layers=4, hidden=64, heads=4, kv_heads=2, ffn=96, seq_len=32, vocab=256, init_std=0.02
)
GPT = ModelConfig(
    name="gpt",
    layers=4,
    hidden=64,
    heads=4,
    seq_len=32,
    vocab=256,
    norm=Norm.layernorm,
    activation=Activation.gelu,
    position=Position.learned,
    bias=True,
    qk_norm=True,
    tied_embeddings=True,
)
MOE = dataclasses.replace(LLAMA, name="moe", moe=MoEConfig(experts=4, top_k=2, ffn=48, shared_ffn=32))
FAMILIES = {
    "llama": LLAMA,
    "llama, qk norm, head size": dataclasses.replace(LLAMA, qk_norm=True, head_dim=24),
    "llama, tied, biases": dataclasses.replace(LLAMA, tied_embeddings=True, bias=True),
    "gpt": GPT,
    "gpt, not tied, no biases": dataclasses.replace(GPT, tied_embeddings=False, bias=False),
    "gpt, relu, grouped queries": dataclasses.replace(GPT, activation=Activation.squared_relu, kv_heads=1),
    "geglu, default width": dataclasses.replace(LLAMA, activation=Activation.geglu, ffn=None),
    "moe, shared expert": MOE,
    "moe, every second layer": dataclasses.replace(LLAMA, moe=MoEConfig(experts=4, top_k=1, every=2)),
    "moe, gelu": dataclasses.replace(GPT, bias=False, moe=MoEConfig(experts=2)),
}


def build(
    config: ModelConfig, mesh: Mesh, seed: int = 1234, recompute: str = "none", precision=torch.float32
):
    """This rank's chunks and groups, as `megafab.build` makes them."""
    from megafab.model import plan as model_plan
    from megafab.topology import groups as topology

    groups = topology.initialize(mesh, seed=seed)
    plan = model_plan.plan(
        ModelShape.of(config),
        groups,
        precision=precision,
        recompute=recompute,
        sequence_parallel=False,
        context_method=ContextMethod.allgather,
    )
    return model_plan.build(plan, groups, seed), groups


def batch(*documents: list[int], packing: Packing = Packing.document) -> Batch:
    """One row of documents; what follows them in the row is one more document of zeros."""
    window = np.zeros((1, LLAMA.seq_len + 1), np.int64)
    starts = np.zeros(window.shape, bool)
    position = 0
    for document in documents:
        window[0, position : position + len(document)] = document
        starts[0, position] = packing is Packing.document
        position += len(document)
    if position <= LLAMA.seq_len:
        starts[0, position] = packing is Packing.document
    packed = pack(window, starts, packing)
    arrays = {f.name: torch.from_numpy(getattr(packed, f.name)) for f in dataclasses.fields(packed)}
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(**arrays, domain_B=zero, sample_B=zero)


def logits_of(chunks, groups, rows: Batch) -> torch.Tensor:
    """[L, V] of the first row, in evaluation."""
    from megafab.model.inputs import ModelInputs

    (model,) = chunks
    inputs = ModelInputs.of(rows, groups, ContextMethod.allgather)
    with torch.no_grad():
        out = model.eval()(
            inputs.tokens_BL, inputs.position_BL, inputs.attention_mask, labels=inputs.labels_BL
        )
    return out[:, 0]


# -- sizes ---------------------------------------------------------------------------------------------------


def built_parameters(rank, world, configs):
    """Parameters of the modules as built, without storage: the largest presets fit no memory."""
    from megatron.core.tensor_parallel import layers

    from megafab.model import plan as model_plan
    from megafab.platform import platform
    from megafab.topology import groups as topology

    # This process is a rank of its own, so that nothing of this reaches another test.
    platform.device = torch.device("meta")
    layers.torch.cuda.current_device = lambda: platform.device
    model_plan.initialize = lambda *_: None
    groups = topology.initialize(Mesh(1), seed=1)
    counts = []
    for config in configs:
        plan = model_plan.plan(
            ModelShape.of(config, 50257),
            groups,
            precision=torch.bfloat16,
            recompute="none",
            sequence_parallel=False,
            context_method=ContextMethod.allgather,
        )
        (model,) = model_plan.build(plan, groups, seed=1)
        counts.append(sum(p.numel() for p in model.parameters()))
    return counts


def preset(name: str) -> ModelConfig:
    return load([f"model={name}", "data.path=x", "train.steps=1"]).model


def test_every_preset_has_the_parameters_it_says(ranks):
    names = config_groups("train")["model"].options
    configs = [preset(name) for name in names]
    (built,) = ranks.run(built_parameters, configs)
    expected = {name: ModelShape.of(c, 50257).parameters for name, c in zip(names, configs, strict=True)}
    assert dict(zip(names, built, strict=True)) == expected


def test_every_family_has_the_parameters_it_says(ranks):
    (built,) = ranks.run(built_parameters, list(FAMILIES.values()))
    expected = {name: ModelShape.of(config).parameters for name, config in FAMILIES.items()}
    assert dict(zip(FAMILIES, built, strict=True)) == expected


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("llama_8b", 128256, 8_030_261_248),  # as published with the weights of Llama 3 8B
        ("llama_70b", 128256, 70_553_706_496),  # Llama 3 70B
        ("llama_1b", 128256, 1_235_814_400),  # Llama 3.2 1B, tied
        ("mixtral_8x7b", 32000, 46_702_792_704),  # Mixtral 8x7B
    ],
)
def test_published_models_to_the_parameter(name, vocab, parameters):
    assert ModelShape.of(preset(name), vocab).parameters == parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt_175b", 174.6), ("mt_nlg_530b", 529.6), ("gpt_1t_frontier", 1008.0), ("gpt_6_7b", 6.7)],
)
def test_published_models_in_billions(name, billions):
    # 174.6, 529.6 and 1008.0 are the counts of Narayanan et al. 2021, table 1, at a vocabulary of 51200.
    assert ModelShape.of(preset(name), 51200).parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_gpt_2_small():
    config = dataclasses.replace(preset("gpt_125m"), seq_len=1024, vocab=50257, vocab_multiple=1)
    assert ModelShape.of(config).parameters == 124_439_808  # Radford et al. 2019, as released


def test_defaults_by_hand():
    plain = ModelShape.of(ModelConfig(name="m", layers=1, hidden=768, heads=12, seq_len=8), 50257)
    # 8/3 x 768 = 2048; 50257 rounded up to 128 is 393 x 128.
    assert (plain.ffn, plain.vocab, plain.kv_heads, plain.head_dim) == (2048, 50304, 12, 64)
    wide = ModelShape.of(ModelConfig(name="m", layers=1, hidden=512, heads=8, seq_len=8), 100)
    assert (wide.ffn, wide.vocab) == (1408, 128)  # 8/3 x 512 = 1365 rounded up to 11 x 128


def test_parameters_by_hand():
    # Vocabulary 128, hidden 4, 2 heads of 2, one key-value head, width 3, RMSNorm, gated.
    config = ModelConfig(name="m", layers=1, hidden=4, heads=2, kv_heads=1, ffn=3, seq_len=8)
    attention = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4  # query, key, value, output
    layer = attention + 3 * 4 * 3 + 2 * 4
    assert ModelShape.of(config, 1).parameters == 2 * 128 * 4 + layer + 4


# -- FLOPs ---------------------------------------------------------------------------------------------------


def counted_flops(rank, world, config, recompute):
    """FLOPs of forward and backward as torch counts them, and those of the forward pass alone.

    SDPA's math kernel spells attention out as matrix products; torch has no rule for the CPU's flash
    kernel. It multiplies the whole L x L square, which is the rule of `ModelShape.flops_per_token` too.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megafab.loss.cross_entropy import token_losses
    from megafab.model.inputs import ModelInputs

    (model,), groups = build(config, Mesh(1), recompute=recompute)
    tokens = list(range(config.seq_len + 1))
    inputs = ModelInputs.of(batch(tokens), groups, ContextMethod.allgather)
    arguments = inputs.tokens_BL, inputs.position_BL, inputs.attention_mask
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        logits = model.train()(*arguments, labels=inputs.labels_BL)
        forward = both.get_total_flops()
        token_losses(logits, inputs.labels_BL.t(), groups.tensor).nll.sum().backward()
    return both.get_total_flops(), forward


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_as_torch_counts_them(ranks, name):
    config = FAMILIES[name]
    ((both, forward),) = ranks.run(counted_flops, config, "none")
    expected = ModelShape.of(config).flops_per_token() * config.seq_len
    assert both == pytest.approx(expected, rel=0.02)
    assert forward == pytest.approx(expected / 3, rel=0.02)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt", "moe, shared expert"])
def test_flops_with_recomputation_as_torch_counts_them(ranks, name, recompute):
    config = FAMILIES[name]
    ((both, _),) = ranks.run(counted_flops, config, recompute)
    shape = ModelShape.of(config)
    assert both == pytest.approx(shape.flops_per_token(recompute=recompute) * config.seq_len, rel=0.02)
    assert both > 1.01 * shape.flops_per_token() * config.seq_len, "something is computed again"


def test_flops_by_hand():
    # Hidden 4, 2 heads of 2, width 3 gated, vocabulary 128, 8 tokens; a multiply-add is 2 FLOPs.
    config = ModelConfig(name="m", layers=2, hidden=4, heads=2, kv_heads=1, ffn=3, seq_len=8)
    matrices = (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4) + 3 * 4 * 3
    attention = 2 * 8 * 4 + 2 * 8 * 4  # query x key, probabilities x value, over all 8 positions
    layer, head = 2 * matrices + attention, 2 * 128 * 4
    shape = ModelShape.of(config, 1)
    assert shape.flops_per_token() == 3 * (2 * layer + head)
    assert shape.flops_per_token(recompute="selective") == 3 * (2 * layer + head) + 2 * attention
    assert shape.flops_per_token(recompute="full") == 3 * (2 * layer + head) + 2 * layer
    assert shape.flops_per_token(head_again=True) == 3 * (2 * layer + head) + head
    assert shape.flops_per_token(16) == 3 * (2 * (layer + attention) + head)


def test_flops_of_175b():
    # Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s / 6h + V / 16lh) with recomputation of every layer;
    # here the logits' forward pass is not computed again, and they count it once less: 3/4 of their term.
    layers, hidden, length, vocab = 96, 12288, 2048, 51200
    theirs = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
    ours = ModelShape.of(preset("gpt_175b")).flops_per_token(recompute="full")
    assert ours == pytest.approx(theirs, rel=1e-9)


# -- initial weights -----------------------------------------------------------------------------------------


def weights(rank, world, config, mesh, seed=1234, precision=torch.float32):
    """This rank's boxes of every logical tensor: name -> (global shape, [(offset, values)])."""
    from megafab.model.tags import tag_all

    chunks, groups = build(config, mesh, seed, precision=precision)
    parts = []
    for tagged in tag_all(chunks, groups):
        boxes = []
        for block in tagged.layout.blocks:
            where = tuple(slice(o, o + n) for o, n in zip(block.local_offset, block.shape, strict=True))
            boxes.append((block.global_offset, tagged.parameter.detach()[where].float().numpy()))
        parts.append((tagged.name, tagged.layout.global_shape, boxes))
    return parts


def assembled(by_rank) -> dict[str, np.ndarray]:
    """The logical tensors; ranks that hold the same elements must agree on them to the bit."""
    whole: dict[str, np.ndarray] = {}
    for parts in by_rank:
        for name, shape, boxes in parts:
            tensor = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            for offset, values in boxes:
                where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                known = ~np.isnan(tensor[where])
                assert np.array_equal(tensor[where][known], values[known]), name
                tensor[where] = values
    for name, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{name} is not covered"
    return whole


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


PLACES = {
    "tensor 2": Mesh(2, tensor=2),
    "tensor 4": Mesh(4, tensor=4),  # llama: more than its key-value heads
    "pipeline 2": Mesh(2, pipeline=2),
    "interleaved": Mesh(2, pipeline=2, virtual_pipeline=2),
    "tensor 2 x pipeline 2": Mesh(4, tensor=2, pipeline=2),
    "data 2": Mesh(2),
}
MOE_PLACES = {
    "expert 2": Mesh(2, expert=2),
    "expert 4 x pipeline 2": Mesh(8, expert=4, pipeline=2),
    "expert 2 x tensor 2": Mesh(2, expert=2, tensor=2),
}


@pytest.fixture(scope="module")
def alone(ranks):
    """Initial weights on one rank."""
    cache: dict[str, dict[str, np.ndarray]] = {}

    def alone(config: ModelConfig) -> dict[str, np.ndarray]:
        if config.name not in cache:
            cache[config.name] = assembled(ranks.run(weights, config, Mesh(1)))
        return cache[config.name]

    return alone


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=lambda c: c.name)
def test_initial_weights_do_not_depend_on_the_topology(ranks, alone, config, place):
    mesh = PLACES[place]
    assert same(assembled(ranks.run(weights, config, mesh, world=mesh.ranks)), alone(config))


@pytest.mark.parametrize("place", MOE_PLACES)
def test_initial_experts_do_not_depend_on_the_topology(ranks, alone, place):
    mesh = MOE_PLACES[place]
    assert same(assembled(ranks.run(weights, MOE, mesh, world=mesh.ranks)), alone(MOE))


def test_another_seed_gives_other_matrices(ranks, alone):
    other = assembled(ranks.run(weights, LLAMA, Mesh(1), 7))
    first = alone(LLAMA)
    assert other.keys() == first.keys()
    for name, tensor in first.items():
        assert np.array_equal(other[name], tensor) == (tensor.ndim == 1), name
    assert same(assembled(ranks.run(weights, LLAMA, Mesh(1), 1234)), first)


def test_no_two_matrices_begin_alike(alone):
    for config in (LLAMA, GPT, MOE):
        first = [tuple(tensor.flat[:4]) for tensor in alone(config).values() if tensor.ndim == 2]
        assert len(set(first)) == len(first)


def test_a_deeper_model_begins_with_the_same_first_layers_but_for_the_residual_scale(ranks, alone):
    shallow = assembled(ranks.run(weights, dataclasses.replace(LLAMA, layers=2), Mesh(1)))
    deep = alone(LLAMA)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert np.array_equal(shallow[name], deep[name])
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    np.testing.assert_allclose(shallow[name], deep[name] * math.sqrt(2), rtol=1e-6)


def test_bf16_weights_are_the_rounded_fp32_ones(ranks, alone):
    bf16 = assembled(ranks.run(weights, LLAMA, Mesh(1), 1234, torch.bfloat16))
    rounded = {
        name: torch.from_numpy(tensor).bfloat16().float().numpy() for name, tensor in alone(LLAMA).items()
    }
    assert same(bf16, rounded)


@pytest.mark.parametrize("config", [LLAMA, GPT, MOE], ids=lambda c: c.name)
def test_the_distribution_of_initial_weights(alone, config):
    # Matrices: N(0, init_std^2); into the residual stream init_std / sqrt(2 x layers); gains 1; biases 0.
    seen = set()
    for name, tensor in alone(config).items():
        if name.endswith("bias"):
            seen.add("bias")
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            seen.add("qk gain" if "q_layernorm" in name or "k_layernorm" in name else "gain")
            assert (tensor == 1).all(), name
        else:
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            seen.add("residual" if into_residual else "matrix")
            std = 0.02 / math.sqrt(8) if into_residual else 0.02
            # The standard errors of a mean and of a standard deviation of n draws; 5 of them are one in 10^6.
            n = tensor.size
            assert abs(tensor.mean()) < 5 * std / math.sqrt(n), name
            assert abs(tensor.std() / std - 1) < 5 / math.sqrt(2 * n), name
    expected = {"gain", "residual", "matrix"}
    assert seen == expected | ({"bias", "qk gain"} if config is GPT else set())


# -- who sees whom -------------------------------------------------------------------------------------------

FIRST, SECOND = [5, 6, 7, 8, 9, 10, 11], [50, 51, 52, 53, 54, 55, 56, 57, 58]
REPLACED = [105, 106, 107, 108, 109, 110, 111]
SPAN = slice(len(FIRST), len(FIRST) + len(SECOND))


def documents(rank, world, config, packing):
    """Logits of SECOND: after FIRST, after another document, after a shorter one, and alone."""
    chunks, groups = build(config, Mesh(1))
    after_first = logits_of(chunks, groups, batch(FIRST, SECOND, packing=packing))[SPAN]
    after_other = logits_of(chunks, groups, batch(REPLACED, SECOND, packing=packing))[SPAN]
    after_two = logits_of(chunks, groups, batch(FIRST[:3], REPLACED[:4], SECOND, packing=packing))[SPAN]
    alone = logits_of(chunks, groups, batch(SECOND, packing=packing))[: len(SECOND)]
    return after_first, after_other, after_two, alone


@pytest.mark.parametrize("config", [LLAMA, GPT, MOE], ids=lambda c: c.name)
def test_a_document_cannot_see_another(ranks, config):
    ((after_first, after_other, after_two, alone),) = ranks.run(documents, config, Packing.document)
    if config is not MOE:  # whose experts multiply the tokens they are given, in batches of varying size
        assert torch.equal(after_first, after_other)
        assert torch.equal(after_first, after_two)
    torch.testing.assert_close(after_first, after_other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after_first, after_two, rtol=1e-5, atol=1e-6)
    # Positions restart: it is as if the document began the row.
    torch.testing.assert_close(after_first, alone, rtol=1e-5, atol=1e-6)
    assert float(alone.std(dim=-1).mean()) > 0.05, "logits that say something"


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=lambda c: c.name)
def test_concatenated_documents_see_each_other(ranks, config):
    ((after_first, after_other, _, alone),) = ranks.run(documents, config, Packing.concatenate)
    assert float((after_first - after_other).abs().amax(dim=-1).min()) > 1e-4
    assert float((after_first - alone).abs().amax(dim=-1).min()) > 1e-4


def rope_is_relative(rank, world):
    """The logits with rotary positions counted from 0 and from 1000."""
    chunks, groups = build(LLAMA, Mesh(1))
    rows = batch(FIRST, SECOND)
    moved = dataclasses.replace(rows, position_BL=rows.position_BL + 1000)
    return logits_of(chunks, groups, rows), logits_of(chunks, groups, moved)


def test_rotary_positions_are_relative(ranks):
    ((here, there),) = ranks.run(rope_is_relative)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def changed_at(rank, world, config, documents, positions):
    """Which positions' logits change, to the bit, with the token at each of `positions`."""
    chunks, groups = build(config, Mesh(1))
    rows = batch(*documents)
    before = logits_of(chunks, groups, rows)
    changes = []
    for position in positions:
        tokens = rows.tokens_BL.clone()
        tokens[0, position] += 1
        after = logits_of(chunks, groups, dataclasses.replace(rows, tokens_BL=tokens))
        changes.append((before != after).any(dim=-1).nonzero().flatten().tolist())
    return changes


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=lambda c: c.name)
def test_nothing_is_seen_before_it_comes(ranks, config):
    length, positions = config.seq_len, [0, 9, 30, 31]
    # One document of the whole row; then two.
    ((changes),) = ranks.run(changed_at, config, [list(range(length + 1))], positions)
    assert changes == [list(range(p, length)) for p in positions]
    ((changes),) = ranks.run(changed_at, config, [list(range(12)), list(range(20, 41))], positions)
    assert changes == [list(range(12)), list(range(9, 12)), [30, 31], [31]]


# -- recomputation -------------------------------------------------------------------------------------------


def gradients(rank, world, config, recompute):
    """The loss and all gradients of one training step's rows."""
    from megafab.loss.cross_entropy import token_losses
    from megafab.model.inputs import ModelInputs

    (model,), groups = build(config, Mesh(1), recompute=recompute)
    inputs = ModelInputs.of(batch(FIRST, SECOND, REPLACED), groups, ContextMethod.allgather)
    logits = model.train()(
        inputs.tokens_BL, inputs.position_BL, inputs.attention_mask, labels=inputs.labels_BL
    )
    loss = token_losses(logits, inputs.labels_BL.t(), groups.tensor).nll.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("config", [LLAMA, GPT, MOE], ids=lambda c: c.name)
def test_recomputation_gives_the_same_gradients(ranks, config, dropout):
    config = dataclasses.replace(config, dropout=dropout)
    ((loss, kept),) = ranks.run(gradients, config, "none")
    for how in ("selective", "full"):
        ((again, recomputed),) = ranks.run(gradients, config, how)
        assert again == loss, how
        assert recomputed.keys() == kept.keys()
        for name, gradient in kept.items():
            assert torch.equal(recomputed[name], gradient), (how, name)
    assert all(bool(gradient.any()) for gradient in kept.values() if gradient.ndim == 2)


def test_dropout_drops(ranks):
    ((without, _),) = ranks.run(gradients, LLAMA, "none")
    ((with_, _),) = ranks.run(gradients, dataclasses.replace(LLAMA, dropout=0.2), "none")
    assert with_ != without


# -- experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_loss_teaches_the_router(ranks, top_k):
    moe = MoEConfig(experts=4, top_k=top_k, ffn=48, aux_loss=0.0)
    ((_, found),) = ranks.run(gradients, dataclasses.replace(LLAMA, moe=moe), "none")
    routers = [gradient for name, gradient in found.items() if "router" in name]
    assert len(routers) == LLAMA.layers
    assert all(float(gradient.norm()) > 1e-6 for gradient in routers)


def test_a_capacity_drops_tokens(ranks):
    def moe(capacity):
        return dataclasses.replace(LLAMA, moe=MoEConfig(experts=4, ffn=48, capacity_factor=capacity))

    ((everything, _),) = ranks.run(gradients, moe(None), "none")
    ((ample, _),) = ranks.run(gradients, moe(4.0), "none")
    ((scarce, _),) = ranks.run(gradients, moe(0.25), "none")
    assert ample == pytest.approx(everything, rel=1e-6)
    assert abs(scarce - everything) > 1e-4


def test_experts_of_every_second_layer(ranks):
    names = assembled(ranks.run(weights, FAMILIES["moe, every second layer"], Mesh(1)))
    with_experts = {name.split(".")[2] for name in names if "experts" in name}
    assert with_experts == {"0", "2"}
    assert "decoder.layers.1.mlp.linear_fc1.weight" in names
