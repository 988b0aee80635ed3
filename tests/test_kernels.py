"""Every kernel against the plain softmax in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.models.attention import flash, kernels


def flash_part(q, k, v, keys=None):
    """What `flash` returns, and the same from its state."""
    rows = flash.Rows.of(q, interpret=True)
    state = rows.more(*map(flash.side_by_side, (k, v)), keys)
    total = jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)
    top = state.largest + jnp.log2(total)
    return flash.flash(q, k, v, keys, interpret=True), top[:, :, 0].swapaxes(1, 2)


KERNELS = {
    "plain": kernels.plain,
    "chunked": kernels.chunked,
    "chunked in blocks": functools.partial(kernels.chunked, block=16),
    "flash": flash_part,
}
EMPTY = -1e37
"""What the `top` of no keys is below."""


def softmax(q, k, v, keys=None):
    """Attention to the first `keys` keys, and its `top`, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :keys], v[:, :keys]))
    logits = np.einsum("blnk,bsnk->blns", q, k)
    top = logits.max(-1, keepdims=True)
    weights = 2.0 ** (logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("blns,bsnk->blnk", weights / total, v), (top + np.log2(total))[..., 0]


def heads(batch, length, number, size, *, seed, dtype=jnp.float32):
    shape = (batch, length, number, size)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(batch, length, present, number, size, *, padding=0, dtype=jnp.float32):
    """Queries, keys, values; the last `padding` keys and values would spoil whatever they meet."""
    q = heads(batch, length, number, size, seed=1) * kernels.logit_scale(size)
    q = q.astype(dtype)
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
    # roundings to 8 bits: of the weights, and by flash of the result
    np.testing.assert_allclose(out, want, rtol=0, atol=0.02)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=0.02)


def test_the_scale_is_that_of_a_softmax():
    q, k, v = (heads(1, n, 2, 16, seed=n) for n in (5, 7, 8))
    v = v[:, :7]
    out, _ = kernels.plain(q * kernels.logit_scale(16), k, v)
    with jax.numpy_dtype_promotion("standard"):
        want = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [200, 256, 300])
def test_flash_in_several_blocks(monkeypatch, length):
    """Blocks that end behind the last query or key hold anything there, even NaN."""
    monkeypatch.setattr(flash, "_BLOCK", 128)
    monkeypatch.setattr(flash, "_ROWS", 64)
    run = jax.jit(KERNELS["flash"])
    for padding in (0, 90, 290):
        arrays = qkv(1, length, 300, 1, 16, padding=padding)
        check(run(*arrays, jnp.int32(300 - padding)), softmax(*arrays, 300 - padding))


def test_flash_goes_on_from_a_state():
    q, k, v = qkv(2, 20, 90, 2, 16)
    q, rows = 3 * q, flash.Rows.of(3 * q, interpret=True)
    k, v = k.at[:, 70:].mul(10), v.at[:, 70:].set(1e4)
    first, second, third = (
        (flash.side_by_side(k[:, a : a + 30]), flash.side_by_side(v[:, a : a + 30]))
        for a in (0, 30, 60)
    )
    state = rows.more(*first)
    state = rows.more(*second, 30, state)
    state = rows.more(*third, jnp.int32(0), state)  # padding alone changes nothing
    found = rows.attend(*third, jnp.int32(10), state)
    np.testing.assert_allclose(found, softmax(q, k, v, 70)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "length, size",
    [(32_768, 1024), (4096, 1024), (1280, 640), (128, 128), (9472, 1024), (1950, 1024), (1, 128)],
)
def test_blocks_of_flash(length, size):
    assert flash.block_of(length, 1024) == size


@pytest.mark.parametrize("width, queries", [(128, 1024), (256, 1024), (384, 512)])
def test_blocks_of_wide_heads_are_smaller(width, queries):
    assert flash.block(width, jnp.bfloat16) == queries


def traced(shape, keys=None):
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shape]
    return str(jax.make_jaxpr(functools.partial(flash.flash, keys=keys))(*arrays))


def test_flash_pads_and_masks_only_what_it_must():
    """A mask costs a fifth of a block's instructions; it is compiled for the last block alone."""
    q, k, odd = (1, 2048, 2, 128), (1, 4096, 2, 128), (1, 4095, 2, 128)
    assert " pad[" not in traced((q, k, k)) and "select_n" not in traced((q, k, k))
    assert " pad[" not in traced((q, odd, odd)) and "select_n" in traced((q, odd, odd))
    assert "select_n" in traced((q, k, k), 4000)
    assert " pad[" in traced([(1, 2048, 2, 64)] * 3)


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
