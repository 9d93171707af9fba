"""Layouts on eight virtual devices: what each device holds, and that values do not change."""

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.config import MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.distributed.mesh import AXES, compiler_options
from jlora.errors import ConfigError
from jlora.ops.dot import dot
from jlora.quant import codebooks, int8, nf4
from jlora.quant.params import quantize_params

MESHES = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def mesh_of(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_full_determinism_adds_an_option_on_gpus_only(platform):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    before, after = (compiler_options(mesh, full_determinism=on) or {} for on in (False, True))
    added = {"xla_gpu_exclude_nondeterministic_ops": "True"} if platform == "gpu" else {}
    assert after == before | added and not before.keys() & added.keys()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def params():
    """Two layers; 512 = 8 blocks of 64, so that eight devices can split every dimension."""
    layers = {
        "q_proj": {"kernel": normal(2, 512, 256), "bias": normal(2, 256)},
        "down_proj": {"kernel": normal(2, 512, 128)},
        "norm": {"scale": normal(2, 512)},
    }
    embedding = {"embedding": normal(64, 512)}
    return {"embed_tokens": embedding, "layers": layers, "lm_head": {"kernel": normal(512, 64)}}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_one_axis_takes_the_remaining_devices(sizes, expected):
    mesh = mesh_of(**sizes)
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ({"data": 3}, 8, "data 3 × fsdp 1 × tensor 1, but there are 8 devices.*-1"),
        ({"fsdp": 3}, 8, "data rest × fsdp 3.*fsdp × tensor.*1, 2, 4, 8"),
        ({"data": 2, "tensor": 2}, 1, "there is 1 device.*make the product 1"),
        ({"fsdp": 2}, 1, "there is 1 device.*one of 1$"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(sizes, count, message):
    with pytest.raises(ConfigError, match=f"(?s)^mesh: .*{message}"):
        sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers.self_attn.q_proj.kernel", (2, 8, 8), (None, "fsdp", "tensor")),
        ("layers.mlp.down_proj.kernel", (2, 8, 8), (None, "tensor", "fsdp")),
        ("h.attn.c_attn.kernel", (2, 8, 8), (None, "fsdp", "tensor")),
        ("h.attn.c_proj.kernel", (2, 8, 8), (None, "tensor", "fsdp")),
        ("layers.self_attn.o_proj.lora_A", (2, 8, 4), (None, "tensor", None)),
        ("layers.self_attn.o_proj.lora_B", (2, 4, 8), (None, None, "fsdp")),
        ("layers.self_attn.q_proj.lora_A", (2, 8, 4), (None, "fsdp", None)),
        ("layers.self_attn.q_proj.lora_B", (2, 4, 8), (None, None, "tensor")),
        ("embed_tokens.embedding", (8, 8), ("tensor", "fsdp")),
        ("lm_head.kernel", (8, 8), ("fsdp", "tensor")),
        ("layers.q_proj.kernel", (2, 7, 8), (None, None, "tensor")),
        ("layers.q_proj.kernel", (2, 8, 7), (None, "fsdp", None)),
        ("layers.q_proj.bias", (2, 8), ()),
        ("layers.norm.scale", (2, 8), ()),
        ("q_proj.kernel", (), ()),
    ],
)
def test_layout_by_name(path, shape, expected):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert sharding.spec(path.split("."), shape, mesh) == PartitionSpec(*expected)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_placement_changes_no_value(sizes, double_quant):
    config = QuantConfig(bnb_4bit_use_double_quant=double_quant)
    tree = quantize_params(params(), config)
    mesh = mesh_of(**sizes)
    placed = sharding.place(tree, sharding.shardings(tree, mesh))
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}"),
        placed,
        sharding.shardings(tree, mesh),
    )


