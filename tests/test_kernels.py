"""Every kernel against the plain softmax in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from kvlock_jax.models.attention import kernels

KERNELS = {
    "plain": kernels.plain,
    "chunked": kernels.chunked,
    "chunked in blocks": functools.partial(kernels.chunked, block=16),
    "splash": functools.partial(kernels.splash, interpret=True),
}
EMPTY = -1e37
"""What the logsumexp of no keys is below."""


def softmax(q, k, v, keys=None):
    """Attention to the first `keys` keys, and its logsumexp, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :keys], v[:, :keys]))
    logits = np.einsum("blnk,bsnk->blns", q, k) / np.sqrt(q.shape[-1])
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("blns,bsnk->blnk", weights / total, v), (top + np.log(total))[..., 0]


def heads(batch, length, number, size, *, seed, dtype=jnp.float32):
    shape = (batch, length, number, size)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(batch, length, present, number, size, *, padding=0, dtype=jnp.float32):
    """Queries, keys, values; the last `padding` keys and values would spoil whatever they meet."""
    q = heads(batch, length, number, size, seed=1, dtype=dtype)
    k, v = (heads(batch, present, number, size, seed=s, dtype=dtype) for s in (2, 3))
    real = jnp.arange(present)[:, None, None] < present - padding
    return q, jnp.where(real, k, 10 * k), jnp.where(real, v, 1e4)


def run(name, q, k, v, keys=None):
    return jax.jit(KERNELS[name], static_argnums=3)(q, k, v, keys)


def check(found, want):
    for got, right in zip(found, want, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "shape, padding",
    [
        ((2, 40, 40, 3, 16), 0),
        ((1, 50, 129, 2, 24), 0),  # no size divides
        ((1, 50, 129, 2, 24), 128),  # one real key
        ((1, 128, 256, 1, 128), 0),  # all of whole lanes
        ((1, 128, 256, 1, 128), 130),  # a whole block of padding
        ((1, 1, 1, 1, 8), 0),
    ],
)
def test_kernel(name, shape, padding):
    arrays = qkv(*shape, padding=padding)
    keys = shape[2] - padding if padding else None
    check(run(name, *arrays, keys), softmax(*arrays, keys))


@pytest.mark.parametrize("name", KERNELS)
def test_keys_may_be_traced(name):
    kernel = jax.jit(KERNELS[name])
    for keys in (1, 33, 40):
        arrays = qkv(2, 20, 40, 3, 16, padding=40 - keys)
        check(kernel(*arrays, jnp.int32(keys)), softmax(*arrays, keys))


@pytest.mark.parametrize("name", KERNELS)
def test_a_part_without_keys_counts_for_nothing(name):
    q, k, v = qkv(1, 20, 40, 2, 16)
    out, lse = jax.jit(KERNELS[name])(q, k, 100 * v, jnp.int32(0))
    assert np.isfinite(out).all() and np.isfinite(lse).all() and (lse < EMPTY).all()
    want = softmax(q, k, v)
    parts = [(out, lse), (out, lse), run(name, q, k, v), (out, lse)]
    for order in (parts, parts[::-1]):
        check(functools.reduce(kernels.merge, order), want)
    none, none_lse = kernels.merge(*parts[:2])
    assert np.isfinite(none).all() and (none_lse < EMPTY).all()


@pytest.mark.parametrize("name", KERNELS)
def test_parts_of_the_keys_merge(name):
    q, k, v = qkv(2, 9, 30, 2, 16)
    q = 3 * q  # some part has most of a query's weight, each time another
    cuts = [(0, 10), (10, 20), (20, 30)]
    parts = [run(name, q, k[:, a:b], v[:, a:b]) for a, b in cuts]
    check(functools.reduce(kernels.merge, parts), softmax(q, k, v))


@pytest.mark.parametrize("name", KERNELS)
def test_large_logits(name):
    q, k, v = qkv(1, 6, 40, 2, 16, padding=3)
    out, lse = run(name, 200 * q, k, v, 37)
    want, want_lse = softmax(200 * q, k, v, 37)  # up to 900
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-3)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16(name):
    arrays = qkv(1, 40, 70, 2, 32, padding=5, dtype=jnp.bfloat16)
    out, lse = run(name, *arrays, 65)
    want, want_lse = softmax(*arrays, 65)
    assert out.dtype == lse.dtype == jnp.float32
    # two roundings to 8 bits: of the weights, and by splash of the scaled queries and the result
    np.testing.assert_allclose(out, want, rtol=0, atol=0.02)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=0.02)


