"""`megafab data`: sources to a corpus.

    request -> tokenizer -> pieces (parallel) -> shards (parallel) -> manifest -> rename

All of it happens in a work directory beside `out`, which appears by one rename when everything is there.
A build that was killed continues: finished pieces are kept as long as the request is the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import BuildConfig, TokenizerType, check, part_of
from data_pipeline.pieces import PIECE_BYTES, Piece
from data_pipeline.pool import Pool
from data_pipeline.progress import Progress
from data_pipeline.shards import SHARD_TOKENS, plan_shards, write_shard
from data_pipeline.sources import Source, digest, resolve
from data_pipeline.stdlib import standard_library
from data_pipeline.tokenize import Counts, Job, load_table, tokenize_piece
from data_pipeline.workspace import Workspace, outages_interrupt
from megafab.data.format import MANIFEST, SPLITS, Corpus, Shard, split_entry, write_manifest
from megafab.data.tokenizer import Tokenizer, tokenizer_fingerprint
from megafab.errors import UserError

_CHECKED = 1_000_000  # characters on which a given tokenizer is tried


def is_built(config: BuildConfig) -> bool:
    """Whether there is nothing to do, found out without doing anything.

    Raises:
        UserError: a mistake in the configuration, sources that are not there, or something else at `out`.
    """
    check(config)
    return _finished(Path(config.out).expanduser(), _request(config, _sources(config)), config.overwrite)


def build(config: BuildConfig) -> None:
    """Build the corpus that `config` asks for, unless it is there already.

    Raises:
        UserError: bad configuration or input, one line each; nothing is left behind.
        Interrupted: the machine failed (disk full, process killed); the next call continues.
    """
    check(config)
    out = Path(config.out).expanduser()
    sources = _sources(config)
    request = _request(config, sources)
    if _finished(out, request, config.overwrite):
        return
    if config.part is not None:
        with outages_interrupt(out), Workspace(out, request, shared=True) as work:
            _build_part(config, sources, work)
        return
    with outages_interrupt(out), Workspace(out, request) as work:
        _build(config, sources, request, work)
        work.publish()
    _report(out)


def _sources(config: BuildConfig) -> dict[str, list[Source]]:
    if config.sources is None:
        return standard_library(config.stdlib_bytes)
    values = {name: value if isinstance(value, list) else [value] for name, value in config.sources.items()}
    return {name: resolve(name, value) for name, value in values.items()}


def _request(config: BuildConfig, sources: Mapping[str, list[Source]]) -> dict[str, Any]:
    """What the corpus depends on, and nothing else: two equal requests give equal corpora."""
    if config.tokenizer.type is TokenizerType.file:
        files = tokenizers.given_files(config.tokenizer)
        content = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        tokenizer: dict[str, Any] = {"type": "file", "files": content}
    else:
        tokenizer = asdict(config.tokenizer) | {"type": config.tokenizer.type.value}
    request = {
        "domains": list(sources),
        "sources": {domain: digest(entries) for domain, entries in sources.items()},
        "tokenizer": tokenizer,
        "text_key": config.text_key,
        "valid_fraction": config.valid_fraction,
        "seed": config.seed,
        "skip_bad": _skips_bad(config),
        "sizes": [PIECE_BYTES, SHARD_TOKENS],
    }
    fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": fingerprint, **request}


def _skips_bad(config: BuildConfig) -> bool:
    # Some of Python's own tests are files that are no UTF-8.
    return config.skip_bad or config.sources is None


def _finished(out: Path, request: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `out` already is the corpus asked for; UserError if it is something else."""
    fix = "another out, or overwrite=true to replace it"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        found = "a directory with other things in it" if out.is_dir() else "a file"
        raise UserError(f"out={out}", found, "nothing there, or a corpus", "another out")
    if overwrite:
        return False
    corpus = Corpus.open(out)
    there = corpus.manifest.get("request", {})
    if there.get("fingerprint") != request["fingerprint"]:
        keys = ", ".join(_differences(there, request))
        raise UserError(
            f"out={out}", f"a corpus built from another request ({keys})", "the same request", fix
        )
    print(f"{out} is finished: {_summary(corpus)}. Nothing to do (overwrite=true builds it again).")
    return True


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in here:
        if key == "fingerprint" or there.get(key) == here[key]:
            continue
        old, new = there.get(key), here[key]
        if key == "sources" and isinstance(old, dict):
            changed = [f"sources.{name}" for name in new if name in old and old[name] != new[name]]
            yield from (f"files of {name} changed" for name in changed)
        else:
            yield f"{key} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value).replace('"', "")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _build(
    config: BuildConfig, sources: Mapping[str, list[Source]], request: Mapping[str, Any], work: Workspace
) -> None:
    tokenizer = _make_tokenizer(config, sources, work)
    with Pool(config.workers) as pool:
        pieces = _tokenize(config, sources, work, pool)
        _say_what_was_skipped(config, pieces)
        domains = _write_shards(config, pieces, tokenizer, work, pool)
    shutil.copytree(_tokenizer_of(work), work.result / "tokenizer")
    manifest = {
        "tokenizer": {
            "type": config.tokenizer.type.value,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "fingerprint": tokenizer_fingerprint(_tokenizer_of(work)),
        },
        "domains": domains,
        "skipped": {domain: dict(result.counts.skipped) for domain, result in pieces.items()},
        "sources": config.sources or "the standard library of Python",
        "request": request,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece", "tokenizers")},
        },
    }
    write_manifest(work.result, manifest)


