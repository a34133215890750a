"""The kernels on a GPU: built, checked against float64, timed beside their peers, and in whole models.

    python tools/bench/kernels.py [--parts build,check,time,train] [--models NAMES] [--engines NAMES]
        [--out FILE] [--rehearse]

- build: compiles the library for this GPU.
- check: every case of `kernel_cases.py` in fp32, bf16 and fp16 against the reference in float64 on the CPU.
- time: `kernel_peers.py` in bf16 in this process: the median of 50 runs by device events, a cache's worth of
  other bytes written before each, in GB/s of the bytes that have to cross memory, beside the bandwidth of a
  copy of 4 GiB (read and written) in the same process; and the peak of memory beyond what was there.
- train: 20 steps with kernels and with the reference, in fp32 and bf16, whose losses must agree; then
  tokens/s and MFU in bf16 of Llamas of 125M, 1B and six layers of 8B, in both engines, with kernels, with the
  reference and with logits by chunks, and of transformers' same model, compiled, with Liger's kernels where
  they are installed. Each in a process of its own, random tokens. FLOPs by `ModelShape.flops_per_token`: full
  attention.

`--rehearse` runs all of it but the build on a CPU, at sizes without meaning: to see that it runs.
Peers are optional: pip install 'megafab[bench]'; apex is built from its repository.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # megafab, where it is not installed

import common  # noqa: E402

ROUNDS = 50
SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-3}  # nats, over 20 steps
# Model, sequence, sequences of a micro-batch, other settings.
MODELS = {
    "125M": ("llama_125m", 1024, 32, ()),
    "1B": ("llama_1b", 2048, 8, ()),
    "8B with 6 layers": ("llama_8b", 4096, 4, ("model.layers=6",)),
}
GOALS = {
    "125M": {"tokens_per_second": 460_000},
    "1B": {"tokens_per_second": 45_000},
    "8B with 6 layers": {"mfu": 0.5},
}


Save = Callable[[dict[str, Any]], None]  # writes what a part has found so far: a run may be cut off


class Device:
    """The GPU, or the CPU that rehearses."""

    def __init__(self, *, rehearsal: bool) -> None:
        import torch

        self.rehearsal = rehearsal
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self._rounds = 2 if rehearsal else ROUNDS
        if not rehearsal:
            properties = torch.cuda.get_device_properties(0)
            self._other = torch.empty(max(4 * properties.L2_cache_size, 1 << 28) // 4, device=self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """The median time of a run."""
        import torch

        for _ in range(3):
            run()
        if self.rehearsal:
            return statistics.median(_wall(run) for _ in range(self._rounds))
        times = []
        for _ in range(self._rounds):
            self._other.zero_()
            # The device waits until the run is queued, so that no launch is timed from the host.
            torch.cuda._sleep(20_000_000)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes allocated at the most during a run, beyond those before."""
        import torch

        if self.rehearsal:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy, read and written."""
        import torch

        size = 1 << (20 if self.rehearsal else 32)
        a, b = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        a.random_()
        return 2 * size / self.seconds(lambda: b.copy_(a))

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on."""
        import torch

        found = common.facts()
        if not self.rehearsal:
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": properties.name,
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
            }
        peers = ("liger_kernel", "apex", "transformers", "triton")
        return found | {"peers": [p for p in peers if importlib.util.find_spec(p) is not None]}


