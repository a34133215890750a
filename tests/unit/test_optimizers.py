"""The update rules against golden vectors, independent references, and what the papers promise of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from megafab.config.load import load
from megafab.config.rules import check_all
from megafab.engine.layerwise import Job, share_out
from megafab.optim import elementwise
from megafab.optim.adamw import AdamW
from megafab.optim.config import MuonConfig, MuonScale, OptimConfig, OptimName, SOAPConfig
from megafab.optim.lion import Lion
from megafab.optim.matrix import Fusion, MatrixOptimizer, is_layer_matrix
from megafab.optim.muon import Muon, orthogonalize
from megafab.optim.soap import SOAP

FP32 = torch.float32


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(generator=torch.Generator().manual_seed(seed))


def trained(
    optimizer: MatrixOptimizer,
    weight: torch.Tensor,
    gradients: list[torch.Tensor],
    *,
    lr: float = 0.1,
    decay: float = 0.0,
    fusion: Fusion | None = None,
):
    """The parameter after an update by each of the gradients."""
    parameter = optimizer.start(weight.clone(), fusion or Fusion.none(weight.shape[0]))
    for updates, gradient in enumerate(gradients):
        optimizer.update(parameter, gradient, lr=lr, decay=decay, updates=updates)
    return parameter


# -- Lion ----------------------------------------------------------------------------------------------------


def lion(weight: list[float], gradients: list[list[float]], *, lr=0.1, betas=(0.9, 0.99), decay=0.0):
    """Weights and moments after a step by each of the gradients, in fp64."""
    parameter = torch.tensor(weight, dtype=torch.float64)
    optimizer = Lion([parameter], lr=lr, betas=betas, weight_decay=decay)
    optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.tolist(), optimizer.state[parameter]["exp_avg"].tolist()


def test_lion_golden_steps():
    """By hand, with beta1 = 0.9, beta2 = 0.99, lr = 0.1, weight decay 0.5.

    First element:  u = + + -: the third gradient outweighs the moment 0.0199 (0.01791 - 0.1 < 0).
    Second element: u = - - -: the moment -0.0597 outweighs the third gradient (-0.05373 + 0.01 < 0).
    Third element:  no gradient, so only the decay.
    """
    weights, moments = lion([1.0, -2.0, 4.0], [[1, -3, 0], [1, -3, 0], [-1, 0.1, 0]], decay=0.5)
    assert weights == pytest.approx([0.772125, -1.4295, 3.4295], rel=1e-12)
    assert moments == pytest.approx([0.0199 * 0.99 - 0.01, -0.0597 * 0.99 + 0.001, 0.0], rel=1e-12)


def test_lion_leaves_what_has_no_gradient():
    weights, moments = lion([3.0], [[0.0], [0.0]])
    assert weights == [3.0]
    assert moments == [0.0]


def test_lion_looks_at_signs_only():
    gradients = [[0.3, -2.0, 0.01], [-0.5, -1.0, 0.02], [0.1, 5.0, -0.05]]
    scaled = [[1024 * g for g in gradient] for gradient in gradients]
    assert lion([0.5, 0.5, 0.5], gradients)[0] == lion([0.5, 0.5, 0.5], scaled)[0]


def test_lion_groups_have_their_own_rates_and_what_has_no_gradient_stays():
    decayed, plain, idle = (torch.ones(3) for _ in range(3))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [plain, idle], "lr": 0.2}]
    optimizer = Lion(groups, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    decayed.grad = plain.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert decayed.tolist() == pytest.approx([0.85] * 3)
    assert plain.tolist() == pytest.approx([0.8] * 3)
    assert idle.tolist() == [1.0] * 3
    assert idle not in optimizer.state


@pytest.mark.parametrize("name", list(OptimName))
def test_every_optimizers_file_is_complete_and_breaks_no_rule(name: OptimName):
    config = load(["model=llama_tiny", "data.path=corpus", "train.steps=20", f"optim={name.value}"])
    assert config.optim.name is name
    check_all(config, ranks=1, corpus=None)


# -- elementwise optimizers of the configuration -------------------------------------------------------------

ELEMENTWISE = {
    OptimName.adamw: OptimConfig(lr=0.01),
    OptimName.lion: OptimConfig(name=OptimName.lion, lr=0.01, eps=None),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_ranges_of_a_parameter_are_updated_like_the_parameter(name: OptimName):
    def steps(parts: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
        optimizer = elementwise.make(ELEMENTWISE[name], [{"params": parts}])
        elementwise.prime(optimizer, parts)
        for gradient in gradients:
            for part, of_part in zip(parts, gradient.split([p.numel() for p in parts]), strict=True):
                part.grad = of_part.clone()
            optimizer.step()
        return torch.cat(parts)

    weight, gradients = normal(100), [normal(100, seed=seed) for seed in range(1, 6)]
    whole = steps([weight.clone()], gradients)
    assert not torch.equal(whole, weight)
    torch.testing.assert_close(steps(list(weight.clone().split([1, 36, 63])), gradients), whole)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_primed_moments_are_those_of_the_checkpoint_and_are_used(name: OptimName):
    parameter = torch.ones(4)
    optimizer = elementwise.make(ELEMENTWISE[name], [{"params": [parameter]}])
    elementwise.prime(optimizer, [parameter])
    before = {kind: optimizer.state[parameter][key] for kind, key in elementwise.MOMENTS[name].items()}
    parameter.grad = torch.ones(4)
    optimizer.step()
    for kind, moment in before.items():
        assert kind.startswith(name.value.removesuffix("w"))
        assert moment.abs().min() > 0, "the step must have filled the primed tensor itself"


def test_adamw_is_torchs_to_the_bit():
    """With groups that decay or do not, and a weight that gets a gradient every other step only."""

    def steps(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> list[torch.Tensor]:
        weights = [normal(size, seed=size) for size in (37, 5, 64)]
        optimizer = make([{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}])
        for step in range(4):
            for weight in weights:
                weight.grad = normal(*weight.shape, seed=100 + step)
            if step % 2:
                weights[0].grad = None
            optimizer.step()
        state = [optimizer.state[weight] for weight in weights]
        assert [int(of["step"]) for of in state] == [2, 4, 4]
        return [*weights, *(of[name] for of in state for name in ("exp_avg", "exp_avg_sq"))]

    config = ELEMENTWISE[OptimName.adamw]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = steps(lambda groups: elementwise.make(config, groups))
    torchs = steps(lambda groups: torch.optim.AdamW(groups, fused=True, **settings))
    assert all(torch.equal(a, b) for a, b in zip(mine, torchs, strict=True))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_step_sees_its_gradients_scaled(name: OptimName):
    def step(factor: float, by: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = normal(50)
        optimizer = elementwise.make(ELEMENTWISE[name], [{"params": [weight]}])
        weight.grad = factor * normal(50, seed=1)
        elementwise.scale(optimizer, [weight.grad], by)
        optimizer.step()
        return weight, optimizer.state[weight]["exp_avg"]

    whole, quarter, scaled = step(1.0, 1.0), step(0.25, 1.0), step(1.0, 0.25)
    assert not torch.equal(whole[1], quarter[1])
    assert all(torch.equal(a, b) for a, b in zip(quarter, scaled, strict=True))


def test_adamw_writes_the_copies_of_those_weights_that_have_one():
    weights = [normal(9), normal(20)]
    optimizer = elementwise.make(ELEMENTWISE[OptimName.adamw], [{"params": weights}])
    assert isinstance(optimizer, AdamW)
    copy = torch.zeros(20, dtype=torch.bfloat16)
    optimizer.copies[weights[1]] = copy
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(copy, weights[1].bfloat16())
    assert not torch.equal(weights[0], normal(9))


def test_setting_the_updates_sets_adams_bias_correction():
    parameter = torch.zeros(1)
    optimizer = elementwise.make(ELEMENTWISE[OptimName.adamw], [{"params": [parameter]}])
    elementwise.prime(optimizer, [parameter])
    elementwise.set_updates(optimizer, 3)
    parameter.grad = torch.ones(1)
    optimizer.step()
    first = 0.1 / (1 - 0.9**4)
    second = math.sqrt(0.05 / (1 - 0.95**4))
    assert parameter.item() == pytest.approx(-0.01 * first / second, rel=1e-5)


# -- matrices of a parameter ---------------------------------------------------------------------------------


def test_a_fusion_takes_bands_apart_and_puts_them_back():
    fusion = Fusion(("query", "key", "value"), 2, (4, 1, 1))
    parameter = torch.arange(12.0)[:, None].repeat(1, 3)
    query, key, value = fusion.split(parameter)
    assert query[:, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert key[:, 0].tolist() == [4, 10]
    assert value[:, 0].tolist() == [5, 11]
    assert fusion.shapes(3) == [(8, 3), (2, 3), (2, 3)]
    assert torch.equal(fusion.join([query, key, value]), parameter)


def test_only_layers_matrices_are_for_matrix_optimizers():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    layer = "decoder.layers.3."
    assert is_layer_matrix(f"{layer}mlp.experts.local_experts.5.linear_fc1.weight", matrix)
    assert is_layer_matrix(f"{layer}self_attention.linear_qkv.weight", matrix)
    assert not is_layer_matrix(f"{layer}mlp.router.weight", matrix)
    assert not is_layer_matrix(f"{layer}input_layernorm.weight", vector)
    assert not is_layer_matrix("embedding.word_embeddings.weight", matrix)
    assert not is_layer_matrix("output_layer.weight", matrix)


def test_work_is_shared_out_evenly_and_alike_on_all_ranks():
    jobs = {f"layer {i} {kind}": Job(cost, True) for i in range(9) for kind, cost in (("a", 3.0), ("b", 5.0))}
    owners = share_out(jobs, copies=3, tensor=2)
    assert owners == share_out(dict(reversed(jobs.items())), copies=3, tensor=2)
    loads = {(c, t): 0.0 for c in range(3) for t in range(2)}
    for name, owner in owners.items():
        loads[owner] += jobs[name].cost
    assert max(loads.values()) - min(loads.values()) <= 3.0


def test_what_every_tensor_rank_has_whole_weighs_on_all_of_them():
    jobs = {"whole": Job(4.0, False), "slices a": Job(3.0, True), "slices b": Job(2.0, True)}
    owners = share_out(jobs, copies=2, tensor=2)
    assert owners["whole"][0] == 0
    assert owners["slices a"][0] == owners["slices b"][0] == 1
    assert owners["slices a"][1] != owners["slices b"][1]


# -- Muon ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 64), (64, 128), (96, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_singular_vectors(shape, dtype):
    matrix = normal(*shape)
    result = orthogonalize(matrix, 5, dtype)
    assert result.shape == matrix.shape
    assert result.dtype is dtype
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ result.float() @ vt.T  # diagonal: the new singular values
    noise = 1e-3 if dtype is torch.float32 else 0.05
    if shape[0] != shape[1]:  # a square matrix has singular values near 0, for which 5 steps are too few
        assert inside.diagonal().min() > 0.5
    assert inside.diagonal().max() < 1.3
    assert (inside - inside.diagonal().diag()).abs().max() < noise
    scaled = orthogonalize(1e4 * matrix, 5, dtype)
    torch.testing.assert_close(scaled.float(), result.float(), rtol=noise, atol=noise)
    assert not orthogonalize(torch.zeros(shape), 5, dtype).any()


def test_newton_schulz_is_its_polynomial_on_singular_values():
    """Of a diagonal matrix: x <- a x + b x^3 + c x^5, five times, from x / |x|."""
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = orthogonalize(values.diag(), 5, torch.float64)
    torch.testing.assert_close(found, expected.diag(), rtol=1e-6, atol=1e-9)


def muon_reference(weight, gradients, config: MuonConfig, *, lr: float, decay: float, scale: float):
    """Jordan's algorithm on one matrix, written out."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = config.momentum * momentum + (1 - config.momentum) * gradient
        update = momentum
        if config.nesterov:
            update = config.momentum * momentum + (1 - config.momentum) * gradient
        weight = weight * (1 - lr * decay) - lr * scale * orthogonalize(update, config.ns_steps, FP32)
    return weight, momentum


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", list(MuonScale))
def test_muon_is_momentum_nesterov_scale_and_decay(shape, nesterov: bool, scale: MuonScale):
    config = MuonConfig(nesterov=nesterov, scale=scale)
    factor = {
        MuonScale.moonlight: 0.2 * math.sqrt(48),
        MuonScale.keller: math.sqrt(3) if shape == (48, 16) else 1.0,
    }[scale]
    weight, gradients = normal(*shape), [normal(*shape, seed=seed) for seed in range(1, 4)]
    parameter = trained(Muon(config, FP32), weight, gradients, decay=0.3)
    expected, momentum = muon_reference(weight, gradients, config, lr=0.1, decay=0.3, scale=factor)
    torch.testing.assert_close(parameter.weight, expected)
    torch.testing.assert_close(parameter.moments["muon_m"], momentum)


