"""Attention and rotary positions against plain loops and complex numbers in float64."""

import cmath
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.models.attention import attend, rope_axes, rope_table, rotate

GRID = (3, 4, 5)


def turns(grid, head_dim):
    """Every token's turns `L K/2` as complex numbers, from the positions of METHOD.md's tokens."""
    third = head_dim // 6
    pairs = (head_dim // 2 - 2 * third, third, third)  # of time, rows, columns
    rows = []
    for position in itertools.product(*map(range, grid)):  # frame-major
        row = []
        for place, count in zip(position, pairs, strict=True):
            for pair in range(count):
                row.append(cmath.exp(1j * place / 10_000 ** (pair / count)))
        rows.append(row)
    return np.array(rows)


def heads(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "head_dim, axes",
    [
        (12, (4, 4, 4)),
        (16, (8, 4, 4)),
        (20, (8, 6, 6)),
        (22, (10, 6, 6)),
        (26, (10, 8, 8)),
        (128, (44, 42, 42)),  # the published models'
    ],
)
def test_rope_table(head_dim, axes):
    assert rope_axes(head_dim) == axes
    cos, sin = rope_table(GRID, head_dim)
    want = turns(GRID, head_dim)
    assert cos.dtype == sin.dtype == jnp.float32
    assert cos.shape == sin.shape == want.shape
    np.testing.assert_allclose(cos, want.real, rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin, want.imag, rtol=0, atol=1e-7)


def test_rope_table_keeps_its_precision_far_out():
    cos, sin = rope_table((1000, 1, 1), 8)
    want = turns((1000, 1, 1), 8)
    np.testing.assert_allclose(cos, want.real, rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin, want.imag, rtol=0, atol=1e-7)


def test_rotate_turns_neighbouring_pairs():
    x = heads(2, 60, 3, 22)
    got = rotate(x, rope_table(GRID, 22))
    wide = np.asarray(x, np.float64)
    want = (wide[..., 0::2] + 1j * wide[..., 1::2]) * turns(GRID, 22)[None, :, None]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[..., 0::2], want.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[..., 1::2], want.imag, rtol=0, atol=1e-6)
    norms = np.linalg.norm(wide, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), norms, rtol=1e-6)


def test_logits_depend_on_offsets_only():
    # one query and one key, put at every token
    rope = rope_table(GRID, 20)
    q, k = (
        rotate(jnp.broadcast_to(heads(1, 1, 1, 20, seed=s), (1, 60, 1, 20)), rope) for s in (1, 2)
    )
    logits = np.einsum("LK,SK->LS", q[0, :, 0], k[0, :, 0])
    places = list(itertools.product(*map(range, GRID)))
    by_offset = {}
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = tuple(np.subtract(a, b).tolist())
        by_offset.setdefault(offset, []).append(logits[i, j])
    for values in by_offset.values():
        np.testing.assert_allclose(values, values[0], rtol=0, atol=1e-5)
    means = [values[0] for values in by_offset.values()]
    assert np.unique(np.round(means, 4)).size > 0.9 * len(means)  # and offsets are told apart


def attend_loop(q, k, v):
    """Attention in Python floats, one query at a time."""
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        logits = [
            math.fsum(q[b, i, n] * k[b, s, n]) / q.shape[-1] ** 0.5 for s in range(k.shape[1])
        ]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for s, weight in enumerate(weights):
            out[b, i, n] += weight / math.fsum(weights) * v[b, s, n]
    return out


@pytest.mark.parametrize("tokens, keys, scale", [(4, 4, 1.0), (3, 7, 1.0), (5, 1, 1.0), (4, 6, 30)])
def test_attend(tokens, keys, scale):
    q = scale * heads(2, tokens, 3, 6, seed=1)
    k, v = heads(2, keys, 3, 6, seed=2), heads(2, keys, 3, 6, seed=3)
    want = attend_loop(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(attend(q, k, v), want, rtol=0, atol=2e-6 * max(1, scale))


def test_attend_survives_large_logits():
    q = jnp.full((1, 1, 1, 4), 1e4)
    k = jnp.stack([jnp.full((1, 1, 4), 1e4), jnp.full((1, 1, 4), -1e4)], axis=1)
    v = jnp.stack([jnp.full((1, 1, 4), 2.0), jnp.full((1, 1, 4), 3.0)], axis=1)
    np.testing.assert_array_equal(attend(q, k, v), jnp.full((1, 1, 1, 4), 2.0))


def test_attend_in_bfloat16_sums_in_float32():
    q, k, v = (heads(2, 9, 2, 32, seed=s, dtype=jnp.bfloat16) for s in range(3))
    got = attend(q, k, v)
    assert got.dtype == jnp.float32
    want = attend_loop(*(np.asarray(x, np.float64) for x in (q, k, v)))
    # half a unit in the last place of the softmax's weights, no more
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-9 * np.abs(np.asarray(v)).max())
    # 1000 equal keys: weights of 1/1000, whose sum bfloat16 would stall at 1/4
    ones = jnp.ones((1, 1000, 1, 4), jnp.bfloat16)
    sums = attend(jnp.zeros((1, 1, 1, 4), jnp.bfloat16), ones, ones)
    np.testing.assert_allclose(sums, 1.0, rtol=2**-8)


def test_attend_under_vmap_equals_rows():
    q, k, v = (heads(3, 4, 2, 6, seed=s) for s in range(3))
    rows = jax.vmap(lambda *x: attend(*(a[None] for a in x))[0])(q, k, v)
    np.testing.assert_allclose(attend(q, k, v), rows, rtol=1e-6, atol=1e-6)
