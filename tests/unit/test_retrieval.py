"""`megafab data retrieval` against its definitions by brute force, across kills, and as training reads it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import EOD, counting_documents, write_corpus
from training import build_corpus

from data_pipeline import chunks, database, neighbors
from launch import cli
from megafab.data.derived import MANIFEST, NEIGHBORS, RETRIEVAL
from megafab.data.encoders import TfIdf, document_frequencies, idf
from megafab.data.format import SPLITS, Corpus, write_manifest
from megafab.data.retrieval import STARTS, Database, Neighbors
from megafab.data.tokenizer import Tokenizer
from megafab.errors import UserError

REPOSITORY = Path(__file__).parents[2]
CHUNK, KEPT = 8, 4
SMALL = (f"chunk={CHUNK}", f"neighbors={KEPT}", "candidates=40", "dim=64", "workers=1")


def documents(generator: np.random.Generator, count: int) -> list[np.ndarray]:
    """Of ids whose frequencies differ, some of EOD alone, some of one token."""
    lengths = generator.integers(0, 60, count)
    lengths[::4] = 0
    return [np.append(generator.zipf(1.3, length).clip(1, 99), EOD) for length in lengths]


def random_corpus(root: Path) -> Corpus:
    """Two domains whose streams cross shards."""
    generator = np.random.default_rng(0)
    train = {"a": documents(generator, 60), "b": documents(generator, 30)}
    return write_corpus(root, train, {"a": documents(generator, 9)}, vocab_size=100, shard_documents=7)


def use_ranges(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Several ranges also of a small corpus."""
    for module in (chunks, database, neighbors):
        monkeypatch.setattr(module, "RANGE_TOKENS", tokens)


