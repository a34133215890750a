"""The repository itself: empty parametrisations, the wheel, the Makefile, the constraints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_parametrisation_without_cases_fails(tmp_path: Path):
    (tmp_path / "test_empty.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', [])\ndef test_nothing(x): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tmp_path)], text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 2
    assert "Empty parameter set in 'test_nothing'" in done.stdout


def test_the_wheel_carries_its_configuration(tmp_path: Path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    files = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {str(path.relative_to(installed / "megafab/conf")) for path in installed.rglob("*.yaml")} == files
    assert (installed / "megafab/slurm/job.sh.j2").read_bytes() == (ROOT / "slurm/job.sh.j2").read_bytes()
    program = (
        "from megafab.config.load import config_directory, load\n"
        "print(config_directory())\n"
        "print(load(['recipe=quickstart']).model.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [str(installed / "megafab/conf"), "llama_tiny"], done.stderr


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match[0].lower().replace("_", "-")


def test_what_setup_installs_is_pinned():
    pins = {
        requirement_name(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    extras = PROJECT["project"]["optional-dependencies"]
    direct = [*PROJECT["project"]["dependencies"], *extras["data"], *extras["dev"]]
    assert {requirement_name(one) for one in direct} - pins == set()


def test_constraints_have_no_local_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if "==" in line and "+" in line] == []


def test_every_make_target_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), target
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert [line.split()[0] for line in listed.stdout.splitlines()] == phony[1].split()


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_console_scripts_exist(name: str):
    import importlib

    module, _, function = PROJECT["project"]["scripts"][name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
