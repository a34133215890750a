"""Telemetry: what is recorded, where it goes, and what a restart leaves of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from megafab.errors import UserError
from megafab.run import Action, Progress, StepOutcome, StepPlan, StepRecord, Verdict
from megafab.telemetry.config import RunSection, TrackingConfig, TrackingKind, WandbMode
from megafab.telemetry.metrics import Telemetry, build_telemetry, peak_flops
from megafab.telemetry.rows import chain_of, flatten, read_rows, to_line, truncate
from megafab.telemetry.sessions import Session
from megafab.telemetry.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink, wandb_mode
from megafab.telemetry.terminal import Terminal, header_lines, short, step_line
from megafab.telemetry.timers import Timers


class Memory(Sink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: list[dict] = []

    def open(self, step: int) -> None:
        self.calls.append(f"open {step}")

    def record(self, record: StepRecord) -> None:
        self.calls.append(f"record {record.row['step']}")
        self.rows.append(dict(record.row))

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        self.calls.append(f"amend {step} {values}")

    def message(self, text: str) -> None:
        self.calls.append(f"message {text}")

    def close(self) -> None:
        self.calls.append("close")


class Clock:
    """A clock that moves only when told to, in place of `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("megafab.telemetry.timers.perf_counter", lambda: self.now)
        monkeypatch.setattr("megafab.telemetry.metrics.time.perf_counter", lambda: self.now)


def telemetry(*sinks: Sink, log_every: int = 1, total_steps: int = 100, **options) -> Telemetry:
    settings = {"is_writer": True, "peak_flops": None} | options
    return Telemetry(sinks, log_every=log_every, total_steps=total_steps, **settings)


def at(step: int, skipped: int = 0) -> Progress:
    tokens = 8 * 16 * step
    return Progress(step, 8 * step, tokens, layer_tokens=tokens, flops=1000.0 * tokens, skipped=skipped)


def record(target: Telemetry, step: int, loss: float = 2.5, applied: bool = True, **options) -> None:
    """Step `step` of 8 sequences of 16 tokens, where the loop would record it."""
    options = {"last": False} | options
    if not target.due(step, options["last"]) and "valid" not in options:
        return
    verdict = Verdict() if applied else Verdict(Action.SKIP, reason="gradients are not finite")
    target.record(
        plan=StepPlan(step - 1, 1e-3, 0.1, 8, 2, 4, 16, (0.5, 0.5)),
        progress=at(step, skipped=not applied),
        outcome=StepOutcome(applied, verdict, 0.75),
        **{
            "loss": loss,
            "domain_loss": {"books": 2.0, "code": 3.0},
            "domain_weight": {"books": 0.5, "code": 0.5},
            "extra": {},
        }
        | options,
    )


def row(step: int, **values) -> dict:
    """A row as `Telemetry` makes it."""
    basis = {
        "step": step,
        "tokens": 128 * step,
        "loss": 3.21456,
        "lr": 3e-4,
        "grad_norm": 0.53211,
        "tokens_per_second": 12345.6,
        "step_seconds": 1.2344,
        "mfu": None,
        "skipped": 0,
        "domain_loss": {"books": 2.0, "code": 3.0},
    }
    return basis | values


# metrics.jsonl


def test_a_recorded_step_is_one_parsable_row(tmp_path: Path):
    target = telemetry(JsonlSink(tmp_path, {}, {}), peak_flops=1e6, session=Session(tmp_path, 4))
    target.start(Progress())
    valid = {"loss": 2.75, "domain_loss": {"books": 2.5, "code": 3.0}}
    record(target, 1, extra={"z_loss": {"log_z": 3.0}}, valid=valid)
    record(target, 2, applied=False)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())  # before close
    target.close()
    expected = {
        "step": 1,
        "samples": 8,
        "tokens": 128,
        "layer_tokens": 128,
        "flops": 128_000.0,
        "loss": 2.5,
        "grad_norm": 0.75,
        "lr": 1e-3,
        "global_batch": 8,
        "seq_len": 16,
        "skipped": 0,
        "domain_loss": {"books": 2.0, "code": 3.0},
        "domain_weight": {"books": 0.5, "code": 0.5},
        "valid_loss": 2.75,
        "valid_domain_loss": {"books": 2.5, "code": 3.0},
        "z_loss": {"log_z": 3.0},
        "session": 1,
    }
    assert {key: first[key] for key in expected} == expected
    assert 0 < first["goodput"] < 1
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 1000 / 1e6)
    assert "verdict" not in first
    assert "valid_loss" not in second
    assert second["mfu"] is not None
    assert second["skipped"] == 1
    assert second["verdict"] == {"action": "SKIP", "reason": "gradients are not finite"}


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(tmp_path, {}, {})
    sink.open(0)
    for step in range(1, 6):
        sink.record(StepRecord(row(step)))
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in mid-write
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3, 4, 5]

    sink = JsonlSink(tmp_path, {}, {})
    sink.open(3)
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3]
    sink.record(StepRecord(row(4)))
    sink.close()
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "header.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("listed", "chain"),
    [
        ('{"a": {"parent": null}, "b": {"parent": "a"}}', ["a", "b"]),
        ('{"a": {"parent": null}, "b": {"parent": "a"}, "c": {"parent": "a"}}', []),  # it branches
        ('{"c": {"parent": null}}', []),
        ('{"some": {"other": "file"}}', []),
        ('["a"]', []),
        ("not JSON", []),
    ],
)
def test_stages_that_follow_one_another_are_a_chain(tmp_path: Path, listed: str, chain: list[str]):
    assert chain_of(tmp_path / "b") == []
    (tmp_path / "stages.json").write_text(listed)
    assert chain_of(tmp_path / "b") == chain


def test_an_evaluation_that_comes_late_is_put_into_its_row(tmp_path: Path):
    target = telemetry(JsonlSink(tmp_path, {}, {}), log_every=5)
    target.start(Progress())
    record(target, 5)
    record(target, 7, loss=float("nan"), valid=None)  # should have been evaluated; the run was left instead
    target.close()
    target = telemetry(JsonlSink(tmp_path, {}, {}), log_every=5)
    target.start(at(7))
    target.amend(7, {"loss": 2.75, "domain_loss": {"books": 2.5}})
    record(target, 10)
    target.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("valid_loss")) for row in rows] == [(5, None), (7, 2.75), (10, None)]
    assert rows[1]["valid_domain_loss"] == {"books": 2.5}
    assert (rows[1]["loss"], rows[1]["nonfinite"]) == (None, True)


def test_a_run_that_goes_back_writes_its_rows_again(tmp_path: Path):
    """In one session: TensorBoard hides what came after, as after a resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session = Session(tmp_path, 1)
    target = telemetry(Memory(), JsonlSink(tmp_path, {}, {}), TensorBoardSink(tmp_path), session=session)
    target.start(Progress())
    for step in range(1, 6):
        record(target, step, loss=float(step))
    target.rewind(at(3))
    record(target, 4, loss=40.0)
    target.close()
    found = [(r["step"], r["loss"], r["session"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert found == [(1, 1.0, 1), (2, 2.0, 1), (3, 3.0, 1), (4, 40.0, 1)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_speed_is_measured_anew_where_a_run_has_gone_back(monkeypatch: pytest.MonkeyPatch):
    clock, memory = Clock(monkeypatch), Memory()
    target = telemetry(memory)
    target.start(Progress())
    for step in (1, 2, 3):
        clock.now += 2.0
        record(target, step)
    clock.now += 100.0
    target.rewind(at(1))
    clock.now += 4.0
    record(target, 2)
    assert memory.rows[-1]["step_seconds"] == 4.0


def test_only_the_torn_line_is_lost_when_nothing_is_repeated(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_row_without_newline_is_kept(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_restart_from_the_beginning_keeps_no_row(tmp_path: Path):
    sink = JsonlSink(tmp_path, {}, {})
    sink.open(0)
    sink.record(StepRecord(row(1)))
    sink.close()
    sink = JsonlSink(tmp_path, {}, {})
    sink.open(0)
    sink.close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_broken_row_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: found 'nonsense', expected a row"):
        read_rows(path)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(loss: float):
    line = to_line({"step": 1, "loss": loss, "domain_loss": {"books": loss, "code": 2.0}})
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": None, "domain_loss": {"books": None, "code": 2.0}, "nonfinite": True}


def test_finite_rows_are_not_flagged():
    assert json.loads(to_line({"step": 1, "loss": 2.0, "mfu": None})) == {"step": 1, "loss": 2.0, "mfu": None}


def test_flatten_joins_with_slashes():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b/c": 2, "b/d/e": 3}


# Telemetry


def test_sinks_are_called_on_due_steps_only():
    sink = Memory()
    target = telemetry(sink, log_every=5, total_steps=12)
    target.start(Progress())
    for step in range(1, 13):
        record(target, step, last=step == 12)
    target.message("done")
    target.close()
    assert sink.calls == ["open 0", "record 5", "record 10", "record 12", "message done", "close"]


def test_the_last_step_is_recorded_wherever_the_run_ends():
    sink = Memory()
    target = telemetry(sink, log_every=5, total_steps=12)
    target.start(Progress())
    for step in range(1, 8):
        record(target, step, last=step == 7)
    target.close()
    assert sink.calls == ["open 0", "record 5", "record 7", "close"]


def test_a_step_that_evaluated_is_recorded_though_not_due():
    sink = Memory()
    target = telemetry(sink, log_every=5)
    target.start(Progress())
    record(target, 3, valid={"loss": 2.0, "domain_loss": {}})
    assert [r["valid_loss"] for r in sink.rows] == [2.0]


def test_other_ranks_record_nothing_and_still_time():
    sink = Memory()
    target = telemetry(sink, is_writer=False)
    target.start(Progress())
    target.begin(1)
    with target.timers("data"):
        pass
    record(target, 1)
    target.message("hello")
    target.close()
    assert sink.calls == []
    assert list(target.timers.totals) == ["data"]


def test_close_without_start_touches_no_sink():
    sink = Memory()
    telemetry(sink).close()
    assert sink.calls == []


def test_speed_leaves_out_evaluation_and_checkpoints(monkeypatch: pytest.MonkeyPatch):
    clock, sink = Clock(monkeypatch), Memory()
    target = telemetry(sink, log_every=2, peak_flops=64_000.0)
    target.start(at(10))  # resumed: the tokens before count for nothing
    for step in (11, 12):
        target.begin(step)
        with target.timers("data"):
            clock.now += 1.0
        with target.timers("update"):
            clock.now += 2.0
        clock.now += 1.0  # in no part
        if step == 11:
            with target.timers("checkpoint"):
                clock.now += 5.0
        with target.timers("evaluate"):
            clock.now += 7.0
        record(target, step)
    (found,) = sink.rows
    # Two steps of 4 s over 2 x 128 tokens; 27 s in all with 2 x 7 s of evaluation and 5 s of checkpoint.
    assert found["tokens_per_second"] == 256 / 8
    assert found["step_seconds"] == 4.0
    assert found["mfu"] == 32 * 1000 / 64_000
    assert found["wall_seconds"] == 27.0
    assert found["evaluate_seconds"] == 14.0
    assert found["checkpoint_seconds"] == 5.0
    assert found["seconds"] == {"data": 1.0, "update": 2.0, "other": 1.0}


def test_without_begin_the_parts_are_means_over_the_interval(monkeypatch: pytest.MonkeyPatch):
    clock, sink = Clock(monkeypatch), Memory()
    target = telemetry(sink, log_every=4)
    target.start(Progress())
    for step in range(1, 5):
        with target.timers("data"):
            clock.now += step
        record(target, step)
    assert sink.rows[0]["seconds"] == {"data": 2.5, "other": 0.0}


def test_the_cost_of_recording_shows_in_the_next_row(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)

    class Slow(Memory):
        def record(self, record: StepRecord) -> None:
            super().record(record)
            clock.now += 3.0

    sink = Slow()
    target = telemetry(sink)
    target.start(Progress())
    for step in (1, 2):
        target.begin(step)
        clock.now += 1.0
        record(target, step)
    assert sink.rows[0]["seconds"] == {"other": 1.0}
    assert sink.rows[1]["seconds"] == {"telemetry": 3.0, "other": 1.0}
    assert sink.rows[1]["step_seconds"] == 4.0


def test_the_device_is_waited_for_on_due_steps_only():
    waits: list[int] = []
    step = 0
    target = telemetry(Memory(), log_every=3, synchronize=lambda: waits.append(step))
    target.start(Progress())
    for step in range(1, 7):
        target.begin(step)
        with target.timers("data"):
            pass
        record(target, step)
    assert set(waits) == {3, 6}


def test_a_technique_may_not_take_a_key_of_the_row():
    target = telemetry(Memory())
    target.start(Progress())
    with pytest.raises(AssertionError, match="loss"):
        record(target, 1, extra={"loss": 1.0})


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_name(name: str, peak: float | None):
    assert peak_flops(name) == peak


# timers


def test_timers_add_up_by_part(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    timers = Timers()
    for _ in range(2):
        with timers("data"):
            clock.now += 1.5
    with contextlib.suppress(KeyError), timers("update"):
        clock.now += 1.0
        raise KeyError  # a part that fails is still counted
    clock.now += 10.0
    assert timers.seconds == {"data": 3.0, "update": 1.0}
    assert timers.lap_seconds == 14.0
    timers.lap()
    with timers("data"):
        clock.now += 0.5
    assert timers.seconds == {"data": 0.5, "update": 0.0}
    assert timers.totals == {"data": 3.5, "update": 1.0}


def test_a_part_includes_the_wait_for_the_device(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)

    def wait() -> None:
        clock.now += 2.0

    timers = Timers(synchronize=wait)
    with timers("data"):
        clock.now += 1.0
    assert timers.seconds == {"data": 1.0}
    timers.exact = True
    with timers("data"):
        clock.now += 1.0
    assert timers.seconds == {"data": 4.0}


# terminal


def test_the_loop_says_which_step_is_the_last():
    """The length was a guess: a step that reaches it is like any other."""
    sink = Memory()
    target = telemetry(sink, log_every=5, total_steps=12)
    target.start(Progress())
    for step in range(1, 15):
        target.begin(step)
        record(target, step, last=step == 14)
    assert [row["step"] for row in sink.rows] == [5, 10, 14]


def test_step_line():
    assert step_line(row(120), 10_000) == (
        "step   120/10000 | loss 3.2146 | lr 3.00e-04 | norm 0.532 | 12.3k tok/s | 1.234 s/step"
    )
    full = row(9, mfu=0.4123, skipped=2, valid_loss=3.30124, loss=math.nan)
    assert step_line(row(12), 9).startswith("step 12 | loss "), "9 was an estimate"
    assert step_line(full, 9) == (
        "step 9/9 | loss nan | lr 3.00e-04 | norm 0.532 | 12.3k tok/s | 1.234 s/step"
        " | MFU 41.2% | skipped 2 | valid 3.3012"
    )
    assert step_line(row(11), 10).startswith("step 11 | loss"), "more steps than were expected"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999.4, "999"),
        (999.6, "1k"),
        (12345, "12.3k"),
        (2.5e6, "2.5M"),
        (3e15, "3e+03T"),
    ],
)
def test_short_numbers(number: float, text: str):
    assert short(number) == text


def test_header_is_aligned():
    assert header_lines({"model": "gpt_tiny", "run dir": "runs/a"}) == [
        "model    gpt_tiny",
        "run dir  runs/a",
    ]


def test_terminal_and_log_show_the_same_lines(tmp_path: Path):
    stream = io.StringIO()
    sink = Terminal(tmp_path, 10, {"model": "gpt_tiny, 1.2M parameters"}, stream)
    sink.open(4)
    sink.record(StepRecord(row(5)))
    sink.message("checkpoint written")
    sink.close()
    shown = stream.getvalue().splitlines()
    assert shown == [
        "model  gpt_tiny, 1.2M parameters",
        "resumed after step 4",
        "step  5/10 | loss 3.2146 | lr 3.00e-04 | norm 0.532 | 12.3k tok/s | 1.234 s/step",
        "checkpoint written",
    ]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    stamp = len("2026-01-31 12:00:00  ")
    assert [line[stamp:] for line in logged] == shown
    assert all(line[:4].isdigit() and line[10] == " " for line in logged)


def test_a_reader_who_leaves_does_not_end_the_run(tmp_path: Path):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        sink = Terminal(tmp_path, 10, {"model": "gpt_tiny"}, stream)
        sink.open(0)
        os.close(reader)
        sink.message("nobody reads this")
        sink.record(StepRecord(row(5)))
        sink.close()
    logged = (tmp_path / "log.txt").read_text()
    assert "nobody reads this" in logged
    assert "step  5/10" in logged


class Slow(io.StringIO):
    """A stream that lets other threads run between any two writes."""

    def write(self, text: str) -> int:
        time.sleep(0.001)
        return super().write(text)


def test_lines_of_several_threads_do_not_mix(tmp_path: Path):
    stream = Slow()
    sink = Terminal(tmp_path, 10, {}, stream)
    texts = [f"thread {n} says so" for n in range(4)]
    threads = [Thread(target=lambda text=text: [sink.message(text) for _ in range(5)]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    assert sorted(stream.getvalue().splitlines()) == sorted(texts * 5)


def test_a_terminal_gets_a_bar_and_a_log_does_not(tmp_path: Path):
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Tty()
    sink = Terminal(tmp_path, 10, {}, stream)
    sink.open(4)
    sink.record(StepRecord(row(5)))
    sink.record(StepRecord(row(12)))  # more steps than were expected
    sink.close()
    assert "5/10" in stream.getvalue()
    assert "12/12" in stream.getvalue()
    assert "ETA" in stream.getvalue()
    assert "12.3k tok/s" in stream.getvalue()
    assert "ETA" not in (tmp_path / "log.txt").read_text()


# wandb


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A user who never logged in to wandb."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    wandb.teardown()
    yield
    wandb.teardown()


def wandb_records(path: Path) -> list:
    """Records of a `.wandb` file: LevelDB log framing around wandb's own messages.

    A 7-byte header, then blocks of 32 KiB holding chunks of (crc u32, length u16, kind u8); kind 1 is a
    whole record, 2, 3 and 4 are its first, middle and last piece.
    """
    from wandb.proto import wandb_internal_pb2

    content, position, piece, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too short for a chunk: padding
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        piece += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


def wandb_rows(records: list) -> list[dict]:
    """Logged rows, without wandb's own keys."""
    rows = []
    for entry in records:
        if entry.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def wandb_session(run_dir: Path, start: int, stop: int) -> list[str]:
    """Log steps `start+1..stop` as one launch of the run; returns what the user was told."""
    said: list[str] = []
    sink = WandbSink(run_dir, TrackingConfig(), "a", {"model": {"layers": 2}}, said.append)
    sink.open(start)
    for step in range(start + 1, stop + 1):
        sink.record(StepRecord(row(step)))
    sink.close()
    return said


def test_two_sessions_are_one_offline_wandb_run(tmp_path: Path, no_login: None):
    said = wandb_session(tmp_path, 0, 3)
    assert len(said) == 1
    assert said[0].startswith("wandb: offline; upload with: wandb sync ")
    wandb_id = (tmp_path / "wandb_id").read_text().strip()
    assert len(wandb_id) == 8
    wandb_session(tmp_path, 3, 5)
    assert (tmp_path / "wandb_id").read_text().strip() == wandb_id
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{wandb_id}.wandb"))
    assert len(files) == 2
    first, second = map(wandb_records, files)
    for records in (first, second):
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert run.run_id == wandb_id
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["model"] == {"layers": 2}
    rows = wandb_rows(first) + wandb_rows(second)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["loss"] == 3.21456
    assert rows[0]["domain_loss/books"] == 2.0
    assert "mfu" not in rows[0]


def test_an_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, no_login: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refuses at once
    monkeypatch.setattr("megafab.telemetry.sinks.WANDB_START_SECONDS", 1)
    failed, offline = wandb_session(tmp_path, 0, 2)
    assert failed.startswith("wandb: could not start online: ")
    assert offline.startswith("wandb: offline; ")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [r["step"] for r in wandb_rows(wandb_records(file))] == [1, 2]


def test_a_failure_in_mid_run_stops_tracking_not_training(tmp_path: Path, no_login: None):
    said: list[str] = []
    sink = WandbSink(tmp_path, TrackingConfig(), "a", {}, said.append)
    sink.open(0)
    sink._run.finish()  # wandb refuses rows from now on
    sink.record(StepRecord(row(1)))
    sink.record(StepRecord(row(2)))
    sink.close()
    assert len(said) == 2
    assert said[1].startswith("wandb: stopped tracking: ")


def test_auto_is_online_only_with_a_key(no_login: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import wandb

    assert wandb_mode(WandbMode.auto) == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode(WandbMode.auto) == "offline"  # online without a key would ask for one
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert wandb_mode(WandbMode.auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(WandbMode.auto) == "offline"
    assert wandb_mode(WandbMode.online) == "online"
    assert wandb_mode(WandbMode.offline) == "offline"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbMode.auto) == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # it reads its variables once
    assert wandb_mode(WandbMode.auto) == "online"


def test_a_malformed_key_is_reported_and_the_run_goes_on_offline(
    tmp_path: Path, no_login: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    failed, offline = wandb_session(tmp_path, 0, 1)
    assert "WANDB_API_KEY invalid" in failed
    assert offline.startswith("wandb: offline; ")


def test_online_without_a_login_is_an_error(no_login: None):
    with pytest.raises(UserError, match=r"tracking\.mode=online: found no wandb login.*wandb login"):
        wandb_mode(WandbMode.online)


# TensorBoard


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, loss in ((0, 4, 3.0), (2, 3, 2.0)):  # the second session repeats step 3
        sink = TensorBoardSink(tmp_path)
        sink.open(start)
        for step in range(start + 1, stop + 1):
            sink.record(StepRecord(row(step, loss=loss, verdict={"reason": "text is no scalar"})))
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert events.Scalars("domain_loss/code")[0].value == 3.0
    assert not {"mfu", "verdict/reason"} & set(events.Tags()["scalars"])


def test_missing_packages_are_named_with_their_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tracking\.tensorboard=true.*pip install tensorboard"):
        TensorBoardSink(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracking\.kind=wandb.*pip install wandb"):
        WandbSink(tmp_path, TrackingConfig(), "a", {}, print)


# all together


def test_build_gives_the_sinks_that_were_asked_for(
    tmp_path: Path, no_login: None, capsys: pytest.CaptureFixture[str]
):
    def run(start: Progress, steps: range, writer: bool = True) -> None:
        target = build_telemetry(
            RunSection(name="a", dir=str(tmp_path / "a")),
            TrackingConfig(tensorboard=True),
            config={"model": {"layers": 2}},
            header={"model": "gpt_tiny"},
            preface=[],
            ranks=2,
            is_writer=writer,
            log_every=1,
            peak_flops=None,
            total_steps=4,
        )
        target.start(start)
        for step in steps:
            record(target, step)
        target.close()

    run(Progress(), range(1, 5))
    run(at(2), range(3, 5))
    run(at(2), range(3, 5), writer=False)
    assert [r["step"] for r in read_rows(tmp_path / "a" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "a" / "header.json").read_text()) == {"model": "gpt_tiny"}
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {
        "config.yaml",
        "header.json",
        "metrics.jsonl",
        "sessions.jsonl",
        "log.txt",
        "wandb",
        "wandb_id",
        "tensorboard",
    }
    out = capsys.readouterr().out
    assert out.count("model  gpt_tiny") == 2
    assert out.count("step 3/4") == 2
    assert out.count("resumed after step 2") == 1


def test_tracking_none_writes_rows_and_log_only(tmp_path: Path):
    target = build_telemetry(
        RunSection(name="a", dir=str(tmp_path)),
        TrackingConfig(kind=TrackingKind.none),
        config={},
        header={},
        preface=[],
        ranks=1,
        is_writer=True,
        log_every=1,
        peak_flops=None,
        total_steps=1,
    )
    target.start(Progress())
    record(target, 1)
    target.close()
    names = {"config.yaml", "header.json", "metrics.jsonl", "sessions.jsonl", "log.txt"}
    assert {p.name for p in tmp_path.iterdir()} == names
