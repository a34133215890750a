"""Saving and restoring a run made of small real parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megafab.checkpoint import store
from megafab.checkpoint.config import CheckpointConfig
from megafab.checkpoint.pieces import LogicalTensor, whole
from megafab.checkpoint.state import Checkpoints
from megafab.errors import UserError
from megafab.run import Progress
from megafab.topology.layout import Layout

DATA = {"corpus": "c0ffee", "tokenizer": "beef"}
CONFIG = {
    "model": {"hidden": 8, "activation": "swiglu", "moe": {"top_k": 2}},
    "optim": {"lr": 0.1},
    "data": {"mixture": None},
    "run": {"dir": "a"},
}


class Engine:
    """One weight of 8, split over all ranks, the copy that the model computes with, a count of updates."""

    def __init__(self, rank: int, world: int) -> None:
        self.layout = Layout.split((8 // world,), 0, world, rank)
        self.master = torch.zeros(8 // world)
        self.copy = self.master.clone()
        self.updates = 0

    def weights(self) -> Engine:
        return self

    def describe(self, value: torch.Tensor) -> LogicalTensor:
        return whole(value, self.layout, owner=True)

    def sharded_state(self) -> dict[str, LogicalTensor]:
        return {"weight": self.describe(self.master)}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.copy.copy_(self.master)


class Loader:
    def __init__(self) -> None:
        self.samples = 0

    def state_dict(self):
        return {"samples": self.samples}

    def load_state_dict(self, state):
        self.samples = state["samples"]


class Average:
    """A technique with a counter, and a tensor like the weight that exists once it has counted."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None


class Techniques:
    """The bus, with `average` on it or nothing."""

    def __init__(self, average: Average | None) -> None:
        self.average = average

    def state_dict(self):
        return {"average": {"count": self.average.count}} if self.average else {}

    def load_state_dict(self, state):
        if self.average and "average" in state:
            self.average.count = state["average"]["count"]

    def sharded_state(self, weights: Engine, only=None):
        average = self.average
        if average is None or not average.count or (only is not None and "average" not in only):
            return {}
        if average.mean is None:
            average.mean = torch.zeros_like(weights.master)
        return {"average/mean": weights.describe(average.mean)}


class Run:
    def __init__(
        self, rank, world, directory, resume="auto", technique=True, data=DATA, config=CONFIG
    ) -> None:
        self.engine, self.loader, self.average = Engine(rank, world), Loader(), Average()
        self.messages: list[str] = []
        self.checkpoints = Checkpoints(
            config=CheckpointConfig(keep=3, resume=resume),
            run_dir=Path(directory),
            engine=self.engine,
            loader=self.loader,
            techniques=Techniques(self.average if technique else None),
            data=data,
            resolved=config,
            topology={"ranks": world},
            message=self.messages.append,
        )

    def train_to(self, step: int) -> Path:
        self.engine.master += step + torch.arange(len(self.engine.master))
        self.engine.updates = step
        self.loader.samples, self.average.count = 4 * step, step
        self.average.mean = self.engine.master / 2
        return self.checkpoints.save(Progress(step=step, samples=4 * step, tokens=64 * step, skipped=1))

    def seen(self):
        mean = None if self.average.mean is None else self.average.mean.tolist()
        engine = self.engine
        return (
            engine.master.tolist(),
            engine.copy.tolist(),
            engine.updates,
            self.loader.samples,
            self.average.count,
            mean,
        )


def train(rank, world, directory, *steps):
    run = Run(rank, world, directory, resume="none")
    return [run.train_to(step) for step in steps][-1]


def resume(rank, world, directory, *args):
    run = Run(rank, world, directory, *args)
    return run.checkpoints.restore(), run.seen()


def test_a_run_comes_back_as_it_was(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 20, world=2)
    progress = Progress(step=20, samples=80, tokens=1280, skipped=1)
    back = ranks.run(resume, str(tmp_path), world=2)
    local = [20.0, 21.0, 22.0, 23.0]
    assert back == [(progress, (local, local, 20, 80, 20, [10.0, 10.5, 11.0, 11.5]))] * 2
    # and on another number of ranks, where each holds more of it
    assert ranks.run(resume, str(tmp_path)) == [
        (progress, (local * 2, local * 2, 20, 80, 20, [10.0, 10.5, 11.0, 11.5] * 2))
    ]


def test_a_change_of_topology_is_told(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 20, world=2)
    (step, text), *_ = ranks.run(resume_telling, str(tmp_path), world=4)
    assert step == 20
    assert "the topology was {'ranks': 2}, it is {'ranks': 4}" in text


