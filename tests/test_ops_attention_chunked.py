"""Chunked attention, compared with the reference: results, gradients, memory, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import MeshConfig
from jlora.distributed import sharding
from jlora.distributed.mesh import BATCH_AXES
from jlora.ops.attention import chunked, reference

B, T, HEADS, KV, DIM, CHUNK = 2, 13, 4, 2, 8, 4

# Documents within a chunk, across chunks and of one token; an id that recurs; padding at the front,
# at the end, and longer than a chunk.
SEGMENTS = jnp.asarray(
    [[1, 1, 2, 2, 2, 2, 2, 2, 3, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]]
)


def qkv(dtype=jnp.float32, batch=B, length=T):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, DIM) for heads in (HEADS, KV, KV)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def both(q, k, v, segments=SEGMENTS, window=None, softcap=None, chunk=CHUNK, scale=0.4):
    """The results of the chunked attention and of the reference."""
    index = jnp.arange(q.shape[1])[None]
    mask = reference.causal_mask(index, index, window)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    got = chunked.attend(q, k, v, segments, window, scale, softcap, chunk)
    return got, reference.attend(q, k, v, mask, scale, softcap)


def weighed(out, logsumexp):
    """A scalar that depends on all results, with different weights."""
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out.astype(jnp.float32) * weights).sum() + (logsumexp * weights[..., 0]).sum()


@functools.partial(jax.jit, static_argnums=0)
def gradients(which, *x, **masks):
    """Gradients of ``weighed`` by queries, keys and values: chunked (0) or reference (1)."""
    return jax.grad(lambda *x: weighed(*both(*x, **masks)[which]), (0, 1, 2))(*x)


def assert_close(got, want, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), got, want)


@pytest.mark.parametrize(
    ("segments", "window", "softcap"),
    [
        (None, None, None),
        (None, 6, 0.7),
        (SEGMENTS, None, None),
        (SEGMENTS, 1, 0.7),
        (SEGMENTS, 6, None),
    ],
)
def test_results_and_gradients_match_the_reference(segments, window, softcap):
    def results(which, *x):
        out = both(*x, segments, window, softcap)[which]
        return weighed(*out), out

    @jax.jit
    def everything(*x):
        both_of = [
            jax.value_and_grad(functools.partial(results, i), (0, 1, 2), True) for i in (0, 1)
        ]
        return [f(*x) for f in both_of]

    assert_close(*everything(*qkv()))


def test_a_document_starts_at_its_first_token_even_if_its_tokens_are_scattered():
    got = chunked._document_start(jnp.asarray([[7, 7, 3, 3, 7, 0, 0], [0, 0, 2, 2, 1, 1, 0]]))
    assert got.tolist() == [[0, 0, 2, 2, 0, 5, 5], [0, 0, 2, 2, 4, 4, 0]]


@pytest.mark.parametrize(
    ("ids", "window"), [([3] * 5 + [2] * 5 + [1] * 3, None), ([1] * 13, 5), ([1] * 4 + [2] * 9, 50)]
)
def test_chunks_that_no_query_sees_are_not_computed(ids, window):
    q, k, v = qkv()
    segments = jnp.asarray([ids] * B)
    # No query sees the chunks with NaN: if they were computed, 0 * NaN would be NaN.
    v = v.at[:, :CHUNK].set(jnp.nan)
    last = slice(3 * CHUNK, None)
    got, want = both(q, k, v, segments, window)
    assert np.isfinite(got[0][:, last]).all() and np.isnan(want[0][:, last]).all()


def test_low_precision_matches_float32_up_to_rounding():
    q, k, v = qkv(jnp.bfloat16)
    in_float32 = [x.astype(jnp.float32) for x in (q, k, v)]
    grads = [gradients(which, *x, window=6) for which, x in ((0, (q, k, v)), (1, in_float32))]
    for got, want in zip(*grads, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(got.astype(jnp.float32) - want) / np.linalg.norm(want)
        assert error < 2**-7  # bfloat16's own rounding is 2^-9 of each number


def test_memory_grows_with_length_and_not_with_its_square():
    def temporaries(length, which):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(length=length)]
        ids = jax.ShapeDtypeStruct((B, length), jnp.int32)

        def loss(q, k, v, ids):
            return weighed(*both(q, k, v, ids, chunk=16)[which])

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1024, which=0) < 2.1 * temporaries(512, which=0)
    assert temporaries(1024, which=1) > 3 * temporaries(512, which=1)


def test_vmap_maps_queries_documents_and_windows():
    q, k, v = (jnp.stack([x, x[::-1]]) for x in qkv())
    segments = jnp.stack([SEGMENTS, SEGMENTS[::-1] * 0 + 1])

    def of_row(which, q, k, v, segments, window):
        return gradients(which, q, k, v, segments=segments, window=window)

    mapped = q, k, v, segments, jnp.asarray([2, 9])
    assert_close(*(jax.vmap(functools.partial(of_row, i))(*mapped) for i in (0, 1)))


def test_layers_of_different_windows_scan_and_rematerialise():
    q, k, v = qkv()

    def loss(which, k):
        def layer(q, window):
            return q + both(q, k, v, window=window)[which][0], None

        out, _ = jax.lax.scan(jax.checkpoint(layer), q, jnp.asarray([2, 5, 100]))
        return weighed(out, out[..., 0])

    assert_close(*(jax.jit(jax.grad(functools.partial(loss, i)))(k) for i in (0, 1)))


def test_a_mesh_splits_rows_and_heads_and_gathers_neither():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    q, k, v = qkv(batch=4)
    segments = jnp.concatenate([SEGMENTS, SEGMENTS[::-1]])
    spec = jax.sharding.PartitionSpec(BATCH_AXES)
    heads = jax.sharding.PartitionSpec(BATCH_AXES, None, "tensor")
    places = [jax.sharding.NamedSharding(mesh, s) for s in (heads, heads, heads, spec)]
    placed = jax.device_put([q, k, v, segments], places)

    def split(q, k, v, segments):
        return gradients(0, q, k, v, segments=segments, window=6)

    with jax.set_mesh(mesh):
        compiled = jax.jit(split).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(*placed), gradients(1, q, k, v, segments=segments, window=6))


@pytest.mark.parametrize(
    ("rows", "heads", "platform", "size"),
    [
        (1, 12, "cpu", 256),
        (8, 12, "cpu", 64),
        (1, 32, "gpu", 1024),
        (4, 32, "gpu", 512),
        (64, 32, "gpu", 256),
        (1, 32, "tpu", 256),
    ],
)
def test_chunks_are_as_large_as_the_device_allows(rows, heads, platform, size):
    assert chunked.chunk_size(rows, heads, platform) == size
