"""Checkpoints: which are valid, which damage is detected, and what survives a full disk."""

import json
import os
import resource
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.errors import ConfigError, DataError, StorageError
from jlora.io import checkpoint
from jlora.tree.fingerprint import _checksum, fingerprint

IDENTITY = {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}, "train": {"seed": 1}}
RUN = {"identity": IDENTITY, "base_fingerprint": "base"}


class State(NamedTuple):
    adapter: dict
    step: jax.Array
    empty: jax.Array
    host: np.ndarray


def state(seed: int = 0) -> State:
    a, b = jax.random.normal(jax.random.key(seed), (2, 8, 4))
    adapter = {"q_proj": {"lora_A": a, "lora_B": b.astype(jnp.bfloat16)}}
    return State(adapter, jnp.int32(seed), jnp.zeros((0, 3)), np.arange(3))


def like(tree):
    def blank(x):
        return np.zeros_like(x) if isinstance(x, np.ndarray) else jnp.zeros_like(x)

    return jax.tree.map(blank, tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def files_of(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file())


def test_save_and_restore_round_trip(tmp_path):
    checkpoint.save(tmp_path, 3, state(3), {"rows": 12, "best": (1.5, 2)}, **RUN)
    assert checkpoint.latest(tmp_path) == 3
    tree, extra = checkpoint.restore(tmp_path, 3, like(state()), **RUN)
    assert_same(tree, state(3))
    assert extra == {"rows": 12, "best": [1.5, 2]}


def test_shapes_without_values_are_enough_to_restore(tmp_path):
    tree = {"a": jnp.arange(6.0)}
    checkpoint.save(tmp_path, 1, tree, {}, **RUN)
    restored, _ = checkpoint.restore(tmp_path, 1, jax.eval_shape(lambda: tree), **RUN)
    assert_same(restored, tree)


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.discard_incomplete(tmp_path / "none") == []


def test_every_file_with_a_flipped_bit_is_caught_and_named(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    checkpoint.save(tmp_path, 2, state(2), {}, **RUN)
    damaged_leaves = set()
    for file in files_of(tmp_path / "2"):
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[len(intact) // 2] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            checkpoint.restore(tmp_path, 2, like(state()), **RUN)
        assert caught.value.where == str(file)
        assert "continues from step 1" in caught.value.fix
        if "leaf" in caught.value.cause:
            damaged_leaves.add(caught.value.cause.split("leaf ")[1].rstrip(")"))
        file.write_bytes(intact)
    assert damaged_leaves == {"adapter.q_proj.lora_A", "adapter.q_proj.lora_B", "step", "host"}
    checkpoint.restore(tmp_path, 2, like(state()), **RUN)


def test_a_leaf_that_orbax_restores_wrongly_is_caught(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    monkeypatch.setattr(checkpoint.store, "_read", lambda *_: {"step": jnp.int32(7)})
    with pytest.raises(DataError, match="leaf step"):
        checkpoint.restore(tmp_path, 1, like(state()), **RUN)


def test_a_lost_file_is_caught(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    lost = tmp_path / "1" / "state" / "adapter.q_proj.lora_A" / "0.0"
    lost.unlink()
    with pytest.raises(DataError, match=r"starts from the beginning") as caught:
        checkpoint.restore(tmp_path, 1, like(state()), **RUN)
    assert caught.value.where == str(lost)


@pytest.mark.parametrize("torn", ["missing", "empty", "cut"])
def test_a_checkpoint_without_a_complete_manifest_is_ignored(tmp_path, torn):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    checkpoint.save(tmp_path, 2, state(2), {}, **RUN)
    manifest = tmp_path / "2" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    if torn != "missing":
        manifest.write_bytes(b"" if torn == "empty" else content[:-100])
    assert checkpoint.latest(tmp_path) == 1
    with pytest.raises(DataError, match="complete ones: 1"):
        checkpoint.restore(tmp_path, 2, like(state()), **RUN)
    assert checkpoint.discard_incomplete(tmp_path) == [tmp_path / "2"]
    assert not (tmp_path / "2").exists() and checkpoint.steps(tmp_path) == [1]


def test_a_save_killed_before_the_manifest_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint.manifest, "write_atomic", die)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 2, state(2), {}, **RUN)
    monkeypatch.undo()
    assert (tmp_path / "2" / "state").is_dir()
    assert checkpoint.latest(tmp_path) == 1
    checkpoint.save(tmp_path, 2, state(2), {}, **RUN)
    assert_same(checkpoint.restore(tmp_path, 2, like(state()), **RUN)[0], state(2))


def test_retention_drops_the_oldest(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, state(step), {}, keep=2, **RUN)
    assert checkpoint.steps(tmp_path) == [10, 100]
    assert sorted(os.listdir(tmp_path)) == ["10", "100"]
    checkpoint.save(tmp_path, 101, state(1), {}, keep=None, **RUN)
    assert checkpoint.steps(tmp_path) == [10, 100, 101]


def test_saving_the_same_state_again_writes_nothing(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), {"x": 1}, **RUN)
    before = {f: f.stat().st_mtime_ns for f in files_of(tmp_path)}
    checkpoint.save(tmp_path, 1, state(1), {"x": 1}, **RUN)
    assert {f: f.stat().st_mtime_ns for f in files_of(tmp_path)} == before
    checkpoint.save(tmp_path, 1, state(2), {"x": 1}, **RUN)
    assert_same(checkpoint.restore(tmp_path, 1, like(state()), **RUN)[0], state(2))


@pytest.mark.parametrize("fails", [False, True])
def test_replacing_the_extra_of_a_checkpoint_is_atomic(tmp_path, monkeypatch, fails):
    checkpoint.save(tmp_path, 1, state(1), {"finished": False}, **RUN)
    data = {f: f.stat().st_mtime_ns for f in files_of(tmp_path / "1" / "state")}

    def full(*_):
        raise StorageError("the disk is full")

    if fails:
        monkeypatch.setattr(checkpoint.manifest, "write_atomic", full)
        with pytest.raises(StorageError):
            checkpoint.save(tmp_path, 1, state(1), {"finished": True}, keep=1, **RUN)
        monkeypatch.undo()
    else:
        checkpoint.save(tmp_path, 1, state(1), {"finished": True}, keep=1, **RUN)
    assert {f: f.stat().st_mtime_ns for f in files_of(tmp_path / "1" / "state")} == data
    tree, extra = checkpoint.restore(tmp_path, 1, like(state()), **RUN)
    assert_same(tree, state(1))
    assert extra == {"finished": not fails}


def test_later_checkpoints_are_dropped_when_a_run_goes_back(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, state(step), {}, **RUN)
    assert checkpoint.discard_later(tmp_path, 10) == [tmp_path / "100"]
    assert checkpoint.steps(tmp_path) == [5, 10]
    assert checkpoint.discard_later(tmp_path / "none", 1) == []


def test_another_runs_checkpoint_is_refused_with_the_settings_that_differ(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    other = {"lora": {"r": 16, "target_modules": ("q_proj", "v_proj")}, "train": {"lr": 1.0}}
    with pytest.raises(ConfigError) as caught:
        checkpoint.restore(tmp_path, 1, like(state()), identity=other, base_fingerprint="base")
    lines = [line.strip() for line in caught.value.cause.splitlines()[1:]]
    assert lines == [
        "lora.r: 8 there, 16 here",
        "train.lr: 'unset' there, 1.0 here",
        "train.seed: 1 there, 'unset' here",
    ]
    with pytest.raises(ConfigError, match="another base model"):
        checkpoint.restore(tmp_path, 1, like(state()), identity=IDENTITY, base_fingerprint="x")


def test_other_leaves_are_named(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3), "b": jnp.ones(2)}, {}, **RUN)
    with pytest.raises(DataError) as caught:
        checkpoint.restore(tmp_path, 1, {"a": jnp.ones(4), "c": jnp.ones(2)}, **RUN)
    assert "a is float32[3] there and float32[4] here" in caught.value.cause
    assert "b is in the checkpoint only" in caught.value.cause
    assert "c is not in the checkpoint" in caught.value.cause


def sharded(value, shape, spec):
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def test_restores_onto_another_mesh(tmp_path):
    value = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    checkpoint.save(tmp_path, 1, {"w": sharded(value, (8, 1), ("x",))}, {}, **RUN)
    for shape, spec in [((2, 4), ("y", "x")), ((1, 1), ()), ((4, 2), (None, "x"))]:
        target = sharded(np.zeros_like(value), shape, spec)
        restored = checkpoint.restore(tmp_path, 1, {"w": target}, **RUN)[0]["w"]
        assert restored.sharding == target.sharding
        np.testing.assert_array_equal(np.asarray(restored), value)


def test_a_full_disk_is_reported_before_writing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    usage = shutil._ntuple_diskusage(1000, 900, 100)
    monkeypatch.setattr(checkpoint.store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        checkpoint.save(tmp_path, 2, state(2), {}, keep=1, **RUN)
    assert caught.value.exit_code == 74
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("Failed write: No space left on device")],
)
def test_a_disk_that_fills_while_writing_leaves_the_earlier_checkpoint(
    tmp_path, monkeypatch, error
):
    checkpoint.save(tmp_path, 1, state(1), {}, **RUN)
    save = checkpoint.store.ocp.Checkpointer.save

    def fill(self, directory, *args, **kwargs):
        save(self, directory, *args, **kwargs)
        raise error

    monkeypatch.setattr(checkpoint.store.ocp.Checkpointer, "save", fill)
    with pytest.raises(StorageError, match="the disk is full"):
        checkpoint.save(tmp_path, 2, state(2), {}, keep=1, **RUN)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["1"]
    assert_same(checkpoint.restore(tmp_path, 1, like(state()), **RUN)[0], state(1))


