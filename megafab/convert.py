"""To and from Hugging Face: whole conversions, streamed tensor by tensor and then judged.

A conversion stands only when (1) what was written, read back and put together again, equals the source bit
for bit (in the exported number type), and (2) `transformers` and megafab, each running its own code on its
own files, predict the same tokens: the Kullback-Leibler divergence of their next-token distributions stays
below a threshold. Else nothing is left behind.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megafab import judge
from megafab.checkpoint import hf, provenance, safetensors, tools, writer
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.checkpoint.store import TECHNIQUES, WEIGHT
from megafab.config.ckpt import ConvertConfig, ExportType, Weights
from megafab.config.overrides import model_overrides
from megafab.config.schema import RunConfig
from megafab.config.tree import build, to_tree
from megafab.data import hf_tokenizer
from megafab.data.format import Corpus
from megafab.data.tokenizer import Tokenizer
from megafab.errors import UserError
from megafab.model.config import ModelConfig
from megafab.model.names import parameter_shapes
from megafab.model.shape import ModelShape
from megafab.run import Progress
from megafab.techniques.ema import EMA
from megafab.telemetry.meter import Meter, size

_DTYPES = {ExportType.fp32: torch.float32, ExportType.bf16: torch.bfloat16, ExportType.fp16: torch.float16}
# In fp32 only the order of sums differs: 3e-16 for a tiny Llama after two steps, 1e-12 with large weights.
# Mistakes cost more even there: 2e-6 for an epsilon of 1e-6 in place of 1e-5, 6e-7 for permuted query heads.
# Rounding to 16 bits costs 1e-7 there, and grows with the model's confidence.
_MAX_KL = {ExportType.fp32: 1e-8, ExportType.bf16: 1e-2, ExportType.fp16: 1e-2}
_FILE_BYTES = 5_000_000_000  # of a safetensors file, as `transformers` cuts them
_TRIAL = 2000  # tokens of each domain that a translated tokenizer is tried on

Say = Callable[[str], None]


def to_hf(path: Path, settings: ConvertConfig, say: Say) -> None:
    """Export the checkpoint at `path` into the directory `settings.to`.

    Raises:
        UserError: a model that `transformers` does not have, a damaged checkpoint, a verdict against it.
    """
    reader = tools.open_intact(path)
    config = build(RunConfig, dict(reader.state["config"]))
    weights = _chosen(reader, settings.weights)
    shape = ModelShape.of(config.model, weights.infos["embedding.word_embeddings.weight"].shape[0])
    architecture = hf.expressing(shape)
    pairs = list(architecture.pairs(shape))
    _require_all(weights, pairs, architecture.name)
    _require_memory(settings, weights)
    corpus, missing = judge.corpus(settings.data, reader.state)
    if corpus is None:
        say(f"no tokenizer is written: {missing}")
    kind, to = settings.dtype or ExportType.fp32, Path(settings.to)
    dtype = _DTYPES[kind]
    with writer.fresh_directory(to) as draft:
        _write_tensors(draft, weights, pairs, dtype, settings.max_bytes or _FILE_BYTES)
        eod = corpus.eod if corpus else None
        own = {
            "architectures": [architecture.name],
            "model_type": architecture.model_type,
            "bos_token_id": eod,  # a document begins after the end of another
            "eos_token_id": eod,
            "dtype": str(dtype).removeprefix("torch."),
        }
        _write_json(draft / "config.json", {**own, **architecture.config(shape)})
        _write_json(draft / "generation_config.json", {"bos_token_id": eod, "eos_token_id": eod})
        if corpus:
            texts = _texts(corpus)
            done = hf_tokenizer.export(corpus.tokenizer_dir, draft, seq_len=config.model.seq_len, texts=texts)
            say(f"tokenizer: {done}")
        _require_equal(safetensors.Files(draft), weights, pairs, dtype)
        say(f"read back: {len(pairs)} tensors of {kind.value} equal the {weights.what}, bit for bit")
        _judge(config, weights, draft, shape, corpus, settings, say)
    say(f"{to}: {architecture.name}, {size(sum(f.stat().st_size for f in to.iterdir()))}")


def from_hf(source: Path, settings: ConvertConfig, say: Say) -> None:
    """Make a checkpoint of the model in the directory `source`, to begin a run with.

    Its weights are fp32 masters; there are no moments and no position in any data (`weights_only`).

    Raises:
        UserError: a model that megafab does not have, files that do not fit it, a verdict against it.
    """
    content = _read_json(source / "config.json")
    architecture = hf.architecture_of(content, f"{source / 'config.json'}")
    try:
        model = architecture.model(content, source.resolve().name)
    except KeyError as error:
        where, expected = str(source / "config.json"), f"what {architecture.name} needs"
        raise UserError(where, f"no {error.args[0]}", expected, "restore the file") from None
    shape = ModelShape.of(model)
    pairs = list(architecture.pairs(shape))
    files = _Import(source, architecture, pairs, shape)
    config = RunConfig(model=model)
    to = Path(settings.to)
    corpus = Corpus.open(settings.data) if settings.data else None
    with writer.fresh_directory(to) as draft:
        made = writer.write(draft, 0, files.tensors, files.band, _first_state(source, architecture, model))
        weights = _Weights(Reader(made), WEIGHT, "masters")
        _require_memory(settings, weights)
        _require_equal(files.files, weights, pairs, None)
        say(f"read back: {len(pairs)} tensors equal the files, bit for bit")
        _judge(config, weights, source, shape, corpus, settings, say)
    checkpoint = to / made.relative_to(draft)
    say(f"{checkpoint}: {shape.parameters:,} parameters. To begin a run with it:")
    say(f"megafab train start.checkpoint={checkpoint} {' '.join(model_overrides(model))} data.path=DIR")


class _Weights:
    """One set of weights in a checkpoint.

    Args:
        reader: of the checkpoint.
        prefix: what stands before their global names.
        what: they are, for people.
    """

    def __init__(self, reader: Reader, prefix: str, what: str) -> None:
        self.path, self.prefix, self.what = reader.path, prefix, what
        self.infos = reader.named(prefix)
        self._reader = reader

    def read(self, name: str) -> torch.Tensor:
        """One of them by its global name, on the host."""
        return self._reader.read(self.prefix + name)


def _chosen(reader: Reader, kind: Weights) -> _Weights:
    if kind is Weights.trained:
        return _Weights(reader, WEIGHT, "masters")
    average = _Weights(reader, f"{TECHNIQUES}{EMA.name}/", "average")
    updates = reader.state["techniques"].get(EMA.name, {}).get("updates", 0)
    if not average.infos or not updates:
        raise UserError(
            f"weights=ema, {reader.path}",
            "no average of the weights",
            "one, as a run with technique=[ema] keeps it",
            "leave weights out, or name a checkpoint of such a run",
        )
    return average


def _require_all(weights: _Weights, pairs: Sequence[hf.Pair], name: str) -> None:
    odd = sorted(weights.infos.keys() ^ {pair.ours for pair in pairs})
    if odd:
        kind = "a weight" if odd[0] in weights.infos else "no weight"
        expected = f"the weights that {name} has"
        fix = (
            "export a checkpoint of the model as its configuration says, without techniques that add weights"
        )
        raise UserError(str(weights.path), f"{kind} {odd[0]}", expected, fix)


def _require_memory(settings: ConvertConfig, weights: _Weights) -> None:
    """One model in fp32 at a time, and its logits."""
    if not settings.judge:
        return
    needed = sum(info.nbytes for info in weights.infos.values())
    fix = "convert on a larger machine, or set judge=false and compare later"
    judge.require_memory("judge=true", needed, "to run the models", fix)


def _texts(corpus: Corpus) -> list[str]:
    """The beginning of every domain, and what tokenizers stumble over."""
    tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    streams = [corpus.domain("train", index) for index in range(len(corpus.domains))]
    parts = [stream.read(0, min(_TRIAL, stream.tokens)).tolist() for stream in streams if stream.tokens]
    texts = [tokenizer.decode(part) for part in parts]
    return [*texts, "  two  spaces\n\n\ttab \u00e9\u4e2d\U0001f642 12345 ", ""]


def _write_tensors(
    draft: Path, weights: _Weights, pairs: Sequence[hf.Pair], dtype: torch.dtype, max_bytes: int
) -> None:
    entries: dict[str, safetensors.Entry] = {}
    for pair in pairs:
        like = torch.empty(weights.infos[pair.ours].shape, device="meta")
        for name, part in zip(pair.theirs, pair.split(like), strict=True):
            entries[name] = safetensors.Entry(tuple(part.shape), dtype)
    meter = Meter("export", sum(entry.nbytes for entry in entries.values()))

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in pairs:
            parts = pair.split(weights.read(pair.ours))
            for name, part in zip(pair.theirs, parts, strict=True):
                yield name, part.to(dtype)
                meter.add(entries[name].nbytes)

    safetensors.write(draft, entries, values(), max_bytes)
    meter.close()


class _Import:
    """The tensors of a directory for `transformers` as ours: checked at once, read when asked for.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model.
    """

    def __init__(
        self, source: Path, architecture: hf.Architecture, pairs: Sequence[hf.Pair], shape: ModelShape
    ) -> None:
        self.files = safetensors.Files(source)
        bare = self.files.entries.keys() & {
            name.removeprefix(architecture.prefix) for pair in pairs for name in pair.theirs
        }
        if bare and not any(name.startswith(architecture.prefix) for name in self.files.entries):
            self.files.rename(lambda name: name if name in _HEADS else architecture.prefix + name)
        self._pairs = {WEIGHT + pair.ours: pair for pair in pairs}
        self._held: tuple[str, torch.Tensor] | None = None
        self._check_names(source, architecture, shape)
        sizes = parameter_shapes(shape)
        self.tensors = {WEIGHT + name: TensorInfo(sizes[name], torch.float32, 1) for name in sizes}
        self._check_shapes(source)
        self._meter = Meter("import", sum(info.nbytes for info in self.tensors.values()))

    def _check_names(self, source: Path, architecture: hf.Architecture, shape: ModelShape) -> None:
        wanted = {name for pair in self._pairs.values() for name in pair.theirs}
        left = {
            name for name in self.files.entries.keys() - wanted if not name.endswith(architecture.ignored)
        }
        if shape.config.tied_embeddings:
            left -= self._copies_of_embedding()
        missing = sorted(wanted - self.files.entries.keys())
        if missing or left:
            found = f"no tensor {missing[0]}" if missing else f"a tensor {min(left)} without a place in it"
            expected = f"the tensors of {architecture.name} as config.json describes it"
            raise UserError(str(source), found, expected, "restore the directory")

    def _copies_of_embedding(self) -> set[str]:
        """The output layer's tensor, where a file has it although it is tied."""
        embedding = self._pairs[f"{WEIGHT}embedding.word_embeddings.weight"].theirs[0]
        return {
            name
            for name in _HEADS & self.files.entries.keys()
            if torch.equal(self.files.read(name), self.files.read(embedding))
        }

    def _check_shapes(self, source: Path) -> None:
        for name, pair in self._pairs.items():
            like = pair.split(torch.empty(self.tensors[name].shape, device="meta"))
            for their, part in zip(pair.theirs, like, strict=True):
                found, expected = self.files.entries[their].shape, tuple(part.shape)
                if found != expected:
                    where, fix = f"{source}, tensor {their}", "restore the directory"
                    raise UserError(where, f"shape {found}", f"{expected}, by config.json", fix)

    def band(self, name: str, band: tuple[int, int]) -> torch.Tensor:
        """Rows of one of our tensors in fp32; the last tensor is held, since its bands come in a row."""
        if self._held is None or self._held[0] != name:
            self._held = None  # let go of one before there is another
            pair = self._pairs[name]
            self._held = name, pair.join([self.files.read(their) for their in pair.theirs])
        rows = self._held[1][band[0] : band[0] + band[1]].float()
        self._meter.add(rows.nbytes)
        return rows


