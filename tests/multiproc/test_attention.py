"""Attention over documents, alone and split over context ranks, against the formula written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megafab.topology.config import ContextMethod

# S whole sequence, B rows, H query heads, G key-value heads, D head size.
LENGTH, ROWS, HEADS, DIM = 32, 2, 8, 6
DOCUMENTS = {
    "one a row": [[32], [32]],
    "several": [[5, 13, 14], [20, 1, 11]],
    "one alone and several": [[32], [7, 25]],
    "at the chunks' borders": [[4, 4, 8, 16], [16, 16]],
}


def documents_of(name: str) -> torch.Tensor:
    """Document numbers [B, S]."""
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in DOCUMENTS[name]]
    return torch.stack(rows).int()


def inputs(groups: int) -> tuple[torch.Tensor, ...]:
    """Query [S, B, H, D], key and value [S, B, G, D], and the gradient of the output [S, B, H x D]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        draw(LENGTH, ROWS, HEADS, DIM),
        draw(LENGTH, ROWS, groups, DIM),
        draw(LENGTH, ROWS, groups, DIM),
        draw(LENGTH, ROWS, HEADS * DIM),
    )


def formula(documents: str, groups: int) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of query, key and value: softmax(q k / sqrt(D)) v head by head."""
    query, key, value, upstream = (x.clone().requires_grad_() for x in inputs(groups))
    document = documents_of(documents)
    rows = []
    for b in range(ROWS):
        allowed = torch.tensor(
            [[s <= l and document[b, s] == document[b, l] for s in range(LENGTH)] for l in range(LENGTH)]  # noqa: E741
        )
        heads = []
        for h in range(HEADS):
            g = h * groups // HEADS
            scores = query[:, b, h] @ key[:, b, g].t() / math.sqrt(DIM)
            heads.append(torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1) @ value[:, b, g])
        rows.append(torch.cat(heads, dim=-1))
    out = torch.stack(rows, dim=1)
    out.backward(upstream.detach())
    return out.detach(), query.grad, key.grad, value.grad


def attention(method: ContextMethod, dropout: float = 0.0, context=None, **options):
    """Core attention as a layer spec makes it, over the context group of all ranks."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megafab.model.attention import CoreAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        kv_channels=DIM,
        attention_dropout=dropout,
        **options,
    )
    groups = ProcessGroupCollection(cp=context or dist.group.WORLD)
    kind = type("CoreAttention", (CoreAttention,), {"context_method": method})
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def split(rank, world, documents, groups, method, dtype):
    """This rank's part of what `formula` gives, and where it belongs."""
    from megafab.model.attention import attention_mask, context_positions

    mine = context_positions(LENGTH, method, world, rank)
    query, key, value, upstream = (x[mine].to(dtype) for x in inputs(groups))
    rows = None if world == 1 or method is ContextMethod.ulysses else mine
    mask = attention_mask(documents_of(documents), rows)
    parts = [x.clone().requires_grad_() for x in (query, key, value)]
    out = attention(method)(*parts, mask)
    out.backward(upstream)
    return mine, (out.detach(), *(part.grad for part in parts))


def assembled(by_rank) -> list[torch.Tensor]:
    """The whole sequence again."""
    order = torch.cat([mine for mine, _ in by_rank])
    assert sorted(order.tolist()) == list(range(LENGTH))
    whole = []
    for parts in zip(*(tensors for _, tensors in by_rank), strict=True):
        joined = torch.cat(parts)
        whole.append(torch.empty_like(joined).index_copy_(0, order, joined))
    return whole


