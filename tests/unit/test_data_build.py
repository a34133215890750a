"""`megafab data` from the command line: what goes in comes out, and bad input gets one line."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hf_tokenizer import byte_level_bpe

from data_pipeline import build as building
from data_pipeline import pieces, shards, sources, stdlib
from data_pipeline.pieces import LineRange
from data_pipeline.progress import Progress
from launch import cli
from megafab.data.format import MANIFEST, Corpus, ShardWriter, token_dtype
from megafab.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]

NASTY = [
    "caf\u00e9, na\u00efve, \u65e5\u672c\u8a9e, \U0001f600\U0001f468\u200d\U0001f469",
    "a\r\nb\r\n\r\n\tc\t\td  \n   indented    twice \n",
    "zero\0byte \u2581 U+2581 \u2581\u2581x",
    "x" * 50_000 + " " * 300 + "one line " * 2000,
    "\ufeffmark \u2028 separators \u0085 </s> <unk> <|endoftext|>",
    "e\u0301 \u00e9 \ufb01 not normalized",
    " ",
    "\n",
]


def prose(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Documents of words over a small vocabulary."""
    draw = random.Random(seed)
    stems = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(300)]
    return [" ".join(draw.choices(stems, k=words)) + f" number {index}.\n" for index in range(count)]


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(texts))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(texts))
    return path


def megafab_data(*overrides: str, vocab: int = 320) -> int:
    return cli.main(["data", f"tokenizer.vocab={vocab}", "workers=1", *overrides])


def documents(corpus: Corpus, domain: str, split: str) -> list[list[int]]:
    """All documents of a domain, through vanilla Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    entry = next(entry for entry in corpus.manifest["domains"] if entry["name"] == domain)
    found = []
    for shard in entry["splits"][split]["shards"]:
        dataset = IndexedDataset(str(corpus.path / shard["name"]))
        found += [dataset[index].tolist() for index in range(len(dataset))]
    return found


def texts(corpus: Corpus, domain: str, split: str) -> Counter[str]:
    tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    found: Counter[str] = Counter()
    for ids in documents(corpus, domain, split):
        assert ids[-1] == corpus.eod
        assert corpus.eod not in ids[:-1]
        found[tokenizer.decode(ids[:-1])] += 1
    return found


@pytest.fixture(scope="module")
def every_format(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A corpus with the same documents in every format, and these documents."""
    root = tmp_path_factory.mktemp("formats")
    wanted = [*NASTY, *prose(80)]
    half = len(wanted) // 2
    plain = jsonl(root / "in" / "plain.jsonl", wanted)
    (root / "in" / "a.jsonl.gz").write_bytes(gzip.compress(lines(wanted[:half]).encode()))
    (root / "in" / "b.gz").write_bytes(gzip.compress(lines(wanted[half:]).encode()))
    frames = [zstandard.compress(lines(part).encode()) for part in (wanted[:half], wanted[half:])]
    (root / "in" / "two_frames.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"id": list(range(len(wanted))), "text": wanted})
    pyarrow.parquet.write_table(table, root / "in" / "rows.parquet", row_group_size=30)
    folder = root / "in" / "folder"
    for index, text in enumerate(wanted):
        path = folder / f"{index % 3}" / f"{index}.{('txt', 'md', 'py')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / ".hidden").write_bytes(b"\xff")
    import datasets

    datasets.Dataset.from_dict({"text": wanted}).save_to_disk(str(root / "in" / "saved"))
    (root / "in" / "hub").mkdir()
    pyarrow.parquet.write_table(table, root / "in" / "hub" / "train-00000-of-00001.parquet")
    entries = {
        "plain": str(plain),
        "gz": f"[{root}/in/a.jsonl.gz,{root}/in/b.gz]",
        "zst": f"{root}/in/*.zst",
        "parquet": f"{root}/in/rows.parquet",
        "folder": str(folder),
        "saved": f"'hf:{root}/in/saved'",
        "hub": f"'hf:{root}/in/hub'",
    }
    given = ",".join(f"{name}:{value}" for name, value in entries.items())
    assert megafab_data(f"sources={{{given}}}", f"out={root}/out", "valid_fraction=0.2") == 0
    return root / "out", wanted


FORMATS = ["plain", "gz", "zst", "parquet", "folder", "saved", "hub"]


@pytest.mark.parametrize("domain", FORMATS)
def test_every_document_comes_out_as_it_went_in(every_format: tuple[Path, list[str]], domain: str) -> None:
    out, wanted = every_format
    corpus = Corpus.open(out)
    train, valid = (texts(corpus, domain, split) for split in ("train", "valid"))
    assert train + valid == Counter(wanted)
    assert train
    assert valid
    assert not train.keys() & valid.keys()


def test_the_split_depends_on_the_text_alone(every_format: tuple[Path, list[str]]) -> None:
    corpus = Corpus.open(every_format[0])
    assert len({frozenset(texts(corpus, domain, "valid")) for domain in FORMATS}) == 1


def test_megatron_and_the_stream_read_the_same(every_format: tuple[Path, list[str]]) -> None:
    corpus = Corpus.open(every_format[0])
    stream = corpus.domain("train", 0)
    found = documents(corpus, "plain", "train")
    assert stream.read(0, stream.tokens).tolist() == [token for ids in found for token in ids]
    begins = np.cumsum([len(ids) for ids in found])[:-1]
    assert stream.document_starts(0, stream.tokens).tolist() == begins.tolist()


def test_the_manifest_counts(every_format: tuple[Path, list[str]]) -> None:
    out, wanted = every_format
    corpus = Corpus.open(out)
    lengths = Tokenizer.load(corpus.tokenizer_dir).byte_lengths()
    for index, entry in enumerate(corpus.manifest["domains"]):
        for split in ("train", "valid"):
            stream = corpus.domain(split, index)
            counts = entry["splits"][split]
            assert (counts["documents"], counts["tokens"]) == (stream.documents, stream.tokens)
            assert counts["bytes"] == int(lengths[stream.read(0, stream.tokens)].sum())
        assert sum(entry["splits"][split]["documents"] for split in ("train", "valid")) == len(wanted)
    assert corpus.manifest["skipped"] == {name: {} for name in FORMATS}


def test_documents_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(50))
    for seed in (1, 2):
        assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/{seed}", f"seed={seed}") == 0
    one, two = (documents(Corpus.open(tmp_path / name), "a", "train") for name in "12")
    assert sorted(one) == sorted(two)
    tokenizer = Tokenizer.load(tmp_path / "1" / "tokenizer")
    in_order = [[*tokenizer.encode(text), tokenizer.eod] for text in prose(50)]
    assert one != two
    assert all([ids for ids in in_order if ids in order] != order for order in (one, two))


