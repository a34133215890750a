"""The checkpoint store on real ranks, real files, real deaths and real full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import warnings
import zlib
from pathlib import Path

import faults
import pytest
import torch
from ranks import RankDied

from megafab.checkpoint import files, store
from megafab.checkpoint.pieces import LogicalTensor, flat_slice, whole
from megafab.errors import UserError
from megafab.topology.layout import Layout

# name: global shape, type, dimension split over tensor ranks (None: replicated), stacked halves
PARAMETERS = {
    "embedding": ((24, 5), torch.bfloat16, 0, 1),
    "attention": ((7, 12), torch.float32, 1, 1),
    "gate_up": ((24, 6), torch.float32, 0, 2),
    "norm": ((6,), torch.float32, None, 1),
    "step": ((), torch.int64, None, 1),
}


def value(name: str) -> torch.Tensor:
    """The global tensor of that name: the same in every process."""
    shape, dtype, _, _ = PARAMETERS[name.removeprefix("moment.")]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


def parts(rank: int, world: int, tensor: int) -> dict[str, LogicalTensor]:
    """This rank's zeroed parts: parameters as tensor-parallel shards, moments as flat slices of those."""
    data, data_rank, tensor_rank = world // tensor, rank // tensor, rank % tensor
    tensors = {}
    for name, (shape, dtype, dim, stride) in PARAMETERS.items():
        layout = Layout.whole(shape)
        if dim is not None:
            local = tuple(n // tensor if d == dim else n for d, n in enumerate(shape))
            layout = Layout.split(local, dim, tensor, tensor_rank, stride)
        first = dim is not None or tensor_rank == 0
        local = torch.zeros(layout.local_shape, dtype=dtype)
        tensors[name] = whole(local, layout, owner=first and data_rank == 0)
        begin, end = (local.numel() * r // data for r in (data_rank, data_rank + 1))
        tensors[f"moment.{name}"] = flat_slice(
            torch.zeros(end - begin, dtype=dtype), begin, layout, owner=first
        )
    return tensors


def filled(rank: int, world: int, tensor: int, add: int = 0) -> dict[str, LogicalTensor]:
    tensors = parts(rank, world, tensor)
    for name, logical in tensors.items():
        for piece in logical.pieces:
            piece.tensor.copy_(value(name)[box(piece)] + add)
    return tensors


def box(piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))


def save(rank, world, directory, tensor, step, add=0, keep=2, keep_every=0):
    tensors = filled(rank, world, tensor, add)
    return store.save(Path(directory), step, tensors, {"add": add}, keep=keep, keep_every=keep_every)


def differing(rank, world, path, tensor, add=0):
    """The names of tensors that do not come back bit for bit."""
    tensors = parts(rank, world, tensor)
    store.load(Path(path), tensors)
    return [
        name
        for name, logical in tensors.items()
        for piece in logical.pieces
        if not torch.equal(piece.tensor, value(name)[box(piece)] + add)
    ]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    """A checkpoint of 4 ranks, 2 x tensor parallel."""
    directory = tmp_path_factory.mktemp("saved")
    paths = ranks.run(save, str(directory), 2, 100, world=4)
    assert paths == [directory / "step_00000100"] * 4
    return paths[0]


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.mark.parametrize(
    ("world", "tensor"), [(4, 2), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 4)], ids=str
)
def test_any_topology_reads_it_bit_for_bit(ranks, saved, world, tensor):
    assert ranks.run(differing, str(saved), tensor, world=world) == [[]] * world


def alone(rank, world, directory):
    path = save(rank, world, directory, 1, 3)
    return differing(rank, world, path, 1)


def test_one_process_without_a_group(ranks, tmp_path):
    assert ranks.run(alone, str(tmp_path), init=False) == [[]]


def test_layout_of_a_checkpoint(saved):
    assert names(saved.parent) == ["latest", "step_00000100"]
    assert (saved.parent / "latest").read_text() == "step_00000100\n"
    assert names(saved) == ["manifest.json", "state.json", "tensors"]
    assert names(saved / "tensors") == [".metadata"] + [f"__{rank}_0.distcp" for rank in range(4)]
    manifest = store.read_manifest(saved)
    assert (manifest["step"], manifest["commit"], manifest["ranks"]) == (100, 1, 4)
    assert sorted(manifest["files"]) == ["state.json"] + [
        f"tensors/{name}" for name in names(saved / "tensors")
    ]
    assert store.read_state(saved) == {"add": 0}
    assert store.verify(saved) == {}


