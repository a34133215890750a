"""conf/ and command lines to dataclasses: what is accepted, and the one line each mistake gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import yaml

from megafab.config import load as loading
from megafab.config.docs import key_docs
from megafab.config.load import compose, config_directory, from_yaml, load, resolved_yaml
from megafab.config.schema import Precision, RunConfig
from megafab.config.stages import of as stages_of
from megafab.config.tree import (
    MISSING,
    annotation_of,
    build,
    default_tree,
    keys,
    nearest,
    to_tree,
    unwrap,
)
from megafab.errors import ConfigError, ConfigErrors
from megafab.model.config import MoEConfig, Norm
from megafab.model.shape import ModelShape
from megafab.resilience.config import SpikesConfig
from megafab.techniques.config import EMAConfig, TechniquesConfig, ZLossConfig

BASE = ("model=llama_tiny", "data.path=corpus", "train.steps=20")
CONF = config_directory()
TECHNIQUES = sorted(field.name for field in dataclasses.fields(TechniquesConfig))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def errors(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    return str(caught.value).splitlines()


def test_the_shortest_command_is_enough():
    config = load(BASE)
    assert type(config) is RunConfig
    assert (config.model.name, config.model.layers, config.model.hidden) == ("llama_tiny", 4, 192)
    assert config.train.steps == 20
    assert config.train.precision is Precision.fp32
    assert config.optim.lr == 3e-4
    assert config.run.dir == "runs/default"
    assert config.techniques.z_loss is None


def test_every_section_is_the_frozen_dataclass_of_the_schema():
    config = load(BASE)
    for field in dataclasses.fields(RunConfig):
        section = getattr(config, field.name)
        if field.name == "kernels":  # one choice, not a section
            continue
        assert type(section).__module__.startswith("megafab.")
        assert section.__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.layers = 5


def test_overrides_win_over_presets_and_recipes_over_presets():
    config = load(["recipe=quickstart", "optim.lr=0.5", "model.layers=8"])
    assert (config.launch.ranks, config.parallel.tensor, config.parallel.pipeline) == (4, 2, 2)
    assert (config.optim.lr, config.model.layers, config.model.name) == (0.5, 8, "llama_tiny")
    assert load(["recipe=quickstart", "model=gpt_tiny"]).model.norm is Norm.layernorm


def test_a_recipe_chosen_by_name_can_be_taken_back():
    assert load([*BASE, "recipe=null"]) == load(BASE)


def test_techniques_are_chosen_by_list():
    config = load([*BASE, "technique=[z_loss,ema]", "techniques.ema.decay=0.5"])
    assert config.techniques.z_loss == ZLossConfig(weight=1e-4)
    assert config.techniques.ema == EMAConfig(decay=0.5)
    assert load([*BASE, "technique=ema"]).techniques.z_loss is None
    assert load([*BASE, "technique=[]"]) == load([*BASE, "technique=null"]) == load(BASE)


def test_sections_merge_and_mappings_are_replaced():
    config = load(
        [*BASE, "model.moe={experts: 4, top_k: 1}", "data.mixture={a: 1, b: 3}", "data.mixture.c=2"]
    )
    assert config.model.moe == MoEConfig(experts=4, top_k=1)
    assert config.data.mixture == {"a": 1.0, "b": 3.0, "c": 2.0}
    assert load([*BASE, "data.mixture={a: 1}", "data.mixture={b: 2}"]).data.mixture == {"b": 2.0}
    assert load([*BASE, "data.mixture.books=0.5"]).data.mixture == {"books": 0.5}


def test_the_controller_of_spikes_is_switched_on_by_its_section():
    assert load(BASE).resilience.spikes is None
    assert load([*BASE, "resilience.spikes={}"]).resilience.spikes == SpikesConfig()
    on = [*BASE, "resilience.spikes={margin: 20, norm_threshold: 9}", "resilience.spikes.patience=2"]
    assert load(on).resilience.spikes == SpikesConfig(margin=20, norm_threshold=9.0, patience=2)
    assert load([*BASE, "data.skip=[[8,4],[100,1]]"]).data.skip == ((8, 4), (100, 1))


def test_numbers_are_taken_as_people_write_them():
    config = load(
        [*BASE, "train.steps=null", "train.tokens=1e9", "optim.lr=1", "+optim.clip=0", "++eval.every=3"]
    )
    assert config.train.tokens == 1_000_000_000
    assert isinstance(config.train.tokens, int)
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert (config.optim.clip, config.eval.every) == (0.0, 3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("007", "007"),
        ("1e3", "1e3"),
        ("true", "true"),
        ("a=b", "a=b"),
        ("a, b", "a, b"),
        ("def f(x):", "def f(x):"),
        ("[x]", "[x]"),
        ('say "no" \\', 'say "no" \\'),
        ("'quoted, so'", "quoted, so"),
    ],
)
def test_text_is_taken_as_it_stands(given: str, text: str):
    assert load([*BASE, f"run.name={given}"]).run.name == text


def test_interpolation_sees_overrides():
    assert (
        load([*BASE, "run.name=a", "run.dir='out/${run.name}/${model.name}'"]).run.dir == "out/a/llama_tiny"
    )


UNKNOWN = ("an unknown key", "a key of the configuration")
# Override -> found, expected, remedy. One command may hold all of these: each gets its line.
VALUE_MISTAKES = {
    "model.laers=3": (*UNKNOWN, "did you mean model.layers?"),
    "train.lr=2": (*UNKNOWN, "did you mean optim.lr?"),
    "optim.lrate=2": (*UNKNOWN, "did you mean optim.lr?"),
    "step=2": (*UNKNOWN, "did you mean train.steps?"),
    "modle=gpt_tiny": (*UNKNOWN, "did you mean model=...?"),
    "model.layers.x=3": (*UNKNOWN, "did you mean model.layers?"),
    "hydra.verbose=true": (
        *UNKNOWN,
        "use one of model, parallel, engine, train, kernels, optim, schedule, data, eval, checkpoint, start, "
        "resilience, tracking, techniques, run, launch",
    ),
    "eval.qqqq=3": (*UNKNOWN, "use one of eval.every, eval.samples"),
    "model.layers=abc": ("text abc", "a whole number", "give model.layers a whole number"),
    "model.hidden=2.5": ("the number 2.5", "a whole number", "give model.hidden a whole number"),
    "model.heads=true": ("the truth value true", "a whole number", "give model.heads a whole number"),
    "model.kv_heads=x": ("text x", "a whole number or null", "give model.kv_heads a whole number"),
    "optim.lr=null": ("null", "a number", "give optim.lr a number"),
    "parallel.sequence=1": (
        "the whole number 1",
        "true or false",
        "parallel.sequence=true or parallel.sequence=false",
    ),
    "train.precision=fp23": ("text fp23", "one of fp32, bf16", "did you mean train.precision=fp32?"),
    "train.batch_ramp=x": (
        "text x",
        "a section with keys start, increment, samples",
        "give train.batch_ramp a section with keys start, increment, samples",
    ),
    "data.mixture=x": (
        "text x",
        "a mapping like {name: value}, each value a number or null",
        "give data.mixture a mapping like {name: value}, each value a number",
    ),
    "techniques.z_loss.weight=1": (
        "z_loss switched off",
        "z_loss among technique=[...]",
        "add technique=[z_loss]",
    ),
    "resilience.spikes.margin=9": (
        "resilience.spikes is null",
        "a section",
        "set resilience.spikes={...}",
    ),
    "optim.muon.momentum=0.9": ("optim.muon is null", "optim=muon", "add optim=muon"),
    "train.steps": ("something that is not an override", "key=value", "write key=value"),
    "train.steps=a=b": (
        "something that is not an override",
        "key=value",
        "quote the value: 'train.steps=\"a=b\"'",
    ),
    "train.steps=1,2": (
        "several values",
        "one, since a run is not a sweep",
        "give one value, or a list as train.steps=[a,b]",
    ),
    "~train.steps": ("a deletion or a package", "key=value", "set it instead: train.steps=null"),
}

# Without a choice there are no files to compose, so that these are reported before the values' types.
CHOICE_MISTAKES = {
    "schedule=wsb": (
        "no schedule named wsb",
        "one of constant, cosine, infinite, inverse_sqrt, linear, rewarm, wsd",
        "did you mean schedule=wsd?",
    ),
    "technique=[ema,xxxx]": (
        "no technique named xxxx",
        f"one of {', '.join(TECHNIQUES)}",
        f"technique={TECHNIQUES[0]}, for example",
    ),
    "optim=null": ("0 names", "one of adamw, lion, muon, soap", "choose one optim"),
    "schedule=[wsd,cosine]": (
        "2 names",
        "one of constant, cosine, infinite, inverse_sqrt, linear, rewarm, wsd",
        "choose one schedule",
    ),
}


def line(override: str, found: str, expected: str, fix: str) -> str:
    return f"{override}: found {found}, expected {expected}. Fix: {fix}"


def test_each_mistaken_value_has_its_line():
    found = errors(*BASE, *VALUE_MISTAKES)
    assert sorted(found) == sorted(line(override, *parts) for override, parts in VALUE_MISTAKES.items())


@pytest.mark.parametrize("override", CHOICE_MISTAKES)
def test_each_mistaken_choice_has_its_line(override: str):
    assert errors(*BASE, override) == [line(override, *CHOICE_MISTAKES[override])]


def test_an_element_of_a_mapping_is_named_when_it_is_wrong():
    assert errors(*BASE, "data.mixture={a: b}") == [
        line("data.mixture.a=b", "text b", "a number", "give data.mixture.a a number")
    ]


def test_a_technique_may_have_a_key_without_a_default():
    assert errors(*BASE, "technique=[curriculum]") == [
        "techniques.curriculum.difficulty: found no value, expected text. "
        "Fix: add techniques.curriculum.difficulty=... to the command"
    ]


def test_the_remedy_for_a_technique_keeps_the_others():
    assert errors(*BASE, "technique=[ema]", "techniques.z_loss.weight=1") == [
        "techniques.z_loss.weight=1: found z_loss switched off, expected z_loss among technique=[...]. "
        "Fix: add technique=[ema,z_loss]"
    ]


def test_an_interpolation_must_resolve():
    assert errors(*BASE, "run.dir='${nope}'") == [
        "run.dir: found Interpolation key 'nope' not found, expected an interpolation that resolves. "
        "Fix: name an existing key, or escape the dollar sign: \\${...}"
    ]


def test_what_nobody_gave_is_named():
    options = ", ".join(MODELS)
    assert errors() == [f"model: found no choice, expected one of {options}. Fix: add model={MODELS[0]}"]
    assert errors("model=llama_tiny") == [
        "data.path: found no value, expected text. Fix: add data.path=... to the command"
    ]


def test_all_mistakes_of_a_command_come_together():
    found = errors(
        *("model=llama_tiny", "model.laers=3", "train.stepz=1", "techniques.ema.decay=0", "model.layers=x"),
    )
    assert [line.partition(":")[0] for line in found] == [
        *("model.laers=3", "train.stepz=1", "techniques.ema.decay=0", "model.layers=x", "data.path"),
    ]


def test_mistakes_are_one_exception_with_its_parts():
    with pytest.raises(ConfigErrors) as caught:
        load([*BASE, "a=1", "b=2"])
    assert [problem.where for problem in caught.value.problems] == ["a=1", "b=2"]


def test_yaml_round_trip_gives_the_same_objects(tmp_path: Path):
    config = load(
        [*BASE, "technique=[ema]", "run.name=1e3", "data.mixture={a: 1, b: 2}", "model.moe.experts=0"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config))
    assert from_yaml(path) == config
    techniques = yaml.safe_load(path.read_text())["techniques"]
    assert techniques.pop("ema") == {"decay": 0.999, "every": 1, "evaluate": True}
    assert techniques
    assert not any(techniques.values())
    assert yaml.safe_load(path.read_text())["techniques"] == dict.fromkeys(TECHNIQUES) | {
        "ema": {"decay": 0.999, "every": 1, "evaluate": True},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {layer: 3}", "model.layer: found an unknown key, expected a key of the configuration. "),
        ("- 1", "found no mapping, expected sections like model: and train:. Fix: restore the file"),
        ("a: [", "expected YAML. Fix: restore the file"),
        (None, "found No such file or directory, expected a run's config.yaml"),
    ],
)
def test_a_bad_config_yaml_is_the_users_error(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        from_yaml(path)
    assert message in str(caught.value)


def test_hydra_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import logging

    monkeypatch.chdir(tmp_path)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    load(BASE)
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == (handlers, level)


# Parameters by hand from each paper's shape: layers x (attention + feed-forward) + embeddings.
# GPT: 12 l h^2 + (V + s) h; biases and norms add less than 0.1 %.
SIZES = {
    "gpt_tiny": (4 * 12 * 192**2 + (4096 + 256) * 192, 4096),
    "gpt_125m": (12 * 12 * 768**2 + (50304 + 2048) * 768, 50304),
    "gpt_350m": (24 * 12 * 1024**2 + (50304 + 2048) * 1024, 50304),
    "gpt_1_3b": (24 * 12 * 2048**2 + (50304 + 2048) * 2048, 50304),
    "gpt_6_7b": (32 * 12 * 4096**2 + (50304 + 2048) * 4096, 50304),
    "gpt_175b": (96 * 12 * 12288**2 + (51200 + 2048) * 12288, 51200),
    "mt_nlg_530b": (105 * 12 * 20480**2 + (51200 + 2048) * 20480, 51200),
    "gpt_1t_frontier": (128 * 12 * 25600**2 + (51200 + 2048) * 25600, 51200),
    "llama_tiny": (4 * (192 * (2 * 192 + 2 * 96) + 3 * 192 * 512) + 2 * 4096 * 192, 4096),
    "llama_125m": (12 * (4 * 768**2 + 3 * 768 * 2048) + 2 * 32000 * 768, 32000),
    "llama_1b": (1_235_814_400, 128256),
    "llama_7b": (6_738_415_616, 32000),
    "llama_8b": (8_030_261_248, 128256),
    "llama_70b": (70_553_706_496, 128256),
    "mixtral_tiny": (4 * (192 * (2 * 192 + 2 * 96) + 4 * 3 * 192 * 256) + 2 * 4096 * 192, 4096),
    "mixtral_8x7b": (46_702_792_704, 32000),
}


@pytest.mark.parametrize("name", MODELS)
def test_presets_have_the_sizes_of_their_papers(name: str):
    expected, vocab = SIZES[name]
    model = dataclasses.replace(load([f"model={name}", "data.path=x"]).model, vocab=vocab)
    assert model.name == name
    assert ModelShape.of(model).parameters == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_begins_with_a_comment_that_says_what_it_is(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_every_recipe_composes(name: str):
    overrides = [f"recipe={name}", "data.path=x"]
    configs = [stage.config for stage in stages_of(overrides)] or [load(overrides)]
    assert all(config.model.layers > 0 for config in configs)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "technique").glob("*.yaml")))
def test_every_technique_file_switches_its_own_section_on(name: str):
    section = unwrap(annotation_of(TechniquesConfig, name))[0]
    missing = [key for key, value in default_tree(section).items() if value == MISSING]
    several = [key for key in missing if "list" in str(annotation_of(section, key))]
    needed = [f"techniques.{name}.{key}={'[x]' if key in several else 'x'}" for key in missing]
    techniques = to_tree(load([*BASE, f"technique=[{name}]", *needed]).techniques)
    assert [key for key, value in techniques.items() if value is not None] == [name]


def test_every_technique_of_the_schema_has_a_file():
    assert {path.stem for path in (CONF / "technique").glob("*.yaml")} == set(
        default_tree(RunConfig)["techniques"]
    )


def test_an_unknown_key_in_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "thing.yaml").write_text("defaults:\n  - _self_\nsize: 3\ncolor: red\n")
    monkeypatch.setattr(loading, "config_directory", lambda: tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose(Thing, "thing", [])
    assert str(caught.value) == (
        "color: found an unknown key, expected a key of the configuration. Fix: did you mean colour?"
    )


def test_a_file_that_does_not_compose_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "thing.yaml").write_text("defaults:\n  - nothing\n")
    monkeypatch.setattr(loading, "config_directory", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"^conf/thing.yaml: found In 'thing': Could not load 'nothing'"):
        compose(Thing, "thing", [])


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(frozen=True, slots=True)
class Thing:
    """For the tests of the tree."""

    size: int = 1  # how big
    # which of two
    colour: Colour = Colour.red
    parts: tuple[int, ...] = ()
    tags: list[str] | None = None


def test_tree_and_dataclass_are_inverse():
    thing = Thing(size=2, colour=Colour.blue, parts=(1, 2), tags=["a"])
    assert to_tree(thing) == {"size": 2, "colour": "blue", "parts": [1, 2], "tags": ["a"]}
    assert build(Thing, to_tree(thing)) == thing


def test_a_list_element_of_the_wrong_type_is_named():
    with pytest.raises(ConfigError, match=r"^parts\[1\]=x: found text x, expected a whole number"):
        build(Thing, {"parts": [1, "x"]})


def test_help_documents_fields_by_their_comments():
    docs = {doc.key: doc for doc in key_docs(Thing)}
    assert docs["size"] == ("size", "int", "1", "how big")
    assert docs["colour"] == ("colour", "red|blue", "red", "which of two")
    documented = {doc.key: doc for doc in key_docs(RunConfig)}
    assert documented["techniques.ema.decay"].default == "0.999"
    assert documented["data.path"] == ("data.path", "str", MISSING, "the directory with manifest.json")
    sections = {key.rpartition(".")[0] for key, _ in keys(RunConfig)}
    assert set(documented) == {key for key, _ in keys(RunConfig)} - sections


@pytest.mark.parametrize(
    ("word", "near"),
    [("lr", "optim.lr"), ("modl.layers", "model.layers"), ("train.layer", "model.layers"), ("qqq", None)],
)
def test_nearest_looks_at_the_whole_key_and_at_its_last_part(word: str, near: str | None):
    assert nearest(word, ["optim.lr", "model.layers", "train.steps"]) == near
