"""What `train.head_chunk` saves: the last product, its loss and gradients, by whole logits and by chunks.

    python tools/bench/linear_cross_entropy.py [--tokens 4096] [--hidden 128] [--vocab 131072] [--chunk 64]
        [--threads 1] [--rounds 3] [--out FILE]

Each way runs in a process of its own; `growth` is how far its peak of resident memory rises above what the
inputs take, the gradients of hidden states and matrix included, in the first of its passes. `seconds` is the
fastest forward and backward pass. The plain path is that of a plain loss, which makes loss and gradient in
one go.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import common

WAYS = ("plain", "chunked")
MIB = 2**20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Memory and time of one way, in this process."""
    import torch

    from megafab.platform import platform

    platform.start(0, options.threads)
    from megafab.loss.head import LossHead
    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    group = topology.initialize(Mesh(1), seed=0).tensor
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, 1, options.hidden, generator=generator).requires_grad_()
    weight = torch.randn(options.vocab, options.hidden, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(options.vocab, (options.tokens, 1), generator=generator)
    head = LossHead(group, options.chunk if options.way == "chunked" else None)
    expected = torch.tensor(1.0 / options.tokens)

    def once() -> float:
        hidden.grad = weight.grad = None
        began = time.perf_counter()
        layer = head.layer(labels)
        output = hidden @ weight.t() if layer is None else layer(hidden, weight, False)
        total = head.losses(output, labels, expected=expected).nll.sum() * expected
        total.backward()
        return time.perf_counter() - began

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    tiny = torch.ones(8, 8).requires_grad_()
    (tiny @ tiny).sum().backward()  # what the libraries take is no part of it
    before = peak()
    once()
    growth = peak() - before
    return {
        "way": options.way,
        "growth_mib": round(growth / MIB, 1),
        "seconds": round(min(once() for _ in range(options.rounds)), 3),
    }


def main() -> None:
    """Measure both ways and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="only this one, to stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "linear_cross_entropy.json")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    names = ("tokens", "hidden", "vocab", "chunk", "threads", "rounds")
    sizes = {name: getattr(options, name) for name in names}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    result = {
        "command": f"python tools/bench/linear_cross_entropy.py {' '.join(arguments)}",
        "machine": common.facts(),
        "sizes": sizes,
        "logits_mib": options.tokens * options.vocab * 4 / MIB,
        "weight_gradient_mib": options.vocab * options.hidden * 4 / MIB,
        "ways": [common.run(__file__, *arguments, f"--way={way}") for way in WAYS],
    }
    common.save(result, options.out)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    rows = [
        [way["way"], way["growth_mib"], way["growth_mib"] / result["logits_mib"], way["seconds"]]
        for way in result["ways"]
    ]
    header = ["logits", "memory above the inputs, MiB", "of the whole logits", "forward and backward, s"]
    return common.markdown(header, rows)


if __name__ == "__main__":
    main()