def test_stock_readers_open_it(saved):
    from torch.distributed.checkpoint import load

    tensors = {name: torch.zeros_like(value(name)) for name in ("gate_up", "moment.gate_up", "embedding")}
    with warnings.catch_warnings(action="ignore"):  # it warns that there is no process group
        load(tensors, checkpoint_id=saved / "tensors", no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, value(name))


def unowned(rank, world, directory):
    lost = whole(torch.zeros(4), Layout.whole((4,)), owner=False)
    store.save(Path(directory), 1, {"lost": lost}, {}, keep=1)


def test_a_tensor_that_no_rank_owns_is_refused(ranks, tmp_path):
    with pytest.raises(RuntimeError, match=r"without an owner.*lost \(4 elements\)"):
        ranks.run(unowned, str(tmp_path), world=2)
    assert names(tmp_path) == []


def load_others(rank, world, path):
    messages = []
    for name, shape, dtype in (
        ("gate", (24, 6), torch.float32),
        ("gate_up", (24, 7), torch.float32),
        ("gate_up", (24, 6), torch.bfloat16),
    ):
        tensor = whole(torch.zeros(shape, dtype=dtype), Layout.whole(shape), owner=True)
        with pytest.raises(UserError) as caught:
            # One rank's mistake is every rank's error.
            store.load(Path(path), {name: tensor} if rank == 1 else {})
        messages.append((caught.value.where.split(", ")[1], caught.value.found, caught.value.expected))
    return messages


def test_tensors_that_do_not_fit_are_named_on_all_ranks(ranks, saved):
    expected = [
        ("tensor gate", "no such tensor", "float32 of shape (24, 6)"),
        ("tensor gate_up", "float32 of shape (24, 6)", "float32 of shape (24, 7)"),
        ("tensor gate_up", "float32 of shape (24, 6)", "bfloat16 of shape (24, 6)"),
    ]
    assert ranks.run(load_others, str(saved), world=2) == [expected] * 2


# Death: the leading rank's writes to disk, in order, are its tensors, their index, the state, the manifest,
# the two directories, (rename), the parent directory, the pointer `latest`, the parent directory again.


def save_and_die(rank, world, directory, victim, at):
    save(rank, world, directory, 2, 1)
    if rank == victim:
        count, fsync = 0, os.fsync

        def die(descriptor):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = die
    save(rank, world, directory, 2, 2, add=1)


@pytest.mark.parametrize(
    ("victim", "at", "survivor"),
    [(3, 1, 1), *((0, at, 1) for at in range(1, 7)), *((0, at, 2) for at in range(7, 10))],
)
def test_killed_at_any_write_the_newest_is_whole(ranks, tmp_path, victim, at, survivor):
    with pytest.raises(RankDied, match=f"rank {victim} ended with status -9"):
        ranks.run(save_and_die, str(tmp_path), victim, at, world=4)
    path = store.newest(tmp_path)
    assert path == tmp_path / f"step_{survivor:08d}"
    assert store.verify(path) == {}
    assert ranks.run(differing, str(path), 1, survivor - 1) == [[]]
    ranks.run(save, str(tmp_path), 1, 3)  # and what the dead save left is gone after the next
    assert names(tmp_path) == ["latest", f"step_{survivor:08d}", "step_00000003"]


def test_there_is_no_tenth_write_to_die_at(ranks, tmp_path):
    ranks.run(save_and_die, str(tmp_path), 0, 10, world=4)


# Damage.


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    faults.flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "problem", "quick"),
    [
        (truncate, "bytes, expected", True),
        (Path.unlink, "No such file or directory", True),
        (flip, "XXH3", False),
    ],
)
@pytest.mark.parametrize("name", ["tensors/__2_0.distcp", "tensors/.metadata", "state.json"])
def test_damage_is_found_by_file(copy, name, damage, problem, quick):
    damage(copy / name)
    found = store.verify(copy)
    assert list(found) == [name]
    assert problem in found[name]
    assert list(store.quick_check(copy)) == ([name] if quick else [])


