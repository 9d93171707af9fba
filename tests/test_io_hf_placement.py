"""Leaves are assembled on their devices; the host holds one tensor at a time."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jlora.config import MeshConfig
from jlora.distributed import sharding
from jlora.io.hf.names import checkpoint_tensors
from jlora.io.hf.placement import _programs, assemble_leaf
from jlora.models import Model
from jlora.quant import nf4

LEAD = {"whole": (), "layers": (3,), "experts": (2, 3)}
SPEC = {
    "whole": PartitionSpec("fsdp", "tensor"),
    "layers": PartitionSpec(None, None, ("tensor", "fsdp")),
    "experts": PartitionSpec(None, None, "tensor", "fsdp"),
}


def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def shape_of(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("lead", LEAD)
@pytest.mark.parametrize("on_mesh", [False, True])
def test_parts_are_placed_correctly(lead, turned, on_mesh, monkeypatch):
    want = np.random.default_rng(0).standard_normal((*LEAD[lead], 8, 4), np.float32)
    where = NamedSharding(mesh(), SPEC[lead]) if on_mesh else None
    indices = list(itertools.product(*map(range, LEAD[lead])))
    read = []

    def part(index):
        read.append(index)
        return want[index].T if turned else want[index]

    placed, place = [], sharding.place

    def record(value, where):
        placed.append(where.shard_shape(value.shape))
        return place(value, where)

    monkeypatch.setattr(sharding, "place", record)
    leaf = assemble_leaf(shape_of(want), where, indices, part, turned)
    np.testing.assert_array_equal(leaf, want)
    if on_mesh:  # every device received only its own part
        shard_shape = where.shard_shape(want.shape)[-2:]
        assert set(placed) == {shard_shape[::-1] if turned else shard_shape}
    assert read == indices
    assert leaf.sharding == where if on_mesh else len(leaf.devices()) == 1


@pytest.mark.parametrize("on_mesh", [False, True])
def test_quantized_parts_are_placed_array_by_array(on_mesh):
    w = jax.random.normal(jax.random.key(0), (3, 128, 256))
    want = jax.vmap(nf4.quantize)(w)
    where = None
    if on_mesh:
        specs = sharding.quantized_spec(("q_proj", "kernel"), want, mesh())
        where = jax.tree.map(lambda s: NamedSharding(mesh(), s), specs)
    shapes = jax.tree.map(shape_of, want)
    indices = [(2,), (0,), (1,)]
    leaf = assemble_leaf(shapes, where, indices, lambda index: nf4.quantize(w[index]))
    assert jax.tree.structure(leaf) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, leaf, want)


def test_a_part_is_written_in_place_and_nothing_moves_between_devices():
    where = NamedSharding(mesh(), PartitionSpec(None, "fsdp", "tensor"))
    leaf = jax.ShapeDtypeStruct((4, 64, 128), jnp.float32)
    make, write = _programs((leaf,), (where,))
    leaves = make()
    part = jax.device_put(
        np.ones((128, 64), np.float32), NamedSharding(mesh(), PartitionSpec("tensor", "fsdp"))
    )
    program = write.lower(leaves, [part], (1,), True).compile().as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective|f32\[4,64,128\]", program)
    assert "f32[4,32,64]" in program
    before = [shard.data.unsafe_buffer_pointer() for shard in leaves[0].addressable_shards]
    after = write(leaves, [part], (1,), True)[0]
    assert [shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards] == before
    write(write(make(), [part], (0,), True), [part], (3,), True)
    assert write._cache_size() == 1  # not one program per layer


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Kernels of 2 MiB; a stack of them has 64 MiB."""

MEASURE = """
import sys, threading, time
import jax
from jlora.io.hf import load_pretrained

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peaks.append(anonymous())

load_pretrained(sys.argv[1], "float32")  # compiles
before, peaks, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
_, params = load_pretrained(sys.argv[1], "float32")
jax.block_until_ready(params)
done.set()
thread.join()
print(max(peaks) - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure memory in")
def test_the_host_never_holds_a_stack_of_layers(tmp_path):
    """Apart from the parameters, which the CPU's devices keep in host memory."""
    model = Model.from_config(CONFIG, "float32")
    save_file(
        {t.name: np.full(t.shape, 0.5, np.float32) for t in checkpoint_tensors(model)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(out) < 24 * 2**20
