"""The difficulty of a step against published vectors and numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megafab.errors import UserError
from megafab.techniques.config import PacingConfig, PacingShape
from megafab.techniques.pacing import Pacing


def pacing(**settings: Any) -> Pacing:
    shape = PacingShape[settings.pop("shape", "linear")]
    return Pacing(PacingConfig(shape=shape, **settings), "techniques.x.pacing")


T = 110_000
# Settings of the GPT recipes of arXiv 2212.03597 and what its released code gives at some steps.
PUBLISHED = {
    "seqlen_truncate": (
        {"start": 80, "end": 2048, "steps": T, "round_to": 8},
        {1: 80, 1000: 96, 27_500: 568, 55_000: 1064, T: 2048, T + 1: 2048},
    ),
    "voc": (
        {"shape": "root", "degree": 2, "start": 1, "end": 100, "steps": T},
        {1: 1, 1000: 10, 27_500: 50, 55_000: 71, T: 100},
    ),
    "random_ltd": (
        {"start": 128, "end": 2048, "steps": 200_000, "round_to": 16},
        {0: 128, 50_000: 608, 100_000: 1088, 199_999: 2032, 200_000: 2048},
    ),
    "discrete": (
        {"shape": "step", "levels": (1, 2, 3, 4, 5), "last_steps": (2, 4, 6, 8)},
        dict(zip(range(1, 11), [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], strict=True)),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vectors(name: str) -> None:
    settings, wanted = PUBLISHED[name]
    one = pacing(**settings)
    assert {step: one.at(step) for step in wanted} == wanted


def test_by_hand() -> None:
    # 10 + 40 * t / 8 = 15, 20, ... 50, down to multiples of 12; never below 10, and 50 at the end.
    linear = pacing(start=10, end=50, steps=8, round_to=12)
    assert [linear.at(step) for step in range(1, 10)] == [12, 12, 24, 24, 24, 36, 36, 50, 50]
    # (t / 8)^(1/3) = 1/2, 1 at t = 1, 8.
    root = pacing(shape="root", degree=3, start=0, end=1, steps=8, round_to=0.25)
    assert (root.at(1), root.at(3), root.at(8)) == (0.5, 0.5, 1)
    assert root.at(4) == math.floor(0.5 ** (1 / 3) * 4) / 4
    assert pacing(start=0.5, end=3.25, steps=10, round_to=2).at(1) == 0.5


def test_it_never_falls() -> None:
    for degree in (0.5, 1, 2, 7):
        one = pacing(shape="root", degree=degree, start=3, end=777.5, steps=999, round_to=5)
        values = [one.at(step) for step in range(1, 1100)]
        assert values == sorted(values)
        assert (values[998], values[-1]) == (777.5, 777.5)


def test_the_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pacing.py").write_text(
        "def stairs(step):\n    return [3, 9, 14.5, 99][step - 1]\ndef nan(step):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"shape": "custom", "start": 4, "end": 50, "round_to": 4}
    stairs = pacing(**settings, function="my_pacing:stairs")
    assert [stairs.at(step) for step in (1, 2, 3, 4)] == [4, 8, 12, 50]
    with pytest.raises(
        UserError, match=r"pacing\.function=my_pacing:nan: found nan for step 1, expected a fin"
    ):
        pacing(**settings, function="my_pacing:nan").at(1)
    with pytest.raises(UserError, match=r"found no function ladder in .*my_pacing\.py"):
        pacing(**settings, function="my_pacing:ladder")
    with pytest.raises(UserError, match="found no module not_there"):
        pacing(**settings, function="not_there:ladder")
