"""Saving and restoring a run made of small real parts."""

from __future__ import annotations

import contextlib
import re
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megafab.checkpoint import store
from megafab.checkpoint.config import Carry, CheckpointConfig, StartConfig
from megafab.checkpoint.pieces import LogicalTensor, whole
from megafab.checkpoint.state import Checkpoints
from megafab.errors import UserError
from megafab.run import Progress, Totals
from megafab.topology.layout import Layout

DATA = {
    "corpus": "c0ffee",
    "tokenizer": "beef",
    "vocab_size": 512,
    "domains": {
        "books": {"tokens": 5000, "documents": 7, "content": "b00c"},
        "code": {"tokens": 1200, "documents": 3, "content": "c0de"},
    },
    "mixture": {"books": 0.8, "code": 0.2},
    "packing": "document",
    "seed": 1,
    "seq_len": 16,
    "block": 1,
    "order_seeds": {},
    "difficulty": None,
}
CONFIG = {
    "model": {"hidden": 8, "activation": "swiglu", "moe": {"top_k": 2}},
    "optim": {"name": "sgd", "lr": 0.1},
    "data": {"path": "a"},
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
        return {"weight/w": self.describe(self.master)}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.copy.copy_(self.master)


class Loader:
    def __init__(self) -> None:
        self.samples, self.counts = 0, {"books": 0, "code": 0}

    def state_dict(self):
        return {"samples": self.samples, "counts": self.counts, "mixture_log": [[0, [0.8, 0.2]]]}

    def load_state_dict(self, state):
        self.samples, self.counts = state["samples"], state["counts"]


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
        self,
        rank,
        world,
        directory,
        resume="auto",
        technique=True,
        data=DATA,
        config=CONFIG,
        start=None,
        **settings: Any,
    ) -> None:
        self.engine, self.loader, self.average = Engine(rank, world), Loader(), Average()
        self.messages: list[str] = []
        self.checkpoints = Checkpoints(
            config=CheckpointConfig(**{"keep": 3, "resume": resume, "asynchronous": False, **settings}),
            start=start or StartConfig(),
            run_dir=Path(directory),
            engine=self.engine,
            loader=self.loader,
            techniques=Techniques(self.average if technique else None),
            data=data,
            resolved=config,
            topology={"ranks": world},
            rates=lambda config, then, now: f"lr {config['optim']['lr']} from {then.step} to {now.step}",
            message=self.messages.append,
            saved=lambda step, seconds: None,
        )

    def train_to(self, step: int, wait: bool = False) -> Path:
        self.engine.master += step + torch.arange(len(self.engine.master))
        self.engine.copy.copy_(self.engine.master)
        self.engine.updates = step
        self.loader.samples, self.average.count = 4 * step, step
        self.loader.counts = {"books": 3 * step, "code": step}
        self.average.mean = self.engine.master / 2
        progress = Progress(step=step, samples=4 * step, tokens=64 * step, skipped=1)
        return self.checkpoints.save(progress, wait=wait)

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
    run = Run(rank, world, directory)
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
    assert "the topology changed: ranks 2 to 4" in text.splitlines()


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


def test_a_run_that_died_before_its_first_save_is_told_to_begin_again(ranks, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert ranks.run(resume_telling, str(tmp_path)) == [
        (0, f"{tmp_path} has no checkpoint yet: the run begins again")
    ]


def test_none_is_refused_where_there_is_a_run(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "saved"), 20)
    with pytest.raises(UserError) as caught:
        ranks.run(resume, str(tmp_path / "saved"), "none", world=2)
    assert str(caught.value) == (
        f"checkpoint.resume=none, run.dir={tmp_path / 'saved'}: found a run there already, step_00000020 its "
        "last checkpoint, expected an empty run directory, for nothing of another run to be lost. "
        "Fix: checkpoint.resume=auto goes on with it; or give run.dir another place"
    )
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"logged: found a run there already, expected an empty"):
        ranks.run(resume, str(tmp_path / "logged"), "none")


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


