"""The command line: `megafab VERB [key=value ...]`; a verb may have two words.

Parts are imported when a verb runs, so that help and mistakes cost no more than the configuration code.
What the user can mend is printed as one line on stderr with exit code 2; everything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megafab.errors import ConfigError, UserError

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: the module with its `main(overrides) -> exit code`, and where its configuration is.

    `schema` is `module:dataclass` and `config` the file of `conf/` below it; a verb without them
    documents its arguments in its module's docstring. `has_flags`: the module has `FLAGS`, name by name with
    what they do. `also` names a verb whose keys it takes as well.
    """

    module: str
    summary: str
    schema: str = ""
    config: str = ""
    has_flags: bool = False
    also: str = ""

    def load_flags(self) -> dict[str, str]:
        """The flags of its own."""
        return importlib.import_module(self.module).FLAGS if self.has_flags else {}

    def load_schema(self) -> type[Any]:
        """The dataclass of the verb's configuration."""
        module, _, name = self.schema.partition(":")
        return getattr(importlib.import_module(module), name)


VERBS = {
    "train": Verb(
        "launch.train", "train a model, on ranks of its own or of torchrun's or srun's",
        "megafab.config.schema:RunConfig", "train",
    ),
    "submit": Verb(
        "launch.submit", "queue a training run on a Slurm cluster, as jobs that survive it",
        "megafab.config.submit:SubmitConfig", "submit", has_flags=True, also="train",
    ),
    "data": Verb(
        "launch.data", "turn text into a tokenizer and shards to train on",
        "data_pipeline.config:BuildConfig", "data",
    ),
    "data difficulty": Verb(
        "launch.difficulty", "how hard each window of a corpus is, for curricula",
        "data_pipeline.config:DifficultyConfig", "difficulty",
    ),
    "data retrieval": Verb(
        "launch.retrieval", "chunks to retrieve, and those near each chunk of a corpus, for RETRO",
        "data_pipeline.retrieval_config:RetrievalConfig", "retrieval",
    ),
    "generate": Verb(
        "launch.generate", "write text with a checkpoint, to look at",
        "megafab.config.generate:GenerateConfig", "generate",
    ),
    "perplexity": Verb(
        "launch.perplexity", "the loss of a checkpoint on held-out text, and what its neighbours are worth",
        "megafab.config.perplexity:PerplexityConfig", "perplexity",
    ),
    "score": Verb(
        "launch.score", "the loss of every token of a corpus under a reference model",
        "megafab.config.score:ScoreConfig", "score",
    ),
    "ckpt": Verb("launch.ckpt", "inspect, verify, reshape, diff, average, convert and grow checkpoints"),
    "report": Verb("launch.report", "one HTML page with the plots of one run or several"),
    "doctor": Verb("launch.doctor", "what is installed, what is missing, whether this node can train"),
}  # fmt: skip

USAGE = "megafab VERB [key=value ...] [--help] [--cfg job]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return guarded(_run, list(sys.argv[1:] if argv is None else argv))


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """`run(argv)`, with what the user can mend printed as one line."""
    try:
        return run(argv)
    except UserError as error:
        return _told(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where, fix = str(error.filename or "output"), "free space and run the same command again"
        return _told(UserError(where, os.strerror(error.errno), "room to write", fix))
    except KeyboardInterrupt:
        return INTERRUPTED


def _told(error: UserError) -> int:
    from launch.job import refuse

    print(error, file=sys.stderr)
    refuse(str(error))
    return USER_ERROR


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"megafab {version('megafab')}")
        return 0
    name, *rest = argv
    if f"{name} {' '.join(rest[:1])}" in VERBS:
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    verb = VERBS.get(name)
    if verb is None:
        raise _unknown(name, "a verb", VERBS, "megafab --help lists them")
    if "-h" in rest or "--help" in rest:
        print(_help(name, verb))
        return 0
    taken = verb.load_flags()
    flags = [argument for argument in rest if argument.startswith("-") and argument not in taken]
    if flags[:1] == ["--cfg"] and verb.schema:
        return _show_config(verb, rest)
    if flags:
        known = [*taken, "--help", *(["--cfg"] if verb.schema else [])]
        raise _unknown(flags[0], "a flag", known, f"megafab {name} --help lists keys and flags")
    return importlib.import_module(verb.module).main(rest)


def _unknown(word: str, what: str, known: Any, otherwise: str) -> ConfigError:
    from megafab.config.tree import did_you_mean

    fix = did_you_mean(word, known) or otherwise
    return ConfigError(word, f"an unknown word where {what} belongs", f"one of {', '.join(known)}", fix)


def _show_config(verb: Verb, arguments: list[str]) -> int:
    """`--cfg job`: the resolved configuration on stdout; then, for a training run, the rules it breaks."""
    from megafab.config import load

    at = arguments.index("--cfg")
    if arguments[at + 1 : at + 2] != ["job"]:
        found = " ".join(arguments[at + 1 : at + 2]) or "nothing"
        raise ConfigError("--cfg", found, "job, the one configuration there is", "--cfg job")
    overrides = arguments[:at] + arguments[at + 2 :]
    if verb.config == "train":
        from launch.train import split_stage
        from megafab.config import stages

        chosen, overrides = split_stage(overrides)
        declared = stages.of(overrides)
        for stage in declared if chosen is None else [stages.named(declared, chosen)]:
            print(f"# stage {stage.name}\n{load.resolved_yaml(stage.config)}---", flush=True)
        stages.check_all(declared)
        if declared:
            return 0
    if verb.config == "submit":
        from launch.submit import own

        overrides = own(overrides)
    config = load.compose(verb.load_schema(), verb.config, overrides)
    print(load.resolved_yaml(config), end="", flush=True)
    if verb.config == "train":
        from launch.ranks import is_joining, rank_environment
        from megafab.config import rules

        ranks = rank_environment().world if is_joining() else config.launch.ranks
        rules.check_all(config, ranks=ranks, corpus=rules.corpus_facts(config))
    return 0


def _overview() -> str:
    verbs = "\n".join(f"  {name:<16} {verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: {USAGE}\n\n{verbs}\n\n"
        "megafab VERB --help lists the verb's keys, --cfg job prints its configuration without running it."
    )


def _help(name: str, verb: Verb) -> str:
    title = f"megafab {name}: {verb.summary}\n\n"
    if not verb.schema:
        return title + (importlib.import_module(verb.module).__doc__ or "").strip()
    from megafab.config.docs import key_docs
    from megafab.config.load import config_groups

    flags = verb.load_flags()
    shown = "".join(f" [{flag}]" for flag in flags)
    lines = [f"usage: megafab {name} [key=value ...]{shown} [--cfg job]", ""]
    if flags:
        lines += [*(f"  {flag:<12} {text}" for flag, text in flags.items()), ""]
    groups = config_groups(verb.config)
    if groups:
        lines.append("presets (files of conf/):")
        for group in groups.values():
            several = " (several: [a,b])" if group.takes_list else ""
            lines.append(f"  {group.name}={'|'.join(group.options)}{several}")
        lines.append("")
    lines.append("keys, their defaults (???: a preset or you must give it), what they take and mean:")
    for doc in key_docs(verb.load_schema()):
        text = f"  {doc.text}" if doc.text else ""
        lines.append(f"  {doc.key + '=' + doc.default:<42} {doc.takes}{text}")
    if verb.also:
        lines += ["", f"and all keys of megafab {verb.also}, which is what the job runs."]
    return title + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