def _build_part(config: BuildConfig, sources: Mapping[str, list[Source]], work: Workspace) -> None:
    """The tokenizer, by whoever comes first, and this part's pieces."""
    with work.exclusive("tokenizer"):
        _make_tokenizer(config, sources, work)
    with Pool(config.workers) as pool:
        _tokenize(config, sources, work, pool)
    print(f"part {config.part} is finished; once all are, the same command without part= builds {config.out}")


def _tokenizer_of(work: Workspace) -> Path:
    return work.root / "tokenizer"


def _make_tokenizer(config: BuildConfig, sources: Mapping[str, list[Source]], work: Workspace) -> Tokenizer:
    directory = _tokenizer_of(work)
    if directory.exists():
        return Tokenizer.load(directory)
    start = time.monotonic()
    settings, temporary = config.tokenizer, work.root / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    given = settings.type is TokenizerType.file
    texts = tokenizers.sample(
        sources, config.text_key, _CHECKED if given else settings.sample_bytes, _skips_bad(config)
    )
    if given:
        tokenizers.adopt(settings, temporary)
    else:
        tokenizers.train(settings, texts, temporary)
    tokenizer = Tokenizer.load(temporary)
    os.replace(temporary, directory)
    if given:
        lost, example = tokenizers.losses(tokenizer, texts)
        if lost:
            share = f"{lost} of {len(texts)} sampled documents"
            print(f"warning: tokenizer.path={settings.path} does not keep text as it is ({share}): {example}")
        print(f"tokenizer: {settings.path}, {tokenizer.vocab_size:,} ids")
    else:
        size, seconds = sum(map(len, texts)) / 1e6, time.monotonic() - start
        kind = f"{settings.type.value}, {tokenizer.vocab_size:,} ids"
        print(f"tokenizer: {kind}, trained on {size:.1f} MB of all domains in {seconds:.1f} s", flush=True)
    return tokenizer


def _say_what_was_skipped(config: BuildConfig, pieces: Mapping[str, _Tokenized]) -> None:
    for domain, result in pieces.items():
        counts = result.counts
        if not counts.documents:
            found = f"no documents with text ({_list(counts.skipped)})"
            raise UserError(f"sources.{domain}", found, "at least one", "give sources with text")
        if config.skip_bad:
            for reason, example in counts.examples.items():
                print(f"skipped in {domain}: {counts.skipped[reason]} x {reason}, the first: {example}")


def _list(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in skipped.items())


@dataclass(slots=True)
class _Tokenized:
    """A domain after the first pass: the names of its pieces, in order, and what is in them."""

    names: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class _Task:
    job: Job
    domain: str
    name: str
    piece: Piece


