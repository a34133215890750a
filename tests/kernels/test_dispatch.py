"""Which kernels layers call, and what is said where they cannot be had."""

from __future__ import annotations

import pytest
import torch

from megafab.errors import UserError
from megafab.kernels import build, dispatch, ops
from megafab.kernels.config import Kernels

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize("kernels", [Kernels.auto, Kernels.reference])
def test_a_cpu_computes_with_the_reference(kernels: Kernels):
    assert dispatch.set_up(kernels) == "reference"
    assert all(ops.chosen(name) == ops.direct(name, ops.REFERENCE) for name in ops.OPS)


@no_gpu
@pytest.mark.parametrize("kernels", [Kernels.cuda, Kernels.apex])
def test_what_cannot_be_had_is_an_error(kernels: Kernels):
    with pytest.raises(UserError, match=f"kernels={kernels.value}.*a GPU that torch can use.*kernels=auto"):
        dispatch.set_up(kernels)


def test_the_toolkit_is_found_by_its_headers(tmp_path, monkeypatch):
    """A script called nvcc is no toolkit."""
    found = build.toolchain()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.toolchain() == found
