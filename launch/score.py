"""`megafab score`: the loss of every token of a corpus under a reference model."""

from __future__ import annotations

from data_pipeline.pool import Pool
from launch.ranks import cores
from megafab.config import load
from megafab.config.score import ScoreConfig, check
from megafab.errors import ConfigError
from megafab.telemetry.meter import Meter


def main(overrides: list[str]) -> int:
    """Score, or find it done; returns the exit code."""
    config = load.compose(ScoreConfig, "score", overrides)
    check(config)
    from launch.chosen import chosen

    checkpoint, run, corpus = chosen(config.checkpoint, config.data)
    seq_len = config.seq_len or run.model.seq_len
    if seq_len > run.model.seq_len:
        expected = f"at most the {run.model.seq_len} that the reference was trained with"
        raise ConfigError(f"seq_len={seq_len}", f"{seq_len}", expected, "leave seq_len out")
    retro = run.model.retro
    if retro.in_context or (retro.chunk and seq_len % retro.chunk):
        found = "a reference with passages in its context" if retro.in_context else f"seq_len={seq_len}"
        expected = f"windows that are chunks of {retro.chunk} tokens and nothing else"
        raise ConfigError(f"checkpoint={config.checkpoint}", found, expected, "another reference or seq_len")
    from megafab.checkpoint import store
    from megafab.data.derived import MANIFEST, SCORES
    from megafab.score import Job, score

    out, checkpoint = SCORES.directory(corpus.path, config.name), checkpoint.resolve()
    seal = store.read_manifest(checkpoint)["seal"]
    if (out / MANIFEST).exists():
        manifest = SCORES.read(out)
        known = {"checkpoint": manifest["seal"], "seq_len": manifest["seq_len"], "corpus": manifest["corpus"]}
        wanted = {"checkpoint": seal, "seq_len": seq_len, "corpus": corpus.fingerprint}
        other = ", ".join(f"another {word}" for word, value in wanted.items() if known[word] != value)
        if other:
            fix = "give another name=, or remove it"
            raise ConfigError(f"name={config.name}", f"scores there with {other}", "none, or the same", fix)
        print(f"{out} is there already")
        return 0
    threads = max(1, cores() // config.workers)
    job = Job(run, checkpoint, seal, corpus.path, out, seq_len, config.micro_batch, threads)
    meter: Meter | None = None

    def told(done: int, total: int) -> None:
        nonlocal meter
        meter = meter or Meter(f"scoring {corpus.path}", total, lambda count: f"{count:,.0f} tokens")
        meter.reach(done)

    with Pool(config.workers) as pool:
        scores, losses = score(job, pool.map, told)
    if meter:
        meter.close()
    for name, loss in losses.items():
        print(f"{name}: {loss:.4f} nats a token")
    print(f"wrote {scores.path}: techniques.token_selection.reference={config.name}")
    return 0