def test_manifest_lists_leaves_with_their_digests(tmp_path):
    import hashlib

    checkpoint.save(tmp_path, 1, {"a": jnp.arange(4.0).reshape(2, 2)}, {}, **RUN)
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    expected = hashlib.sha256(np.arange(4, dtype="<f4").tobytes()).hexdigest()
    assert manifest["leaves"] == {"a": {"shape": [2, 2], "dtype": "float32", "sha256": expected}}


def test_a_fingerprint_depends_on_values_and_not_on_placement():
    value = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    one = fingerprint({"w": jnp.asarray(value)})
    assert one == fingerprint({"w": value})
    assert one == fingerprint({"w": sharded(value, (4, 2), ("x", "y"))})
    assert one != fingerprint({"v": value})
    assert one != fingerprint({"w": value.reshape(16, 8)})
    assert one != fingerprint({"w": value.astype(np.int32)})


def checksum(bits):
    """The fingerprint's sum, with Python integers."""
    total = 0
    for position, value in enumerate(bits.reshape(-1).tolist()):
        weight = ((position * 0x9E3779B1) % 2**32 ^ (position >> 15)) | 1
        total += value * weight
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_checksum_equals_the_same_sum_in_python(dtype):
    value = jax.random.normal(jax.random.key(0), (3, 5, 2)) * 50
    value = np.asarray(value.astype(dtype))
    bits = value.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[value.dtype.itemsize])
    assert int(_checksum(jnp.asarray(value))) == checksum(bits)