def _wall(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def build_library(device: Device, save: Save) -> dict[str, Any]:
    """Seconds to compile the library, or to find it."""
    from megafab.kernels import build, dispatch
    from megafab.kernels.config import Kernels

    lacking = build.missing()
    if lacking is not None:
        sys.exit(f"the kernels need {lacking}")
    targets = [build.target_of_device()]
    found = build.library_path(targets).exists()
    begin = time.perf_counter()
    dispatch.set_up(Kernels.cuda)
    return {"target": targets[0], "already_built": found, "seconds": round(time.perf_counter() - begin, 1)}


def check(device: Device, save: Save) -> dict[str, Any]:
    """The largest error of each operator and type, in multiples of its tolerance."""
    import kernel_cases

    from megafab.kernels import ops

    worst: dict[str, float] = {}
    wrong = []
    for case in kernel_cases.CASES:
        for dtype in kernel_cases.DTYPES:
            given = kernel_cases.inputs(case, dtype, device.device)
            found = kernel_cases.results(case, ops.KERNELS, given)
            pairs = zip(found, kernel_cases.exact(case, given), strict=True)
            error = max((kernel_cases.error(a, b) for a, b in pairs), default=0.0) / case.tolerance(dtype)
            name = f"{case.ops[0]} {str(dtype).rpartition('.')[2]}"
            worst[name] = max(worst.get(name, 0.0), error)
            if not error <= 1:
                wrong.append(f"{case.name} {dtype}: {error:.2g} times its tolerance")
    return {"cases": len(kernel_cases.CASES), "wrong": wrong, "worst": worst}


def times(device: Device, save: Save) -> dict[str, Any]:
    """Every make of every subject."""
    import kernel_peers
    import torch

    copy = device.copy_bandwidth()
    sizes = kernel_peers.Sizes(device.device, torch.bfloat16, rehearsal=device.rehearsal)
    found = []
    for subject in kernel_peers.subjects(sizes):
        for timing in subject():
            makes = {make: _timed(device, timing.bytes, run, copy) for make, run in timing.runs.items()}
            entry = {"name": timing.name, "bytes": timing.bytes, "goal": timing.goal, "makes": makes}
            found.append({**entry, "floor_ms": timing.bytes / copy * 1e3})
            print(_line(found[-1]), flush=True)
            save({"copy_gb_per_second": copy / 1e9, "timings": found})
        gc.collect()
        torch._dynamo.reset()
    if not device.rehearsal:
        torch.cuda.empty_cache()
    return {"copy_gb_per_second": copy / 1e9, "timings": found}


def _timed(device: Device, size: int, run: Callable[[], object], copy: float) -> dict[str, Any]:
    """The numbers of one make, or why it gave none: a peer's failure is no reason to lose the rest."""
    try:
        seconds = device.seconds(run)
        return {
            "ms": seconds * 1e3,
            "gb_per_second": size / seconds / 1e9,
            "of_copy": size / seconds / copy,
            "memory_peak": device.peak(run),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _ms(found: dict[str, Any]) -> str:
    return f"{found['ms']:.3f}" if "ms" in found else "failed"


def _line(entry: dict[str, Any]) -> str:
    makes = ", ".join(f"{make} {_ms(found)}" for make, found in entry["makes"].items())
    return f"{entry['name']}: floor {entry['floor_ms']:.3f} ms; {makes}"


def train(device: Device, save: Save, models: list[str], engines: list[str]) -> dict[str, Any]:
    """Losses with and without kernels; speed of whole models."""
    choices = ("reference",) if device.rehearsal else ("cuda", "reference")
    extra = ("--rehearse",) if device.rehearsal else ()
    same: list[dict[str, Any]] = []
    speeds: list[dict[str, Any]] = []
    result = {"same_losses": same, "speeds": speeds, "goals": GOALS}
    for precision, limit in SAME_LOSS.items():
        losses = [common.run(__file__, "--losses", k, precision, *extra) for k in choices]
        apart = max(abs(a - b) for a, b in zip(losses[0], losses[-1], strict=True))
        same.append({"precision": precision, "apart": apart, "limit": limit, "losses": losses[0]})
        save(result)
    for model in models:
        cases: list[tuple[str, tuple[str, ...]]] = [
            (f"{engine}, {kernels}", ("--speed", model, engine, kernels))
            for engine in engines
            for kernels in (*choices, f"{choices[0]} train.head_chunk={8 if device.rehearsal else 2048}")
        ]
        if importlib.util.find_spec("transformers") is not None:
            cases.append(("transformers", ("--peer", model)))
        for case, arguments in cases:
            try:
                found = common.run(__file__, *arguments, *extra)
            except subprocess.CalledProcessError as error:  # said on stderr; the others go on
                found = {"error": f"exit code {error.returncode}"}
            speeds.append({"model": model, "case": case, **found})
            print(speeds[-1], flush=True)
            save(result)
    return result


def _run(settings: list[str]) -> tuple[Callable[[int], float], Any, int]:
    """A step with the batch of a number, giving its loss; the model's shape; and the tokens of a step."""
    import torch

    from megafab.platform import platform

    platform.start(0)
    from megafab.build import build
    from megafab.config import load
    from megafab.engine.base import nll_only
    from megafab.model.shape import ModelShape
    from megafab.run import Batch, Progress, Verdict

    with tempfile.TemporaryDirectory() as scratch:
        corpus = common.random_corpus(Path(scratch) / "corpus", tokens=10_000)
        quiet = [f"data.path={corpus.path}", "tracking=none", "eval.samples=0", "eval.every=0"]
        config = load.load([*settings, *quiet, "train.steps=1000", "checkpoint.save_last=false"])
        run = build(config, ranks=1)
    rows, length, vocab = config.train.global_batch, config.model.seq_len, run_vocab(config, corpus)

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, vocab, (rows, length), generator=generator)
        batch = Batch(
            tokens_BL=tokens,
            labels_BL=tokens.roll(-1, 1),
            loss_mask_BL=torch.ones(tokens.shape),
            position_BL=torch.arange(length).expand(tokens.shape),
            document_BL=torch.zeros(tokens.shape, dtype=torch.int32),
            domain_B=torch.zeros(rows, dtype=torch.int64),
            sample_B=torch.arange(rows),
        )
        plan = run.schedules.at(Progress(step=100 + number))
        ledger = run.engine.forward_backward(batch, plan, nll_only)
        run.engine.update(plan, Verdict(), run.engine.gradient_stats())
        return ledger.reduced().loss

    return step, ModelShape.of(config.model, corpus.vocab_size), rows * length


def run_vocab(config: Any, corpus: Any) -> int:
    """Ids that the model has."""
    return config.model.vocab or corpus.vocab_size


def losses(kernels: str, precision: str) -> list[float]:
    """Of 20 steps of the tiny Llama."""
    step, *_ = _run([*common.TINY, f"kernels={kernels}", f"train.precision={precision}"])
    return [step(number) for number in range(20)]


def _settings(model: str, rehearsal: bool) -> tuple[str, int, int, list[str]]:
    name, length, rows, more = MODELS[model]
    if rehearsal:
        name, length, rows, more = "llama_tiny", 32, 2, ()
    vocab = 32 if rehearsal else 128_256 if name == "llama_8b" else 32_000
    return name, length, rows, [f"model.vocab={vocab}", *more]


def speed(model: str, engine: str, kernels: str, *, rehearsal: bool) -> dict[str, Any]:
    """Tokens a second and MFU of megafab; `kernels` is the choice, and settings after a space."""
    name, length, rows, more = _settings(model, rehearsal)
    step, shape, tokens = _run(
        [
            f"model={name}",
            f"engine={engine}",
            *f"kernels={kernels}".split(),
            f"model.seq_len={length}",
            f"train.micro_batch={rows}",
            f"train.global_batch={rows}",
            "train.precision=bf16",
            *more,
        ]
    )
    return _speed(step, tokens, shape.flops_per_token(), rehearsal)


def _speed(step: Callable[[int], Any], tokens: int, flops: float, rehearsal: bool) -> dict[str, Any]:
    from megafab.platform import platform
    from megafab.telemetry.metrics import peak_flops

    for number in range(1 if rehearsal else 10):
        step(number)
    blocks = []
    for _ in range(1 if rehearsal else 5):
        platform.synchronize()
        begin = time.perf_counter()
        for number in range(1 if rehearsal else 4):
            step(number)
        platform.synchronize()
        blocks.append((time.perf_counter() - begin) / (1 if rehearsal else 4))
    rate, most = tokens / min(blocks), peak_flops(platform.device_name())
    return {
        "tokens_per_second": round(rate),
        "mfu": round(rate * flops / most, 4) if most else None,
        "step_ms": [round(block * 1e3, 2) for block in blocks],
        "memory_peak": platform.memory_peak(),
    }


def peer(model: str, *, rehearsal: bool) -> dict[str, Any]:
    """Transformers' Llama in a plain loop: bf16 by autocast, compiled, AdamW fused; Liger's if it is here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megafab.config import load
    from megafab.model.shape import ModelShape
    from megafab.platform import platform

    name, length, rows, more = _settings(model, rehearsal)
    c = load.load(
        [f"model={name}", f"model.seq_len={length}", *more, "data.path=none", "train.steps=1"]
    ).model
    shape = ModelShape.of(c, c.vocab or 0)
    liger = importlib.util.find_spec("liger_kernel") is not None and not rehearsal
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=c.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=length,
            tie_word_embeddings=c.tied_embeddings,
            use_cache=False,
        )
    ).to(platform.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    run = network if rehearsal else torch.compile(network)
    device = platform.device.type

    def step(number: int) -> None:
        tokens = torch.randint(0, shape.vocab, (rows, length)).to(platform.device)
        with torch.autocast(device, torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"liger": liger, **_speed(step, rows * length, shape.flops_per_token(), rehearsal)}


def tables(result: dict[str, Any]) -> Iterator[str]:
    """What was found, in Markdown."""
    if "check" in result:
        wrong = result["check"]["wrong"]
        yield f"{result['check']['cases']} cases in three types against float64: {len(wrong)} wrong"
        yield from wrong
    if "time" in result:
        timings = result["time"]["timings"]
        makes = list(dict.fromkeys(make for entry in timings for make in entry["makes"]))
        yield f"\ncopy: {result['time']['copy_gb_per_second']:.0f} GB/s; times in ms\n"
        rows = []
        for entry in timings:
            own = entry["makes"]["megafab"]
            goal = "" if entry["goal"] is None else f"{entry['goal']:.0%}"
            found = [_ms(entry["makes"][m]) if m in entry["makes"] else "" for m in makes]
            share = ["", ""]
            if "ms" in own:
                share = [f"{own['gb_per_second']:.0f}", f"{own['of_copy']:.0%}"]
            rows.append([entry["name"], f"{entry['floor_ms']:.3f}", *found, *share, goal])
        yield common.markdown(["operator", "floor", *makes, "GB/s", "of copy", "goal"], rows)
    if "train" in result:
        yield ""
        for same in result["train"]["same_losses"]:
            apart, limit = f"{same['apart']:.1e}", same["limit"]
            yield f"20 steps in {same['precision']}: losses at most {apart} apart, limit {limit}"
        rows = [[s["model"], s["case"], *_speed_cells(s)] for s in result["train"]["speeds"]]
        yield "\n" + common.markdown(["model", "case", "tokens/s", "MFU", "memory, GiB"], rows)


def _speed_cells(found: dict[str, Any]) -> list[Any]:
    if "error" in found:
        return [found["error"], "", ""]
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return [f"{found['tokens_per_second']:,}", mfu, f"{found['memory_peak'] / 2**30:.1f}"]


def main() -> None:
    """Run the parts, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default="build,check,time,train")
    parser.add_argument("--out", type=Path, help="default: results/kernels-DEVICE.json beside this file")
    parser.add_argument("--models", default=",".join(MODELS), help="of train")
    parser.add_argument("--engines", default="megatron,deepspeed", help="of train")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--losses", nargs=2, metavar=("KERNELS", "PRECISION"), help="here, to stdout")
    parser.add_argument("--speed", nargs=3, metavar=("MODEL", "ENGINE", "KERNELS"), help="here, to stdout")
    parser.add_argument("--peer", metavar="MODEL", help="here, to stdout")
    options = parser.parse_args()
    if options.losses:
        print(json.dumps(losses(*options.losses)))
    elif options.speed:
        print(json.dumps(speed(*options.speed, rehearsal=options.rehearse)))
    elif options.peer:
        print(json.dumps(peer(options.peer, rehearsal=options.rehearse)))
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: nothing can be timed here; --rehearse shows that this runs")
    device = Device(rehearsal=options.rehearse)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": device.facts()}
    name = result["machine"].get("gpu", "rehearsal").lower().replace(" ", "-")
    out = options.out or common.RESULTS / f"kernels-{name}.json"
    models, engines = options.models.split(","), options.engines.split(",")
    parts: dict[str, Callable[[Device, Save], dict[str, Any]]] = {
        "build": build_library,
        "check": check,
        "time": times,
        "train": functools.partial(train, models=models, engines=engines),
    }
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(parts):
        sys.exit(f"--parts: found {', '.join(sorted(unknown))}, expected of {', '.join(parts)}")
    if not options.rehearse:
        wanted = ["build", *(part for part in wanted if part != "build")]
    for part in (part for part in wanted if part != "build" or not options.rehearse):

        def save(found: dict[str, Any], part: str = part) -> None:
            result[part] = found
            common.save(result, out)

        save(parts[part](device, save))
    print("\n".join(tables(result)))
    if result.get("check", {}).get("wrong") or any(
        not same["apart"] <= same["limit"] for same in result.get("train", {}).get("same_losses", ())
    ):
        sys.exit(1)


if __name__ == "__main__":
    main()
