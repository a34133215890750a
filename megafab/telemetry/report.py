"""One self-contained HTML page with the plots of a run, or of several side by side.

The page loads nothing from anywhere: its style and script are `report.css` and `report.js`, its charts
inline SVG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from megafab.errors import UserError
from megafab.telemetry.charts import (
    Axis,
    Mark,
    Series,
    css_color,
    json_for_html,
    line_figure,
    number,
    percent,
    stack_axis,
    stacked_figure,
)
from megafab.telemetry.comparison import Reach, reach, reference, shifts
from megafab.telemetry.logged import LoggedRun, config_differences, load_runs, summary, yaml_value
from megafab.telemetry.sessions import Goodput
from megafab.telemetry.terminal import short

# What `Telemetry` writes itself; every other key of a row is the name of a technique.
ROW_KEYS = frozenset(
    ("step", "samples", "tokens", "layer_tokens", "flops", "loss", "grad_norm", "lr", "global_batch")
    + ("seq_len", "skipped", "total_steps", "total_tokens", "total_flops")
    + ("tokens_per_second", "step_seconds", "mfu", "wall_seconds", "evaluate_seconds", "checkpoint_seconds")
    + ("seconds", "time", "domain_loss", "domain_weight", "valid_loss", "valid_domain_loss", "verdict")
    + ("session", "nonfinite", "goodput")
)


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of `run_dirs` to `out`.

    Raises:
        UserError: a directory is not that of a run, or `out` cannot be written.
    """
    runs = load_runs(run_dirs)
    try:
        out.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"out={out}", error.strerror or repr(error), "a file to write", "choose another out="
        ) from error


