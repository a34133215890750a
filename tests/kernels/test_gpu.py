"""The kernels on a GPU: every operator and type against float64, and whole runs against the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megafab.kernels import dispatch, ops
from megafab.kernels.config import Kernels
from tools.bench.kernel_cases import CASES, DTYPES, Case, error, exact, inputs, results

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "kernels.py"

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The library, compiled for this GPU."""
    assert dispatch.set_up(Kernels.cuda, print) == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).rpartition(".")[2])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_kernel_matches_the_reference_in_float64(case: Case, dtype: torch.dtype):
    given = inputs(case, dtype, "cuda")
    for a, b in zip(results(case, ops.KERNELS, given), exact(case, given), strict=True):
        assert error(a, b) <= case.tolerance(dtype)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_a_run_with_kernels_is_the_run_without(precision: str, limit: float):
    """The losses of 20 steps."""
    with_kernels, without = (
        json.loads(
            subprocess.run(
                [sys.executable, BENCH, "--losses", choice, precision], check=True, capture_output=True
            ).stdout.splitlines()[-1]
        )
        for choice in ("cuda", "reference")
    )
    assert with_kernels == pytest.approx(without, abs=limit)