# file: where in it a byte is flipped
POSITIONS = {
    "header of a tensor": ("tensors/__2_0.distcp", lambda data: data.index(b"PK\x03\x04") + 4),
    "pickle of a tensor": ("tensors/__2_0.distcp", lambda data: data.index(b"_rebuild_tensor")),
    "values of a tensor": (
        "tensors/__2_0.distcp",
        lambda data: re.search(rb"data/0FB..Z*", data, re.S).end(),
    ),
    "directory of a tensor": ("tensors/__2_0.distcp", lambda data: data.rindex(b"PK\x05\x06") + 8),
    "first byte of a file": ("tensors/__0_0.distcp", lambda data: 0),
    "last byte of a file": ("tensors/__0_0.distcp", lambda data: len(data) - 1),
    "index, a name": ("tensors/.metadata", lambda data: data.index(b"gate_up")),
    "index, an offset": ("tensors/.metadata", lambda data: data.index(b"distcp") + 8),
    "state": ("state.json", lambda data: data.index(b"0")),
    "manifest, a size": ("manifest.json", lambda data: data.index(b'"size": ') + 8),
    "manifest, a hash": ("manifest.json", lambda data: data.index(b'"xxh3_128": "') + 13),
    "manifest, the order": ("manifest.json", lambda data: data.index(b'"commit": ') + 10),
    "manifest, the step": ("manifest.json", lambda data: data.index(b'"step": ') + 8),
    "manifest, the seal": ("manifest.json", lambda data: data.index(b'"seal": "') + 9),
    "manifest, a brace": ("manifest.json", lambda data: 0),
}


@pytest.fixture
def two(ranks, copy) -> tuple[Path, Path]:
    """A checkpoint and one that was committed later."""
    return copy, ranks.run(save, str(copy.parent), 2, 200, world=4)[0]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_flipped_bit_is_found_wherever_it_is_and_the_one_before_taken(two, position):
    older, newer = two
    name, where = POSITIONS[position]
    faults.flip(newer / name, where((newer / name).read_bytes()))
    assert list(store.verify(newer)) == [name]
    path, (damaged,) = store.first_intact(store.candidates(older.parent), store.verify)
    assert path == older
    assert damaged.startswith(f"{newer}: {name}: ")


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "tensors/.metadata", "tensors/__0_0.distcp", "tensors/__3_0.distcp"],
)
def test_a_file_cut_or_missing_is_found_and_the_one_before_taken(two, name, damage):
    older, newer = two
    damage(newer / name)
    path, (damaged,) = store.first_intact(store.candidates(older.parent), store.verify)
    assert path == older
    assert damaged.startswith(f"{newer}: {name}: ")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"step_00000100\n", ""),  # a save was killed before the pointer moved
        (b"step_00000200\n", ""),
        (b"step_00000210\n", "'step_00000210'"),
        (b"", "''"),
        (b"step\xff", "'damaged content'"),
        (b"../../x\n", "'../../x'"),
        (None, "'No such file or directory'"),
    ],
)
def test_a_damaged_pointer_is_told_and_nothing_depends_on_it(ranks, two, content, found):
    older, newer = two
    pointer = older.parent / "latest"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    problem = store.check_latest(older.parent)
    expected = f"{pointer}: found {found}, expected the name of a checkpoint beside it"
    assert problem == (expected if found else "")
    assert store.newest(older.parent) == newer
    ranks.run(save, str(older.parent), 1, 300)
    assert pointer.read_text() == "step_00000300\n"


def test_verifying_in_parts_covers_every_file_once(copy):
    files = sorted(store.read_manifest(copy)["files"])
    for name in files:
        flip(copy / name)
    by_part = [list(store.verify(copy, part=part, parts=4)) for part in range(4)]
    assert sorted(name for part in by_part for name in part) == files


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_reported(copy, text):
    (copy / "manifest.json").write_text(text)
    assert store.verify(copy) == {
        "manifest.json": "found damaged content, expected a manifest as `save` writes it"
    }