@pytest.mark.parametrize("sizes", MESHES[1:])
@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_every_shard_of_a_quantized_kernel_holds_complete_blocks(sizes, name):
    """Each device's codes and absmax suffice to dequantize its part of the kernel."""
    tree = quantize_params(params(), QuantConfig(bnb_4bit_use_double_quant=False))
    mesh = mesh_of(**sizes)
    dense = np.asarray(tree["layers"][name]["kernel"].dequantize())
    q = sharding.place(tree, sharding.shardings(tree, mesh))["layers"][name]["kernel"]
    seen = np.zeros(dense.shape, bool)
    for codes, absmax in zip(q.codes.addressable_shards, q.absmax.addressable_shards, strict=True):
        assert codes.device == absmax.device
        _, rows, bytes_ = codes.index
        cols = slice(2 * (bytes_.start or 0), bytes_.stop and 2 * bytes_.stop)
        part = dense[:, cols, rows]  # the kernel is the stored matrix's transpose
        values = codebooks.NF4[
            np.stack([np.asarray(codes.data) >> 4, np.asarray(codes.data) & 15], -1)
        ]
        blocks = values.reshape(2, part.shape[2], -1, 64) * np.asarray(absmax.data)[..., None]
        np.testing.assert_array_equal(blocks.reshape(2, part.shape[2], -1).mT, part)
        assert part.size < dense.size
        seen[:, cols, rows] = True
    assert seen.all()


@pytest.mark.parametrize(
    "sizes", [*(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:-1]), MESHES[-1]]
)
@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_products_and_gradients_of_sharded_quantized_kernels_equal_the_unsharded(settings, sizes):
    """Compared with the dequantized kernels on one device, layer by layer."""
    kernels = {"q_proj": {"kernel": normal(2, 512, 256)}, "o_proj": {"kernel": normal(2, 256, 512)}}
    tree = quantize_params({"layers": kernels}, QuantConfig(**settings))
    mesh = mesh_of(**sizes)
    x = normal(1, 8, 512, seed=1)

    def loss(x, layers, product):
        def body(h, w):
            inner = jnp.tanh(product(h, w["q_proj"]["kernel"]) / 30)
            return h + product(inner, w["o_proj"]["kernel"]) / 20, None

        return jnp.sum(jnp.sin(jax.lax.scan(body, x, layers)[0]))

    def dense(h, w):
        return jnp.matmul(h, w.dequantize(), precision="highest")

    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    expected, expected_gradient = run(x, tree["layers"], dense)
    placed = sharding.place(tree, sharding.shardings(tree, mesh))
    rows = sharding.place(x, sharding.batch_sharding(mesh))
    got, gradient = run(rows, placed["layers"], dot)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(gradient), expected_gradient, atol=1e-5 * float(jnp.abs(expected_gradient).max())
    )


def test_an_axis_that_would_cut_blocks_splits_the_other_dimension():
    mesh = mesh_of(data=1, fsdp=8)
    in_four_blocks = nf4.quantize(normal(24, 256)).mT  # (in 256, out 24)
    got = sharding.quantized_spec(("q_proj", "kernel"), in_four_blocks, mesh)
    assert got.codes == got.absmax == PartitionSpec(("tensor", "fsdp"), None)
    got = sharding.quantized_spec(("o_proj", "kernel"), in_four_blocks, mesh)
    assert got.codes == PartitionSpec("fsdp", "tensor")
    got = sharding.quantized_spec(("q_proj", "kernel"), nf4.quantize(normal(25, 256)).mT, mesh)
    assert got.codes == PartitionSpec("tensor", None)  # neither 4 blocks nor 25 rows
    across_rows = nf4.quantize(normal(24, 40)).mT
    got = sharding.quantized_spec(("q_proj", "kernel"), across_rows, mesh)
    assert got.codes == PartitionSpec(("tensor", "fsdp"), None) and got.absmax == PartitionSpec()
    got = sharding.quantized_spec(("o_proj", "kernel"), across_rows, mesh)
    assert got.codes == PartitionSpec("fsdp", "tensor") and got.absmax == PartitionSpec()


QUANTIZERS = {
    "whole blocks": lambda w: nf4.quantize(w, 32),
    "float32 absmax": lambda w: nf4.quantize(w, 64, double_quant=False),
    "fp4": lambda w: nf4.quantize(w, 32, quant_type="fp4"),
    "cut blocks": lambda w: nf4.quantize(w[:, :96], 32),
    "straddling rows": lambda w: nf4.quantize(w[:, :200], 64),
    "int8": int8.quantize,
}


