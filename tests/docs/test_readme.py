"""What the README shows is what the code says and does."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from data_pipeline.config import check_difficulty
from data_pipeline.retrieval_config import check_retrieval
from launch import cli, submit
from megafab.config import load, rules
from megafab.config.submit import check as check_job
from megafab.engine import capabilities

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_quoted_loop_is_the_loop():
    (quoted,) = blocks("python")
    source = (ROOT / "megafab" / "train.py").read_text()
    indented = "\n".join(f"        {line}" if line else "" for line in quoted.rstrip().split("\n"))
    assert len(quoted.splitlines()) > 15
    assert indented in source


def test_the_table_of_engines_is_that_of_the_code():
    (quoted,) = re.findall(
        r"<!-- python -m megafab.engine.capabilities -->\n(.*?)<!-- end -->", README, re.DOTALL
    )
    assert "\n".join(line.strip() for line in quoted.strip().splitlines()) == capabilities.table().strip()


def test_the_quoted_mistakes_get_the_quoted_answers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (session,) = blocks("console")
    command, expected = session.split("\n", 1)
    assert cli.main(command.removeprefix("$ megafab ").split()) == cli.USER_ERROR
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"`((?:megafab|conf|tests|tools)/[\w/.]+)`", README)))
)
def test_named_paths_exist(target):
    assert (ROOT / target).exists()


def test_the_model_readme_computes():
    (snippet,) = blocks("python", (ROOT / "megafab/model/README.md").read_text())
    names: dict = {}
    exec(snippet, names)
    assert names["flops"] > names["shape"].flops_per_token()


def commands() -> list[str]:
    """The command lines that these READMEs show."""
    places = (".", "data_pipeline", "megafab/techniques", "slurm")
    texts = ((ROOT / place / "README.md").read_text().replace("\\\n", " ") for place in places)
    shown = (block for text in texts for block in blocks("bash", text))
    return [line for block in shown for line in block.splitlines() if line.startswith("megafab ")]


@pytest.mark.parametrize("command", commands())
def test_shown_commands_are_valid(command):
    words = shlex.split(command, comments=True)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in cli.VERBS else words[0]
    overrides = words[len(name.split()) :]
    if "..." in overrides:
        overrides.remove("...")
        overrides += ["model=gpt_1_3b", "data.path=corpus", "train.steps=200000"]
    verb = cli.VERBS[name]
    if name == "submit":
        mine = submit.own(overrides)
        check_job(load.compose(verb.load_schema(), verb.config, mine))
        overrides = [text for text in overrides if text not in (*mine, *submit.FLAGS)]
        name, verb = "train", cli.VERBS["train"]
    config = load.compose(verb.load_schema(), verb.config, overrides)
    if name == "train":
        rules.check_all(config, ranks=config.launch.ranks, corpus=None)
    if name == "data difficulty":
        check_difficulty(config)
    if name == "data retrieval":
        check_retrieval(config)


def test_the_quickstart_of_the_other_engine_has_a_place_of_its_own():
    command = ["make", "-n", "quickstart", "ENGINE=deepspeed", "ARGS=train.steps=70"]
    shown = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    arguments = "recipe=quickstart engine=deepspeed run.dir=runs/quickstart_deepspeed train.steps=70"
    assert f"megafab train {arguments}\n" in shown
    assert "megafab generate checkpoint=runs/quickstart_deepspeed " in shown
    config = load.load([*arguments.split(), "data.path=corpus"])
    rules.check_all(config, ranks=config.launch.ranks, corpus=None)