def test_the_same_command_goes_on_with_a_run_that_began_from_a_path(ranks, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    ranks.run(train, first, 10, 20)
    source = f"{first}/checkpoints/step_00000010"
    ranks.run(branch, second, source)
    ((step, told),) = ranks.run(resume_telling, second, CONFIG, source)
    assert step == 30
    assert f"this run has gone on from {source}: it continues where it was" in told
    # The same where a run went back to a checkpoint of its own.
    ranks.run(branch, first, source)
    assert ranks.run(resume_telling, first, CONFIG, source)[0][0] == 30


def test_a_path_is_refused_where_there_is_another_run(ranks, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    ranks.run(train, first, 10)
    ranks.run(train, second, 25)
    with pytest.raises(UserError, match=r"run\.dir=.*second: found a run there already that did not begin"):
        ranks.run(resume, second, f"{first}/checkpoints/step_00000010", world=2)


def test_weights_alone_begin_a_run(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "a"), 20)
    ((progress, seen),) = ranks.run(resume_weights, str(tmp_path / "b"), str(tmp_path / "a"))
    assert progress == Progress(before=BEFORE)
    master, copy, updates, samples, count, mean = seen
    assert master == copy == [20.0 + i for i in range(8)]
    assert (updates, samples, count, mean) == (0, 0, 0, None)


BEFORE = Totals(steps=20, samples=80, tokens=1280)


def begin_at(rank, world, directory, source, optimizer, data, *steps):
    start = StartConfig(str(source), Carry[optimizer], Carry[data])
    run = Run(rank, world, directory, start=start)
    progress = run.checkpoints.restore()
    seen = run.seen()
    for step in steps:
        run.train_to(step)
    return progress, seen, run.loader.counts, run.messages


@pytest.mark.parametrize("optimizer", ["reset", "keep"])
@pytest.mark.parametrize("data", ["reset", "keep"])
def test_a_run_begins_with_what_is_kept_of_another(ranks, tmp_path, optimizer, data):
    ranks.run(train, str(tmp_path / "a"), 20, world=2)
    arguments = str(tmp_path / "b"), str(tmp_path / "a"), optimizer, data
    ((progress, seen, counts, told),) = ranks.run(begin_at, *arguments)
    local = [20.0, 21.0, 22.0, 23.0] * 2
    assert progress == Progress(before=BEFORE)
    kept = optimizer == "keep", data == "keep"
    assert seen == (local, local, 20 * kept[0], 80 * kept[1], 0, None)
    assert counts == ({"books": 60, "code": 20} if kept[1] else {"books": 0, "code": 0})
    source = tmp_path / "a" / "checkpoints" / "step_00000020"
    assert told == [
        f"starting from {source}: optimizer {optimizer}, place in the data {data}",
        "lr 0.1 from 20 to 0",
    ]


def test_a_run_that_began_from_another_goes_on_with_itself(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "a"), 20)
    arguments = str(tmp_path / "b"), str(tmp_path / "a"), "reset", "reset"
    ranks.run(begin_at, *arguments, 30)
    ((progress, _, _, told),) = ranks.run(begin_at, *arguments)
    assert progress.step == 30
    assert told[0] == f"resuming from {tmp_path}/b/checkpoints/step_00000030"
    lineage = store.read_state(tmp_path / "b" / "checkpoints" / "step_00000030")["lineage"]
    assert [Path(entry["from"]).parents[1].name for entry in lineage] == ["a"]


def begin_otherwise(rank, world, directory, source, model, state, data):
    start = StartConfig(str(weights_of(source, **state)), data=Carry[data])
    run = Run(rank, world, directory, config={**CONFIG, "model": {**CONFIG["model"], **model}}, start=start)
    return run.checkpoints.restore()


