"""usage: megafab report RUN_DIR [RUN_DIR ...] [out=FILE]

Writes one HTML page with the plots of a run, or of several side by side: losses, domains, learning rate,
gradient norm, speed, where the time of a step goes, what techniques report, how configurations differ, and
what each run took to the loss that the first one ended with. The directory of a training in stages stands
for all of them, with what each did to the losses of the domains; steps and tokens count from its beginning.
The page needs no network. Without out= it becomes report.html in the (first) run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megafab.errors import UserError
from megafab.telemetry.report import write_report


def main(overrides: Sequence[str]) -> int:
    """Write the page and say where it is.

    Raises:
        UserError: an argument or a run directory is not what it should be.
    """
    run_dirs: list[Path] = []
    out: Path | None = None
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if equals and key == "out":
            out = Path(value)
        elif equals and not Path(argument).exists():
            raise UserError(
                argument, "an unknown key", "run directories and out=FILE", "megafab report --help"
            )
        else:
            run_dirs.append(Path(argument))
    if not run_dirs:
        raise UserError(
            "megafab report", "no run directory", "at least one", "name one, as in: megafab report runs/a"
        )
    target = out or run_dirs[0] / "report.html"
    write_report(list(dict.fromkeys(run_dirs)), target)
    print(f"{target} ({target.stat().st_size / 1024:.0f} KiB)")
    return 0