def test_what_stands_beside_the_weights(ranks, tmp_path):
    path = ranks.run(train, str(tmp_path), 20, world=2)[0]
    state = store.read_state(path)
    assert state["config"] == CONFIG
    assert state["data"] == DATA
    assert state["topology"] == {"ranks": 2}
    assert state["versions"]["torch"] == torch.__version__
    assert state["lineage"] == []


@pytest.mark.parametrize("how", ["auto", "none"])
def test_without_a_checkpoint_a_run_starts_afresh(ranks, tmp_path, how):
    assert ranks.run(resume, str(tmp_path), how)[0][0] == Progress()


def test_none_ignores_what_is_there(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 20)
    assert ranks.run(resume, str(tmp_path), "none")[0][0] == Progress()


def test_a_path_is_resumed_into_another_run_and_the_lineage_tells(ranks, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ranks.run(train, str(first), 10, 20)
    path = ranks.run(branch, str(second), str(first / "checkpoints/step_00000010"))[0]
    assert path == second / "checkpoints/step_00000030"
    (origin,) = store.read_state(path)["lineage"]
    assert (origin["from"], origin["step"]) == (str(first / "checkpoints/step_00000010"), 10)


def branch(rank, world, directory, source):
    run = Run(rank, world, directory, source)
    assert run.checkpoints.restore().step == 10
    return run.train_to(30)


def test_a_missing_path_is_refused(ranks, tmp_path):
    with pytest.raises(UserError, match="checkpoint.resume=.*gone: found no such directory"):
        ranks.run(resume, str(tmp_path), str(tmp_path / "gone"), world=2)


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_it_taken(ranks, tmp_path):
    path = ranks.run(train, str(tmp_path), 10, 20, world=2)[0]
    file = path / "tensors" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[700] ^= 4
    file.write_bytes(content)
    back = ranks.run(resume_telling, str(tmp_path), world=2)
    assert [step for step, _ in back] == [10, 10]
    assert ["step_00000020: tensors/__1_0.distcp: SHA-256" in text for _, text in back] == [True, True]
    # Asked for by name, it is refused instead.
    with pytest.raises(UserError, match="only damaged checkpoints.*__1_0.distcp"):
        ranks.run(resume, str(tmp_path), str(path), world=2)


def resume_telling(rank, world, directory, config=CONFIG):
    """The step resumed from, and what the user is told."""
    run = Run(rank, world, directory, config=config)
    return run.checkpoints.restore().step, "\n".join(run.messages)


def test_other_data_are_refused(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 10)
    with pytest.raises(UserError, match="corpus: found fingerprint c0ffee there and decaf in this run"):
        ranks.run(resume, str(tmp_path), "auto", True, {**DATA, "corpus": "decaf"})


@pytest.mark.parametrize(
    ("section", "key"),
    [({"activation": "geglu"}, "activation=geglu"), ({"moe": {"top_k": 1}}, "moe.top_k=1")],
)
def test_another_model_is_refused_though_its_tensors_fit(ranks, tmp_path, section, key):
    ranks.run(train, str(tmp_path), 1)
    config = {**CONFIG, "model": {**CONFIG["model"], **section}}
    with pytest.raises(UserError, match=rf"^model\.{key}, .* found weights trained with model\."):
        ranks.run(resume, str(tmp_path), "auto", True, DATA, config)


def test_settings_that_changed_are_told(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 1)
    config = {**CONFIG, "optim": {"lr": 0.2}, "data": {"mixture": {"a": 1.0}}, "run": {"dir": "b"}}
    ((step, told),) = ranks.run(resume_telling, str(tmp_path), config)
    assert step == 1
    changes = "optim.lr from 0.1 to 0.2, data.mixture from null to {a: 1.0}"
    assert f"changed since the checkpoint: {changes}" in told
    assert "run.dir" not in told
    ((_, told),) = ranks.run(resume_telling, str(tmp_path), CONFIG)
    assert "changed since" not in told


def test_a_technique_may_be_switched_on_or_off_at_a_resume(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "on"), 10)
    progress, (master, _, _, _, count, mean) = ranks.run(resume, str(tmp_path / "on"), "auto", False)[0]
    assert (progress.step, master[0], count, mean) == (10, 10.0, 0, None)
    ranks.run(save_without, str(tmp_path / "off"))
    progress, (_, _, _, samples, count, mean) = ranks.run(resume, str(tmp_path / "off"))[0]
    assert (progress.step, samples, count, mean) == (5, 20, 0, None)


def save_without(rank, world, directory):
    Run(rank, world, directory, technique=False).train_to(5)