def test_a_fingerprint_changes_with_a_single_bit_and_with_a_swap():
    codes = np.random.default_rng(0).integers(0, 256, size=(64, 32), dtype=np.uint8)
    one = fingerprint([codes])
    flipped = codes.copy()
    flipped[63, 31] ^= 128
    swapped = codes.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({one, fingerprint([flipped]), fingerprint([swapped])}) == 3


TWO_PROCESSES = """
import sys
from pathlib import Path
from jlora.io import checkpoint
from jlora.distributed import processes
from jlora.tree.fingerprint import fingerprint
processes.initialize()
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

def place(value, *spec):
    target = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(value.shape, target, value.__getitem__)

value = np.arange(12, dtype=np.float32).reshape(4, 3)
tree = {"rows": place(value, "x"), "all": place(value)}
like = {"rows": place(value * 0), "all": place(value * 0, "x")}
run = {"identity": {}, "base_fingerprint": fingerprint(tree)}
checkpoint.save(Path(sys.argv[1]), 1, tree, {}, keep=1, **run)
checkpoint.save(Path(sys.argv[1]), 2, tree, {"n": 2}, keep=1, **run)
tree, extra = checkpoint.restore(Path(sys.argv[1]), 2, like, **run)
for name in like:
    assert tree[name].sharding == like[name].sharding
    for shard in tree[name].addressable_shards:
        assert (np.asarray(shard.data) == value[shard.index]).all()
print(extra, run["base_fingerprint"])
processes.exit_process(0, all_exit=True)
"""


def test_two_processes_save_one_checkpoint_and_one_process_reads_it(tmp_path, two_processes):
    runs = two_processes(TWO_PROCESSES, tmp_path)
    printed = [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    value = np.arange(12, dtype=np.float32).reshape(4, 3)
    tree = {"rows": jnp.asarray(value), "all": jnp.asarray(value)}
    base = fingerprint(tree)
    assert printed == [f"{{'n': 2}} {base}"] * 2
    assert checkpoint.steps(tmp_path) == [2]
    restored, _ = checkpoint.restore(tmp_path, 2, tree, identity={}, base_fingerprint=base)
    assert_same(restored, tree)


def test_a_write_that_is_cut_short_is_a_storage_error(tmp_path):
    """A limit on the size of files, below that of a leaf, as a quota would be."""
    large = {"a": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpoint.save(tmp_path, 1, large, {}, **RUN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"0\.5 MiB needed, .* MiB free") as caught:
            checkpoint.save(tmp_path, 2, like(large), {}, **RUN)
            checkpoint.save(tmp_path, 3, jax.tree.map(jnp.sqrt, large), {}, **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.where == str(tmp_path / "3")
    assert checkpoint.steps(tmp_path) == [1, 2]
    restored, _ = checkpoint.restore(tmp_path, 1, like(large), **RUN)
    assert_same(restored, large)