def test_moonlights_scale_gives_updates_of_adamws_size():
    """RMS about 0.2 lr at every shape, as AdamW's is (Liu et al. 2025, section 2.2)."""
    for shape in ((256, 64), (64, 256), (128, 128)):
        zero = torch.zeros(shape)
        update = trained(Muon(MuonConfig(), FP32), zero, [normal(*shape)], lr=1.0).weight
        assert 0.14 < update.square().mean().sqrt() < 0.22, shape


BUILD: Mapping[str, MatrixOptimizer] = {
    "muon": Muon(MuonConfig(), FP32),
    "soap": SOAP(OptimConfig(name=OptimName.soap, lr=1.0, soap=SOAPConfig(frequency=2))),
}


@pytest.mark.parametrize("name", BUILD)
def test_fused_matrices_are_updated_as_if_they_were_apart(name: str):
    fusion = Fusion(("query", "key", "value"), 2, (8, 4, 4))
    weight, gradients = normal(32, 24), [normal(32, 24, seed=seed) for seed in range(1, 6)]
    fused = trained(BUILD[name], weight, gradients, decay=0.1, fusion=fusion)
    apart = [
        trained(BUILD[name], part, [fusion.split(g)[i] for g in gradients], decay=0.1)
        for i, part in enumerate(fusion.split(weight))
    ]
    torch.testing.assert_close(fused.weight, fusion.join([p.weight for p in apart]))
    for kind, moment in fused.moments.items():
        torch.testing.assert_close(moment, fusion.join([p.moments[kind] for p in apart]))
    for (kind, part), factor in fused.factors.items():
        theirs = [p.factors[kind, ""] for p in apart]
        # What has no part of its own belongs to all of them, as v does.
        torch.testing.assert_close(factor, theirs[fusion.names.index(part)] if part else fusion.join(theirs))
    other = trained(BUILD[name], weight, gradients, decay=0.1)
    assert not torch.allclose(other.weight, fused.weight), "fusing must matter, or this test says nothing"


