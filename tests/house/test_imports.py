"""Who may import whom. Imports go down the levels below; the table is the architecture in twenty lines."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("megafab", "launch", "data_pipeline", "tools")

# Part -> level; the longest name that fits decides. A part imports lower levels only, and itself.
LEVELS = {
    "megafab.platform": 0,
    "megafab.function": 0,
    "megafab.topology": 1,
    "megafab.kernels": 1,
    "megafab.telemetry": 1,
    "megafab.model": 2,
    "megafab.loss": 2,
    "megafab.data": 2,
    "megafab.optim": 2,
    "megafab.checkpoint.pieces": 2,
    "megafab.techniques.base": 3,
    "megafab.techniques.pacing": 3,  # for several techniques
    "megafab.engine.base": 3,
    "megafab.engine": 4,
    "megafab.checkpoint": 4,
    "megafab.techniques.bus": 4,
    "megafab.techniques.masks": 4,  # for several techniques
    "megafab.techniques.mixing": 4,
    "megafab.resilience": 4,
    "megafab.planner": 4,
    "megafab.techniques": 5,
    "megafab.config": 5,
    "megafab.build": 7,
    "megafab.retrieval": 6,
    "megafab.generate": 7,
    "megafab.judge": 8,
    "megafab.perplexity": 8,
    "megafab.score": 9,
    "megafab.scorer": 8,
    "megafab.convert": 9,
    "megafab.checkpoint.surgery": 9,
    "megafab.evaluation": 6,
    "megafab.train": 7,
    "megafab.stages": 9,
    "data_pipeline": 8,
    "launch": 10,
    "tools": 11,
}
# The page says what a step is; the parts it calls are handed to it.
TRAIN_MAY_IMPORT = (
    "megafab.engine.base",
    "megafab.techniques.base",
    "megafab.techniques.bus",
    "megafab.loss",
    "megafab.evaluation",
)
DATA_PIPELINE_MAY_IMPORT = (
    "data_pipeline",
    "megafab.errors",
    "megafab.function",
    "megafab.run",
    "megafab.config.load",
    "megafab.data.format",
    "megafab.data.tokenizer",
    "megafab.data.derived",  # the formats of what it derives from a corpus, as that of the corpus itself
    "megafab.data.difficulty",
    "megafab.data.scores",
    "megafab.data.retrieval",
    "megafab.data.encoders",
    "megafab.data.index",
    "megafab.data.order",
)
# Nouns and sections: importable from everywhere.
SHARED = ("megafab.errors", "megafab.run")

# Third-party packages that only these parts may touch. `tools` may use anything.
CONFINED = {
    "megatron": (
        *("megafab.platform", "megafab.topology.groups", "megafab.model", "megafab.loss", "megafab.engine"),
    ),
    "deepspeed": ("megafab.engine.zero",),
    "hydra": ("megafab.config.load",),
    "omegaconf": (
        "megafab.config.load",
        "megafab.config.generate",
        "megafab.config.perplexity",
        "megafab.config.score",
        "data_pipeline.retrieval_config",
    ),  # and every config.py, for MISSING
    "wandb": ("megafab.telemetry",),
    "datasets": ("data_pipeline",),
    "faiss": ("megafab.data.index",),
    "torch.distributed": (
        *(
            "megafab.platform",
            "megafab.topology",
            "megafab.engine",
            "megafab.checkpoint",
            "megafab.resilience",
        ),
        *("megafab.telemetry", "megafab.techniques.bus", "megafab.loss", "launch.doctor"),
    ),
}
# Where the words of one device may stand in code; the group over hosts is gloo's on every platform.
KNOWS_DEVICES = ("megafab.platform", "megafab.kernels", "megafab.topology.groups", "launch.doctor")
DEVICE_WORDS = {"cuda", "nccl", "gloo"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in sorted(files)}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports when it runs; `if TYPE_CHECKING:` is for readers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


@cache
def imported(module: str) -> tuple[str, ...]:
    return tuple(imports(ast.parse(sources()[module].read_text())))


def within(name: str, parts: tuple[str, ...] | dict[str, int]) -> str | None:
    """The longest of `parts` that `name` is or lies in."""
    fits = [part for part in parts if name == part or name.startswith(part + ".")]
    return max(fits, key=len, default=None)


def is_section(name: str) -> bool:
    """Whether a module, or a name of it, is a package's `config.py`."""
    parts = name.split(".")
    return parts[0] == "megafab" and "config" in parts[2:3]