def test_duplicates_are_on_one_side(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(30) * 3)
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/out", "valid_fraction=0.3") == 0
    train, valid = (texts(Corpus.open(tmp_path / "out"), "a", split) for split in ("train", "valid"))
    assert not train.keys() & valid.keys()
    assert set(train.values()) | set(valid.values()) == {3}


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_neither_split_stays_empty(tmp_path: Path, fraction: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(20))
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/out", f"valid_fraction={fraction}") == 0
    corpus = Corpus.open(tmp_path / "out")
    counts = (corpus.documents("train"), corpus.documents("valid"))
    assert counts == (((19,), (1,)) if fraction == "0.0001" else ((1,), (19,)))


def test_nothing_is_held_out_on_request(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(prose(50)))
    assert megafab_data(f"sources={{a:{path}}}", f"out={tmp_path}/out", "valid_fraction=0") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.documents("train"), corpus.documents("valid")) == ((1,), (0,))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces and shards out of little text (in this process only)."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 3000)
    monkeypatch.setattr(sources, "_ROW_RANGE_BYTES", 5000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 4000)


@pytest.mark.usefixtures("small_pieces")
def test_many_pieces_and_shards(tmp_path: Path) -> None:
    wanted = [*NASTY, *prose(120)]
    jsonl(tmp_path / "in" / "a.jsonl", wanted)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines(wanted).encode()))
    rows = pyarrow.table({"text": wanted})
    pyarrow.parquet.write_table(rows, tmp_path / "in" / "c.parquet", row_group_size=5)
    pyarrow.parquet.write_table(rows, tmp_path / "in" / "d.parquet")
    assert megafab_data(f"sources={{a:{tmp_path}/in}}", f"out={tmp_path}/out", "valid_fraction=0.1") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert len(list((tmp_path / "out" / "train").glob("a-*.bin"))) > 3
    found = texts(corpus, "a", "train") + texts(corpus, "a", "valid")
    assert found == Counter({text: 4 for text in wanted})


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_each_line_belongs_to_one_range(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    content = [json.dumps({"text": text}) for text in ["", "a", "b" * 40, "c", "d" * 95, "e"]]
    path.write_text("\n".join(content))
    total = path.stat().st_size
    ranges = [LineRange(str(path), at, min(total, at + size)) for at in range(0, total, size)]
    found = [text for piece in ranges for text in piece.documents("text")]
    assert found == ["", "a", "b" * 40, "c", "d" * 95, "e"]


def digest_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


def big_source(path: Path, megabytes: int) -> Path:
    """A JSONL file of several pieces of 4 MiB."""
    some = prose(50, words=750)
    return jsonl(path, [f"{index} {some[index % 50]}" for index in range(megabytes * 250)])


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    source = big_source(tmp_path / "a.jsonl", 9)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, text in enumerate(NASTY):
        (folder / f"{index}.txt").write_bytes(text.encode())
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert megafab_data(f"sources={{a:{source},b:{folder}}}", f"out={out}", f"workers={workers}") == 0
    assert digest_of(tmp_path / "1") == digest_of(tmp_path / "2")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_build(root: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """A build in its own process, with two workers, that has finished a piece and has more to do."""
    source = big_source(root / "a.jsonl", 33)
    overrides = [f"sources={{a:{source}}}", f"out={root}/out"]
    command = [sys.executable, "-m", "launch.cli", "data", *overrides, "tokenizer.vocab=320", "workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    build = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any((root / ".out.building" / "pieces").glob("*.npz")), "no piece was finished")
    return build, overrides


def test_a_killed_build_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, overrides = start_build(tmp_path)
    workers = children(build.pid)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    wait_until(lambda: not any(map(is_alive, workers)), "workers outlived the build")
    assert len(workers) >= 2
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.building"
    finished = {path.stem for path in (work / "pieces").glob("*.npz")}

    redone = []
    tokenize_piece = building.tokenize_piece
    monkeypatch.setattr(
        building, "tokenize_piece", lambda *args: (redone.append(args[2]), tokenize_piece(*args))[1]
    )
    assert megafab_data(*overrides) == 0
    assert "continuing the interrupted build" in capsys.readouterr().out
    assert redone
    assert not finished & set(redone)
    assert not work.exists()
    assert megafab_data(overrides[0], f"out={tmp_path}/at_once") == 0
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "at_once")


def test_a_build_whose_worker_dies_can_continue(tmp_path: Path) -> None:
    build, _ = start_build(tmp_path)
    worker = next(pid for pid in children(build.pid) if "spawn_main" in command_line(pid))
    os.kill(worker, signal.SIGKILL)
    error = build.communicate()[1]
    assert build.returncode == 2
    assert re.fullmatch(
        r"workers=2: found a worker process that was killed.*run the same command again.*\n", error
    )
    assert any((tmp_path / ".out.building" / "pieces").glob("*.npz"))


def test_a_build_stopped_by_the_keyboard_can_continue(tmp_path: Path) -> None:
    build, _ = start_build(tmp_path)
    build.send_signal(signal.SIGINT)
    assert build.communicate()[1] == ""
    assert build.returncode == 130
    assert any((tmp_path / ".out.building" / "pieces").glob("*.npz"))


def test_leftovers_of_another_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(40))
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/wanted", "seed=2") == 0
    left = tmp_path / ".out.building"
    (left / "pieces").mkdir(parents=True)
    (left / "request.json").write_text("{}")
    (left / "pieces" / "a-0000000.npz").write_bytes(b"of another build")
    (left / "tokenizer").mkdir()
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/out", "seed=2") == 0
    assert "leftovers of a build of another request: starting over" in capsys.readouterr().out
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "wanted")


