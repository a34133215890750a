"""`megafab ckpt` on checkpoints that no run has to make first: inspect, verify, reshape, diff, average."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import state_of, tensors_of, write_checkpoint

from launch.cli import main
from megafab.checkpoint import reader as reader_module
from megafab.checkpoint import store, tools, writer
from megafab.checkpoint.reader import Reader, TensorInfo
from megafab.errors import UserError
from megafab.model.config import ModelConfig
from megafab.telemetry.meter import Meter, size

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    name="small", layers=12, hidden=32, heads=4, kv_heads=2, ffn=48, seq_len=16, vocab=128, head_dim=8
)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, nothing is said of progress: stderr is for errors."""
    monkeypatch.setattr(Meter, "every", 3600.0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ckpt") / "run"
    write_checkpoint(directory, MODEL)
    return directory


def ckpt(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megafab ckpt ...`."""
    code = main(["ckpt", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[str]:
    found, out, err = ckpt(capsys, *arguments)
    assert (found, err) == (code, "")
    return out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, out, err = ckpt(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


# -- inspect -------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_checkpoint_is(run_dir: Path, capsys):
    lines = shown(capsys, "inspect", run_dir)
    weights = sum(info.nbytes for info in Reader(run_dir / "checkpoints" / "step_00000007").weights.values())
    assert lines[0] == str(run_dir / "checkpoints" / "step_00000007")
    assert lines[1] == "step      7: 56 samples, 3,584 tokens"
    assert lines[2] == (
        f"model     small: {weights // 4:,} parameters, layers 12, hidden 32, heads 4, seq_len 16"
    )
    assert f"          weight: 75 of float32, {weights / 1024:.1f} KiB" in lines
    assert not any("weights only" in line for line in lines)
    assert shown(capsys, "inspect", run_dir / "checkpoints" / "step_00000007") == lines


def test_inspect_lists_tensors_in_the_order_of_layers(run_dir: Path, capsys):
    listed = [line.split()[0] for line in shown(capsys, "inspect", run_dir, "tensors=true")]
    layers = [name for name in listed if name.startswith("weight/") and name.endswith("linear_proj.weight")]
    assert layers == [f"weight/decoder.layers.{i}.self_attention.linear_proj.weight" for i in range(12)]
    line = next(line for line in shown(capsys, "inspect", run_dir, "tensors=true") if layers[0] in line)
    assert line.split()[1:] == ["float32", "32", "x", "32", "1", "piece"]


# -- verify --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """A step directory to damage."""
    shutil.copytree(run_dir, tmp_path / "copy")
    return tmp_path / "copy" / "checkpoints" / "step_00000007"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_verify_is_content_with_a_whole_checkpoint(copy: Path, capsys):
    assert shown(capsys, "verify", copy) == [f"{copy}: intact"]


@pytest.mark.parametrize("at", [0, 0.3, 0.999])
@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/.metadata", "state.json"])
def test_verify_names_the_file_with_a_flipped_bit(copy: Path, capsys, name: str, at: float):
    flip(copy / name, int(at * (copy / name).stat().st_size))
    lines = shown(capsys, "verify", copy, code=1)
    assert lines[0] == f"{copy}: damaged"
    assert lines[1].startswith(f"  {name}: XXH3 ")
    assert len(lines) == 2


def test_verify_names_a_damaged_manifest(copy: Path, capsys):
    flip(copy / "manifest.json", (copy / "manifest.json").stat().st_size // 2)
    lines = shown(capsys, "verify", copy, code=1)
    assert lines[1].startswith("  manifest.json: ")


def test_verify_names_what_is_cut_or_gone(copy: Path, capsys):
    length = (copy / "state.json").stat().st_size
    with (copy / "state.json").open("r+b") as file:
        file.truncate(length - 1)
    (copy / "tensors" / ".metadata").unlink()
    assert shown(capsys, "verify", copy, code=1)[1:] == [
        "  tensors/.metadata: No such file or directory",
        f"  state.json: {length - 1} bytes, expected {length}",
    ]


def test_verify_of_a_run_looks_at_every_checkpoint(tmp_path: Path, capsys):
    directory = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        made = write_checkpoint(tmp_path / f"made{step}", MODEL, step=step)
        shutil.copytree(made, directory / made.name)
    flip(directory / "step_00000001" / "state.json", 5)
    heads = [line for line in shown(capsys, "verify", tmp_path / "run", code=1) if line[0] != " "]
    assert sorted(heads) == [f"{directory}/step_00000001: damaged", f"{directory}/step_00000002: intact"]


# -- reshape -------------------------------------------------------------------------------------------------


def stored(path: Path) -> list[int]:
    """Sizes of the files of tensors."""
    return [file.stat().st_size for file in sorted((path / "tensors").glob("*.distcp"))]


def equal(a: Path, b: Path) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    same = [torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left]
    return left.keys() == right.keys() and all(same)


@pytest.mark.parametrize("files", [1, 3, 8])
def test_reshape_into_files_of_like_size(run_dir: Path, tmp_path: Path, capsys, files: int):
    source, to = run_dir / "checkpoints" / "step_00000007", tmp_path / "to"
    assert shown(capsys, "reshape", run_dir, f"to={to}", f"files={files}") == [
        f"{to}/checkpoints/step_00000007"
    ]
    made = to / "checkpoints" / "step_00000007"
    assert len(stored(made)) == files
    assert max(stored(made)) < 1.5 * min(stored(made))
    assert store.verify(made) == {}
    assert equal(source, made)
    assert store.newest(to / "checkpoints") == made


def test_reshape_by_size(run_dir: Path, tmp_path: Path, capsys):
    limit = 60_000
    shown(capsys, "reshape", run_dir, f"to={tmp_path / 'to'}", f"max_bytes={limit}")
    made = tmp_path / "to" / "checkpoints" / "step_00000007"
    assert len(stored(made)) > 5
    # What torch adds to a tensor is for the file, not for the limit.
    assert max(stored(made)) < limit + 75 * 3 * 1500
    assert equal(run_dir / "checkpoints" / "step_00000007", made)


def test_reshape_cuts_large_tensors_into_bands(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reader_module, "BAND_BYTES", 1000)
    source = run_dir / "checkpoints" / "step_00000007"
    made = tools.reshape(source, tmp_path / "to", deal=writer.by_count(2), moments=True)
    info = Reader(made).tensors["weight/embedding.word_embeddings.weight"]
    assert info.pieces == -(-128 // (1000 // 128))
    assert equal(source, made)


def test_reshape_keeps_the_state_and_adds_where_it_comes_from(run_dir: Path, tmp_path: Path):
    source = run_dir / "checkpoints" / "step_00000007"
    made = tools.reshape(source, tmp_path / "to", deal=None, moments=True)
    then, now = store.read_state(source), store.read_state(made)
    (entry,) = now["lineage"]
    assert (entry["from"], entry["step"], entry["operation"]) == (str(source.resolve()), 7, "reshape")
    changed = {key for key in now if now[key] != then[key]}
    assert changed <= {"lineage", "versions", "written_at"}


def test_reshape_to_weights_only(run_dir: Path, tmp_path: Path, capsys):
    shown(capsys, "reshape", run_dir, f"to={tmp_path / 'to'}", "moments=false")
    made = tmp_path / "to" / "checkpoints" / "step_00000007"
    assert {name.partition("/")[0] for name in Reader(made).tensors} == {"weight"}
    assert store.read_state(made)["weights_only"]
    assert any("weights only" in line for line in shown(capsys, "inspect", made))


def test_reshape_of_every_kind_of_tensor(tmp_path: Path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "hollow": torch.empty(3, 0),
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "counts": torch.arange(5),
        "deep": torch.arange(24.0).view(2, 3, 4),
    }
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, 1) for name, t in tensors.items()}

    def source(name: str, band: tuple[int, int]) -> torch.Tensor:
        return tensors[name][band[0] : sum(band)] if tensors[name].dim() else tensors[name]

    first = writer.write(tmp_path / "a", 1, infos, source, state_of(MODEL, 1))
    made = tools.reshape(first, tmp_path / "b", deal=writer.by_count(3), moments=True)
    found = tensors_of(made)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype is tensors[name].dtype
    assert not tools.diff(first, made).tensors


# -- diff ----------------------------------------------------------------------------------------------------


def changed_copy(source: Path, to: Path, changes: dict[str, torch.Tensor | None], **state) -> Path:
    """`source` again with tensors replaced (None: left out) or added, and other entries of its state."""
    tensors = {**tensors_of(source), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, 1) for name, t in kept.items()}
    state = {**store.read_state(source), **state}
    return writer.write(to, 7, infos, lambda name, band: kept[name][band[0] : sum(band)], state)


def test_diff_of_a_checkpoint_with_itself_is_nothing(run_dir: Path, capsys):
    assert shown(capsys, "diff", run_dir, run_dir) == ["0 of 225 common tensors differ"]


def test_diff_tells_what_differs(run_dir: Path, tmp_path: Path, capsys):
    source = run_dir / "checkpoints" / "step_00000007"
    name, other = "weight/output_layer.weight", "adam_m/output_layer.weight"
    value = tensors_of(source)[name]
    value[3, 4] += 0.5
    value[5, 6] -= 2.0
    left_out = "adam_v/output_layer.weight"
    changes = {name: value, other: torch.zeros(2), left_out: None, "technique": torch.ones(1)}
    state = store.read_state(source)
    state["config"]["model"]["norm_eps"] = 1e-6
    changed = changed_copy(source, tmp_path / "b", changes, config=state["config"])
    lines = shown(capsys, "diff", run_dir, changed, code=1)
    norm = float(tensors_of(source)[name].double().norm())
    assert lines == [
        "config   model.norm_eps: 1e-05 and 1e-06",
        f"only in the first: {left_out}",
        "only in the second: technique",
        f"tensor   {other}: float32 of shape (128, 32) and float32 of shape (2,)",
        f"tensor   {name}: 2 elements, largest difference 2.000e+00, relative {4.25**0.5 / norm:.3e}",
        "2 of 224 common tensors differ",
    ]


def test_diff_sees_the_sign_of_zero_and_what_is_not_a_number(tmp_path: Path):
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, float("nan"), 2.0])
    paths = [
        writer.write(
            tmp_path / side,
            1,
            {"w": TensorInfo((3,), torch.float32, 1)},
            lambda name, band, t=t: t,
            state_of(MODEL, 1),
        )
        for side, t in (("a", a), ("b", b))
    ]
    (difference,) = tools.diff(*paths).tensors
    assert difference.count == 2
    assert difference.largest != difference.largest
    assert not tools.diff(paths[1], paths[1])


def test_diff_shows_the_ten_that_differ_most_unless_asked(run_dir: Path, tmp_path: Path, capsys):
    other = write_checkpoint(tmp_path / "b", MODEL, seed=1)
    short, long = (shown(capsys, "diff", run_dir, other, *more, code=1) for more in ([], ["tensors=true"]))
    assert len(short) == 12
    assert short[-2] == "tensor   215 more (tensors=true lists them)"
    assert len(long) == 226


# -- average -------------------------------------------------------------------------------------------------


def test_average_is_the_weighted_mean_of_the_weights(tmp_path: Path, capsys):
    paths = [write_checkpoint(tmp_path / str(seed), MODEL, seed=seed, step=seed) for seed in (1, 2, 3)]
    to = tmp_path / "mean"
    shown(capsys, "average", *paths, f"to={to}", "weights=[1,0.5,2.5]")
    made = to / "checkpoints" / "step_00000003"
    found, sources = tensors_of(made), [tensors_of(path) for path in paths]
    assert set(found) == {name for name in sources[0] if name.startswith("weight/")}
    for name, tensor in found.items():
        a, b, c = (source[name].double() for source in sources)
        assert torch.equal(tensor, ((0.25 * a + 0.125 * b) + 0.625 * c).float())
    state = store.read_state(made)
    assert state["weights_only"]
    assert [(e["step"], e["weight"]) for e in state["lineage"]] == [(1, 0.25), (2, 0.125), (3, 0.625)]
    assert store.verify(made) == {}


def test_average_of_a_checkpoint_with_itself_is_itself(run_dir: Path, tmp_path: Path, capsys):
    shown(capsys, "average", run_dir, run_dir, run_dir, f"to={tmp_path / 'mean'}")
    made = tensors_of(tmp_path / "mean" / "checkpoints" / "step_00000007")
    source = tensors_of(run_dir / "checkpoints" / "step_00000007")
    assert all(torch.equal(tensor, source[name]) for name, tensor in made.items())


def test_other_models_are_not_averaged(run_dir: Path, tmp_path: Path, capsys):
    import dataclasses

    other = write_checkpoint(tmp_path / "b", dataclasses.replace(MODEL, ffn=64))
    err = refused(capsys, "average", run_dir, other, f"to={tmp_path / 'mean'}")
    assert err.startswith(
        f"{other}, weight decoder.layers.0.mlp.linear_fc1.weight: found float32 of shape (128, 32), "
        "expected float32 of shape (96, 32), as in "
    )
    assert not (tmp_path / "mean").exists()


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verfy", "RUN"], "megafab ckpt verfy: found no such verb, expected one of inspect, verify, "),
        ([], "megafab ckpt: found no such verb"),
        (["diff", "RUN"], "megafab ckpt diff: found 1 paths, expected 2."),
        (["average", "RUN", "to=x"], "megafab ckpt average: found 1 paths, expected at least 2."),
        (["inspect", "gone"], "PATH=gone: found no such directory, expected "),
        (["inspect", "RUN", "tensor=true"], "tensor=true: found an unknown key"),
        (["reshape", "RUN"], "to: found no value, expected text."),
        (["reshape", "RUN", "to=x", "files=2", "max_bytes=9"], "files=2, max_bytes=9: found two ways to cut"),
        (["reshape", "RUN", "to=x", "files=0"], "files=0: found 0, expected at least 1."),
        (["average", "RUN", "RUN", "to=x", "weights=[1]"], "weights=[1.0]: found 1 weights, expected 2"),
        (["average", "RUN", "RUN", "to=x", "weights=[1,-1]"], "weights=[1.0, -1.0]: found a weight below 0"),
        (["average", "RUN", "RUN", "to=x", "weights=[0,0]"], "weights=[0.0, 0.0]: found a weight below 0"),
        (["reshape", "RUN", "to=RUN"], "to=RUN: found something there already"),
        (["convert", "RUN", "to=x", "format=megafab", "dtype=bf16"], "dtype=bf16: found format=megafab, exp"),
        (["convert", "RUN", "to=x", "format=megafab", "max_bytes=9"], "max_bytes=9: found format=megafab, "),
        (["convert", "RUN", "to=x", "format=megafab", "weights=ema"], "weights=ema: found format=megafab, "),
        (
            ["convert", "RUN", "to=x", "weights=ema"],
            "weights=ema, RUN/checkpoints/step_00000007: found no av",
        ),
        (["convert", "RUN", "to=x", "judge=false", "max_kl=1"], "max_kl=1.0: found judge=false, expected "),
        (["convert", "RUN", "to=x", "max_kl=-1"], "max_kl=-1.0: found -1.0, expected at least 0."),
        (
            ["convert", "RUN", "to=x", "format=gguf"],
            "format=gguf: found text gguf, expected one of hf",
        ),
        (["convert", "RUN", "to=x", "format=megafab"], "RUN/config.json: found No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    run_dir: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], line: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run_dir)
    assert refused(capsys, *arguments).startswith(line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RUN"]


# file: what is said of a flipped bit
DAMAGED = {
    "tensors/__0_0.distcp": "XXH3 ",
    "tensors/.metadata": "XXH3 ",
    "state.json": "XXH3 ",
    "manifest.json": "found damaged content",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("verb", ["reshape", "average", "convert", "diff", "grow"])
def test_a_damaged_checkpoint_is_refused(
    run_dir: Path, copy: Path, tmp_path: Path, capsys, verb: str, name: str
):
    flip(copy / name, (copy / name).stat().st_size // 2)
    paths = {"average": [run_dir, copy], "diff": [run_dir, copy]}.get(verb, [copy])
    to = [] if verb == "diff" else [f"to={tmp_path / 'to'}"]
    err = refused(capsys, verb, *paths, *to)
    assert err.startswith(f"{copy}: found {name}: {DAMAGED[name]}")
    assert err.endswith("Fix: take another, or restore the file\n")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_inspect_of_a_state_that_cannot_be_read(copy: Path, capsys):
    flip(copy / "state.json", 0)
    err = refused(capsys, "inspect", copy)
    assert err.startswith(f"{copy}: found a state.json that cannot be read (")
    assert err.endswith(f"Fix: see what is damaged: megafab ckpt verify {copy}\n")


def test_what_fails_half_way_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch):
    read, count = Reader.read, 0

    def fails(self, *arguments):
        nonlocal count
        count += 1
        if count == 50:
            raise OSError(28, "No space left on device", str(tmp_path))
        return read(self, *arguments)

    monkeypatch.setattr(Reader, "read", fails)
    with pytest.raises(UserError, match="No space left on device"):
        tools.reshape(run_dir / "checkpoints" / "step_00000007", tmp_path / "to", deal=None, moments=True)
    assert list(tmp_path.iterdir()) == []


# -- progress ------------------------------------------------------------------------------------------------


def test_long_work_tells_how_far_it_is(run_dir: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(Meter, "every", 0.0)
    code, _, err = ckpt(capsys, "reshape", run_dir, f"to={tmp_path / 'to'}")
    lines = [line for line in err.splitlines() if line.startswith("reshape")]
    total = size(Reader(run_dir / "checkpoints" / "step_00000007").nbytes)
    assert code == 0
    assert len(lines) == 225
    assert lines[0].startswith("reshape   ")
    assert lines[-1].startswith(f"reshape 100 %: {total} of {total}, ")
    assert lines[-1].endswith(", 0 s left")


def test_sizes_in_words():
    assert [size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 7 << 40)] == [
        *("0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "7.00 TiB"),
    ]


# -- memory --------------------------------------------------------------------------------------------------

LIMIT = 96 << 20
_PROGRAM = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import megafab.checkpoint.surgery.grow, megafab.convert  # all that the verbs import
from launch.cli import main

directory, limit, verbs = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
allowed = int(status["VmData"].split()[0]) * 1024 + limit
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
for verb in verbs:
    print(verb[0], main(["ckpt", *verb]), flush=True)
try:
    torch.ones(limit // 4)
except RuntimeError:
    print("the limit holds")
"""


@pytest.mark.slow
def test_every_verb_stays_within_a_memory_limit_that_the_checkpoint_exceeds(tmp_path: Path):
    large = ModelConfig(
        name="large", layers=23, hidden=512, heads=8, kv_heads=4, ffn=1408, seq_len=64, vocab=1024
    )
    a, b = (write_checkpoint(tmp_path / str(s), large, seed=s, kinds=["weight"]) for s in (1, 2))
    total = Reader(a).nbytes
    assert total > 2.7 * LIMIT
    verbs = [
        ["inspect", str(a), "tensors=true"],
        ["verify", str(a)],
        ["diff", str(a), str(b)],
        ["reshape", str(a), f"to={tmp_path / 'reshaped'}", "files=4"],
        ["average", str(a), str(b), f"to={tmp_path / 'mean'}"],
        ["convert", str(a), f"to={tmp_path / 'hf'}", "judge=false", "max_bytes=100000000"],
        ["convert", str(tmp_path / "hf"), f"to={tmp_path / 'back'}", "format=megafab", "judge=false"],
        ["grow", str(a), f"to={tmp_path / 'grown'}", "layers=24", "hidden=640", "experts=2", "judge=false"],
    ]
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path), str(LIMIT), json.dumps(verbs)]
    # Memory that is freed goes back at once, so that the limit is on what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=250)
    codes = [line for line in done.stdout.splitlines() if line.split()[0] in {v[0] for v in verbs}]
    assert done.stdout.endswith("the limit holds\n"), done.stdout[-500:] + done.stderr[-3000:]
    assert [line.split()[0] for line in codes if line.split()[1:] in (["0"], ["1"])] == [v[0] for v in verbs]
    assert equal(a, tmp_path / "back" / "checkpoints" / "step_00000000")
