"""usage: megafab ckpt VERB PATH [PATH ...] [to=DIR] [key=value ...]

  inspect PATH            step, model, topology, versions, lineage and contents; tensors=true: each tensor
  verify  PATH            hash every file; names what is damaged and exits with 1
  reshape PATH to=DIR     write it again in files=N files, or in files of max_bytes=N; moments=false:
                          weights only, with the masks of a sparse model
  diff    A B             compare configurations and tensors; exits with 1 where they differ
  average A B ... to=DIR  mean of the weights; weights=[1,3]: not all alike
  densify PATH to=DIR     weights of a sparse model without its masks, to train on as a dense one
  convert PATH to=DIR     to a directory for transformers: Llama, Qwen3, Mixtral, GPT-2 or GPT-NeoX;
                          dtype=fp32|bf16|fp16, max_bytes=N a file, weights=ema: the average that the
                          technique keeps, max_kl=X: largest divergence of the two models' predictions,
                          judge=false: do not compare them, data=CORPUS
  convert HF_DIR to=DIR format=megafab
                          and from one, to begin a run with; max_kl, judge and data as above
  grow    PATH to=DIR     a larger model, to begin a run with: layers=N depth=stack|interleave|zero|random|
                          learned, hidden=N heads=N kv_heads=N ffn=N width=direct|zero|random|learned,
                          vocab=N, experts=N; preserving=true: refuse if the logits move; optimizer=copy:
                          with its moments; judge and data as above
  grow    PATH advise=true tokens=N|flops=X
                          how long to train PATH, and how often to stack it, for a grown model of that budget

PATH is a directory step_XXXXXXXX, or a run directory, which stands for its newest checkpoint (verify: for
all). DIR is made. As a run directory, it can be resumed, generated from and exported. Nothing is made of a
damaged checkpoint: all its files are hashed first. No verb holds more than a few tensors in memory, but for
the judge of a conversion or growth, which holds one model, and for learned growth, which holds two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megafab.config import ckpt as config
from megafab.config import load
from megafab.errors import ConfigError

DAMAGED = DIFFERENT = 1


def main(arguments: Sequence[str]) -> int:
    """Run one verb on checkpoints; returns the exit code."""
    name, *rest = arguments or ("",)
    if name not in VERBS:
        from megafab.config.tree import did_you_mean

        fix = did_you_mean(name, VERBS) or "megafab ckpt --help explains them"
        raise ConfigError(f"megafab ckpt {name}".strip(), "no such verb", f"one of {', '.join(VERBS)}", fix)
    schema, least, most, run = VERBS[name]
    paths = [Path(a) for a in rest if "=" not in a or Path(a).exists()]
    settings = load.compose(schema, "ckpt", [a for a in rest if "=" in a and not Path(a).exists()])
    if not least <= len(paths) <= (most or len(paths)):
        expected = f"{least}" if most == least else f"at least {least}"
        fix = "megafab ckpt --help shows what it takes"
        raise ConfigError(f"megafab ckpt {name}", f"{len(paths)} paths", expected, fix)
    config.check(settings)
    return run(settings, *paths)


def _inspect(settings: config.InspectConfig, path: Path) -> int:
    from megafab.checkpoint import tools

    for line in tools.describe(_newest(path), tensors=settings.tensors):
        print(line)
    return 0


def _verify(settings: config.VerifyConfig, path: Path) -> int:
    from megafab.checkpoint import store, tools

    damaged = 0
    for checkpoint, problems in tools.verify(store.locate(path, key="PATH")):
        print(f"{checkpoint}: {'damaged' if problems else 'intact'}")
        for name, problem in problems.items():
            print(f"  {name}: {problem}")
        damaged += bool(problems)
    return DAMAGED if damaged else 0


def _reshape(settings: config.ReshapeConfig, path: Path) -> int:
    from megafab.checkpoint import tools, writer

    deal = writer.by_count(settings.files) if settings.files else None
    deal = writer.by_size(settings.max_bytes) if settings.max_bytes else deal
    print(tools.reshape(_newest(path), Path(settings.to), deal=deal, moments=settings.moments))
    return 0


def _diff(settings: config.DiffConfig, a: Path, b: Path) -> int:
    from megafab.checkpoint import tools

    difference = tools.diff(_newest(a), _newest(b))
    for line in tools.show(difference, tensors=settings.tensors):
        print(line)
    return DIFFERENT if difference else 0


def _average(settings: config.AverageConfig, *paths: Path) -> int:
    from megafab.checkpoint import tools

    print(tools.average([_newest(path) for path in paths], Path(settings.to), settings.weights))
    return 0


def _densify(settings: config.DensifyConfig, path: Path) -> int:
    from megafab.checkpoint.surgery.densify import densify

    print(densify(_newest(path), Path(settings.to)))
    return 0


def _convert(settings: config.ConvertConfig, path: Path) -> int:
    os.environ["MEGAFAB_DEVICE"] = "cpu"
    from megafab import convert

    if settings.format is config.Format.hf:
        convert.to_hf(_newest(path), settings, print)
    else:
        convert.from_hf(path, settings, print)
    return 0


def _grow(settings: config.GrowVerbConfig, path: Path) -> int:
    os.environ["MEGAFAB_DEVICE"] = "cpu"
    from megafab.checkpoint.surgery import advice, grow

    if settings.advise:
        for line in advice.of_checkpoint(_newest(path), settings, settings.tokens, settings.flops):
            print(line)
    else:
        assert settings.to is not None  # config.check
        made = grow.grow(_newest(path), Path(settings.to), settings, print)
        print("To begin a run with it:", grow.command(made), sep="\n")
    return 0


def _newest(path: Path) -> Path:
    """The newest whole checkpoint of a run directory; a step directory as it is, for the verb to check."""
    from megafab.checkpoint import store

    paths = store.locate(path, key="PATH")
    if paths == [path]:
        return path
    found, damaged = store.first_intact(paths, store.quick_check)
    assert found is not None  # locate() has refused a place without any
    for problem in damaged:
        print(f"passing over a damaged checkpoint: {problem}", file=sys.stderr)
    return found


# Verb -> its settings, how many paths it takes (None: any number), and what runs it.
VERBS: dict[str, tuple[type[Any], int, int | None, Callable[..., int]]] = {
    "inspect": (config.InspectConfig, 1, 1, _inspect),
    "verify": (config.VerifyConfig, 1, 1, _verify),
    "reshape": (config.ReshapeConfig, 1, 1, _reshape),
    "diff": (config.DiffConfig, 2, 2, _diff),
    "average": (config.AverageConfig, 2, None, _average),
    "densify": (config.DensifyConfig, 1, 1, _densify),
    "convert": (config.ConvertConfig, 1, 1, _convert),
    "grow": (config.GrowVerbConfig, 1, 1, _grow),
}