@pytest.mark.parametrize("other", [1, 9])
def test_another_format_is_told_from_damage(copy, other):
    manifest = {**store.read_manifest(copy), "format": other}
    (copy / "manifest.json").write_text(json.dumps(store.sealed(manifest)))
    found = f"found format {other}, of another version of megafab, expected format 2"
    assert store.verify(copy) == {"manifest.json": found}
    with pytest.raises(UserError, match=f"manifest.json: {found}.*go on with the version that wrote it"):
        store.read_manifest(copy)


def test_newest_passes_over_damage_and_says_so(saved, tmp_path, caplog):
    for step in (1, 2, 3):
        path = Path(shutil.copytree(saved, tmp_path / f"step_{step:08d}"))
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(store.sealed({**manifest, "commit": step})))
    (tmp_path / ".step_00000005.tmp-1a2b3c" / "tensors").mkdir(parents=True)  # a save under way
    shutil.copytree(saved, tmp_path / "step_00000004")
    (tmp_path / "step_00000004/manifest.json").unlink()
    truncate(tmp_path / "step_00000003/tensors/__1_0.distcp")
    (tmp_path / "step_00000002/state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest(tmp_path) == tmp_path / "step_00000001"
    text = "\n".join(caplog.messages)
    assert "step_00000003: tensors/__1_0.distcp:" in text
    assert "step_00000002: state.json: No such file" in text
    assert "step_00000004: manifest.json: found No such file" in text
    assert "step_00000005" not in text
    (tmp_path / "step_00000001/state.json").unlink()
    with pytest.raises(UserError, match="only damaged checkpoints"):
        store.newest(tmp_path)
    assert store.newest(tmp_path / "elsewhere") is None


def test_an_index_that_carries_code_is_refused(ranks, copy):
    (copy / "tensors/.metadata").write_bytes(pickle.dumps(subprocess.Popen))
    with pytest.raises(RuntimeError, match="subprocess.Popen does not belong into a checkpoint's index"):
        ranks.run(differing, str(copy), 1)


@pytest.mark.parametrize(("where", "found"), [("nowhere", "no such directory"), ("", "no checkpoint there")])
def test_a_path_without_a_checkpoint_is_refused(tmp_path, where, found):
    with pytest.raises(UserError, match=f"checkpoint.resume=.*found {found}"):
        store.locate(tmp_path / where)


def test_a_path_may_be_a_step_or_a_run(saved, tmp_path):
    shutil.copytree(saved.parent, tmp_path / "run" / "checkpoints")
    inside = tmp_path / "run" / "checkpoints" / saved.name
    assert store.locate(inside) == [inside]
    assert store.locate(tmp_path / "run") == [inside]
    assert store.locate(saved.parent) == [saved]


# No room.


def save_beyond_a_limit(rank, world, directory):
    """Rank 1 may write no file above 512 bytes, the second time."""
    save(rank, world, directory, 2, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    with pytest.raises(UserError) as caught:
        save(rank, world, directory, 2, 2)
    left = names(Path(directory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save(rank, world, directory, 2, 3)
    return str(caught.value), left


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_loses_nothing(ranks, tmp_path):
    results = ranks.run(save_beyond_a_limit, str(tmp_path), world=4)
    assert len({message for message, _ in results}) == 1
    assert "found File too large (rank 1)" in results[0][0]
    # The leading rank has removed its draft before it raises; the others may see it go.
    assert results[0][1] == ["latest", "step_00000001"]
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]
    assert store.verify(tmp_path / "step_00000001") == {}


def save_while_the_disk_writes(rank, world, directory, fails):
    """Every write tells the disk to begin, and one of these calls has bad news."""
    files._AHEAD = 1
    send, calls = os.fdatasync, 0

    def fdatasync(descriptor):
        nonlocal calls
        calls += 1
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        send(descriptor)

    os.fdatasync = fdatasync
    save(rank, world, directory, 1, 1)
    return calls


def test_what_goes_wrong_while_a_file_is_written_is_told(ranks, tmp_path):
    (calls,) = ranks.run(save_while_the_disk_writes, str(tmp_path / "a"), False)
    assert calls  # how many: as many as the disk is in time for
    assert store.verify(tmp_path / "a" / "step_00000001") == {}
    with pytest.raises(UserError, match=r"found Input/output error \(rank 0\)"):
        ranks.run(save_while_the_disk_writes, str(tmp_path / "b"), True)
    assert names(tmp_path / "b") == []


def save_until_full(rank, world, directory):
    size = 200_000  # floats: 0.8 MB a rank and save

    def tensors(fill: float) -> dict[str, LogicalTensor]:
        mine = torch.full((size,), fill)
        return {"big": whole(mine, Layout.split((size,), 0, world, rank), owner=True)}

    def save_until_refused() -> None:
        nonlocal step
        for step in range(1, 9):
            store.save(Path(directory), step, tensors(float(step)), {}, keep=8)

    step = 0
    with pytest.raises(UserError) as caught:
        save_until_refused()
    last = store.newest(Path(directory))
    assert last is not None
    restored = tensors(0.0)
    store.load(last, restored)
    return step, last.name, restored["big"].pieces[0].tensor.unique().tolist(), str(caught.value)


def test_a_full_disk_fails_the_save_and_loses_nothing(ranks, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        results = ranks.run(save_until_full, str(disk), world=2)
        # 4 MB hold two saves of 1.6 MB.
        for step, last, values, message in results:
            assert (step, last, values) == (3, "step_00000002", [2.0])
            assert "found No space left on device" in message
        assert names(disk) == ["latest", "step_00000001", "step_00000002"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_cannot_be_made_is_named(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints.*Not a directory"):
        ranks.run(save, str(tmp_path / "file" / "checkpoints"), 1, 1, world=2)


# Retention and order.


def save_steps(rank, world, directory, steps, keep):
    for step in steps:
        with contextlib.suppress(UserError):
            save(rank, world, directory, 1, step, add=step, keep=keep)


def test_only_the_newest_are_kept(ranks, tmp_path):
    ranks.run(save_steps, str(tmp_path), [10, 20, 30, 40], 2, world=2)
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000040"]
    assert (tmp_path / "latest").read_text() == "step_00000040\n"


def save_kept(rank, world, directory, steps):
    for step in steps:
        save(rank, world, directory, 1, step, add=step, keep=1, keep_every=20)


def test_every_so_many_steps_one_is_kept_for_ever(ranks, tmp_path):
    ranks.run(save_kept, str(tmp_path), [10, 20, 30, 40, 50])
    assert names(tmp_path) == ["latest", *(f"step_000000{step}" for step in (20, 40, 50))]


def test_a_damaged_checkpoint_takes_no_place_of_a_sound_one(ranks, tmp_path):
    ranks.run(save_steps, str(tmp_path), [1, 2], 3)
    truncate(tmp_path / "step_00000002/state.json")
    (tmp_path / "step_00000001/manifest.json").write_text("{")
    ranks.run(save_steps, str(tmp_path), [3, 4], 1)
    # Of the first, nobody knows when it was written: it is the user's to look at.
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000004"]


def test_a_run_that_went_back_continues_from_what_it_saved_since(ranks, tmp_path):
    ranks.run(save_steps, str(tmp_path), [100, 200, 50, 60], 3, world=1)
    assert names(tmp_path) == ["latest", "step_00000050", "step_00000060", "step_00000200"]
    assert store.newest(tmp_path) == tmp_path / "step_00000060"


def test_a_step_saved_again_is_replaced(ranks, tmp_path):
    ranks.run(save, str(tmp_path), 1, 7, 1)
    ranks.run(save, str(tmp_path), 1, 7, 2)
    assert names(tmp_path) == ["latest", "step_00000007"]
    assert ranks.run(differing, str(tmp_path / "step_00000007"), 1, 2) == [[]]


def save_failing(rank, world, directory):
    save(rank, world, directory, 1, 1, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    with pytest.raises(UserError):
        save(rank, world, directory, 1, 2, keep=1)


def test_nothing_is_deleted_before_the_newest_has_committed(ranks, tmp_path):
    ranks.run(save_failing, str(tmp_path))
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert store.verify(tmp_path / "step_00000001") == {}