_HEADS = {"lm_head.weight", "embed_out.weight"}


def _require_equal(
    files: safetensors.Files, weights: _Weights, pairs: Sequence[hf.Pair], dtype: torch.dtype | None
) -> None:
    """What is in the files, joined, is what is in the checkpoint, in `dtype` (None: that of the files)."""
    for pair in pairs:
        theirs = pair.join([files.read(name) for name in pair.theirs])
        ours = weights.read(pair.ours)
        ours, theirs = (ours.to(dtype), theirs) if dtype else (ours, theirs.float())
        if not torch.equal(_bits(ours), _bits(theirs)):
            raise UserError(
                f"tensor {pair.ours}",
                "other values in the copy than in the source",
                "the same bits",
                "look for a disk or memory that fails, and convert again",
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _judge(
    config: RunConfig,
    weights: _Weights,
    directory: Path,
    shape: ModelShape,
    corpus: Corpus | None,
    settings: ConvertConfig,
    say: Say,
) -> None:
    """Run both models on the same tokens, one after the other, and hold their logits together."""
    if not settings.judge:
        say("judge=false: the logits were not compared")
        return
    if importlib.util.find_spec("transformers") is None:
        say("transformers is not installed: the logits were not compared (pip install 'megafab[eval]')")
        return
    tokens, what = judge.text(corpus, seq_len=shape.config.seq_len, vocab=shape.vocab)
    ours = judge.logits(config, weights.path, tokens, shape.vocab, prefix=weights.prefix)
    theirs = _their_logits(directory, tokens)
    found = judge.compare(ours, theirs)
    usual = _MAX_KL[settings.dtype or ExportType.fp32]
    limit = usual if settings.max_kl is None else settings.max_kl
    say(
        f"logits on {tokens.numel()} tokens of {what}: KL {found.kl:.2e} (at most {limit:.0e}), "
        f"largest difference {found.max_abs:.2e}"
    )
    if not found.kl <= limit:
        raise UserError(
            f"max_kl={limit:.0e}",
            f"a divergence of {found.kl:.2e} nats a token between the two models",
            "models that predict the same",
            "report it, with the model's configuration; for 16 bits a larger max_kl may be right",
        )


@torch.no_grad()
def _their_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, loading = loaded
    odd = [f"{kind} {name}" for kind in ("missing_keys", "unexpected_keys") for name in loading[kind]]
    if odd:
        fix = "report it, with the version of transformers"
        raise UserError(str(directory), f"{odd[0]} for transformers", "every tensor taken", fix)
    return model.eval()(tokens).logits.float()


def _first_state(source: Path, architecture: hf.Architecture, model: ModelConfig) -> dict[str, Any]:
    """The state of a checkpoint that no run has written yet."""
    now = provenance.now()
    entry = {"from": str(source.resolve()), "step": 0, "written_at": now}
    return {
        "weights_only": True,
        "progress": asdict(Progress()),
        "loader": {},
        "engine": {},
        "techniques": {},
        "data": {},
        "config": {"model": to_tree(model)},
        "topology": {},
        "versions": provenance.versions(),
        "written_at": now,
        "lineage": [{**entry, "operation": f"import of {architecture.name}"}],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        found, fix = error.strerror or str(error), "name a directory that save_pretrained wrote"
        raise UserError(str(path), found, "the model's configuration", fix) from error
    except ValueError as error:
        raise UserError(str(path), f"damaged content ({error})", "JSON", "restore the file") from None
