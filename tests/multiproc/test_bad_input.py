"""What a user can get wrong, through the command line: exit code 2, a line a mistake, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training import SHORT_RUN, SMALL_MODEL

from launch import cli

ROOT = Path(__file__).parents[2]
MODELS = (
    "gpt_125m, gpt_175b, gpt_1_3b, gpt_1t_frontier, gpt_350m, gpt_6_7b, gpt_tiny, llama_125m, llama_1b, "
    "llama_70b, llama_7b, llama_8b, llama_tiny, mixtral_8x7b, mixtral_tiny, mt_nlg_530b"
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def refused(corpus, run_dir, capsys) -> Callable[..., list[str]]:
    """`megafab train` with overrides that it must refuse before it makes anything; its lines on stderr."""

    def refused(*overrides: str) -> list[str]:
        base = [*SMALL_MODEL, *SHORT_RUN, f"data.path={corpus}", f"run.dir={run_dir}"]
        given = {override.partition("=")[0] for override in overrides}
        base = [argument for argument in base if argument.partition("=")[0] not in given]
        capsys.readouterr()
        assert cli.main(["train", *base, *(o for o in overrides if not o.endswith("=-"))]) == cli.USER_ERROR
        out, err = capsys.readouterr()
        assert out == ""
        assert not run_dir.exists()
        return err.splitlines()

    return refused


# (overrides, what stands on stderr); {corpus} is the corpus of these tests. `key=-` leaves a key out.
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no corpus": (
        ["data.path=-"],
        ["data.path: found no value, expected text. Fix: add data.path=... to the command"],
    ),
    "no such corpus": (
        ["data.path=/nowhere"],
        [
            "[corpus] data.path=/nowhere: found no such directory, expected a directory with manifest.json. "
            "Fix: make one: megafab data out=/nowhere sources={...}; or give data.path another directory"
        ],
    ),
    "a vocabulary that is too small": (
        ["model.vocab=100"],
        [
            "[vocab-of-tokenizer] model.vocab=100: found 100, expected the 512 of the tokenizer in "
            "data.path={corpus}, or a little more. Fix: model.vocab=null takes the tokenizer's"
        ],
    ),
    "a vocabulary of another tokenizer": (
        ["model.vocab=99999"],
        [
            "[vocab-of-tokenizer] model.vocab=99999: found 99999, expected the 512 of the tokenizer in "
            "data.path={corpus}, or a little more. Fix: model.vocab=null takes the tokenizer's"
        ],
    ),
    "heads that do not divide": (
        ["parallel.tensor=8", "launch.ranks=8"],
        [
            "[heads-by-tensor] model.heads=4: found 4 % 8 = 4, expected a multiple of parallel.tensor=8. "
            "Fix: change parallel.tensor"
        ],
    ),
    "layers that do not divide": (
        ["parallel.pipeline=3", "launch.ranks=3", "train.global_batch=9"],
        [
            "[layers-by-pipeline] model.layers=4: found 4 % 3 = 1, expected a multiple of "
            "parallel.pipeline=3. Fix: change one of them"
        ],
    ),
    "layers that do not divide into chunks": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3", "launch.ranks=2"],
        [
            "[layers-by-pipeline] model.layers=4: found 4 % 6 = 4, expected a multiple of "
            "parallel.pipeline=2 x parallel.virtual_pipeline=3. Fix: change one of them"
        ],
    ),
    "ranks that do not divide": (
        ["parallel.tensor=2", "parallel.pipeline=2", "launch.ranks=6"],
        [
            "[ranks] launch.ranks=6: found 6 ranks, expected a multiple of tensor 2 x pipeline 2 x context 1 "
            "= 4. Fix: run 8 ranks, or lower one of parallel.tensor, parallel.pipeline, parallel.context"
        ],
    ),
    "a batch that does not divide": (
        ["train.global_batch=9", "launch.ranks=2"],
        [
            "[global-batch] train.global_batch=9: found 9 sequences, expected a multiple of "
            "train.micro_batch=1 x 2 data parallel ranks. Fix: train.global_batch=10, or another "
            "train.micro_batch"
        ],
    ),
    "an unknown key": (
        ["parallel.tensr=2"],
        [
            "parallel.tensr=2: found an unknown key, expected a key of the configuration. "
            "Fix: did you mean parallel.tensor?"
        ],
    ),
    "an unknown section": (
        ["tran.steps=2"],
        [
            "tran.steps=2: found an unknown key, expected a key of the configuration. "
            "Fix: did you mean train.steps?"
        ],
    ),
    "an unknown model": (
        ["model=lama_tiny"],
        [
            f"model=lama_tiny: found no model named lama_tiny, expected one of {MODELS}. "
            "Fix: did you mean model=llama_tiny?"
        ],
    ),
    "a value of the wrong kind": (
        ["train.steps=1.5"],
        [
            "train.steps=1.5: found the number 1.5, expected a whole number or null. "
            "Fix: give train.steps a whole number"
        ],
    ),
    "an unknown choice": (
        ["train.precision=fp8"],
        [
            "train.precision=fp8: found text fp8, expected one of fp32, bf16. "
            "Fix: did you mean train.precision=fp32?"
        ],
    ),
    "two lengths": (
        ["train.tokens=100000"],
        [
            "[run-length] train.steps, train.tokens: found both, expected exactly one of them. "
            "Fix: set one of them to null"
        ],
    ),
    "no length": (
        ["train.steps=-"],
        [
            "[run-length] train.steps, train.tokens: found neither, expected exactly one of them. "
            "Fix: add train.steps=1000, say"
        ],
    ),
    "sequence parallel alone": (
        ["parallel.sequence=true"],
        [
            "[sequence-parallel] parallel.sequence=true: found parallel.tensor=1, expected parallel.tensor "
            "of 2 or more, over which to split sequences. Fix: parallel.sequence=false, or parallel.tensor=2 "
            "or more"
        ],
    ),
    "expert parallel without experts": (
        ["parallel.expert=2", "launch.ranks=2"],
        [
            "[expert-without-moe] parallel.expert=2: found a model without experts, expected experts to "
            "spread. Fix: parallel.expert=1, or a model with model.moe.experts"
        ],
    ),
    "an unknown domain": (
        ["data.mixture={cod: 1}"],
        [
            "[mixture-domains] data.mixture.cod=1: found cod, expected a domain of data.path={corpus}: code, "
            "tests, prose. Fix: did you mean data.mixture.code?"
        ],
    ),
    "several mistakes in keys and values": (
        ["parallel.tensr=2", "train.precision=fp8", "model.hiden=3"],
        [
            "parallel.tensr=2: found an unknown key, expected a key of the configuration. "
            "Fix: did you mean parallel.tensor?",
            "model.hiden=3: found an unknown key, expected a key of the configuration. "
            "Fix: did you mean model.hidden?",
            "train.precision=fp8: found text fp8, expected one of fp32, bf16. "
            "Fix: did you mean train.precision=fp32?",
        ],
    ),
    "several rules at once": (
        [
            "parallel.pipeline=3",
            "train.global_batch=9",
            "optim.lr=-1",
            "launch.ranks=2",
            "data.path=/nowhere",
        ],
        [
            "[range] optim.lr=-1: found -1, expected more than 0. Fix: give optim.lr a value more than 0",
            "[ranks] launch.ranks=2: found 2 ranks, expected a multiple of tensor 1 x pipeline 3 x context 1 "
            "= 3. Fix: run 3 ranks, or lower one of parallel.tensor, parallel.pipeline, parallel.context",
            "[layers-by-pipeline] model.layers=4: found 4 % 3 = 1, expected a multiple of "
            "parallel.pipeline=3. Fix: change one of them",
            "[corpus] data.path=/nowhere: found no such directory, expected a directory with manifest.json. "
            "Fix: make one: megafab data out=/nowhere sources={...}; or give data.path another directory",
        ],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_with_its_lines(refused, corpus, name):
    overrides, lines = REFUSED[name]
    assert refused(*overrides) == [line.replace("{corpus}", str(corpus)) for line in lines]


def test_a_launcher_that_contradicts_the_configuration(refused, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert refused("launch.ranks=4") == [
        "[launcher] launch.ranks=4: found 2 ranks started by torchrun or srun, expected the same number. "
        "Fix: leave launch.ranks out, or have 4 ranks started"
    ]
    assert refused("parallel.tensor=4", "model.heads=8", "model.kv_heads=4") == [
        "[ranks] launch.ranks=2: found 2 ranks, expected a multiple of tensor 4 x pipeline 1 x context 1 "
        "= 4. Fix: run 4 ranks, or lower one of parallel.tensor, parallel.pipeline, parallel.context"
    ]


# -- a corpus that is not what its manifest says -------------------------------------------------------------


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def half_a_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def another_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


def short_shard(path: Path) -> None:
    os.truncate(path / "train/code-00000.bin", 1000)


def short_index(path: Path) -> None:
    os.truncate(path / "train/code-00000.idx", 50)


def missing_shard(path: Path) -> None:
    (path / "valid/prose-00000.bin").unlink()


AGAIN = "Fix: restore the file, or build the corpus again: megafab data ... overwrite=true"
DAMAGED = {
    no_manifest: (
        "[corpus] data.path={path}: found no manifest.json in it, expected a directory with manifest.json. "
        "Fix: make one: megafab data out={path} sources={{...}}; or give data.path another directory"
    ),
    half_a_manifest: (
        "[corpus] data.path={path}: found a manifest.json that cannot be read (JSONDecodeError: {why}), "
        "expected the manifest that megafab data wrote. Fix: make one: megafab data out={path} "
        "sources={{...}}; or give data.path another directory"
    ),
    another_format: (
        "{path}/manifest.json: found ('megafab-corpus', 99), expected format megafab-corpus, version 1. "
        "Fix: build the corpus again with this megafab"
    ),
    short_shard: (
        "{path}/train/code-00000.bin: found 1000 bytes, expected {bin} bytes, as manifest.json says. " + AGAIN
    ),
    short_index: (
        "{path}/train/code-00000.idx: found 50 bytes, expected {idx} bytes, as manifest.json says. " + AGAIN
    ),
    missing_shard: (
        "{path}/valid/prose-00000.bin: found no such file, expected a file the manifest lists. " + AGAIN
    ),
}


@pytest.fixture
def damaged(corpus, tmp_path) -> Path:
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def command(rank, world, argv):
    """A command on this rank: exit code and stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(argv)
    return code, err.getvalue()


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda f: f.__name__)
def test_a_damaged_corpus_is_named_by_its_file(ranks, corpus, damaged, run_dir, damage):
    damage(damaged)
    argv = ["train", *SMALL_MODEL, *SHORT_RUN, f"data.path={damaged}", f"run.dir={run_dir}"]
    ((code, err),) = ranks.run(command, argv, init=False)
    why = ""
    if damage is half_a_manifest:
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads((damaged / "manifest.json").read_text())
        why = str(caught.value)
    sizes = {kind: (corpus / f"train/code-00000.{kind}").stat().st_size for kind in ("bin", "idx")}
    assert (code, err) == (2, DAMAGED[damage].format(path=damaged, why=why, **sizes) + "\n")
    assert trained(run_dir) == []


