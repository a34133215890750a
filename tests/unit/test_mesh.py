"""Rank arithmetic: by hand, and against the groups that Megatron-core makes for the same axes."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from megafab.topology import groups as topology
from megafab.topology.config import ParallelConfig
from megafab.topology.layout import Layout
from megafab.topology.mesh import Mesh


def test_coordinates_by_hand():
    # tensor fastest, then context, then data, then pipeline: 13 = 1 + 2 x (0 + 2 x (1 + 2 x 1))
    mesh = Mesh(16, tensor=2, context=2, pipeline=2)
    assert (mesh.data, mesh.model_parallel) == (2, 8)
    place = mesh.tensor_rank(13), mesh.context_rank(13), mesh.data_rank(13), mesh.pipeline_rank(13)
    assert place == (1, 0, 1, 1)
    assert mesh.rank_of(tensor=1, context=0, data=1, pipeline=1) == 13


@pytest.mark.parametrize("axes", list(itertools.product((1, 2, 3), repeat=4)))
def test_every_rank_has_coordinates_of_its_own(axes):
    tensor, context, data, pipeline = axes
    ranks = tensor * context * data * pipeline
    mesh = Mesh(ranks, tensor=tensor, context=context, pipeline=pipeline)
    for rank in range(ranks):
        place = {
            "tensor": mesh.tensor_rank(rank),
            "context": mesh.context_rank(rank),
            "data": mesh.data_rank(rank),
            "pipeline": mesh.pipeline_rank(rank),
        }
        assert mesh.rank_of(**place) == rank
        assert all(0 <= place[axis] < getattr(mesh, axis) for axis in place)


def test_the_mesh_of_a_configuration():
    config = ParallelConfig(tensor=2, pipeline=3, virtual_pipeline=4, context=5, expert=6)
    expected = Mesh(60, tensor=2, context=5, pipeline=3, expert=6, virtual_pipeline=4)
    assert Mesh.of(config, 60) == expected


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (Mesh(1), "data 1"),
        (Mesh(8, tensor=2, pipeline=2), "tensor 2 x pipeline 2 x data 2"),
        (Mesh(4, pipeline=4, virtual_pipeline=2), "pipeline 4 x data 1, 2 model chunks a stage"),
        (Mesh(8, context=2, expert=4), "context 2 x data 4, expert 4"),
    ],
)
def test_descriptions(mesh, text):
    assert mesh.describe() == text


def test_layers_of_a_plain_pipeline():
    mesh = Mesh(4, pipeline=4)
    assert [list(mesh.layers_of(8, stage)) for stage in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_layers_of_an_interleaved_pipeline_go_round_the_stages():
    # Narayanan et al. 2021, figure 4: with 2 stages and 2 chunks, stage 0 has layers 0-1 and 4-5.
    mesh = Mesh(2, pipeline=2, virtual_pipeline=2)
    by_stage = [[list(mesh.layers_of(8, stage, chunk)) for chunk in range(2)] for stage in range(2)]
    assert by_stage == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 6), (3, 4), (4, 3)])
def test_every_layer_is_in_one_chunk_and_chunks_in_flow_order_count_up(pipeline, virtual):
    mesh = Mesh(pipeline, pipeline=pipeline, virtual_pipeline=virtual)
    # A micro-batch visits all stages with chunk 0, then all with chunk 1, ...
    flow = [mesh.layers_of(24, stage, chunk) for chunk in range(virtual) for stage in range(pipeline)]
    assert list(itertools.chain(*flow)) == list(range(24))


MESHES = {
    "tensor 2 x pipeline 2 x data 2": Mesh(8, tensor=2, pipeline=2),
    "tensor 2 x context 2 x data 2": Mesh(8, tensor=2, context=2),
    "context 2 x pipeline 2 x data 2": Mesh(8, context=2, pipeline=2),
    "tensor 4 x pipeline 2, interleaved": Mesh(8, tensor=4, pipeline=2, virtual_pipeline=2),
    "expert 2 of data 4 x pipeline 2": Mesh(8, pipeline=2, expert=2),
    "expert 4 of tensor 2 x data 4": Mesh(8, tensor=2, expert=4),
}
# The coordinates by which the ranks of a group differ.
AXES = {
    "tensor": ["tensor"],
    "context": ["context"],
    "data": ["data"],
    "data_context": ["context", "data"],
    "pipeline": ["pipeline"],
}


def megatrons(rank, world, mesh):
    """The ranks of each of this rank's groups, core's idea of its coordinates, what ranks agree on."""
    from megatron.core import parallel_state

    groups = topology.initialize(mesh, seed=1)
    core = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data_context": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
    }
    for name in core.keys() & {field.name for field in fields(groups)}:
        assert getattr(groups, name) is core[name], name
    members = {name: dist.get_process_group_ranks(group) for name, group in core.items()}
    place = {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
    }
    facts = {
        "rank": groups.rank,
        "first": groups.is_first_stage == parallel_state.is_pipeline_first_stage(),
        "last": groups.is_last_stage == parallel_state.is_pipeline_last_stage(),
        "agreed": groups.agree_max(10 * rank),
        "sum": float(groups.sum_over_job(torch.tensor(float(rank)))),
        "counts": groups.counts_loss,
    }
    return members, place, facts


@pytest.mark.parametrize("name", MESHES)
def test_megatron_makes_the_same_groups(ranks, name):
    mesh = MESHES[name]
    for rank, (members, place, facts) in enumerate(ranks.run(megatrons, mesh, world=mesh.ranks)):
        expected = {axis: getattr(mesh, f"{axis}_rank")(rank) for axis in place}
        assert place == expected
        for group, axes in AXES.items():
            assert members[group] == _along(mesh, rank, axes), group
        # Experts are dealt to the tensor x context x data ranks of a stage, in rank order, as whole ones.
        stage = _along(mesh, rank, ["tensor", "context", "data"])
        mine = stage.index(rank)
        first = mine - mine % mesh.expert
        assert members["expert"] == stage[first : first + mesh.expert]
        assert members["expert_data"] == stage[mine % mesh.expert :: mesh.expert]
        assert facts == {
            "rank": rank,
            "first": True,
            "last": True,
            "agreed": 70,
            "sum": 28.0,
            "counts": place["tensor"] == 0 and place["pipeline"] == mesh.pipeline - 1,
        }


def _along(mesh: Mesh, rank: int, axes: list[str]) -> list[int]:
    """All ranks that differ from `rank` in the coordinates of `axes` only."""

    def rest(of: int) -> list[int]:
        return [
            getattr(mesh, f"{axis}_rank")(of)
            for axis in ("tensor", "context", "data", "pipeline")
            if axis not in axes
        ]

    return [other for other in range(mesh.ranks) if rest(other) == rest(rank)]


def test_a_split_layout_by_hand():
    # Rank 1 of 2 of a [4, 3] tensor split by rows holds rows 2 and 3.
    layout = Layout.split((2, 3), 0, parts=2, part=1)
    (block,) = layout.blocks
    assert layout.global_shape == (4, 3)
    assert (block.local_offset, block.global_offset, block.shape) == ((0, 0), (2, 0), (2, 3))


def test_a_split_layout_with_a_gate():
    # Gate (rows 0-3) and up (rows 4-7) are split each on its own: rank 1 of 2 has rows 2, 3, 6, 7.
    gate, up = Layout.split((4, 3), 0, parts=2, part=1, stride=2).blocks
    assert (gate.local_offset, gate.global_offset, gate.shape) == ((0, 0), (2, 0), (2, 3))
    assert (up.local_offset, up.global_offset, up.shape) == ((2, 0), (6, 0), (2, 3))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_parts_of_a_split_cover_it_once(dim, stride):
    local = (4, 6)
    seen = torch.zeros(tuple(3 * n if d == dim else n for d, n in enumerate(local)))
    for part in range(3):
        layout = Layout.split(local, dim, parts=3, part=part, stride=stride)
        assert layout.global_shape == tuple(seen.shape)
        for block in layout.blocks:
            seen[tuple(slice(o, o + n) for o, n in zip(block.global_offset, block.shape, strict=True))] += 1
    assert bool((seen == 1).all())