# -- SOAP ----------------------------------------------------------------------------------------------------


def soap(**settings) -> SOAP:
    """Its authors' betas; the settings are SOAPConfig's."""
    config = SOAPConfig(**{"frequency": 1, **settings})
    return SOAP(OptimConfig(name=OptimName.soap, lr=1.0, beta1=0.95, beta2=0.95, soap=config))


def adam_reference(weight, gradients, *, lr: float, decay: float):
    """Adam whose epsilon is added before the bias correction, and then decoupled decay."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(gradients, 1):
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
        step = lr * math.sqrt(1 - 0.95**t) / (1 - 0.95**t)
        weight = (weight - step * m / (v.sqrt() + 1e-8)) * (1 - lr * decay)
    return weight


def test_soaps_first_update_only_begins_the_statistics():
    weight, gradient = normal(6, 4), normal(6, 4, seed=1)
    parameter = trained(soap(), weight, [gradient], decay=0.5)
    assert torch.equal(parameter.weight, weight)
    assert not parameter.moments["soap_m"].any()
    assert not parameter.factors["soap_v", ""].any()
    left, basis = parameter.factors["soap_left", ""], parameter.factors["soap_q_left", ""]
    torch.testing.assert_close(left, 0.05 * gradient @ gradient.T)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6))
    rotated = basis.T @ left @ basis
    torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-5)
    assert rotated.diagonal()[0] == rotated.diagonal().max()


def diagonal_gradients(count: int, size: int = 5) -> list[torch.Tensor]:
    """Gradients g with g g^T and g^T g diagonal, so that the eigenbasis is that of the weights."""
    return [normal(size, seed=seed).diag() for seed in range(1, count + 1)]


def test_soap_with_diagonal_statistics_is_adam():
    weight, gradients = normal(5, 5), diagonal_gradients(7)
    found = trained(soap(), weight, gradients, lr=0.01, decay=0.1).weight
    expected = adam_reference(weight, gradients[1:], lr=0.01, decay=0.1)
    # What is not on the diagonal has no gradient: the eigenvectors of the statistics hit it exactly.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_soap_without_preconditioned_sides_is_adam():
    weight, gradients = normal(6, 8), [normal(6, 8, seed=seed) for seed in range(1, 8)]
    parameter = trained(soap(max_dim=5), weight, gradients, lr=0.01, decay=0.1)
    assert set(parameter.factors) == {("soap_v", "")}
    expected = adam_reference(weight, gradients[1:], lr=0.01, decay=0.1)
    torch.testing.assert_close(parameter.weight, expected)


def test_soap_preconditions_the_sides_that_are_short_enough():
    parameter = trained(soap(max_dim=7), normal(6, 8), [normal(6, 8, seed=1)])
    assert set(parameter.factors) == {("soap_v", ""), ("soap_left", ""), ("soap_q_left", "")}


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed, dtype=torch.float64))[0]


def quadratic(optimizer: MatrixOptimizer, turn: torch.Tensor | None, steps: int = 12) -> list[torch.Tensor]:
    """Weights on the way down |A w - B|^2 + noise, turned back; `turn` rotates the space of the inputs."""
    a, b = normal(8, 8, seed=1, dtype=torch.float64), normal(8, 8, seed=2, dtype=torch.float64)
    turn = torch.eye(8, dtype=torch.float64) if turn is None else turn
    parameter = optimizer.start(normal(8, 8, seed=3, dtype=torch.float64) @ turn, Fusion.none(8))
    course = []
    for updates in range(steps):
        noise = normal(8, 8, seed=10 + updates, dtype=torch.float64)
        gradient = a.T @ (a @ parameter.weight @ turn.T - b) + noise
        optimizer.update(parameter, gradient @ turn, lr=0.01, decay=0.0, updates=updates)
        course.append(parameter.weight @ turn.T)
    return course


def test_soap_turns_with_the_space_and_adam_does_not():
    turn = rotation(8, seed=4)
    plain, turned = quadratic(soap(frequency=3), None), quadratic(soap(frequency=3), turn)
    assert not torch.equal(plain[-1], plain[0])
    torch.testing.assert_close(turned[-1], plain[-1], rtol=1e-4, atol=1e-4)
    adam = soap(max_dim=1)  # without a side to precondition
    assert (quadratic(adam, turn)[-1] - quadratic(adam, None)[-1]).abs().max() > 1e-2


def test_soap_follows_the_eigenvectors_of_its_statistics():
    """Power iteration on the same statistics comes to their eigenvectors, v in their order."""
    gradients = [normal(6, 6, seed=1)] * 60
    parameter = trained(soap(frequency=1, shampoo_beta=0.5), normal(6, 6), gradients, lr=1e-3)
    left, basis = parameter.factors["soap_left", ""], parameter.factors["soap_q_left", ""]
    rotated = basis.T @ left @ basis
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4 * rotated.diagonal().max()
    # Of a constant gradient the second moment in its eigenbasis is the squared singular values.
    diagonal = parameter.factors["soap_v", ""].diagonal()
    values = torch.linalg.svdvals(gradients[0]).square() * (1 - 0.95**59)
    torch.testing.assert_close(diagonal.sort().values, values.sort().values, rtol=1e-3, atol=1e-5)


def test_soap_keeps_v_with_its_direction_when_eigenvalues_change_places():
    """First the first axis has the large gradients, then the second: columns swap, and v with them."""
    early, late = torch.tensor([3.0, 1.0]).diag(), torch.tensor([1.0, 30.0]).diag()
    parameter = trained(soap(frequency=2), torch.zeros(2, 2), [early, early, late], lr=1e-3)
    v, left = parameter.factors["soap_v", ""], parameter.factors["soap_q_left", ""]
    assert left.abs().argmax(dim=0).tolist() == [1, 0]
    expected_of_axis = [0.95 * 0.05 * 9 + 0.05 * 1, 0.95 * 0.05 * 1 + 0.05 * 900]
    assert v.diagonal().tolist() == pytest.approx([expected_of_axis[1], expected_of_axis[0]], rel=1e-4)


def test_soaps_first_basis_does_not_follow_rounding_errors():
    """A gradient with fewer columns than rows leaves directions free; noise must not choose among them."""
    gradient = normal(64, 16)
    noisy = gradient + 1e-7 * normal(64, 16, seed=1)
    exact, disturbed = (
        trained(soap(), torch.zeros(64, 16), [g]).factors["soap_q_left", ""] for g in (gradient, noisy)
    )
    overlap = (exact.T @ disturbed).abs().diagonal()
    assert overlap.min() > 0.999


@pytest.mark.parametrize("name", BUILD)
def test_state_is_in_the_parameters_own_tensors(name: str):
    """What a checkpoint reads and fills: nothing else may decide on the next update."""
    gradients = [normal(12, 8, seed=seed) for seed in range(1, 8)]
    optimizer = BUILD[name]
    unbroken = trained(optimizer, normal(12, 8), gradients)
    half = trained(optimizer, normal(12, 8), gradients[:3])
    resumed = optimizer.start(half.weight.clone(), Fusion.none(12))
    for kind, moment in half.moments.items():
        resumed.moments[kind].copy_(moment)
    for key, factor in half.factors.items():
        resumed.factors[key].copy_(factor)
    for updates in range(3, 7):
        optimizer.update(resumed, gradients[updates], lr=0.1, decay=0.0, updates=updates)
    assert torch.equal(resumed.weight, unbroken.weight)
    assert not torch.equal(unbroken.weight, half.weight)


@pytest.mark.parametrize("name", BUILD)
def test_an_update_leaves_the_gradient_alone(name: str):
    gradient = normal(12, 8)
    before = gradient.clone()
    trained(BUILD[name], normal(12, 8), [gradient] * 3)
    assert torch.equal(gradient, before)


def test_soap_costs_more_where_sides_are_long():
    optimizer = soap(frequency=10)
    assert optimizer.cost(Fusion.none(32), 128) > optimizer.cost(Fusion.none(64), 64)
    assert soap(max_dim=1).cost(Fusion.none(64), 64) == 64 * 64
    fused = Fusion(("gate", "up"), 1, (64, 64))
    assert optimizer.cost(fused, 64) == 2 * optimizer.cost(Fusion.none(64), 64)
