"""The tables of results/*.json in Markdown, as the README shows them.

    python tools/bench/table.py [overhead] [peers] [startup] [loader] [data_build] [checkpoint] [optimizers]
        [engines] [token_dropping] [linear_cross_entropy] [data_techniques] [retrieval] [retro]

Without a name, all that have a result. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import checkpoint
import common
import data_techniques
import engines
import linear_cross_entropy
import optimizers
import overhead
import peers
import retrieval
import retro
import startup
import token_dropping


def loader(result: dict[str, Any]) -> str:
    """Tokens per second of the loader, beside Megatron's dataset where it was measured."""
    megatron = {(m["seq_len"], m["batch"]): m["tokens_per_second"] for m in result["megatron_gpt_dataset"]}
    rows = [
        [
            f"{case['seq_len']} x {case['batch']}, {case['packing']}",
            case["tokens_per_second"],
            megatron.get((case["seq_len"], case["batch"]), ""),
        ]
        for case in result["loader"]
        if not case["prefetch"]
    ]
    return common.markdown(["sequence x batch, packing", "loader, tokens/s", "GPTDataset, tokens/s"], rows)


def data_build(result: dict[str, Any]) -> str:
    """Speed of the tokenize stage beside SentencePiece alone."""
    rows = []
    for name in ("sentencepiece", "megafab"):
        speed = result[f"{name}_speed"]
        rows.append([name, round(speed["tokens_per_cpu_second"]), round(speed["tokens_per_wall_second"])])
    return common.markdown(["tokenizing", "tokens per CPU second", "tokens per second"], rows)


REPORTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "overhead": overhead.report,
    "peers": peers.report,
    "startup": startup.report,
    "loader": loader,
    "data_build": data_build,
    "checkpoint": checkpoint.report,
    "optimizers": optimizers.report,
    "linear_cross_entropy": linear_cross_entropy.report,
    "engines": engines.report,
    "token_dropping": token_dropping.report,
    "data_techniques": data_techniques.report,
    "retrieval": retrieval.report,
    "retro": retro.table,
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*REPORTS, []], help="default: all")
    names = parser.parse_args().names or [n for n in REPORTS if (common.RESULTS / f"{n}.json").exists()]
    for name in names:
        result = json.loads((common.RESULTS / f"{name}.json").read_text())
        print(f"{name} (`{result.get('command', f'python tools/bench/{name}.py')}`)\n")
        print(REPORTS[name](result), end="\n\n")


if __name__ == "__main__":
    main()