@pytest.mark.parametrize("module", ["q_proj", "down_proj"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 8), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
)
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_shards_are_dequantized_without_communication(quantizer, sizes, module):
    """Every device dequantizes its own part, with the same values as a single device."""
    mesh = mesh_of(**dict(zip(AXES, sizes, strict=True)))
    kernels = [quantizer(normal(64, 256, seed=s)).mT for s in range(2)]
    tree = {"layers": {module: {"kernel": jax.tree.map(lambda *x: jnp.stack(x), *kernels)}}}
    where = sharding.shardings(tree, mesh)
    rows, cols = where["layers"][module]["kernel"].codes.spec[-2:]
    dense = NamedSharding(mesh, PartitionSpec(None, cols, rows))
    q = sharding.place(tree, where)["layers"][module]["kernel"]
    run = jax.jit(lambda q: q.dequantize(), out_shardings=dense).lower(q).compile()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", run.as_text())
    part = q.codes.addressable_shards[0].data
    assert part.size * sizes[1] * sizes[2] == q.codes.size
    expected = tree["layers"][module]["kernel"].dequantize()
    np.testing.assert_array_equal(np.asarray(run(q)), np.asarray(expected))


def test_moments_are_sharded_like_their_parameters():
    mesh = mesh_of(data=1, fsdp=4, tensor=2)
    module = {"lora_A": normal(2, 8, 4), "lora_B": normal(2, 4, 8)}
    adapter = {"layers": {"q_proj": module, "o_proj": module}}
    state = {"trainable": adapter, "opt": optax.adam(0.1).init(adapter)}
    layouts = sharding.shardings(state, mesh)
    assert layouts["opt"][0].count.spec == PartitionSpec()
    for tree in (layouts["trainable"], layouts["opt"][0].mu, layouts["opt"][0].nu):
        assert tree == sharding.shardings(adapter, mesh)
    assert layouts["trainable"]["layers"]["o_proj"]["lora_B"] == NamedSharding(
        mesh, PartitionSpec(None, None, "fsdp")
    )


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    batch = np.arange(2 * 8 * 3).reshape(2, 8, 3).astype(np.int32)
    placed = sharding.place(batch, sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(np.asarray(placed), batch)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}


def test_description_counts_the_bytes_on_each_device():
    tree = quantize_params(params(), QuantConfig())
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    placed = sharding.place(tree, sharding.shardings(tree, mesh))
    rows = sharding.describe(jax.eval_shape(lambda: tree), mesh)
    assert sum(row.leaves for row in rows) == 6
    assert sum(row.total_bytes for row in rows) == sum(x.nbytes for x in jax.tree.leaves(tree))
    first = jax.devices()[0]
    held = [s for x in jax.tree.leaves(placed) for s in x.addressable_shards if s.device == first]
    assert sum(row.device_bytes for row in rows) == sum(s.data.nbytes for s in held)
    names = {(row.kind, row.layout) for row in rows}
    assert {("kernel (NF4)", "tensor × fsdp"), ("kernel", "fsdp × tensor")} <= names
    assert ("bias", "replicated") in names
    assert [r.total_bytes for r in rows] == sorted((r.total_bytes for r in rows), reverse=True)


WORKER = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jlora import nf4, sharding
from jlora.config import MeshConfig
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
w = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
tree = {"q_proj": {"kernel": nf4.quantize(jax.numpy.asarray(w)).mT}}
where = sharding.shardings(tree, mesh)
placed = sharding.place(sharding.place(tree, where), where)
codes = placed["q_proj"]["kernel"].codes
for shard in codes.addressable_shards:
    expected = np.asarray(tree["q_proj"]["kernel"].codes)
    np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert shard.data.size * 4 == expected.size
assert not codes.is_fully_addressable
total = jax.jit(lambda t: t["q_proj"]["kernel"].dequantize().sum())(placed)
print("SUM", float(total), float(tree["q_proj"]["kernel"].dequantize().sum()))
"""


def test_two_processes_share_the_arrays():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WORKER, address]
    workers = [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    for output in outputs:
        line = next(line for line in output.splitlines() if line.startswith("SUM"))
        sharded, unsharded = map(float, line.split()[1:])
        assert abs(sharded - unsharded) <= 1e-3 * abs(unsharded)


def test_gather_returns_full_arrays_on_the_host():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    spec = jax.sharding.PartitionSpec("fsdp")
    array = jax.device_put(np.arange(16.0), NamedSharding(mesh, spec))
    copy = sharding.gather({"a": array})["a"]
    assert isinstance(copy, np.ndarray) and copy.tolist() == list(range(16))
