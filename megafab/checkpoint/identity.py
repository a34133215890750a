"""What decides which samples a run sees, and in which order: the identity of its data.

It is kept beside the weights, in words that a person can compare. A resume with another identity would
repeat some samples and leave out others without a word, so it is refused with what differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megafab.checkpoint.changes import changes
from megafab.data.config import Packing
from megafab.data.format import Corpus
from megafab.data.plan import DataPlan
from megafab.data.skips import Skips

Identity = Mapping[str, Any]

# Settings of the identity by the keys of the configuration that they come from.
_SETTINGS = {
    **{"packing": "data.packing", "seed": "train.seed", "seq_len": "model.seq_len", "block": "data.block"},
    "difficulty": "the index of techniques.curriculum.difficulty",
}
# With another of these, the windows of a domain are others, or come in another order.
_ORDER = ("seq_len", "difficulty")


def identity(
    plan: DataPlan, *, weights: Sequence[float], packing: Packing, seed: int, seq_len: int, block: int
) -> dict[str, Any]:
    """The identity of a run's data, JSON-able.

    Args:
        plan: what is read, and in which order; of the corpus the training split counts.
        weights: of the mixture, by domain in the corpus' order.
        packing: how documents share a sequence.
        seed: of the order.
        seq_len: of the windows that a domain is cut into.
        block: samples in a row that come from one domain.
    """
    corpus = plan.corpus
    numbers = zip(corpus.domains, corpus.tokens("train"), corpus.documents("train"), strict=True)
    return {
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "vocab_size": corpus.vocab_size,
        "domains": {
            name: {"tokens": tokens, "documents": documents, "content": _content(corpus, index)}
            for index, (name, tokens, documents) in enumerate(numbers)
        },
        "mixture": dict(zip(corpus.domains, weights, strict=True)),
        "packing": packing.value,
        "seed": seed,
        "seq_len": seq_len,
        "block": block,
        "order_seeds": plan.order_seeds,
        "difficulty": plan.difficulty and plan.difficulty.fingerprint,
        "retrieval": plan.retrieval and plan.retrieval.facts,
    }


def differences(then: Identity, now: Identity) -> list[str]:
    """What a resume would change about the samples, one line each; empty: nothing."""
    return [*_of_tokenizer(then, now), *_of_domains(then["domains"], now["domains"]), *_of_order(then, now)]


def tokenizer_differences(then: Identity, now: Identity) -> list[str]:
    """What weights alone would find changed: each row of an embedding belongs to an id of one tokenizer.

    Empty: nothing, or `then` tells no tokenizer, as that of an import does not.
    """
    return list(_of_tokenizer(then, now)) if then else []


def carried_on(
    loader: Mapping[str, Any], fresh: Mapping[str, Any], then: Identity, now: Identity
) -> dict[str, Any]:
    """The loader's state where a run goes on with other data on purpose.

    Samples are counted on, and those that were passed over stay so. A domain continues where it was if its
    windows are still the same ones in the same order, and begins anew otherwise.

    Args:
        loader: its state in the checkpoint.
        fresh: its state at the beginning of this run.
        then, now: the identities.
    """
    same_order = all(then[name] == now[name] for name in _ORDER)

    def count(name: str) -> int:
        seeds = [one["order_seeds"].get(name, one["seed"]) for one in (then, now)]
        same = same_order and seeds[0] == seeds[1] and then["domains"].get(name) == now["domains"][name]
        return loader["counts"][name] if same else 0

    skipped = Skips.of(pair for pairs in loader.get("skips", {}).values() for pair in pairs)
    same_domains = list(then["domains"]) == list(now["domains"])
    clusters = {}
    if "clusters" in fresh:
        clusters["clusters"] = {
            n: loader["clusters"][n] if count(n) else fresh["clusters"][n] for n in fresh["counts"]
        }
    return {
        **fresh,
        **clusters,
        "samples": loader["samples"],
        "counts": {name: count(name) for name in fresh["counts"]},
        "skips": {"given": [], "found": skipped.before(loader["samples"]).pairs},
        # Its weights go by the order of domains.
        "mixture_log": loader["mixture_log"] if same_domains else [],
    }


def _short(value: Any) -> Any:
    """Of a hash the first digits, which people compare."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _content(corpus: Corpus, domain: int) -> str:
    """A hash of the ids of one domain's training split; 16 hexadecimal digits, to be read by people."""
    shards = corpus.manifest["domains"][domain]["splits"]["train"]["shards"]
    text = " ".join(shard["bin_sha256"] for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_tokenizer(then: Identity, now: Identity) -> Iterator[str]:
    if then["tokenizer"] != now["tokenizer"]:
        old, new = (f"{one['tokenizer'][:12]} ({one['vocab_size']:,} ids)" for one in (then, now))
        yield f"tokenizer {old} is now {new}"


def _of_domains(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*then, *now)):
        if name not in then:
            yield f"domain {name} ({now[name]['tokens']:,} tokens) is new"
        elif name not in now:
            yield f"domain {name} ({then[name]['tokens']:,} tokens) is gone"
        elif then[name]["tokens"] != now[name]["tokens"]:
            yield f"domain {name} had {then[name]['tokens']:,} tokens and has {now[name]['tokens']:,}"
        elif then[name]["content"] != now[name]["content"]:
            yield f"domain {name} has other content of the same length ({now[name]['tokens']:,} tokens)"
    if list(then) != list(now) and then.keys() == now.keys():
        yield f"the domains were in the order {', '.join(then)} and are in the order {', '.join(now)}"


def _of_order(then: Identity, now: Identity) -> Iterator[str]:
    for name in dict.fromkeys((*then["mixture"], *now["mixture"])):
        old, new = (one["mixture"].get(name, 0.0) for one in (then, now))
        if old != new:
            yield f"the weight of {name} was {old:.6g} and is {new:.6g}"
    for name, key in _SETTINGS.items():
        if then[name] != now[name]:
            yield f"{key} was {then[name]} and is {now[name]}"
    old, new = (one.get("retrieval") or {} for one in (then, now))
    if bool(old) != bool(new):
        yield "neighbours are read now, and were not" if new else "no neighbours are read any more"
    else:
        for key, was, now_is in changes(old, new):
            yield f"data.retrieval, {key}: was {_short(was)} and is {_short(now_is)}"
    for name in dict.fromkeys((*then["order_seeds"], *now["order_seeds"])):
        old, new = (one["order_seeds"].get(name, one["seed"]) for one in (then, now))
        if old != new:
            yield f"the order of {name} was that of seed {old} and is that of seed {new}"