def part_of(name: str) -> str | None:
    part = within(name, LEVELS)
    if part == "megafab.techniques":  # each technique is a part of its own
        return ".".join(name.split(".")[:3])
    return part


def level_of(part: str) -> int:
    fits = within(part, LEVELS)
    assert fits is not None
    return LEVELS[fits]


@pytest.mark.parametrize("module", sources())
def test_imports_go_down(module: str):
    if is_section(module) or within(module, SHARED):
        return  # their own tests are below
    part = part_of(module)
    assert part is not None or module in PACKAGES, f"{module} has no level: add it to LEVELS"
    for name in imported(module):
        if name.split(".")[0] not in PACKAGES or within(name, SHARED) or is_section(name):
            continue
        other = part_of(name)
        assert other is not None, f"{module} imports {name}, which has no level"
        below = part is not None and level_of(other) < level_of(part)
        assert other == part or below, f"{module} may not import {name}: it is not on a lower level"


@pytest.mark.parametrize("module", [name for name in sources() if is_section(name)])
def test_sections_import_nothing_that_costs(module: str):
    allowed = sys.stdlib_module_names | {"omegaconf", "megafab"}
    for name in imported(module):
        assert name.split(".")[0] in allowed, f"{module} imports {name}"
        assert name.split(".")[0] != "omegaconf" or name == "omegaconf.MISSING"
        assert name.split(".")[0] != "megafab" or within(name, ("megafab.errors",)) or is_section(name)


def test_the_schema_imports_sections_only():
    for name in imported("megafab.config.schema"):
        assert name.split(".")[0] in sys.stdlib_module_names or is_section(name), name


@pytest.mark.parametrize("module", SHARED)
def test_the_nouns_import_no_part(module: str):
    for name in imported(module):
        assert name.split(".")[0] not in PACKAGES or within(name, SHARED), f"{module} imports {name}"


def test_the_page_imports_protocols_only():
    for name in imported("megafab.train"):
        if name.startswith("megafab."):
            assert within(name, (*TRAIN_MAY_IMPORT, *SHARED)), f"megafab.train imports {name}"


@pytest.mark.parametrize("module", [name for name in sources() if name.startswith("data_pipeline")])
def test_the_data_pipeline_knows_the_format_only(module: str):
    for name in imported(module):
        if name.split(".")[0] in PACKAGES:
            assert within(name, DATA_PIPELINE_MAY_IMPORT), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in sources() if not name.startswith("tools")])
def test_third_parties_stay_where_they_belong(module: str):
    for name in imported(module):
        third = within(name, tuple(CONFINED))
        if third is None or (third == "omegaconf" and (is_section(module) or module.endswith(".config"))):
            continue
        assert within(module, CONFINED[third]), f"{module} may not import {name}"


@pytest.mark.parametrize("module", [name for name in sources() if not name.startswith("tools")])
def test_devices_are_named_in_one_place(module: str):
    if within(module, KNOWS_DEVICES) or is_section(module):
        return
    for node in ast.walk(ast.parse(sources()[module].read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in DEVICE_WORDS, f"{module}, line {node.lineno}: {node.value!r}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr != "cuda", f"{module}, line {node.lineno}: torch.cuda"


def test_a_configuration_is_checked_without_torch():
    modules = (
        "launch.cli, launch.ranks, launch.train, data_pipeline.config, data_pipeline.retrieval_config, "
        + ", ".join(f"megafab.config.{name}" for name in ("load", "rules", "docs", "generate"))
    )
    heavy = ("torch", "numpy", "megatron", "wandb", "datasets", "hydra", "rich")
    program = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