@pytest.mark.parametrize(
    ("model", "state", "data", "line"),
    [
        ({"activation": "gelu"}, {}, "reset", r"model\.activation=gelu, start.checkpoint=.*: found weights "
         r"trained with model\.activation=swiglu, .* megafab ckpt grow"),
        ({}, {"data": {}}, "keep", "start.data=keep, start.checkpoint=.*: found a checkpoint of weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_begun_with_is_refused(ranks, tmp_path, model, state, data, line):
    ranks.run(train, str(tmp_path / "a"), 20)
    with pytest.raises(UserError, match=line):
        ranks.run(begin_otherwise, str(tmp_path / "b"), str(tmp_path / "a"), model, state, data)


def resume_weights(rank, world, directory, source):
    return resume(rank, world, directory, str(weights_of(source)), True, changed(corpus="another"))


def weights_of(source, **changes: Any) -> Path:
    """The weights alone of the only checkpoint of a run, as the tools make them."""
    (path,) = (Path(source) / "checkpoints").glob("step_*")
    state = {**store.read_state(path), "weights_only": True, **changes}
    tensors = Run(0, 1, source).checkpoints._tensors(only=())
    store.load(path, tensors)
    return store.save(Path(source) / "weights" / "checkpoints", 20, tensors, state, keep=1)


def begin_with(rank, world, directory, source, allow=False, **changes: Any):
    """What is said where a run whose tokenizer is not DATA's begins from weights."""
    weights = weights_of(source, **changes)
    data = changed(tokenizer="cafe", vocab_size=300)
    run = Run(rank, world, directory, str(weights), data=data, allow_data_change=allow)
    run.checkpoints.restore()
    return run.messages


def test_weights_of_another_tokenizer_are_refused_unless_allowed(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "a"), 20)
    arguments = str(tmp_path / "b"), str(tmp_path / "a")
    difference = "tokenizer beef (512 ids) is now cafe (300 ids)"
    weights = tmp_path / "a" / "weights" / "checkpoints" / "step_00000020"
    with pytest.raises(UserError) as caught:
        ranks.run(begin_with, *arguments)
    assert str(caught.value) == (
        f"checkpoint.resume={weights} ({weights}): found another tokenizer than that of the weights: "
        f"{difference}, expected theirs: each row of the embedding belongs to one of its ids. Fix: name a "
        "corpus of that tokenizer, or accept it: checkpoint.allow_data_change=true"
    )
    ((started, told, _),) = ranks.run(begin_with, *arguments, True)
    assert started.startswith(f"starting from {weights}: ")
    assert told == f"the data changed: {difference}"


def begin_with_an_import(rank, world, directory, source):
    return begin_with(rank, world, directory, source, data={})


def test_an_import_tells_no_tokenizer_to_compare(ranks, tmp_path):
    ranks.run(train, str(tmp_path / "a"), 20)
    ((message, _),) = ranks.run(begin_with_an_import, str(tmp_path / "b"), str(tmp_path / "a"))
    assert message.startswith("starting from ")


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
    assert ["step_00000020: tensors/__1_0.distcp: XXH3" in text for _, text in back] == [True, True]
    # Asked for by name, it is refused instead.
    with pytest.raises(UserError, match="only damaged checkpoints.*__1_0.distcp"):
        ranks.run(resume, str(tmp_path), str(path), world=2)


def resume_telling(rank, world, directory, config=CONFIG, resume="auto"):
    """The step resumed from, and what the user is told."""
    run = Run(rank, world, directory, resume, config=config)
    return run.checkpoints.restore().step, "\n".join(run.messages)


def changed(**changes: Any) -> dict[str, Any]:
    return {**DATA, **changes}


OTHER_DATA = {
    "a domain that grew": (
        changed(domains={**DATA["domains"], "code": {"tokens": 2400, "documents": 5, "content": "c0d2"}}),
        "domain code had 1,200 tokens and has 2,400",
        {"books": 30, "code": 0},
    ),
    "other content": (
        changed(domains={**DATA["domains"], "code": {"tokens": 1200, "documents": 3, "content": "feed"}}),
        "domain code has other content of the same length (1,200 tokens)",
        {"books": 30, "code": 0},
    ),
    "another tokenizer": (
        changed(tokenizer="cafe", vocab_size=1024),
        "tokenizer beef (512 ids) is now cafe (1,024 ids)",
        {"books": 30, "code": 10},
    ),
    "another mixture": (
        changed(mixture={"books": 0.5, "code": 0.5}),
        "the weight of books was 0.8 and is 0.5; the weight of code was 0.2 and is 0.5",
        {"books": 30, "code": 10},
    ),
    "another seed": (changed(seed=2), "train.seed was 1 and is 2", {"books": 0, "code": 0}),
    "another length": (changed(seq_len=32), "model.seq_len was 16 and is 32", {"books": 0, "code": 0}),
    "another packing": (
        changed(packing="concatenate"),
        "data.packing was document and is concatenate",
        {"books": 30, "code": 10},
    ),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_are_refused_unless_allowed(ranks, tmp_path, name):
    data, difference, counts = OTHER_DATA[name]
    ranks.run(train, str(tmp_path), 10)
    with pytest.raises(UserError) as caught:
        ranks.run(resume, str(tmp_path), "auto", True, data, world=2)
    assert str(caught.value) == (
        f"checkpoint.resume=auto ({tmp_path}/checkpoints/step_00000010): found other data than the "
        f"checkpoint's: {difference}, expected the same samples in the same order, for the resumed run to "
        "equal the unbroken one. Fix: undo the change, begin a new run.dir, or accept it: "
        "checkpoint.allow_data_change=true"
    )
    ((step, told, samples, counted),) = ranks.run(resume_with, str(tmp_path), data)
    assert (step, samples, counted) == (10, 40, counts)
    assert f"the data changed: {difference}" in told


def resume_with(rank, world, directory, data):
    run = Run(rank, world, directory, data=data, allow_data_change=True)
    step = run.checkpoints.restore().step
    return step, run.messages, run.loader.samples, run.loader.counts


def test_domains_that_come_and_go_are_named(ranks, tmp_path):
    ranks.run(train, str(tmp_path), 10)
    domains = {"law": {"tokens": 10, "documents": 1, "content": "1a"}, "books": DATA["domains"]["books"]}
    data = changed(domains=domains, mixture={"law": 0.5, "books": 0.5})
    with pytest.raises(
        UserError, match=r"domain code \(1,200 tokens\) is gone; domain law \(10 tokens\) is new;"
    ):
        ranks.run(resume, str(tmp_path), "auto", True, data)
    data = changed(domains=dict(reversed(DATA["domains"].items())))
    with pytest.raises(UserError, match="in the order books, code and are in the order code, books"):
        ranks.run(resume, str(tmp_path), "auto", True, data)


def test_another_optimizer_is_refused(ranks, tmp_path):
    ranks.run(save_with_moments, str(tmp_path))
    with pytest.raises(UserError) as caught:
        ranks.run(resume, str(tmp_path), world=2)
    assert str(caught.value) == (
        f"checkpoint.resume=auto ({tmp_path}/checkpoints/step_00000003): found lion_m, weight of each "
        "parameter, as another optimizer keeps them, expected weight, as optim.name=sgd does. Fix: take "
        "the optimizer that the checkpoint was written with, or begin a new run.dir with "
        "start.optimizer=reset"
    )


def save_with_moments(rank, world, directory):
    run = Run(rank, world, directory, technique=False)
    weight = run.engine.sharded_state()["weight/w"]
    run.engine.sharded_state = lambda: {"weight/w": weight, "lion_m/w": weight}
    run.train_to(3)


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
    config = {**CONFIG, "optim": {"name": "sgd", "lr": 0.2}, "data": {"path": None}, "run": {"dir": "b"}}
    ((step, told),) = ranks.run(resume_telling, str(tmp_path), config)
    assert step == 1
    changes = "optim.lr from 0.1 to 0.2, data.path from a to null"
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


# -- saves that are written while training goes on -----------------------------------------------------------


def hold_writing() -> threading.Event:
    """Let what threads write wait for the event; the copies are made before."""
    write, go = store.save, threading.Event()

    def held(*args: Any, **kwargs: Any) -> Path:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(30)
        return write(*args, **kwargs)

    store.save = held
    return go


def train_on_while_saving(rank, world, directory):
    run, go = Run(rank, world, directory, asynchronous=True), hold_writing()
    with run.checkpoints:
        path = run.train_to(10)
        saved_10 = run.seen()
        # The step goes on: everything that was saved changes while the writing has not even begun.
        run.engine.master.fill_(-1.0)
        run.average.mean.fill_(-1.0)
        run.loader.counts["books"] = -1
        assert not path.exists()
        go.set()
        run.engine.master.copy_(torch.tensor(saved_10[0]))
        run.train_to(20, wait=True)  # waits for the one under way
        assert path.exists()
    return saved_10


@pytest.mark.parametrize("world", [1, 2])
def test_later_steps_do_not_change_what_is_saved(ranks, tmp_path, world):
    trained = ranks.run(train_on_while_saving, str(tmp_path), world=world)
    source = str(tmp_path / "checkpoints" / "step_00000010")
    back = ranks.run(resume, str(tmp_path / "other"), source, world=world)
    assert [seen for _, seen in back] == trained
    assert store.read_state(Path(source))["loader"]["counts"] == {"books": 30, "code": 10}


def save_thrice(rank, world, directory):
    run = Run(rank, world, directory, asynchronous=True)
    addresses = []
    with run.checkpoints:
        for step in (10, 20, 30):
            run.train_to(step)
            addresses.append([buffer.data_ptr() for buffer in run.checkpoints._snapshot._buffers.values()])
    assert addresses[0] == addresses[1] == addresses[2]
    return run.messages


def test_the_end_waits_and_buffers_are_used_again(ranks, tmp_path):
    told = ranks.run(save_thrice, str(tmp_path), world=2)[0]
    assert [line.split(" in ")[0] for line in told] == [
        f"saved {tmp_path}/checkpoints/step_000000{step}" for step in (10, 20, 30)
    ]
    assert all(re.search(r" s; training waited \d+\.\d\d s$", line) for line in told)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        *(f"step_000000{step}" for step in (10, 20, 30)),
    ]


@contextlib.contextmanager
def no_room():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_in_the_background(rank, world, directory, room_again):
    run = Run(rank, world, directory, asynchronous=True)
    with run.checkpoints:
        run.train_to(10)
        run.checkpoints._settled()
        with no_room() if rank == 1 else contextlib.nullcontext():
            run.train_to(20)
            run.checkpoints._background._thread.join()
            if not room_again:
                run.train_to(30)
        run.train_to(30)
    return run.messages


def test_a_failed_save_is_raised_on_all_ranks_where_the_next_fails_too(ranks, tmp_path):
    with pytest.raises(
        UserError, match=r"found File too large \(rank 1\).*earlier checkpoints are untouched"
    ):
        ranks.run(fail_in_the_background, str(tmp_path), False, world=2)
    assert store.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000010"


def test_a_failed_save_is_told_and_made_good_where_there_is_room_again(ranks, tmp_path):
    told = ranks.run(fail_in_the_background, str(tmp_path), True, world=2)[0]
    assert "File too large (rank 1)" in told[1]
    assert told[1].endswith("; saving after step 30 in place")
    assert store.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000030"


def fail_at_the_end(rank, world, directory):
    run = Run(rank, world, directory, asynchronous=True)
    with run.checkpoints, no_room() if rank == 1 else contextlib.nullcontext():
        run.train_to(10)
        run.checkpoints._background._thread.join()


def test_a_failed_save_is_raised_at_the_end(ranks, tmp_path):
    with pytest.raises(UserError, match=r"File too large \(rank 1\)"):
        ranks.run(fail_at_the_end, str(tmp_path), world=2)
    assert store.candidates(tmp_path / "checkpoints") == []


def leave_by_error(rank, world, directory):
    run = Run(rank, world, directory, asynchronous=True)
    with contextlib.suppress(ZeroDivisionError), run.checkpoints:
        run.train_to(10)
        raise ZeroDivisionError


def test_an_error_of_training_does_not_lose_the_save_under_way(ranks, tmp_path):
    ranks.run(leave_by_error, str(tmp_path), world=2)
    assert store.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000010"