@pytest.mark.parametrize("groups", [8, 4, 1])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_one_rank_equals_the_formula(ranks, documents, groups):
    found = assembled(ranks.run(split, documents, groups, ContextMethod.allgather, torch.float64))
    for one, expected in zip(found, formula(documents, groups), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "world", "groups"),
    [
        (ContextMethod.allgather, 2, 8),
        (ContextMethod.allgather, 2, 1),
        (ContextMethod.allgather, 4, 4),
        (ContextMethod.allgather, 4, 1),  # fewer key-value heads than ranks
        (ContextMethod.ulysses, 2, 8),
        (ContextMethod.ulysses, 2, 2),
        (ContextMethod.ulysses, 4, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_context_ranks_equal_the_formula(ranks, documents, method, world, groups):
    found = assembled(ranks.run(split, documents, groups, method, torch.float64, world=world))
    for one, expected in zip(found, formula(documents, groups), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ContextMethod)
def test_fp32_to_1e_6(ranks, method):
    found = assembled(ranks.run(split, "several", 4, method, torch.float32, world=2))
    for one, expected in zip(found, formula("several", 4), strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_masked_documents_matter():
    """The references of different documents differ, so that the tests above can fail."""
    one, several = formula("one a row", 4), formula("several", 4)
    for a, b in zip(one, several, strict=True):
        assert float((a - b).abs().max()) > 0.1


# -- positions and masks -------------------------------------------------------------------------------------


def positions(rank, world, method, ranks):
    from megafab.model.attention import context_positions

    return [context_positions(8, method, ranks, each).tolist() for each in range(ranks)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ContextMethod.ulysses, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # First and last quarter, the two in the middle: as much causal work on either rank.
        (ContextMethod.allgather, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (ContextMethod.allgather, [[0, 7], [1, 6], [2, 5], [3, 4]]),
        (ContextMethod.allgather, [list(range(8))]),
    ],
)
def test_positions_of_context_ranks_by_hand(ranks, method, expected):
    assert ranks.run(positions, method, len(expected), init=False) == [expected]


def masks(rank, world):
    from megafab.model.attention import attention_mask

    two, one = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[3, 3, 3, 3], [0, 0, 0, 0]])
    return (
        attention_mask(two, None),
        attention_mask(two, torch.tensor([0, 3])),
        attention_mask(one, None),
        attention_mask(torch.cat((one, two)), None).shape,
    )


def test_masks_by_hand(ranks):
    whole, rows, one, shape = ranks.run(masks)[0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert whole[0, 0].int().tolist() == expected
    assert rows[0, 0].int().tolist() == [expected[0], expected[3]]
    assert torch.equal(one[0], one[1])
    assert one[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert shape == (3, 1, 4, 4)


# -- rotary positions ----------------------------------------------------------------------------------------


def rotated(rank, world, positions, base):
    """A vector of ones in 4 dimensions turned by its position, and the gradient through the rotation."""
    from megafab.kernels.rope import rope_table, rotate

    table = rope_table(torch.tensor([positions]), 4, base, torch.float64)
    x = torch.ones(len(positions), 1, 1, 4, dtype=torch.float64, requires_grad=True)
    out = rotate(x, table)
    checked = torch.autograd.gradcheck(lambda x: rotate(x, table), (x,), raise_exception=False)
    return out.detach().reshape(-1, 4), checked


def test_rotation_by_hand(ranks):
    ((found, checked),) = ranks.run(rotated, [0, 1, 5], 100.0)
    assert checked
    for row, position in zip(found.tolist(), (0, 1, 5), strict=True):
        # Pairs are (0, 2) and (1, 3); they turn by position x 1 and position / 10.
        fast, slow = position, position / 10
        assert row == pytest.approx(
            [
                math.cos(fast) - math.sin(fast),
                math.cos(slow) - math.sin(slow),
                math.cos(fast) + math.sin(fast),
                math.cos(slow) + math.sin(slow),
            ]
        )


def long_positions(rank, world):
    from megafab.kernels.rope import rope_table

    return rope_table(torch.tensor([[1_000_000]]), 2, 10000.0, torch.float32).flatten()


def test_angles_are_computed_in_fp64(ranks):
    # In fp32 an angle of 10^6 is known to 0.06 only.
    found = ranks.run(long_positions)[0]
    assert found.tolist() == pytest.approx([math.cos(1e6), math.sin(1e6)], abs=1e-6)


# -- dropout -------------------------------------------------------------------------------------------------


def dropped(rank, world, sequence):
    """Which probabilities were dropped: values are unit vectors, so that the output shows them."""
    from contextlib import nullcontext

    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megafab.model.attention import attention_mask
    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    groups = topology.initialize(Mesh(world, tensor=world), seed=5)
    layer = attention(
        ContextMethod.allgather,
        dropout=0.5,
        context=groups.context,
        tensor_model_parallel_size=world,
        sequence_parallel=sequence,
    )
    key = torch.zeros(LENGTH, 1, 2, LENGTH)
    value = torch.eye(LENGTH).view(LENGTH, 1, 1, LENGTH).repeat(1, 1, 2, 1)
    mask = attention_mask(torch.zeros(1, LENGTH), torch.arange(LENGTH))
    # Under sequence parallelism core runs the whole block inside a fork.
    with get_cuda_rng_tracker().fork() if sequence else nullcontext():
        out = layer.train()(key, key, value, mask)
    plain = layer.eval()(key, key, value, mask)
    torch.testing.assert_close(plain[7, 0, :8], torch.full((8,), 1 / 8))
    return out == 0


@pytest.mark.parametrize("sequence", [False, True])
def test_heads_drop_apart_on_different_tensor_ranks(ranks, sequence):
    first, second = ranks.run(dropped, sequence, world=2)
    both = torch.stack((*first.chunk(2, dim=-1), *second.chunk(2, dim=-1)))
    lower = torch.ones(LENGTH, LENGTH).tril().bool().unsqueeze(1)
    for i in range(4):
        assert abs(float(both[i][lower].float().mean()) - 0.5) < 0.1
        for j in range(i):
            same = float((both[i] == both[j])[lower].float().mean())
            assert abs(same - 0.5) < 0.1, "independent draws of a half agree by a half"
