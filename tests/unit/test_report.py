"""The report: right numbers, nothing from outside, one line for the user's mistakes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch import cli
from megafab.errors import UserError
from megafab.telemetry.charts import (
    MAX_POINTS,
    Axis,
    Series,
    json_for_html,
    line_figure,
    moving_median,
    number,
    percent,
    stacked_figure,
)
from megafab.telemetry.logged import config_differences, load_run, summary
from megafab.telemetry.report import duration, page, write_report
from megafab.telemetry.rows import to_line

NAN = float("nan")
LOSSES = [4.0, 3.0, NAN, 2.5]


def write_run(directory: Path, losses: list[float] = LOSSES, lr: float = 1e-3, **technique) -> Path:
    """Steps 10, 20, ... of 100 tokens each, restarted after the second row, the third one discarded."""
    directory.mkdir(parents=True)
    lines = []
    for i, loss in enumerate(losses):
        row = {
            "step": 10 * (i + 1),
            "tokens": 1000 * (i + 1),
            "layer_tokens": 900 * (i + 1),
            "flops": 2.5e6 * (i + 1),
            "loss": loss,
            "grad_norm": 1.0 + i,
            "lr": lr / (i + 1),
            "tokens_per_second": [100.0, 300.0, 200.0, 1000.0][i % 4],
            "step_seconds": 0.5,
            "mfu": None,
            "skipped": int(i >= 2),
            "session": 1 + (i >= 2),
            "wall_seconds": 1000.0,
            "evaluate_seconds": 15.0,
            "checkpoint_seconds": 0.0,
            "seconds": {"data": 0.1, "forward_backward": 0.3 + i, "other": 0.1},
            "domain_loss": {"books": loss + 1, "code": loss - 1},
            "domain_weight": {"books": 0.25, "code": 0.75},
            **technique,
        }
        if i % 2:
            row |= {"valid_loss": loss + 0.5, "valid_domain_loss": {"books": loss + 2, "code": loss - 2}}
        lines.append(to_line(row))
    (directory / "metrics.jsonl").write_text("".join(lines))
    (directory / "config.yaml").write_text(
        f"model: {{name: gpt_tiny}}\noptim: {{lr: {lr}}}\nrun: {{name: x}}\n"
    )
    return directory


class Page(HTMLParser):
    """A page taken apart; fails on elements that do not nest."""

    VOID = frozenset({"meta"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # element, attribute, value
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def figures(html: str) -> dict[str, dict]:
    """The data of each figure by its title."""
    found = re.findall(
        r"<figcaption><b>(.*?)</b>.*?<script type=\"application/json\">(.*?)</script></figure>", html, re.S
    )
    assert len({title for title, _ in found}) == len(found)
    return {title: json.loads(data) for title, data in found}


def report(*run_dirs: Path) -> str:
    out = run_dirs[0].parent / "page.html"
    write_report(run_dirs, out)
    return out.read_text()


# Numbers


def test_summary_in_numbers(tmp_path: Path):
    assert summary(load_run(write_run(tmp_path / "a"), "a")) == {
        "steps": 40,
        "tokens": 4000,
        "layer_tokens": 3600,
        "flops": 1e7,
        "total_tokens": None,
        "total_flops": None,
        "train_loss": 2.5,
        "valid_loss": 3.0,
        "best_valid_loss": 3.0,
        "tokens_per_second": 250.0,  # the median of 100, 200, 300, 1000
        "step_seconds": 0.5,
        "mfu": None,
        "wall_seconds": 4000.0,
        "evaluate_seconds": 60.0,
        "checkpoint_seconds": 0.0,
        "goodput": None,
        "restarts": 1,
        "skipped": 1,
    }


def test_page_shows_the_summary(tmp_path: Path):
    run = write_run(tmp_path / "a")
    (run / "header.json").write_text('{"model": "gpt_tiny: 1,234 parameters", "topology": "2 ranks"}')
    html = report(run)
    cells = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", html))
    assert cells == {
        "model": "gpt_tiny: 1,234 parameters",
        "topology": "2 ranks",
        "steps": "40",
        "tokens": "4,000",
        "tokens of the mean layer": "3,600",
        "model FLOPs": "1e+07",
        "train loss": "2.5000",
        "validation loss": "3.0000",
        "best validation loss": "3.0000",
        "tokens per second": "250 (median)",
        "seconds per step": "0.5 (median)",
        "wall time": "1 h 06 min, of which evaluation 1 min 00 s",
        "restarts": "1",
        "discarded updates": "1",
    }


def test_without_a_header_the_configuration_names_the_model(tmp_path: Path):
    assert "<tr><th>model</th><td>gpt_tiny</td></tr>" in report(write_run(tmp_path / "a"))


def test_figures_hold_what_was_logged(tmp_path: Path):
    found = figures(
        report(write_run(tmp_path / "a", z_loss={"log_z": 7.0, "reward": {"books": 1, "code": 2}}))
    )
    assert list(found) == [
        "Loss",
        "Loss by domain",
        "Domain weights",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Where a step goes",
        "log z",
        "reward",
    ]
    train, valid = found["Loss"]["series"]
    assert train["name"] == "train"
    assert train["step"] == [10, 20, 30, 40]
    assert train["tokens"] == [1000, 2000, 3000, 4000]
    assert train["y"] == [4.0, 3.0, None, 2.5]
    assert valid["name"] == "validation"
    assert (valid["step"], valid["y"]) == ([20, 40], [3.5, 3.0])
    domains = {s["name"]: s["y"] for s in found["Loss by domain"]["series"]}
    assert domains == {
        "books": [5.0, 4.0, None, 3.5],
        "code": [3.0, 2.0, None, 1.5],
        "books, validation": [5.0, 4.5],
        "code, validation": [1.0, 0.5],
    }
    assert [s["y"] for s in found["Domain weights"]["series"]] == [[0.25] * 4, [0.75] * 4]
    assert found["Learning rate"]["series"][0]["y"] == [1e-3, 5e-4, 3.33333e-4, 2.5e-4]
    assert found["Gradient norm"]["log"] is True
    assert found["Throughput"]["series"][0]["y"] == [100, 300, 200, 1000]
    parts = {s["name"]: s["y"] for s in found["Where a step goes"]["series"]}
    assert parts == {"data": [0.1] * 4, "forward backward": [0.3, 1.3, 2.3, 3.3], "other": [0.1] * 4}
    assert found["log z"]["series"][0]["y"] == [7.0] * 4
    assert {s["name"]: s["y"] for s in found["reward"]["series"]} == {"books": [1] * 4, "code": [2] * 4}


def test_mfu_and_a_growing_batch_are_shown_when_there_are_any(tmp_path: Path):
    run = write_run(tmp_path / "a", mfu=0.41)
    rows = [
        json.loads(line) | {"global_batch": 8 * i} for i, line in enumerate((run / "metrics.jsonl").open())
    ]
    (run / "metrics.jsonl").write_text("".join(map(to_line, rows)))
    found = figures(report(run))
    assert found["MFU"]["series"][0]["y"] == [0.41] * 4
    assert found["Global batch"]["series"][0]["y"] == [0, 8, 16, 24]


def test_restarts_and_discarded_updates_are_marked_once_an_axis(tmp_path: Path):
    html = report(write_run(tmp_path / "a"))
    assert html.count("<title>restart</title>") == 2
    assert html.count("<title>update discarded</title>") == 2


# The page


def test_page_is_self_contained(tmp_path: Path):
    html = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    loaded = {
        (tag, name) for tag, name, _ in Page(html).attributes if name in ("src", "href", "srcset", "data")
    }
    assert loaded == set()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest|\bimport ", html)


def test_text_of_a_run_cannot_become_markup(tmp_path: Path):
    run = write_run(tmp_path / "<b>a", online={"</script><i>": 1.0})
    (run / "sample.txt").write_text("Once <script>alert(1)</script> & again")
    html = report(run)
    Page(html)
    assert "Once &lt;script&gt;alert(1)&lt;/script&gt; &amp; again" in html
    assert "<b>a" not in html
    assert "<i>" not in html


def test_several_runs_share_one_page(tmp_path: Path):
    first = write_run(tmp_path / "a", z_loss={"log_z": 7.0})
    second = write_run(tmp_path / "b", losses=[5.0, 1.0], lr=2e-3)
    html = report(first, second)
    found = figures(html)
    assert [(s["name"], s["color"]) for s in found["Loss"]["series"]] == [
        ("a", 0),
        ("b", 1),
        ("a, validation", 0),
        ("b, validation", 1),
    ]
    assert found["Loss"]["series"][1]["y"] == [5.0, 1.0]
    assert found["Loss by domain: a"]["y"] == found["Loss by domain: b"]["y"]  # one scale
    assert found["Where a step goes: a"]["y"] == found["Where a step goes: b"]["y"]
    assert [s["name"] for s in found["log z"]["series"]] == ["a"]
    assert "<tr><th>train loss</th><td>2.5000</td><td>1.0000</td></tr>" in html
    assert "<tr><th>optim.lr</th><td>0.001</td><td>0.002</td></tr>" in html
    assert "model.name</th>" not in html  # the same in both


def test_config_differences_by_key(tmp_path: Path):
    runs = []
    for name, text in (
        ("a", "x: {y: 1, z: null, tied: true}\nrun: {dir: a}"),
        ("b", "x: {y: 1, w: 3}\nrun: {dir: b}"),
    ):
        run = write_run(tmp_path / name)
        (run / "config.yaml").write_text(text)
        runs.append(load_run(run, name))
    assert config_differences(runs) == {"x.z": ["null", ""], "x.tied": ["true", ""], "x.w": ["", "3"]}


def test_runs_of_one_name_are_told_apart_by_path(tmp_path: Path):
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [s["name"] for s in figures(report(first, second))["Learning rate"]["series"]] == [
        str(first),
        str(second),
    ]


def test_one_row_is_enough(tmp_path: Path):
    Page(report(write_run(tmp_path / "a", losses=[4.0])))


def test_a_run_of_nothing_but_nan_is_shown(tmp_path: Path):
    html = report(write_run(tmp_path / "a", losses=[NAN, NAN]))
    assert figures(html)["Loss"]["series"][0]["y"] == [None, None]
    assert "train loss</th>" not in html


# Charts


def series(values: list, **options) -> Series:
    steps = list(range(len(values)))
    return Series("a", 0, steps, [10 * s for s in steps], values, **options)


def test_line_coordinates():
    html = line_figure("t", [series([0.0, 1.0, None, 0.5, 0.0])], axis=Axis(0.0, 1.0))
    by_step = html.split('class="plot by-tokens"')[0]
    # Five steps over x = 52 .. 548 (560 less the right margin), values over y = 236 .. 8; a gap at the third.
    assert re.findall(r'class="line" stroke="var\(--c0\)" d="(.*?)"', by_step) == [
        "M52.0 236.0L176.0 8.0M424.0 122.0L548.0 236.0"
    ]
    assert 'data-range="0 4"' in by_step


def test_a_lone_point_is_drawn():
    html = line_figure("t", [series([None, 0.5, None])], axis=Axis(0.0, 1.0))
    assert 'd="M300.0 122.0L300.0 122.0"' in html


def test_stack_borders():
    html = stacked_figure("t", [series([0.25, 0.5]), series([0.5, 0.5])], axis=Axis(0.0, 1.0))
    first, second = re.findall(r'class="area" fill="var\(--c0\)" d="(.*?)"', html.split("by-tokens")[0])
    assert first == "M52.0 179.0L548.0 122.0L548.0 236.0L52.0 236.0Z"
    assert second == "M52.0 65.0L548.0 8.0L548.0 122.0L52.0 179.0Z"


def test_thinning_keeps_extremes_and_ends():
    values = [1.0] * 10_000
    values[0], values[1234], values[5678], values[-1] = 2.0, 9.0, -9.0, 3.0
    html = line_figure("t", [series(values)])
    found = json.loads(re.search(r'json">(.*?)</script>', html)[1])["series"][0]
    assert len(found["y"]) <= MAX_POINTS + 2
    kept = dict(zip(found["step"], found["y"], strict=True))
    assert (kept[0], kept[1234], kept[5678], kept[9999]) == (2.0, 9.0, -9.0, 3.0)


def test_long_stacks_are_means_of_neighbours():
    html = stacked_figure("t", [series([1.0, 3.0] * MAX_POINTS)])
    found = json.loads(re.search(r'json">(.*?)</script>', html)[1])["series"][0]
    assert found["y"] == [2.0] * MAX_POINTS
    assert found["step"][:2] == [1, 3]


def test_moving_median_neither_lags_nor_bulges():
    assert moving_median([9.0, 3.0, 5.0, 100.0, 7.0, 8.0]) == [9.0, 5.0, 5.0, 7.0, 8.0, 8.0]
    assert moving_median([1.0, None, 3.0]) == [1.0, None, 3.0]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.0, 1.0), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis(2.3, 4.1), [2.5, 3.0, 3.5, 4.0]),
        (Axis(-3.0, 48_000.0), [0.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0]),
        (Axis(0.3, 30.0, log=True), [1.0, 10.0]),
        (Axis(0.8, 30.0, log=True), [1.0, 10.0]),
        (Axis(1.5, 6.0, log=True), [2.0, 5.0]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]):
    assert axis.ticks() == pytest.approx(ticks)


def test_axes_fit_their_values():
    assert Axis.fit([1.0, None, 3.0]) == Axis(0.9, 3.1)
    assert Axis.fit([1.0, 2.0], zero=True) == Axis(0.0, 2.16)
    assert Axis.fit([5.0]) == Axis(4.75, 5.25)
    assert Axis.fit([]) == Axis(0.0, 1.0)
    log = Axis.fit([0.0, 1.2, 12.0], log=True)
    assert (log.low, log.high) == pytest.approx((1.0, 14.4))
    robust = Axis.fit([1.0] * 50 + [2.0] * 50 + [50.0] * 3, robust=True)
    assert robust.high == pytest.approx(2.05)
    assert Axis(1.0, 100.0, log=True).at(10.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.21456, "3.215"), (12345, "12.3k"), (3e-4, "3e-4"), (0.005, "5e-3"), (0.25, "0.25")],
)
def test_numbers_are_short(value: float, text: str):
    assert number(value) == text


def test_shares_and_durations():
    assert percent(0.4123) == "41.2%"
    assert duration(3.14159) == "3.14 s"
    assert duration(75) == "1 min 15 s"
    assert duration(3720) == "1 h 02 min"
    assert duration(90_000) == "1 d 01 h"


def test_json_cannot_end_its_script():
    assert json_for_html({"a": "</script>"}) == '{"a":"\\u003c/script>"}'


# The command


def test_command_writes_into_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert cli.main(["report", str(first), str(second)]) == 0
    assert capsys.readouterr().out.startswith(str(first / "report.html"))
    assert "a vs b" in (first / "report.html").read_text()


def test_command_writes_where_out_says(tmp_path: Path):
    run = write_run(tmp_path / "lr=1")  # a directory may look like a key
    assert cli.main(["report", str(run), f"out={tmp_path / 'page.html'}"]) == 0
    assert "lr=1" in (tmp_path / "page.html").read_text()
    assert not (run / "report.html").exists()


def test_a_run_named_twice_is_shown_once(tmp_path: Path):
    run = write_run(tmp_path / "a")
    assert cli.main(["report", str(run), str(run) + "/"]) == 0
    assert page([load_run(run, "a")]) == (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "megafab report: found no run directory"),
        (["absent"], "absent: found no directory, expected a run directory"),
        (["empty"], "metrics.jsonl: found No such file or directory"),
        (["no_rows"], "metrics.jsonl: found no row"),
        (["no_config"], "config.yaml: found No such file or directory"),
        (["bad_config"], "config.yaml: found no YAML"),
        (["list_config"], "config.yaml: found list, expected a mapping"),
        (["good", "format=pdf"], "format=pdf: found an unknown key"),
        (["good", "out=absent/page.html"], "out=absent/page.html: found No such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("good", "no_rows", "no_config", "bad_config", "list_config"):
        write_run(tmp_path / name)
    (tmp_path / "no_rows" / "metrics.jsonl").write_text("")
    (tmp_path / "no_config" / "config.yaml").unlink()
    (tmp_path / "bad_config" / "config.yaml").write_text("a: [")
    (tmp_path / "list_config" / "config.yaml").write_text("- a\n")
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Fix: " in error


def test_a_broken_row_is_an_error_of_the_user(tmp_path: Path):
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text("{}\n" + to_line({"step": 1}))
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        load_run(run, "a")