def trained(run_dir: Path) -> list[str]:
    """What a run directory has of a run that trained."""
    names = {path.name for path in run_dir.glob("*")} if run_dir.exists() else set()
    return sorted(names - {".lock", "logs"})


def test_ranks_of_their_own_say_it_once(damaged, run_dir):
    short_shard(damaged)
    shard = json.loads((damaged / "manifest.json").read_text())["domains"][0]["splits"]["train"]["shards"][0]
    arguments = [*SMALL_MODEL, *SHORT_RUN, f"data.path={damaged}", f"run.dir={run_dir}", "launch.ranks=2"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{damaged}/train/code-00000.bin: found 1000 bytes, expected {shard['bin_bytes']} bytes, as "
        f"manifest.json says. {AGAIN}\n"
    )
    assert trained(run_dir) == []


# -- building a corpus ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["sources={web: /nowhere}"], "sources.web=/nowhere"),
        (["sources={web: EMPTY}"], "EMPTY"),
        (["sources={web: TRUNCATED}", "tokenizer.vocab=400"], "TRUNCATED line 2"),
        (["sources={web: LATIN}"], "LATIN"),
        (["sources={web: FINE}", "tokenizer.vocab=10"], "tokenizer.vocab=10"),
        (["sources={web: FINE}", "outt=x"], "outt=x"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_corpus_that_cannot_be_built_leaves_nothing(tmp_path, capsys, overrides, line):
    row = json.dumps({"text": (ROOT / "LICENSE").read_text()})
    files = {
        "EMPTY": ("empty.jsonl", b""),
        "TRUNCATED": ("cut.jsonl", f"{row}\n{row[:-9]}".encode()),
        "LATIN": ("latin.txt", "caf\xe9".encode("latin-1")),
        "FINE": ("fine.txt", b"some text\n" * 99),
    }
    for word, (name, content) in files.items():
        (tmp_path / name).write_bytes(content)
        overrides = [override.replace(word, str(tmp_path / name)) for override in overrides]
        line = line.replace(word, str(tmp_path / name))
    before = sorted(tmp_path.iterdir())
    assert cli.main(["data", *overrides, f"out={tmp_path / 'corpus'}", "workers=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{line}: found ")
    assert err.count("\n") == 1
    assert ", expected " in err
    assert ". Fix: " in err
    assert sorted(tmp_path.iterdir()) == before