def test_a_finished_corpus_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(40))
    given = [f"sources={{a:{source}}}", f"out={tmp_path}/out"]
    assert megafab_data(*given) == 0
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    capsys.readouterr()
    assert megafab_data(*given, "workers=2") == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / MANIFEST).stat().st_mtime_ns == before

    assert megafab_data(*given, "valid_fraction=0.3") == 2
    error = capsys.readouterr().err
    assert "another request (valid_fraction was 0.01, is 0.3)" in error
    assert "overwrite=true" in error
    jsonl(source, prose(41))
    assert megafab_data(*given) == 2
    assert "another request (files of sources.a changed)" in capsys.readouterr().err
    assert megafab_data(*given, "overwrite=true") == 0
    assert sum(Corpus.open(tmp_path / "out").documents("train")) == 40
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_finding_a_finished_corpus_imports_nothing_heavy(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(40))
    given = [f"sources={{a:{source}}}", f"out={tmp_path}/out", "tokenizer.vocab=320", "workers=1"]
    assert cli.main(["data", *given]) == 0
    program = (
        "import sys\nfrom launch import cli\n"
        f"assert cli.main(['data', *{given!r}]) == 0\n"
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'sentencepiece') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.endswith("Nothing to do (overwrite=true builds it again).\n[]\n")