def test_splash_in_several_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 128)
    both = jax.jit(lambda *x: (KERNELS["splash"](*x), kernels.splash_output(*x, interpret=True)))
    for padding in (0, 90, 290):
        arrays = qkv(1, 200, 300, 1, 16, padding=padding)
        found, out = both(*arrays, jnp.int32(300 - padding))
        want = softmax(*arrays, 300 - padding)
        check(found, want)
        np.testing.assert_allclose(out, want[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "length, size, covered",
    [
        (32_768, 1024, 32_768),
        (4096, 1024, 4096),
        (1280, 640, 1280),
        (128, 128, 128),
        (9472, 1024, 10_240),
        (32_760, 1024, 32_768),
        (1950, 1024, 2048),
        (1, 128, 128),
    ],
)
def test_blocks_of_splash(length, size, covered):
    assert kernels._blocks(length, 1024) == (size, covered)


@pytest.mark.parametrize("width, queries", [(128, 1024), (256, 1024), (384, 512)])
def test_blocks_of_wide_heads_are_smaller(width, queries, monkeypatch):
    sizes, make = [], splash_attention.BlockSizes

    def found(**size):
        sizes.append(size)
        return make(**size)

    monkeypatch.setattr(splash_attention, "BlockSizes", found)
    padded([(1, 4096, 1, width)] * 3)
    assert sizes[0] == {"block_q": queries, "block_kv": queries}


def padded(shape, keys=None):
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shape]
    return str(jax.make_jaxpr(functools.partial(kernels.splash_output, keys=keys))(*arrays))


def test_splash_pads_only_what_is_not_aligned():
    q, k = (1, 2048, 2, 128), (1, 4096, 2, 128)
    assert " pad[" not in padded((q, k, k)) and "segmented" not in padded((q, k, k))
    assert " pad[" not in padded((q, k, k), 4000) and "segmented" in padded((q, k, k), 4000)
    odd = (1, 4095, 2, 128)
    assert " pad[" in padded((q, odd, odd)) and "segmented" in padded((q, odd, odd))


def test_chunked_holds_one_block_of_logits():
    """Of 2 GB of logits in all, and 67 MB of a head; numbers beside them are 21 MB."""
    shape = jax.ShapeDtypeStruct((2, 4096, 16, 32), jnp.float32)
    lowered = jax.jit(lambda *x: kernels.chunked(*x, 4090)[0]).lower(shape, shape, shape)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 64e6


def of_xla(monkeypatch):
    """Lets the reference of `jax.nn` stand in for cuDNN, and returns its calls."""
    attention, asked = jax.nn.dot_product_attention, []

    def fake(q, k, v, *, implementation, **options):
        asked.append((q.dtype, implementation))
        with jax.numpy_dtype_promotion("standard"):
            return attention(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    return asked


@pytest.mark.parametrize("keys", [None, 25, jnp.int32(25)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_is_asked(monkeypatch, keys, dtype):
    asked = of_xla(monkeypatch)
    arrays = qkv(3, 20, 30, 2, 16, padding=0 if keys is None else 5, dtype=dtype)
    out = kernels.cudnn_output(*arrays, keys)
    assert asked == [(dtype, "cudnn")] and out.dtype == jnp.float32
    want, _ = softmax(*arrays, None if keys is None else 25)
    np.testing.assert_allclose(out, want, rtol=0, atol=0.03)


def test_cudnn_is_not_asked_in_float32(monkeypatch):
    asked = of_xla(monkeypatch)
    arrays = qkv(1, 20, 30, 2, 16)
    np.testing.assert_allclose(kernels.cudnn_output(*arrays), softmax(*arrays)[0], atol=1e-5)
    assert asked == []


def test_without_cudnn():
    """The real function, which this process cannot give: the CPU traces for GPUs too."""
    arrays = qkv(1, 20, 30, 2, 16, dtype=jnp.bfloat16)
    out = jax.jit(kernels.cudnn_output)(*arrays)
    np.testing.assert_allclose(out, softmax(*arrays)[0], rtol=0, atol=0.02)