@pytest.fixture(autouse=True)
def small_ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_ranges(monkeypatch, 50_000 if "real" in request.fixturenames else 300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """With `retrieval/small` and `neighbors/small`; tests change nothing in them."""
    corpus = random_corpus(tmp_path_factory.mktemp("built") / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        use_ranges(patch, 300)
        assert run(corpus, "name=small") == 0
    return corpus


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Real text, real tokens."""
    return Corpus.open(build_corpus(tmp_path_factory.mktemp("real")))


def run(corpus: Corpus, *overrides: str) -> int:
    return cli.main(["data", "retrieval", f"path={corpus.path}", *SMALL, *overrides])


def files_of(corpus: Corpus, name: str) -> dict[str, bytes]:
    """The content of all files of a database and its neighbours."""
    roots = [corpus.path / kind.folder / name for kind in (RETRIEVAL, NEIGHBORS)]
    return {f"{root.parent.name}/{file.name}": file.read_bytes() for root in roots for file in root.iterdir()}


def stream_of(corpus: Corpus, split: str, domain: int) -> tuple[np.ndarray, np.ndarray]:
    """All ids of a domain, and the number of the document of each."""
    stream = corpus.domain(split, domain)
    ids = stream.read(0, stream.tokens)
    return ids, np.cumsum(ids == EOD) - (ids == EOD)


def rows_of(corpus: Corpus, chunk: int) -> list[tuple[int, int, np.ndarray]]:
    """(domain, document, ids) of every row, one document after the other."""
    found = []
    for domain in range(len(corpus.domains)):
        ids, document = stream_of(corpus, "train", domain)
        for number in range(document[-1] + 1):
            text = ids[(document == number) & (ids != EOD)]
            found += [(domain, number, text[at : at + chunk]) for at in range(0, len(text), chunk)]
    return found


def test_rows_and_queries_by_hand(tmp_path: Path) -> None:
    """Documents of 9, 0, 6, 4 and then 8, 8 tokens, EOD left out, in shards of two documents, chunks of 4."""
    train = {"a": counting_documents([10, 1, 7, 5]), "b": counting_documents([9, 9], first=100)}
    corpus = write_corpus(tmp_path / "corpus", train, shard_documents=2)
    stream = corpus.domain("train", 0)
    starts, ends = chunks.row_bounds(stream, 0, 23, 4)
    assert starts.tolist() == [0, 4, 8, 11, 15, 18]
    assert ends.tolist() == [4, 8, 9, 15, 17, 22]
    for cut in range(1, 23):
        parts = chunks.row_bounds(stream, 0, cut, 4), chunks.row_bounds(stream, cut, 23 - cut, 4)
        assert np.concatenate([part[0] for part in parts]).tolist() == starts.tolist()

    asked = chunks.queries(stream, 0, 5, 4, EOD)
    # Documents begin at 0, 10, 11, 18 and end before 23.
    assert asked.start_C.tolist() == [0, 4, 11, 12, 18]
    assert asked.end_C.tolist() == [4, 8, 12, 16, 20]
    assert asked.low_C.tolist() == [0, 0, 0, 11, 11]
    assert asked.high_C.tolist() == [10, 10, 18, 18, 23]
    # A chunk that ends with EOD belongs to the document that ends there, which may have no other token.
    empty, whole = (chunks.queries(stream, 7, 1, length, EOD) for length in (4, 3))
    assert (empty.start_C.tolist(), empty.end_C.tolist()) == ([10], [10])
    assert (whole.start_C.tolist(), whole.end_C.tolist()) == ([7], [9])

    assert run(corpus, "chunk=4", "name=four") == 0
    found = Database.open(corpus.path / "retrieval" / "four")
    assert np.load(found.path / STARTS).tolist() == [0, 4, 8, 11, 15, 18, 0, 4, 9, 13]
    tokens, lengths = found.read(np.array([1, -1, 5, 9]), 6)
    assert lengths.tolist() == [5, 0, 4, 4]
    assert tokens[0].tolist() == [5, 6, 7, 8, 9, EOD]
    assert tokens[1].tolist() == [EOD] * 6
    assert tokens[2].tolist() == [19, 20, 21, 22, EOD, EOD]
    assert tokens[3].tolist() == [113, 114, 115, 116, EOD, EOD]


def test_rows_put_together_are_the_documents(built: Corpus) -> None:
    found = Database.open(built.path / "retrieval" / "small")
    want = rows_of(built, CHUNK)
    assert found.rows == len(want) > 200
    tokens, lengths = found.read(np.arange(found.rows), CHUNK)
    for text, length, (_, _, ids) in zip(tokens, lengths, want, strict=True):
        assert text[:length].tolist() == ids.tolist()
        assert (text[length:] == EOD).all()
    # With its continuation a row is what its document still has.
    tokens, lengths = found.read(np.arange(found.rows), 2 * CHUNK)
    follows = [*want[1:], (-1, -1, want[0][2])]
    for text, length, one, after in zip(tokens, lengths, want, follows, strict=True):
        more = after[2] if one[:2] == after[:2] else []
        assert text[:length].tolist() == [*one[2], *more]


def query_of(ids: np.ndarray, document: np.ndarray, at: int) -> tuple[np.ndarray, set[int]]:
    """What query chunk `at` is searched with, and the documents it overlaps."""
    here = slice(at * CHUNK, (at + 1) * CHUNK)
    last = (document[here] == document[here][-1]) & (ids[here] != EOD)
    return ids[here][last], set(document[here].tolist())


def test_neighbors_are_those_of_brute_force(built: Corpus) -> None:
    found = Neighbors.open("small", built, CHUNK)
    rows = rows_of(built, CHUNK)
    embed = found.database.encoder.embed
    keys = embed([ids for _, _, ids in rows])
    assert np.linalg.norm(keys, axis=1) == pytest.approx(1)
    without_text = 0
    for split in SPLITS:
        for domain in range(len(built.domains)):
            ids, document = stream_of(built, split, domain) if built.tokens(split)[domain] else ([], [])
            assert found.rows(split, domain).shape == (len(ids) // CHUNK, KEPT)
            for at, got in enumerate(found.rows(split, domain)):
                text, own = query_of(ids, document, at)
                without_text += not len(text)
                scores = keys @ embed([text])[0]
                nearest = np.argsort(-scores, kind="stable")[:40].tolist() if len(text) else []
                if split == "train":
                    nearest = [row for row in nearest if rows[row][0] != domain or rows[row][1] not in own]
                want = nearest[:KEPT]
                assert (got >= 0).sum() == len(want)
                got = got[: len(want)]
                if split == "train":
                    assert not any(rows[row][0] == domain and rows[row][1] in own for row in got)
                # Equally near rows may change places.
                assert scores[got] == pytest.approx(scores[want], abs=1e-6)
    assert without_text > 0


def test_tfidf_weighs_ids_by_how_rare_they_are() -> None:
    """Its vectors are sums of what single ids have, and nearly orthogonal for different ids."""
    texts = [np.array([5, 6, 5, 6]), np.array([], np.int64), np.array([6, 5]), np.array([9])]
    counts = document_frequencies(texts, 10)
    assert counts.tolist() == [0, 0, 0, 0, 0, 2, 2, 0, 0, 1]
    weights = idf(counts, 4)
    assert weights[[0, 5, 9]] == pytest.approx(np.log([5, 5 / 3, 5 / 2]))
    encoder = TfIdf(weights, 1 << 14)
    five, six, both, nine, none = encoder.embed(
        [*map(np.array, ([5], [6], [9, 5, 9], [9])), np.empty(0, np.int64)]
    )
    assert np.linalg.norm([five, six, both, nine], axis=1) == pytest.approx(1)
    assert five @ six == pytest.approx(0, abs=0.04)
    length = np.hypot(weights[5], 2 * weights[9])
    assert both @ five == pytest.approx(weights[5] / length, abs=0.04)
    assert both @ nine == pytest.approx(2 * weights[9] / length, abs=0.04)
    assert not none.any()


def test_a_window_does_not_see_its_own_documents(built: Corpus) -> None:
    found = Neighbors.open("small", built, CHUNK)
    rows = rows_of(built, CHUNK)
    ids, document = stream_of(built, "train", 0)
    dropped = 0
    for start in range(0, len(ids), 8 * CHUNK):
        got = found.read("train", 0, start, 8, count=2)
        wrong = found.read("train", 0, start, 8, count=2, wrong=True)
        own = set(document[start : start + 8 * CHUNK + 1].tolist())
        kept = found.rows("train", 0)[start // CHUNK : start // CHUNK + 8]
        for at in range(8):
            mine = kept[at].tolist() if at < len(kept) else []
            others = [row for row in mine if row >= 0 and (rows[row][0] != 0 or rows[row][1] not in own)]
            dropped += len(mine) - len(others)
            assert got[at].tolist() == (others + [-1, -1])[:2]
        assert ((wrong >= 0) == (got >= 0)).all()
        assert not any(rows[row][0] == 0 and rows[row][1] in own for row in wrong[wrong >= 0])
    assert dropped > 20
    # Nothing of the validation split is in the database, and fewer columns are the first ones.
    kept = found.rows("valid", 0)[:3]
    assert found.read("valid", 0, 0, 3, count=KEPT).tolist() == kept.tolist()
    assert found.read("valid", 0, 0, 3, count=1).tolist() == kept[:, :1].tolist()
    assert found.read("valid", 1, 0, 3, count=2).tolist() == [[-1, -1]] * 3


def test_wrong_neighbors_are_a_draw_by_position(built: Corpus) -> None:
    found = Neighbors.open("small", built, CHUNK)
    whole = found.read("valid", 0, 0, 20, count=KEPT, wrong=True)
    assert found.read("valid", 0, 4 * CHUNK, 5, count=2, wrong=True).tolist() == whole[4:9, :2].tolist()
    drawn = np.concatenate(
        [found.read("train", 0, at * CHUNK, 1, count=KEPT, wrong=True).ravel() for at in range(150)]
    )
    drawn = drawn[drawn >= 0]
    halves = np.bincount(drawn * 2 // found.database.rows)
    assert halves.min() > 0.4 * len(drawn)
    assert len(set(drawn.tolist())) > 0.5 * found.database.rows


def test_live_search_finds_what_the_build_did(built: Corpus) -> None:
    found = Neighbors.open("small", built, CHUNK)
    ids, document = stream_of(built, "valid", 0)
    texts = [query_of(ids, document, at)[0] for at in range(10)]
    assert found.database.search(texts, KEPT).tolist() == found.rows("valid", 0)[:10].tolist()
    row = 17
    tokens, lengths = found.database.read(np.array([row]), CHUNK)
    rows = found.database.search([tokens[0], tokens[0][: lengths[0]], np.array([EOD, EOD])], 3)
    assert rows[0].tolist() == rows[1].tolist()
    best, _ = found.database.read(rows[0, :1], CHUNK)
    assert best[0].tolist() == tokens[0].tolist()
    assert rows[2].tolist() == [-1, -1, -1]
    assert found.database.search([tokens[0]], found.database.rows + 5)[0, -5:].tolist() == [-1] * 5


STOPS = [
    (database, "count_range", 4),
    (database, "embed_range", 3),
    (database.index, "train", 0),
    (database.index, "index_file", 2),
    (neighbors, "embed_range", 4),
    (neighbors, "_search_range", 15),
]


@pytest.mark.parametrize(("module", "name", "after"), STOPS, ids=[stop[1] for stop in STOPS])
def test_an_interrupted_build_continues_to_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: object,
    name: str,
    after: int,
) -> None:
    """Ctrl-C at each stage of a build with two lists and four files of the index."""
    options = ("index=IVF2,Flat", "shard_rows=100", "train_rows=200", "name=once")
    at_once, corpus = random_corpus(tmp_path / "at_once"), random_corpus(tmp_path / "corpus")
    assert run(at_once, *options) == 0
    function, calls = getattr(module, name), []

    def stopped(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopped)
        assert run(corpus, *options) == cli.INTERRUPTED
    first = len(calls)
    calls.clear()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *arguments: (calls.append(arguments), function(*arguments))[1])
        assert run(corpus, *options) == 0
    assert "continuing the interrupted build" in capsys.readouterr().out
    if name in ("count_range", "embed_range", "_search_range"):
        left = calls_of_a_build(at_once, name, module) - (first - 1)
        assert len(calls) == left, "what was finished is not done again"
    assert files_of(corpus, "once") == files_of(at_once, "once")
    assert not list(corpus.path.glob("*/.*.building"))


def calls_of_a_build(corpus: Corpus, name: str, module: object) -> int:
    """How often a build that nothing interrupts calls a function for its ranges."""
    if module is database:
        return sum(-(-tokens // 300) for tokens in corpus.tokens("train"))
    each = 300 // CHUNK
    ranges = sum(-(-(tokens // CHUNK) // each) for split in SPLITS for tokens in corpus.tokens(split))
    files = -(-Database.open(corpus.path / "retrieval" / "once").rows // 100)
    return ranges * (files if name == "_search_range" else 1)


def test_nothing_of_another_request_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted where rows are counted and the index is trained; then chunks are shorter."""
    corpus, fresh = random_corpus(tmp_path / "corpus"), random_corpus(tmp_path / "fresh")
    options = ("index=IVF2,Flat", "train_rows=100", "name=one")
    with monkeypatch.context() as patch:
        patch.setattr(database, "_add", interrupt)
        assert run(corpus, *options) == cli.INTERRUPTED
    left = {path.name for path in (corpus.path / "retrieval" / ".one.building").iterdir()}
    assert left >= {"counts.npy", "idf.npy", "trained.faiss"}
    for one in (corpus, fresh):
        assert run(one, *options, "chunk=4") == 0
    assert "leftovers of a build of another request: starting over" in capsys.readouterr().out
    assert files_of(corpus, "one") == files_of(fresh, "one")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_build_continues_and_workers_do_not_matter(built: Corpus, tmp_path: Path) -> None:
    """Killed on one process while it embeds, finished on two."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from data_pipeline import chunks, database, neighbors\n"
        "from launch import cli\n"
        "for module in (chunks, database, neighbors):\n"
        "    module.RANGE_TOKENS = 300\n"
        "embed = database.embed_range\n"
        "database.embed_range = lambda one: (time.sleep(0.2), embed(one))[1]\n"
        "cli.main(sys.argv[1:])\n"
    )
    corpus = random_corpus(tmp_path / "corpus")
    arguments = ["data", "retrieval", f"path={corpus.path}", *SMALL, "name=small"]
    build = subprocess.Popen(
        [sys.executable, str(slow), *arguments], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}
    )
    pieces = corpus.path / "retrieval" / ".small.building" / "pieces"
    deadline = time.monotonic() + 60
    while len(list(pieces.glob("embeddings-*.npy"))) < 2:
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert not (corpus.path / "retrieval" / "small").exists()
    assert run(corpus, "name=small", "workers=2") == 0
    assert files_of(corpus, "small") == files_of(built, "small")


def test_what_is_finished_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = random_corpus(tmp_path / "corpus")
    assert run(corpus) == 0
    before = files_of(corpus, "tfidf-8")
    capsys.readouterr()
    assert run(corpus) == 0
    assert capsys.readouterr().out.count("is finished. Nothing to do") == 2
    assert run(corpus, "neighbors=2") == 2
    assert "a megafab-neighbors made from another request (neighbors)" in capsys.readouterr().err
    assert run(corpus, "dim=32") == 2
    assert "a megafab-retrieval made from another request (encoder)" in capsys.readouterr().err
    assert files_of(corpus, "tfidf-8") == before
    assert run(corpus, "dim=32", "overwrite=true") == 0
    assert Database.open(corpus.path / "retrieval" / "tfidf-8").encoder.dim == 32


def test_another_corpus_is_retrieved_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are never those of the window's documents, whatever their numbers."""
    corpus = random_corpus(tmp_path / "corpus")
    generator = np.random.default_rng(1)
    others = write_corpus(tmp_path / "others", {"x": documents(generator, 40)}, vocab_size=100)
    assert run(corpus, f"database={others.path}", "name=far") == 0
    assert not (corpus.path / "retrieval").exists()
    found = Neighbors.open("far", corpus, CHUNK)
    assert found.database.corpus.path == others.path
    kept = found.rows("train", 0)[:5]
    assert (kept >= 0).all(axis=1).any()
    assert found.read("train", 0, 0, 5, count=KEPT).tolist() == kept.tolist()
    assert found.facts == {
        "neighbors": found.fingerprint,
        "database": found.database.fingerprint,
        "chunk": CHUNK,
        "encoder": found.database.manifest["encoder"],
        "index": "Flat",
        "kept": KEPT,
    }
    json.dumps(found.facts)

    # Built again from another request, then gone.
    arguments = [f"path={others.path}", *SMALL, "name=far", "dim=16", "overwrite=true"]
    assert cli.main(["data", "retrieval", *arguments]) == 0
    with pytest.raises(
        UserError, match=r"found neighbours in the database \w{12}, expected neighbours in .* now"
    ):
        Neighbors.open("far", corpus, CHUNK)
    (others.path / "retrieval" / "far" / MANIFEST).unlink()
    with pytest.raises(UserError, match="one that is not finished, expected a finished megafab-retrieval"):
        Neighbors.open("far", corpus, CHUNK)


def with_tokenizer(corpus: Corpus, fingerprint: str) -> Corpus:
    """The same text, said to be of another tokenizer."""
    manifest = {**corpus.manifest, "tokenizer": {**corpus.manifest["tokenizer"], "fingerprint": fingerprint}}
    write_manifest(corpus.path, manifest)
    return Corpus.open(corpus.path)


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, others = random_corpus(tmp_path / "corpus"), random_corpus(tmp_path / "others")
    with pytest.raises(UserError, match="found no such directory, expected a finished megafab-neighbors"):
        Neighbors.open("none", corpus, CHUNK)
    assert run(corpus, f"database={others.path}", "name=one") == 0
    with pytest.raises(UserError, match="found chunks of 8 tokens, expected chunks of 16. Fix: .* chunk=16"):
        Neighbors.open("one", corpus, 16)
    another = write_corpus(tmp_path / "another", {"a": counting_documents([9])}, vocab_size=100)
    with pytest.raises(UserError, match="found a megafab-neighbors of the corpus"):
        Neighbors.open(corpus.path / "neighbors" / "one", another, CHUNK)

    file = corpus.path / "neighbors" / "one" / "train-a.npy"
    np.save(file, np.load(file)[1:])
    with pytest.raises(UserError, match=r"train-a.npy: found .* of int64, expected .* as the manifest says"):
        Neighbors.open("one", corpus, CHUNK)
    file.unlink()
    with pytest.raises(UserError, match=r"train-a.npy: found no usable file"):
        Neighbors.open("one", corpus, CHUNK)

    (others.path / "retrieval" / "one" / "idf.npy").write_bytes(b"x")
    with pytest.raises(UserError, match=r"encoder tfidf: found files that hash to"):
        Database.open(others.path / "retrieval" / "one").search([np.array([1])], 1)

    others = with_tokenizer(others, "other")
    with pytest.raises(UserError, match="found a megafab-retrieval of the corpus"):
        Neighbors.open("one", corpus, CHUNK)
    assert run(corpus, f"database={others.path}", "name=two") == 2
    assert "found text of the tokenizer other, expected text of the tokenizer none" in capsys.readouterr().err
    assert cli.main(["data", "retrieval", f"path={others.path}", *SMALL, "name=one", "overwrite=true"]) == 0
    assert run(corpus, "name=one", "overwrite=true") == 0
    path = corpus.path / "neighbors" / "one" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["database"] = str(others.path / "retrieval" / "one")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="found text of the tokenizer other"):
        Neighbors.open("one", corpus, CHUNK)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder=bert", "dim=null"], "encoder=bert: found an unknown encoder"),
        (["encoder=transformers", "dim=null"], "encoder_model: found nothing, expected a model"),
        (["encoder_model=x"], "encoder_model=x: found encoder=tfidf, expected transformers or"),
        (["encoder=nowhere:f"], "dim=64: found encoder=nowhere:f, expected encoder=tfidf"),
        (["encoder=nowhere:f", "dim=null"], "encoder=nowhere:f: found no module nowhere"),
        (["candidates=3"], "candidates=3: found a value too small, expected at least 4"),
        (["name=a/b"], "name=a/b: found no name of a directory"),
        (["workers=0"], "workers=0: found a value too small"),
        (["index=Flut"], "index=Flut: found no index for vectors of 64 numbers (could not parse index"),
        (["nprobe=2"], "nprobe=2: found an index without lists (IVF)"),
        (["index=IVF4,Flat", "ef_search=9"], "ef_search=9: found an index without a graph (HNSW)"),
        (["index=IVF4000,Flat"], "index=IVF4000,Flat: found "),
        (
            ["encoder=transformers", "dim=null", "encoder_model=no/such"],
            "encoder_model=no/such: found no usable model (",
        ),
    ],
)
def test_mistakes_get_one_line(
    built: Corpus, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert run(built, "name=mistake", *overrides) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (built.path / "retrieval" / "mistake").exists()


def test_a_missing_package_is_named(
    built: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sentence_transformers", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(built, "name=mistake") == 2
    assert capsys.readouterr().err.endswith("Fix: pip install faiss-cpu\n")
    # Neighbours that are there are read without it.
    assert Neighbors.open("small", built, CHUNK).read("train", 0, 0, 2, count=2).shape == (2, 2)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    options = ("name=mistake", "encoder=sentence_transformers", "encoder_model=x", "dim=null")
    assert run(built, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("encoder=sentence_transformers: found no package sentence_transformers")
    assert error.endswith("Fix: pip install sentence-transformers\n")


def recall(corpus: Corpus, name: str, exact: str) -> float:
    """The share of exact neighbours that an index finds."""
    ours, theirs = (Neighbors.open(one, corpus, 64) for one in (name, exact))
    pairs = zip(ours.rows("train", 0), theirs.rows("train", 0), strict=True)
    found = [len(set(one) & set(other)) / len(other) for one, other in pairs if (other >= 0).all()]
    assert len(found) > 1000
    return float(np.mean(found))


def test_indices_that_are_not_exact(real: Corpus) -> None:
    arguments = ["data", "retrieval", f"path={real.path}", "workers=1", "dim=64", "candidates=100"]
    assert cli.main([*arguments, "name=flat"]) == 0
    assert cli.main([*arguments, "name=all", "index=IVF32,Flat", "nprobe=32", "shard_rows=1500"]) == 0
    assert recall(real, "all", "flat") > 0.999
    manifest = Database.open(real.path / "retrieval" / "all").manifest
    assert manifest["search"] == {"nprobe": 32}
    assert {file for file in manifest["sha256"] if "index" in file} > {
        "index-00000.faiss",
        "index-00002.faiss",
    }
    assert cli.main([*arguments, "name=few", "index=IVF32,Flat"]) == 0
    assert Database.open(real.path / "retrieval" / "few").manifest["search"] == {"nprobe": 2}
    assert 0.4 < recall(real, "few", "flat") < recall(real, "all", "flat")
    assert (
        cli.main([*arguments, "name=graph", "index=RR64,IVF16_HNSW8,SQ8", "nprobe=16", "ef_search=20"]) == 0
    )
    search = Database.open(real.path / "retrieval" / "graph").manifest["search"]
    assert search == {"nprobe": 16, "quantizer_efSearch": 20}
    assert recall(real, "graph", "flat") > 0.9


def test_a_model_of_transformers(real: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers
    import torch
    import transformers
    from hf_tokenizer import byte_level_bpe

    directory = tmp_path / "bert"
    core = tokenizers.Tokenizer.from_file(
        str(byte_level_bpe(tmp_path / "t.json", ["[PAD]", "[CLS]", "[SEP]"]))
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(
            transformers.BertConfig(vocab_size=300, max_position_embeddings=256, **sizes)
        ).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    corpus = small_part(real, tmp_path / "corpus")
    arguments = ["data", "retrieval", f"path={corpus.path}", "workers=1", "encoder=transformers"]
    assert cli.main([*arguments, f"encoder_model={directory}"]) == 0
    found = Neighbors.open("transformers-64", corpus, 64)
    assert (found.rows("train", 0) >= 0).all(axis=1).mean() > 0.5

    tokens, lengths = found.database.read(np.arange(20), 64)
    texts = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
    got = found.database.encoder.embed(texts)
    for ids, vector in zip(texts, got, strict=True):
        asked = tokenizer(Tokenizer.load(corpus.tokenizer_dir).decode(ids), return_tensors="pt")
        with torch.inference_mode():
            mean = model(**asked).last_hidden_state[0, 1:-1].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)

    # A model that has changed since is not searched with.
    config = directory / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"encoder .*bert: found files that hash to"):
        Database.open(found.database.path).search(texts, 1)


def small_part(corpus: Corpus, root: Path) -> Corpus:
    """The first documents of a corpus, with its tokenizer."""
    parts = {}
    for domain, name in enumerate(corpus.domains):
        stream = corpus.domain("train", domain)
        ids = stream.read(0, min(stream.tokens, 12_000))
        ids[-1] = corpus.eod
        parts[name] = np.split(ids, np.flatnonzero(ids[:-1] == corpus.eod) + 1)
    part = write_corpus(root, parts, vocab_size=corpus.vocab_size)
    shutil.copytree(corpus.tokenizer_dir, root / "tokenizer")
    write_manifest(root, {**part.manifest, "tokenizer": corpus.manifest["tokenizer"]})
    return Corpus.open(root)


def test_a_function_of_the_users(
    real: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_part(real, tmp_path / "corpus")
    module = tmp_path / "my_encoder.py"
    module.write_text(
        "import numpy as np\n"
        "def letters(texts):\n"
        "    return np.array([[text.count(letter) for letter in 'etaoinsh('] for text in texts])\n"
        "def flat(texts):\n    return np.ones(len(texts))\n"
        "def few(texts):\n    return np.ones((1, 4))\n"
        "def words(texts):\n    return [['x'] for text in texts]\n"
        "def infinite(texts):\n    return np.full((len(texts), 2), np.inf)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["data", "retrieval", f"path={corpus.path}", "workers=1"]
    assert cli.main([*arguments, "encoder=my_encoder:letters"]) == 0
    found = Database.open(corpus.path / "retrieval" / "letters-64")
    text = Tokenizer.load(corpus.tokenizer_dir).encode("the heat of the north sea, he notes")
    (vector,) = found.encoder.embed([np.array(text)])
    counts = np.array(["the heat of the north sea, he notes".count(letter) for letter in "etaoinsh("])
    assert vector == pytest.approx(counts / np.linalg.norm(counts), abs=1e-6)
    capsys.readouterr()
    for name, message in (
        ("flat", "found (1,) of float64, expected numbers of shape (1, E)"),
        ("few", "found (1, 4) of float64, expected numbers of shape ("),
        ("words", "found (1, 1) of <U1"),
        ("infinite", "found nan or infinity, expected finite numbers"),
    ):
        assert cli.main([*arguments, f"encoder=my_encoder:{name}", "name=bad"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"encoder=my_encoder:{name}: ")
        assert message in error
        assert error.count("\n") == 1


def test_gathered_ranges_are_those_read_one_by_one(built: Corpus) -> None:
    stream = built.domain("train", 0)
    ids, document = stream_of(built, "train", 0)
    starts = np.random.default_rng(0).integers(0, stream.tokens, 100)
    for start, found in zip(starts, stream.gather(starts, 30), strict=True):
        own = document[start : start + 30] == document[start]
        assert found[: own.sum()].tolist() == ids[start : start + 30][own].tolist()
        for count in (1, 25):
            if start + count <= stream.tokens:
                low, high = stream.document_bounds(int(start), count)
                assert low == np.flatnonzero(document == document[start])[0]
                assert high == np.flatnonzero(document == document[start + count - 1])[-1] + 1
    with pytest.raises(IndexError):
        stream.gather(np.array([stream.tokens]), 1)


def test_a_database_that_helps_nobody_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "one", {"a": counting_documents([80])}, vocab_size=100)
    assert cli.main(["data", "retrieval", f"path={corpus.path}", *SMALL]) == 2
    assert "found no chunk with a neighbour, expected some" in capsys.readouterr().err
