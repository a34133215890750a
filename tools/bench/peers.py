"""Training speed of one small Llama in megafab and in its peers, on a CPU.

    python tools/bench/peers.py [--rounds 3] [--seconds 3] [--cases megafab,litgpt] [--out FILE]

The same shapes, random tokens, global batch in two micro-batches, AdamW and clipping at norm 1.0:

- megafab: one rank through its engine; bf16 weights with fp32 masters and gradients.
- litgpt: its GPT in a plain loop; bf16 by autocast, its own default ("bf16-mixed").
- transformers: LlamaForCausalLM in a plain loop; bf16 by autocast.
- Trainer: LlamaForCausalLM through transformers.Trainer as it comes, with `bf16=True`.
- bf16-true: litgpt and transformers with weights and Adam's moments in bf16, which is less work and a
  worse training; for orientation only.

AdamW is fused in all of them. A process measures one case at one precision; processes take turns for
`--rounds` rounds, one at a time. A block is two steps, and the fastest block counts. On a machine that is
not idle, `tokens_per_cpu_second` with one thread is the number to compare.
Peers are optional: pip install 'megafab[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

BLOCK = 2  # steps
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
MICRO_BATCHES = common.GLOBAL_BATCH // common.MICRO_BATCH
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, EPS = 4, 192, 8, 4, 512, 1e-5  # conf/model/llama_tiny.yaml
PRECISIONS = ("fp32", "bf16", "bf16-true")
THREADS = (1, 2)

Step = Callable[[], object]


def megafab(precision: str) -> Step:
    """A step of the engine, as `megafab.train.fit` calls it."""
    from megafab.platform import platform

    platform.start(0)
    import tempfile

    import torch

    from megafab.build import build
    from megafab.config import load
    from megafab.engine.base import nll_only
    from megafab.run import Batch, Progress, Verdict

    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus", tokens=10_000)
        settings = [
            f"train.precision={precision}",
            "train.steps=1000",
            f"optim.weight_decay={WEIGHT_DECAY}",
            f"data.path={corpus.path}",
            "tracking=none",
            "eval.samples=0",
            "eval.every=0",
        ]
        config = load.load([*common.TINY, *settings])
        c = config.model
        found = (c.layers, c.hidden, c.heads, c.kv_heads, c.ffn, c.norm_eps, config.optim.clip)
        assert found == (LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, EPS, CLIP), found
        run = build(config, ranks=1)
    engine, plan = run.engine, run.schedules.at(Progress(step=100))
    tokens = torch.randint(0, common.VOCAB, (common.GLOBAL_BATCH, common.SEQ_LEN))
    batch = Batch(
        tokens_BL=tokens,
        labels_BL=tokens.roll(-1, 1),
        loss_mask_BL=torch.ones(tokens.shape),
        position_BL=torch.arange(common.SEQ_LEN).expand(tokens.shape),
        document_BL=torch.zeros(tokens.shape, dtype=torch.int32),
        domain_B=torch.zeros(common.GLOBAL_BATCH, dtype=torch.int64),
        sample_B=torch.arange(common.GLOBAL_BATCH),
    )

    def step() -> None:
        engine.forward_backward(batch, plan, nll_only)
        engine.update(plan, Verdict(), engine.gradient_stats())

    return step


def litgpt(precision: str) -> Step:
    """litgpt's GPT and its own cross-entropy."""
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=common.SEQ_LEN,
        n_layer=LAYERS,
        n_embd=HIDDEN,
        n_head=HEADS,
        n_query_groups=KV_HEADS,
        vocab_size=common.VOCAB,
        padded_vocab_size=common.VOCAB,
        norm_class_name="RMSNorm",
        norm_eps=EPS,
        mlp_class_name="LLaMAMLP",
        intermediate_size=FFN,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)

    def loss(tokens_BL: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(model(tokens_BL)[:, :-1], tokens_BL[:, 1:], chunk_size=0)

    return plain_loop(model, loss, precision)


def transformers(precision: str) -> Step:
    """LlamaForCausalLM in the same plain loop."""
    model = llama()
    return plain_loop(model, lambda tokens_BL: model(input_ids=tokens_BL, labels=tokens_BL).loss, precision)


def plain_loop(model: Any, loss: Callable[[Any], Any], precision: str) -> Step:
    """What a short script would do, with everything that makes it fast on a CPU."""
    import torch

    if precision == "bf16-true":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    micro = torch.randint(0, common.VOCAB, (MICRO_BATCHES, common.MICRO_BATCH, common.SEQ_LEN))
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for tokens_BL in micro:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = loss(tokens_BL)
            (value / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def llama() -> Any:
    """transformers' model of the same shape, with its default attention (SDPA)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=common.VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=common.SEQ_LEN,
            rms_norm_eps=EPS,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def trainer_blocks(precision: str, seconds: float) -> list[common.Clock]:
    """Seconds of each block of steps inside transformers.Trainer.train."""
    import tempfile

    import torch
    import transformers as hf

    tokens = torch.randint(0, common.VOCAB, (4096, common.SEQ_LEN))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    ends: list[common.Clock] = []

    class Times(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            ends.append(common.clock())
            control.should_training_stop = ends[-1][0] - ends[0][0] > seconds and len(ends) > 3 * BLOCK

    with tempfile.TemporaryDirectory() as scratch:
        arguments = hf.TrainingArguments(
            output_dir=scratch,
            use_cpu=True,
            bf16=precision == "bf16",
            per_device_train_batch_size=common.MICRO_BATCH,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            learning_rate=LR,
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_steps=100_000,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        hf.Trainer(model=llama(), args=arguments, train_dataset=data, callbacks=[Times()]).train()
    return [common.passed(ends[i], ends[i + BLOCK]) for i in range(BLOCK, len(ends) - BLOCK, BLOCK)]


def loop_blocks(step: Step, seconds: float) -> list[common.Clock]:
    """Seconds of each block of steps, after one that warms up."""
    ends: list[common.Clock] = []
    while len(ends) < 4 or ends[-1][0] - ends[0][0] < seconds:
        for _ in range(BLOCK):
            step()
        ends.append(common.clock())
    return [common.passed(*pair) for pair in itertools.pairwise(ends)]


LOOPS = {"megafab": megafab, "litgpt": litgpt, "transformers": transformers}
CASES = {
    "megafab": ("fp32", "bf16"),
    "litgpt": ("fp32", "bf16", "bf16-true"),
    "transformers": ("fp32", "bf16", "bf16-true"),
    "Trainer": ("fp32", "bf16"),
}


def measure(case: str, precision: str, threads: Sequence[int], seconds: float) -> dict[int, common.Clock]:
    """The fastest block of one case by number of threads: its least wall and its least CPU seconds."""
    import torch

    torch.manual_seed(1)
    step = None if case == "Trainer" else LOOPS[case](precision)
    best = {}
    for count in threads:
        torch.set_num_threads(count)
        blocks = trainer_blocks(precision, seconds) if step is None else loop_blocks(step, seconds)
        wall, cpu = zip(*blocks, strict=True)
        best[count] = min(wall), min(cpu)
    return best


def require_peers(cases: list[str]) -> None:
    """Leave with one line when a peer is not installed."""
    needs = {
        "litgpt": ("litgpt",),
        "transformers": ("transformers",),
        "Trainer": ("transformers", "accelerate"),
    }
    wanted = {package for case in cases for package in needs.get(case, ())}
    missing = sorted(package for package in wanted if importlib.util.find_spec(package) is None)
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; pip install 'megafab[bench]', or choose --cases")


def main() -> None:
    """Every case in processes of its own, in turns; one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one case at one number of threads")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument("--out", type=Path, default=common.RESULTS / "peers.json")
    parser.add_argument("--one", action="store_true", help="this case, here, to stdout")
    options = parser.parse_args()
    names, precisions = options.cases.split(","), options.precisions.split(",")
    threads = [int(count) for count in options.threads.split(",")]
    if options.one:
        print(json.dumps(measure(names[0], precisions[0], threads, options.seconds)))
        return
    require_peers(names)
    rounds: dict[tuple[str, str, int], list[common.Clock]] = {}
    for _ in range(options.rounds):
        for precision in precisions:
            for name in (n for n in names if precision in CASES[n]):
                case = [f"--cases={name}", f"--precisions={precision}"]
                settings = [f"--threads={options.threads}", f"--seconds={options.seconds}"]
                for count, best in common.run(__file__, "--one", *case, *settings).items():
                    rounds.setdefault((name, precision, int(count)), []).append(best)
    result = {
        "command": f"python tools/bench/peers.py --rounds={options.rounds} --seconds={options.seconds}",
        "model": common.TINY_TEXT,
        "machine": common.facts(),
        "versions": {p: common.version(p) for p in ("litgpt", "transformers", "accelerate")},
        "cases": [_case(*key, best) for key, best in rounds.items()],
    }
    common.save(result, options.out)
    print(report(result))


def _case(name: str, precision: str, threads: int, rounds: Sequence[common.Clock]) -> dict[str, Any]:
    tokens = BLOCK * common.GLOBAL_BATCH * common.SEQ_LEN
    wall, cpu = zip(*rounds, strict=True)
    return {
        "case": name,
        "precision": precision,
        "threads": threads,
        "tokens_per_second": round(tokens / min(wall)),
        "tokens_per_cpu_second": round(tokens / min(cpu)),
        "by_round": [round(tokens / seconds) for seconds in wall],
    }


def report(result: dict[str, Any]) -> str:
    """Tokens per second as a Markdown table: a row for each case, a column for each setting."""
    cases = result["cases"]
    settings = sorted({(c["threads"], c["precision"]) for c in cases}, key=lambda s: (s[1], s[0]))
    speed = {(c["case"], c["threads"], c["precision"]): c["tokens_per_second"] for c in cases}
    names = [name for name in CASES if any(c["case"] == name for c in cases)]
    rows = [[name, *(speed.get((name, *setting), "") for setting in settings)] for name in names]
    header = ["tokens/s", *(f"{p}, {t} thread{'s' * (t > 1)}" for t, p in settings)]
    return common.markdown(header, rows)


if __name__ == "__main__":
    main()