def page(runs: Sequence[LoggedRun]) -> str:
    """The whole page."""
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    script = (here / "report.js").read_text(encoding="utf-8")
    title = " vs ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    body = [
        _head(runs, title),
        _tiles(runs[0]) if len(runs) == 1 else "",
        _summary_table(runs),
        _config_differences(runs) if len(runs) > 1 else "",
        _costs(runs) if len(runs) > 1 else "",
        _shifts(runs),
        _goodput(runs),
        _section("Learning", _learning(runs)),
        _section("Speed", _speed(runs)),
        _techniques(runs),
        _samples(runs),
        _configs(runs),
    ]
    numbers = [{"name": run.name, **summary(run)} for run in runs]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - megafab</title><style>{style}</style></head>"
        f'<body data-x="step"><main>{"".join(body)}'
        "<footer>Bold lines over faint ones are moving medians; the pointer shows what was logged. "
        "Dashed verticals are restarts, triangles discarded updates.</footer></main>"
        f'<script type="application/json" id="summary">{json_for_html(numbers)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def duration(seconds: float) -> str:
    """A length of time in two units: `1 h 02 min`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {int(rest):02d} s"
    return f"{rest:.3g} s"


def _identity(run: LoggedRun) -> dict[str, str]:
    """What the run is: the facts it noted itself, or at least its model."""
    return {**run.header} if run.header else {"model": str(run.config.get("model/name", ""))}


def _outcome(run: LoggedRun) -> dict[str, str]:
    """The summary as a reader wants it, label by label; unknown facts are left out."""
    numbers = summary(run)
    pauses = ", ".join(
        f"{what} {duration(numbers[key])}"
        for what, key in (("evaluation", "evaluate_seconds"), ("checkpoints", "checkpoint_seconds"))
        if numbers[key]
    )
    formats: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("steps", "steps", lambda v: f"{v:,}"),
        ("tokens", "tokens", lambda v: f"{v:,}"),
        ("tokens of the mean layer", "layer_tokens", lambda v: f"{v:,}"),
        ("tokens with earlier runs", "total_tokens", lambda v: f"{v:,}"),
        ("model FLOPs", "flops", lambda v: f"{v:.3g}"),
        ("model FLOPs with earlier runs", "total_flops", lambda v: f"{v:.3g}"),
        ("train loss", "train_loss", lambda v: f"{v:.4f}"),
        ("validation loss", "valid_loss", lambda v: f"{v:.4f}"),
        ("best validation loss", "best_valid_loss", lambda v: f"{v:.4f}"),
        ("tokens per second", "tokens_per_second", lambda v: f"{v:,.0f} (median)"),
        ("seconds per step", "step_seconds", lambda v: f"{v:.4g} (median)"),
        ("MFU", "mfu", lambda v: f"{percent(v)} (median)"),
        ("wall time", "wall_seconds", lambda v: duration(v) + (f", of which {pauses}" if pauses else "")),
        ("goodput", "goodput", percent),
        ("restarts", "restarts", str),
        ("discarded updates", "skipped", str),
    )
    return {label: text(numbers[key]) for label, key, text in formats if numbers[key] is not None}


def _head(runs: Sequence[LoggedRun], title: str) -> str:
    numbers = summary(runs[0])
    if len(runs) == 1:
        line = f"{numbers['steps']:,} steps, {short(numbers['tokens'] or 0)} tokens"
    else:
        line = f"{len(runs)} runs side by side"
    return (
        f"<header><div><p>megafab report</p><h1>{escape(title)}</h1><p>{line}</p></div>"
        '<div class="switch" role="group" aria-label="x axis">'
        '<button data-x="step" aria-pressed="true">steps</button>'
        '<button data-x="tokens" aria-pressed="false">tokens</button></div></header>'
    )


def _tiles(run: LoggedRun) -> str:
    numbers = summary(run)
    tiles = (
        ("train loss", numbers["train_loss"], lambda v: f"{v:.4f}"),
        ("validation loss", numbers["valid_loss"], lambda v: f"{v:.4f}"),
        ("tokens", numbers["tokens"], short),
        ("tokens per second", numbers["tokens_per_second"], short),
        ("MFU", numbers["mfu"], percent),
        ("wall time", numbers["wall_seconds"], duration),
        ("goodput", numbers["goodput"], percent),
    )
    shown = (f"<div><b>{text(v)}</b><span>{label}</span></div>" for label, v, text in tiles if v is not None)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _summary_table(runs: Sequence[LoggedRun]) -> str:
    """What each run is, then how it went; beside each other when there is one run only."""
    blocks = [
        _table(runs, {label: [facts.get(label, "") for facts in block] for facts in block for label in facts})
        for block in ([_identity(run) for run in runs], [_outcome(run) for run in runs])
    ]
    return f'<div class="{"grid2" if len(runs) == 1 else "stack"}">{"".join(blocks)}</div>'


def _table(runs: Sequence[LoggedRun], lines: Mapping[str, Sequence[str]]) -> str:
    """A line of values, one a run, for each label; runs are named above when there are several."""
    head = ""
    if len(runs) > 1:
        names = "".join(
            f'<th><i style="--c:{css_color(run.color)}"></i>{escape(run.name)}</th>' for run in runs
        )
        head = f"<thead><tr><th></th>{names}</tr></thead>"
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for label, values in lines.items()
    )
    return f'<div class="card"><table>{head}<tbody>{body}</tbody></table></div>'


def _config_differences(runs: Sequence[LoggedRun]) -> str:
    lines = config_differences(runs)
    content = _table(runs, lines) if lines else '<div class="card"><pre>none</pre></div>'
    return f"<h2>Configuration: what differs</h2>{content}"


def _costs(runs: Sequence[LoggedRun]) -> str:
    """What each run took to the loss that the first one ended with."""
    found = reference(runs)
    if found is None:
        return ""
    first, loss = found
    reached = [reach(run, loss) for run in runs]
    mine = reached[runs.index(first)]
    assert mine is not None, "it ended there"

    def line(text: Callable[[Reach], str]) -> list[str]:
        return ["not reached" if one is None else text(one) for one in reached]

    lines = {
        "steps": line(lambda one: f"{one.step:,}"),
        "tokens": line(lambda one: f"{one.tokens:,}"),
        "model FLOPs": line(lambda one: f"{one.flops:.3g}"),
        "share of its FLOPs": line(lambda one: percent(one.flops / mine.flops) if mine.flops else ""),
    }
    title = f"Cost of the validation loss that {first.name} ended with, {loss:.4f}"
    return f"<h2>{escape(title)}</h2>{_table(runs, lines)}"


def _shifts(runs: Sequence[LoggedRun]) -> str:
    """What each stage did to the domains: forgotten where the loss rose, adapted to where it fell."""
    by_name = {run.name: run for run in runs}
    tables = []
    for run in runs:
        if run.parent not in by_name:
            continue
        head = "".join(f"<th>{text}</th>" for text in ("", "before", "worst", "after", "change"))
        body = "".join(
            f"<tr><th>{escape(one.domain)}</th><td>{one.before:.4f}</td><td>{one.worst:.4f}</td>"
            f"<td>{one.after:.4f}</td><td>{one.change:+.4f}</td></tr>"
            for one in shifts(by_name[run.parent], run)
        )
        if body:
            title = f"Validation loss by domain: {run.name} after {run.parent}"
            tables.append(
                f'<h2>{escape(title)}</h2><div class="card"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
    return "".join(tables)


def _goodput(runs: Sequence[LoggedRun]) -> str:
    """What became of the time that the ranks were allocated, of each run and of all stages together."""
    known = [(run.name, run.spent) for run in runs if run.spent is not None and run.spent.allocated > 0]
    if not known:
        return ""
    if any(run.parent for run in runs):
        total = Goodput()
        for _, spent in known:
            total.add(spent)
        known.append(("all stages", total))
    causes = dict.fromkeys(
        cause for _, spent in known for cause, seconds in spent.lost.items() if seconds > 0
    )

    def shares(seconds: Callable[[Goodput], float]) -> list[str]:
        return [percent(seconds(spent) / spent.allocated) for _, spent in known]

    lines = {
        "useful: steps that are part of the run": shares(lambda spent: spent.useful),
        **{f"lost: {cause}": shares(lambda spent, c=cause: spent.lost.get(c, 0.0)) for cause in causes},
        "allocated": [f"{spent.allocated / 3600:.3g} rank-hours" for _, spent in known],
        "sessions": [str(spent.sessions) for _, spent in known],
        "in the queue between them": [duration(spent.queued) for _, spent in known],
    }
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in known)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for label, values in lines.items()
    )
    return (
        '<h2>Goodput</h2><div class="card"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(title: str, figures: Iterable[str]) -> str:
    content = "".join(figures)
    return f'<h2>{escape(title)}</h2><div class="grid2">{content}</div>' if content else ""


def _learning(runs: Sequence[LoggedRun]) -> list[str]:
    several = len(runs) > 1
    train = [run.series("loss", run.name if several else "train", run.color, smooth=True) for run in runs]
    valid = [
        run.series(
            "valid_loss",
            f"{run.name}, validation" if several else "validation",
            run.color if several else 1,
            dots=True,
            sparse=True,
        )
        for run in runs
        if run.known("valid_loss")
    ]
    shown = [v for s in (*train, *valid) for v in s.values]
    figures = [
        line_figure(
            "Loss",
            [*train, *valid],
            axis=Axis.fit(shown, robust=True),
            marks=[mark for run in runs for mark in _marks(run)],
            note="nats per token; dots: validation" if several else "nats per token",
            wide=True,
        )
    ]
    figures += _by_leaf(
        runs,
        "domain_loss",
        "Loss by domain",
        also="valid_domain_loss",
        note="nats per token; dots: validation",
    )
    figures += _by_leaf(
        runs, "domain_weight", "Domain weights", label=percent, zero=True, note="share of samples"
    )
    figures += _one_each(runs, "lr", "Learning rate", zero=True)
    figures += _one_each(
        runs, "grad_norm", "Gradient norm", log=True, smooth=True, note="before clipping, log scale"
    )
    figures += (
        _one_each(runs, "global_batch", "Global batch", zero=True, note="sequences")
        if _varies(runs, "global_batch")
        else []
    )
    return figures


def _speed(runs: Sequence[LoggedRun]) -> list[str]:
    figures = _one_each(
        runs, "tokens_per_second", "Throughput", zero=True, note="tokens per second of training"
    )
    figures += _one_each(
        runs, "goodput", "Goodput so far", zero=True, label=percent, note="useful / allocated"
    )
    figures += _one_each(runs, "mfu", "MFU", zero=True, label=percent, note="model FLOP/s over peak")
    colors = _leaf_colors(runs, "seconds")
    stacks = {
        run.name: [
            run.series(f"seconds/{part}", part.replace("_", " "), colors[part])
            for part in run.leaves("seconds")
        ]
        for run in runs
        if run.leaves("seconds")
    }
    if stacks:
        axis = stack_axis(stacks.values())
        figures += [
            stacked_figure(_titled("Where a step goes", name, runs), stack, axis=axis, note="seconds")
            for name, stack in stacks.items()
        ]
    return figures


def _techniques(runs: Sequence[LoggedRun]) -> str:
    """A section for each technique: a figure for each of its numbers."""
    metrics: dict[str, dict[str, None]] = {}
    for key in (key for run in runs for row in run.rows for key in row):
        technique, _, rest = key.partition("/")
        if technique not in ROW_KEYS:
            metrics.setdefault(technique, {})["/".join([technique, *rest.split("/")[:1]]).rstrip("/")] = None
    sections = []
    for technique, keys in metrics.items():
        figures: list[str] = []
        for key in keys:
            title = key.rpartition("/")[2].replace("_", " ")
            figures += _one_each(runs, key, title, smooth=True) + _by_leaf(runs, key, title)
        sections.append(_section(technique.replace("_", " ").capitalize(), figures))
    return "".join(sections)


def _one_each(
    runs: Sequence[LoggedRun],
    key: str,
    title: str,
    *,
    zero: bool = False,
    log: bool = False,
    smooth: bool = False,
    label: Callable[[float], str] = number,
    note: str = "",
) -> list[str]:
    """A figure with one curve a run; none where no run has the number."""
    series = [
        run.series(key, run.name, run.color, smooth=smooth, sparse=True) for run in runs if run.known(key)
    ]
    if not series:
        return []
    axis = Axis.fit((v for s in series for v in s.values), zero=zero, log=log)
    return [line_figure(title, series, axis=axis, label=label, note=note)]


def _by_leaf(
    runs: Sequence[LoggedRun],
    prefix: str,
    title: str,
    *,
    also: str = "",
    zero: bool = False,
    label: Callable[[float], str] = number,
    note: str = "",
) -> list[str]:
    """A figure for each run with one curve for each key below `prefix/`, all on one scale.

    A key has the same colour in every run. `also` is a prefix with the same keys, shown as dots.
    """
    colors = _leaf_colors(runs, prefix)
    panels: dict[str, list[Series]] = {}
    for run in runs:
        leaves = [leaf for leaf in run.leaves(prefix) if run.known(f"{prefix}/{leaf}")]
        curves = [
            run.series(f"{prefix}/{leaf}", leaf, colors[leaf], smooth=not zero, sparse=True)
            for leaf in leaves
        ]
        curves += [
            run.series(f"{also}/{leaf}", f"{leaf}, validation", colors[leaf], dots=True, sparse=True)
            for leaf in leaves
            if also and run.known(f"{also}/{leaf}")
        ]
        if curves:
            panels[run.name] = curves
    axis = Axis.fit(
        (v for curves in panels.values() for s in curves for v in s.values), zero=zero, robust=not zero
    )
    return [
        line_figure(_titled(title, name, runs), curves, axis=axis, label=label, note=note)
        for name, curves in panels.items()
    ]


def _leaf_colors(runs: Sequence[LoggedRun], prefix: str) -> dict[str, int]:
    """A colour for each key below `prefix/`, the same in every run."""
    leaves = dict.fromkeys(leaf for run in runs for leaf in run.leaves(prefix))
    return {leaf: color for color, leaf in enumerate(leaves)}


def _titled(title: str, name: str, runs: Sequence[LoggedRun]) -> str:
    return f"{title}: {name}" if len(runs) > 1 else title


def _varies(runs: Sequence[LoggedRun], key: str) -> bool:
    return any(len(set(run.known(key))) > 1 for run in runs)


def _marks(run: LoggedRun) -> list[Mark]:
    """Restarts and discarded updates."""
    marks = []
    for before, row in pairwise(run.rows):
        tokens = row.get("total_tokens", row.get("tokens", 0))
        place = (run.color, row.get("total_steps", row["step"]), tokens)
        if row.get("session", 1) != before.get("session", 1):
            marks.append(Mark("restart", *place))
        if row.get("skipped", 0) > before.get("skipped", 0):
            marks.append(Mark("skipped", *place))
    return marks


def _samples(runs: Sequence[LoggedRun]) -> str:
    texts = [
        f'<div class="card"><pre>{escape(run.sample)}</pre></div>'
        if len(runs) == 1
        else f'<div class="card"><table><thead><tr><th><i style="--c:{css_color(run.color)}"></i>'
        f"{escape(run.name)}</th></tr></thead></table><pre>{escape(run.sample)}</pre></div>"
        for run in runs
        if run.sample
    ]
    if not texts:
        return ""
    return f'<h2>Sample text</h2><div class="{"grid2" if len(texts) > 1 else ""}">{"".join(texts)}</div>'


def _configs(runs: Sequence[LoggedRun]) -> str:
    """Every configuration in full, folded."""
    folded = (
        f'<details class="card"><summary>{escape(run.name)}</summary><pre>'
        + escape(
            "\n".join(f"{key.replace('/', '.')}: {yaml_value(value)}" for key, value in run.config.items())
        )
        + "</pre></details>"
        for run in runs
    )
    return f"<h2>Configuration</h2>{''.join(folded)}"