def test_only_a_corpus_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "in" / "a.jsonl", prose(40))
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/in", "overwrite=true") == 2
    assert "found a directory with other things in it" in capsys.readouterr().err
    assert source.exists()


def test_one_build_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", prose(40))
    with building.Workspace(tmp_path / "out", {}):
        assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/out") == 2
    assert "found another build at work there" in capsys.readouterr().err


def test_parts_made_at_the_same_time_give_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "text.jsonl", prose(400))
    told = [f"sources={{words: {source}}}", "tokenizer.vocab=300", "workers=1"]
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
    monkeypatch.setattr(building, "PIECE_BYTES", 4096)
    monkeypatch.setattr(sources, "PIECE_BYTES", 4096, raising=False)
    assert cli.main(["data", *told, f"out={tmp_path / 'whole'}"]) == 0
    out = tmp_path / "parts"
    commands = [["data", *told, f"out={out}", f"part={part}/3"] for part in range(3)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    program = (
        "import sys; from data_pipeline import build, pieces, sources\n"
        "for module in (build, pieces, sources): module.PIECE_BYTES = 4096\n"
        "from launch import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, *command], env=environment) for command in commands
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    made = sorted(path.name for path in (tmp_path / ".parts.building" / "pieces").glob("words-*"))
    assert len({name.partition(".")[0] for name in made}) > 6
    assert not out.exists()
    capsys.readouterr()
    assert cli.main(["data", *told, f"out={out}"]) == 0
    fingerprints = {Corpus.open(where).fingerprint for where in (tmp_path / "whole", out)}
    assert len(fingerprints) == 1
    assert not (tmp_path / ".parts.building").exists()


def test_parts_of_another_request_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "text.jsonl", prose(50))
    told = [
        "data",
        f"sources={{words: {source}}}",
        "tokenizer.vocab=300",
        f"out={tmp_path / 'o'}",
        "workers=1",
    ]
    assert cli.main([*told, "part=0/2"]) == 0
    capsys.readouterr()
    pieces_of = tmp_path / ".o.building" / "pieces"
    assert len(list(pieces_of.iterdir())) > 0
    assert cli.main([*told, "part=1/2", "seed=7"]) == 0
    assert "has leftovers of a build of another request: starting over" in capsys.readouterr().out
    with (tmp_path / ".o.building" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a part does that is being made
        assert cli.main([*told, "part=0/2", "seed=8"]) == 2
        assert "found another build at work there" in capsys.readouterr().err
    assert cli.main([*told, "part=2/2"]) == 2
    assert "part=2/2: found no part, expected K/N with K from 0 to N - 1" in capsys.readouterr().err


def test_a_given_tokenizer_that_keeps_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [*NASTY, *prose(20)]
    source = jsonl(tmp_path / "a.jsonl", wanted)
    path = byte_level_bpe(tmp_path / "my.json", ["<|endoftext|>"])
    given = ["tokenizer.type=file", f"tokenizer.path={path}", "workers=1"]
    assert cli.main(["data", f"sources={{a:{source}}}", f"out={tmp_path}/out", *given]) == 0
    assert "warning" not in capsys.readouterr().out
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.eod == 0
    assert texts(corpus, "a", "train") + texts(corpus, "a", "valid") == Counter(wanted)


def test_a_given_tokenizer_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    source = jsonl(tmp_path / "a.jsonl", ["an  odd mind", *prose(40)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*prose(40), "an  odd mind"]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=100,
        minloglevel=2,
    )
    given = ["tokenizer.type=file", f"tokenizer.path={tmp_path}/m.model", "workers=1"]
    assert cli.main(["data", f"sources={{a:{source}}}", f"out={tmp_path}/out", *given]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"warning: tokenizer\.path=.*41 of 41 sampled.*'an  odd mind' comes back as 'an odd mind'", said
    )


def test_the_default_corpus(tmp_path: Path) -> None:
    assert megafab_data(f"out={tmp_path}/out", "stdlib_bytes=300000", vocab=512) == 0
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.domains == ("code", "tests", "prose")
    assert min(*corpus.documents("train"), *corpus.documents("valid")) >= 1
    assert 100_000 < sum(corpus.tokens("train")) < 500_000


def test_the_default_corpus_without_the_librarys_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("os.py", "asyncio/tasks.py", "encodings/ascii.py", "site-packages/other.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""The docstring of {name}."""\n')
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    domains = stdlib.standard_library(10_000)
    names = {domain: [file.name for file in entry.files] for domain, [entry] in domains.items()}
    assert names == {
        "code": ["os.py"],
        "asyncio": ["asyncio/tasks.py"],
        "encodings": ["encodings/ascii.py"],
        "prose": ["os.py"],
    }
    documents = [
        text for piece in domains["prose"][0].pieces("text", True) for text in piece.documents("text")
    ]
    assert documents[-1] == "The docstring of os.py."


def test_progress_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "every", 0.0)
    monkeypatch.setattr(sources, "PIECE_BYTES", 10_000)
    source = jsonl(tmp_path / "a.jsonl", prose(40))
    assert megafab_data(f"sources={{a:{source}}}", f"out={tmp_path}/out") == 0
    line = (
        r"tokenize \d+ %: \d+ documents, 0\.\d MB, 0\.\d\dM tokens, [\d.]+ MB/s, [\d,]+ tokens/s, \d+ s left"
    )
    said = [text for text in capsys.readouterr().out.splitlines() if re.fullmatch(line, text)]
    assert len(said) >= 2
    assert said[-1].startswith("tokenize 100 %: 40 documents")


GOOD = prose(40)


def truncate(data: bytes) -> bytes:
    return data[: len(data) - len(data) // 4]


def latin(texts: list[str]) -> bytes:
    return lines(texts).encode() + b'{"text": "caf\xe9"}\n'


# Name of the file, its content, what the line on stderr has to say.
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("a.jsonl", b"", r"a\.jsonl: found an empty file"),
    "empty text": ("a.txt", b"", r"a\.txt: found an empty file"),
    "no documents": ("a.jsonl", b'{"text": ""}\n' * 3, r"sources\.d: found no documents with text"),
    "empty line": (
        "a.jsonl",
        lines(GOOD).replace("\n", "\n\n", 1).encode(),
        r"a\.jsonl line 2: found an empty line, expected one JSON object a line.*skip_bad=true",
    ),
    "truncated line": (
        "a.jsonl",
        lines(GOOD).encode()[:-20],
        r"a\.jsonl line 40: found invalid JSON \(Unterminated string.*truncated",
    ),
    "invalid JSON": (
        "a.jsonl",
        (lines(GOOD[:7]) + "{text: 1}\n").encode(),
        r"a\.jsonl line 8: found invalid JSON \(Expecting property name.* at character 1\)",
    ),
    "no object": ("a.jsonl", b"[1, 2]\n", r"a\.jsonl line 1: found a JSON list, expected one JSON object"),
    "no key": (
        "a.jsonl",
        lines(GOOD).encode() + b'{"content": "x", "id": 2}\n',
        r"a\.jsonl line 41: found no key 'text', only 'content', 'id'.*text_key=KEY",
    ),
    "no string": (
        "a.jsonl",
        b'{"text": null}\n',
        r"a\.jsonl line 1: found a null under 'text', expected a string",
    ),
    "number": ("a.jsonl", b'{"text": 1.5}\n', r"a\.jsonl line 1: found a number under 'text'"),
    "lone surrogate": (
        "a.jsonl",
        b'{"text": "ab\\ud800"}\n',
        r"a\.jsonl line 1: found half a surrogate pair \(U\+D800\) at character 2",
    ),
    "JSONL not UTF-8": (
        "a.jsonl",
        latin(GOOD),
        r"a\.jsonl line 41: found byte 0xE9 at byte offset 13, .*not UTF-8",
    ),
    "text not UTF-8": (
        "a.txt",
        b"caf\xe9 " * 50,
        r"a\.txt: found byte 0xE9 at byte offset 3, which is not UTF-8",
    ),
    "truncated gzip": (
        "a.jsonl.gz",
        truncate(gzip.compress(lines(GOOD).encode())),
        r"a\.jsonl\.gz: found a truncated gzip file",
    ),
    "no gzip": ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: found a damaged gzip file"),
    "truncated zstd": (
        "a.jsonl.zst",
        truncate(zstandard.compress(lines(GOOD).encode())),
        r"a\.jsonl\.zst: found a truncated zstd file",
    ),
    "no zstd": ("a.jsonl.zst", b"plain text", r"a\.jsonl\.zst: found a damaged zstd file"),
    "empty gzip": ("a.gz", gzip.compress(b""), r"a\.gz: found a compressed file with nothing in it"),
    "bad line in gzip": (
        "a.gz",
        gzip.compress(lines(GOOD[:3]).encode() + b"{\n"),
        r"a\.gz line 4: found invalid JSON",
    ),
    "no Parquet": (
        "a.parquet",
        b"PAR1 not",
        r"a\.parquet: found a file that cannot be read .*expected a Parquet",
    ),
}


# One case with two workers shows that errors cross processes.
@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in BAD_FILES), ("truncated line", 2)])
def test_a_bad_file(name: str, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    given = [f"sources={{d:{tmp_path}/{file}}}", f"out={tmp_path}/out", f"workers={workers}"]
    assert_refused(given, message, tmp_path, capsys)


def assert_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert megafab_data(*given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert "Fix: " in error
    assert sorted(tmp_path.iterdir()) == before


def parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# Overrides, with the files of `files` under {root}, and what the line on stderr has to say.
BAD_REQUESTS: dict[str, tuple[list[str], str]] = {
    "missing": (["sources={{d:{root}/no/such.jsonl}}"], r"sources\.d=.*no such file.*\(.*/files exists\)"),
    "typo": (["sources={{d:./book}}"], r"sources\.d=\./book: found no such file or directory"),
    "no match": (["sources={{d:'{root}/*.nope'}}"], r"sources\.d=.*found no file that matches"),
    "no files": (["sources={{d:{root}/empty}}"], "found a directory without files"),
    "binary": (["sources={{d:{root}/dir}}"], r"picture\.png: found byte 0x89 at byte offset 0.*glob"),
    "one document": (["sources={{d:{root}/one.txt}}"], r"\.d: found one distinct document.*valid_fraction=0"),
    "equal documents": (
        ["sources={{d:{root}/same.jsonl}}"],
        "found one distinct document, expected at least two",
    ),
    "slash": (["sources={{a/b:{root}/good.jsonl}}"], "sources.*a/b"),
    "domain": (["sources={{a@b:{root}/good.jsonl}}"], "found the domain name 'a@b', expected letters"),
    "no domain": (["sources={{}}"], r"sources=\{\}: found no domain"),
    "no path": (["sources={{d:3}}"], r"sources\.d: found 3, expected a path"),
    "unknown key": (["worker=2"], "worker=2: found an unknown key.*did you mean workers"),
    "workers": (["workers=0"], "workers=0: found .*at least 1"),
    "fraction": (["valid_fraction=1"], r"valid_fraction=1.*0 <= share < 1"),
    "large vocabulary": (
        ["sources={{d:{root}/good.jsonl}}", "tokenizer.vocab=9000"],
        r"tokenizer\.vocab=9000: found a vocabulary too large for the data, expected at most \d+",
    ),
    "small vocabulary": (
        ["sources={{d:{root}/good.jsonl}}", "tokenizer.vocab=260"],
        r"tokenizer\.vocab=260: found a vocabulary too small for the data, expected at least \d+",
    ),
    "path without file": (["tokenizer.path=x"], r"tokenizer\.path=x: .*tokenizer\.type=file"),
    "file without path": (["tokenizer.type=file"], r"tokenizer\.path: found nothing"),
    "no tokenizer": (
        ["sources={{d:{root}/good.jsonl}}", "tokenizer.type=file", "tokenizer.path={root}/no"],
        r"/no: found no such file or directory, expected tokenizer\.model",
    ),
    "no column": (["sources={{d:{root}/column.parquet}}"], r"no key 'text', only 'content', 'id'.*text_key="),
    "numbers": (
        ["sources={{d:{root}/numbers.parquet}}"],
        "found column 'text' of type int64, expected strings",
    ),
    "null": (["sources={{d:{root}/null.parquet}}"], r"null\.parquet row 40: found a null under 'text'"),
    "no dataset": (
        ["sources={{d:'hf:{root}/dir'}}"],
        r"sources\.d=hf:.*found what datasets\.load_dataset cannot load \(.*expected an existing path",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad") / "files"
    jsonl(root / "good.jsonl", GOOD)
    jsonl(root / "same.jsonl", GOOD[:1] * 5)
    (root / "one.txt").write_text("".join(GOOD))
    (root / "empty").mkdir()
    (root / "dir").mkdir()
    (root / "dir" / "picture.png").write_bytes(b"\x89PNG")
    parquet(root / "column.parquet", content=["a"], id=[1])
    parquet(root / "numbers.parquet", text=[1, 2])
    parquet(root / "null.parquet", text=[*GOOD, None])
    return root


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request(name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_REQUESTS[name]
    overrides = [text.format(root=files) for text in given]
    assert_refused([*overrides, f"out={tmp_path}/out"], message, tmp_path, capsys)


def test_out_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert megafab_data() == 2
    assert capsys.readouterr().err.startswith("out")


def test_bad_documents_are_skipped_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    bad = ["", "{", "[]", '{"no": 1}', '{"text": 1}', '{"text": "\\udfff"}', '{"text": ""}', '{"text": 2}']
    (source / "a.jsonl").write_text(lines(GOOD) + "\n".join(bad) + "\n")
    (source / "b.jsonl").write_bytes(b"")
    (source / "c.jsonl.gz").write_bytes(gzip.compress(lines(GOOD).encode())[:-12])
    (source / "d.txt").write_bytes(b"\xff")
    parquet(source / "e.parquet", text=["from parquet", None])
    assert megafab_data(f"sources={{d:{source}}}", f"out={tmp_path}/out", "skip_bad=true") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.manifest["skipped"]["d"] == {
        "empty line": 1,
        "invalid JSON": 1,
        "not a JSON object": 1,
        "no text key": 1,
        "text is not a string": 3,
        "invalid Unicode": 1,
        "empty document": 1,
        "empty file": 1,
        "damaged file": 1,
        "not UTF-8": 1,
    }
    said = capsys.readouterr().out
    assert f"3 x text is not a string, the first: {source}/a.jsonl line 45: found a number" in said
    found = texts(corpus, "d", "train") + texts(corpus, "d", "valid")
    assert found["from parquet"] == 1
    assert all(found[text] >= 1 for text in GOOD)


def test_a_shard_of_int32(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train/a-00000", token_dtype(70_000))
    writer.append([69_999, 1])
    shard = writer.close()
    assert (shard.bin_bytes, shard.tokens) == (8, 2)
    assert [path.name for path in (tmp_path / "train").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("source", ["in", "in/**/*.txt"])
def test_a_link_back_to_a_directory_above_is_not_followed(source: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text(GOOD[0])
    (tmp_path / "in" / "below" / "b.txt").write_text(GOOD[1])
    (tmp_path / "in" / "below" / "back").symlink_to(tmp_path / "in")
    overrides = (f"sources={{d:'{tmp_path}/{source}'}}", "valid_fraction=0", "tokenizer.vocab=300")
    assert megafab_data(*overrides, f"out={tmp_path}/out") == 0
    assert texts(Corpus.open(tmp_path / "out"), "d", "train") == Counter(GOOD[:2])


def test_what_is_no_file_in_a_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lost = tmp_path / "in", tmp_path / "in" / "lost.txt"
    source.mkdir()
    (source / "a.txt").write_text(GOOD[0])
    lost.symlink_to(tmp_path / "nowhere")
    assert megafab_data(f"sources={{d:{source}}}", f"out={tmp_path}/out") == 2
    assert capsys.readouterr().err.startswith(f"{lost}: found No such file or directory")
    lost.unlink()
    os.mkfifo(lost)  # reading it would wait for a writer for ever
    assert megafab_data(f"sources={{d:{source}}}", f"out={tmp_path}/out") == 2
    assert capsys.readouterr().err.startswith(f"{lost}: found a pipe, socket or device")
