"""The kernels without a GPU: their sources compile and are executed, thread by thread, on the CPU.

What is checked of every operator: the reference's gradient against finite differences; schema, fake and
gradient by torch's own opcheck; the CUDA source against the reference in float64, in both orders of threads.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulator
import pytest
import torch

from megafab.kernels import build, ops
from tools.bench.kernel_cases import CASES, DTYPES, Case, error, exact, inputs, results

needs_nvcc = pytest.mark.skipif(build.toolchain() is None, reason="no nvcc (CUDA_HOME)")
every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.large else []) for c in CASES]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).rpartition(".")[2])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What nobody wrote is nan."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def test_every_operator_has_a_case():
    """An operator without one would go unchecked; backward operators are reached through gradients."""
    reached = {name for case in CASES for name in case.ops}
    forward = {name for name in ops.OPS if not name.endswith("_backward")}
    assert reached == forward


@every_dtype
@every_case
@needs_nvcc
@pytest.mark.usefixtures("poisoned")
def test_kernel_matches_the_reference_in_float64(case: Case, dtype: torch.dtype):
    """Results and gradients of the CUDA sources."""
    emulator.load()
    given = inputs(case, dtype)
    found, expected = results(case, emulator.NAMESPACE, given), exact(case, given)
    assert [error(a, b) for a, b in zip(found, expected, strict=True)] == pytest.approx(
        [0.0] * len(expected), abs=case.tolerance(dtype)
    )


@every_case
@needs_nvcc
def test_the_order_of_threads_does_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch):
    """A missing barrier shows: the threads of each block run in the other order, and nothing moves."""
    emulator.load()
    given = inputs(case, torch.bfloat16)
    forth = results(case, emulator.NAMESPACE, given)
    monkeypatch.setenv("EMULATOR_ORDER", "reverse")
    back = results(case, emulator.NAMESPACE, given)
    for a, b in zip(forth, back, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_dtype
@every_case
def test_reference_matches_itself_in_float64(case: Case, dtype: torch.dtype):
    """What the CPU computes with, in its own precision."""
    given = inputs(case, dtype)
    for a, b in zip(results(case, ops.REFERENCE, given), exact(case, given), strict=True):
        assert error(a, b) <= case.tolerance(dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.small], ids=lambda c: c.name)
def test_gradient_of_the_reference(case: Case):
    """By finite differences in float64."""
    given = inputs(case, torch.float64)
    for name in case.ops:
        ops.choose(name, ops.REFERENCE)
    if any(x is not None and x.requires_grad for x in given):
        assert torch.autograd.gradcheck(lambda *own: case.call(*own), given, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("namespace", [ops.KERNELS, ops.REFERENCE])
@pytest.mark.parametrize("case", [c for c in CASES if c.small], ids=lambda c: c.name)
def test_wiring(case: Case, namespace: str):
    """Schema, fake and gradient agree with what the operator does."""
    for name, arguments in calls(case, namespace):
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("case", [c for c in CASES if c.small], ids=lambda c: c.name)
def test_traces_whole(case: Case):
    """Nothing breaks the graph that torch.compile makes of a layer, forward and backward."""
    given = inputs(case, torch.float32)
    traced = dataclasses.replace(case, call=torch.compile(case.call, fullgraph=True, backend="aot_eager"))
    found, expected = (results(c, ops.KERNELS, given) for c in (traced, case))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def calls(case: Case, namespace: str) -> list[tuple[str, tuple]]:
    """The operators that a case calls, with their arguments."""
    seen: list[tuple[str, tuple]] = []
    before = {name: ops.chosen(name) for name in case.ops}
    for name in case.ops:

        def record(*arguments, name: str = name):
            seen.append((name, arguments))
            return ops.direct(name, namespace)(*arguments)

        ops.replace(name, record)
    given = inputs(case, torch.float32)
    made = case.call(
        *(None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in given)
    )
    made = [made] if isinstance(made, torch.Tensor) else list(made)
    for x in made:
        if x.requires_grad:
            x.sum().backward(retain_graph=True)
    for name, op in before.items():
        ops.replace(name, op)
    assert {name for name, _ in seen} == set(case.ops)
    return seen


@needs_nvcc
def test_every_source_compiles_for_every_target_without_spills(tmp_path: Path):
    """Registers and stack from ptxas' report."""
    usages = build.compile_all(tmp_path)
    assert {usage.target for usage in usages} == {f"sm_{target}" for target in build.TARGETS}
    assert [usage for usage in usages if usage.spills or usage.stack] == []


@needs_nvcc
def test_what_torch_sees_of_them_compiles(tmp_path: Path):
    """`bindings.cpp` as it is on a GPU; a torch for CPUs lacks one header, of macros."""
    tools = build.toolchain()
    assert tools is not None
    if torch.version.cuda is None:
        macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    root = Path(torch.__file__).parent / "include"
    places = (tmp_path, root, root / "torch" / "csrc" / "api" / "include", tools.home / "include")
    command = ["g++", "-std=c++20", "-fsyntax-only", *(f"-isystem{place}" for place in places)]
    done = subprocess.run([*command, build.CSRC / "bindings.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_nothing_is_built_at_import():
    """Importing all of the kernels starts no compiler."""
    code = (
        "import subprocess, sys\nsubprocess.Popen = subprocess.run = None\nimport megafab.kernels.dispatch\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