def _run_task(task: _Task) -> tuple[str, int, Counts]:
    tokenizer = _load_tokenizer(task.job.tokenizer, task.job.fingerprint)
    return task.domain, task.piece.size, tokenize_piece(task.job, tokenizer, task.name, task.piece)


@lru_cache(maxsize=1)
def _load_tokenizer(directory: Path, fingerprint: str) -> Tokenizer:
    """Once a process; the fingerprint tells apart what one directory held at different times."""
    return Tokenizer.load(directory)


def _tokenize(
    config: BuildConfig, sources: Mapping[str, list[Source]], work: Workspace, pool: Pool
) -> dict[str, _Tokenized]:
    """Every piece of this part that is not done yet, on all workers."""
    fingerprint, skip_bad = tokenizer_fingerprint(_tokenizer_of(work)), _skips_bad(config)
    job = Job(work.pieces, _tokenizer_of(work), fingerprint, config.text_key, skip_bad)
    results = {domain: _Tokenized() for domain in sources}
    sizes = [source.size for entries in sources.values() for source in entries]
    part, parts = part_of(config)
    total = None if None in sizes or parts > 1 else sum(size for size in sizes if size)
    counted = itertools.count()

    def unfinished(progress: Progress) -> Iterator[_Task]:
        for domain, entries in sources.items():
            pieces = (piece for source in entries for piece in source.pieces(config.text_key, skip_bad))
            for number, piece in enumerate(pieces):
                if next(counted) % parts != part:
                    continue
                name = f"{domain}-{number:07d}"
                results[domain].names.append(name)
                table = load_table(work.pieces, name)
                if table is None:
                    yield _Task(job, domain, name, piece)
                else:
                    results[domain].counts.add(table.counts)
                    progress.add(piece.size, table.counts, fresh=False)

    with Progress("tokenize", total) as progress:
        for domain, size, counts in pool.map(_run_task, unfinished(progress)):
            results[domain].counts.add(counts)
            progress.add(size, counts, fresh=True)
    return results


def _write_shards(
    config: BuildConfig, pieces: Mapping[str, _Tokenized], tokenizer: Tokenizer, work: Workspace, pool: Pool
) -> list[dict[str, Any]]:
    """The shards of all domains; returns the domains as the manifest lists them."""
    start = time.monotonic()
    plans = [
        plan
        for domain, result in pieces.items()
        for plan in plan_shards(
            work.result,
            work.pieces,
            domain,
            result.names,
            config.valid_fraction,
            config.seed,
            tokenizer.vocab_size,
        )
    ]
    written: dict[tuple[str, str], list[tuple[Shard, int]]] = defaultdict(list)
    for plan, shard in zip(plans, pool.map(write_shard, plans), strict=True):
        written[plan.domain, plan.split].append(shard)
    print(f"write: {len(plans)} shards in {time.monotonic() - start:.1f} s", flush=True)

    def entry(domain: str, split: str) -> dict[str, Any]:
        shards = written[domain, split]
        return split_entry([shard for shard, _ in shards], sum(size for _, size in shards))

    return [{"name": name, "splits": {split: entry(name, split) for split in SPLITS}} for name in pieces]


def _report(out: Path) -> None:
    """What was built, domain by domain."""
    corpus = Corpus.open(out)
    for domain in corpus.manifest["domains"]:
        train, valid = (domain["splits"][split] for split in SPLITS)
        ratio = (train["bytes"] + valid["bytes"]) / (train["tokens"] + valid["tokens"])
        skipped = corpus.manifest["skipped"][domain["name"]]
        print(
            f"  {domain['name']}: {train['documents']:,} documents ({train['tokens']:,} tokens) to train on, "
            f"{valid['documents']:,} ({valid['tokens']:,}) held out, {ratio:.2f} bytes a token"
            + (f"; skipped {_list(skipped)}" if skipped else "")
        )
    print(f"{out} is finished: {_summary(corpus)}")


def _summary(corpus: Corpus) -> str:
    tokens = sum(corpus.tokens("train")) + sum(corpus.tokens("valid"))
    return f"{tokens:,} tokens in {len(corpus.domains)} domains, fingerprint {corpus.fingerprint[:12]}"
