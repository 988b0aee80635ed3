"""Norms, and the kernels that compute them on TPUs, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.models import norms
from kvlock_jax.models.attention.rope import rope_table

EPS = 1e-6
RNG = np.random.default_rng(0)


def numbers(*shape, mean=0.0):
    return (RNG.normal(size=shape) + mean).astype(np.float32)


def layer_norm(x, factor, shift):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    centred /= np.sqrt(centred.var(-1, keepdims=True) + EPS)
    return centred * factor[:, None] + shift[:, None]


FORMS = {
    "modulated": norms.modulated,
    "kernel": functools.partial(norms.modulated_kernel, interpret=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "rows, tokens, mean", [(2, 40, 0.0), (2, 1, 0.0), (1, 2100, 0.0), (2, 24, 300)]
)
def test_modulated(form, rows, tokens, mean):
    """A mean of 300 leaves 15 of 24 bits to what differs; its square would leave none."""
    x, factor, shift = numbers(rows, tokens, 128, mean=mean), numbers(rows, 128), numbers(1, 128)
    found = jax.jit(functools.partial(FORMS[form], eps=EPS, dtype=jnp.float32))(x, factor, shift)
    limit = 1e-5 if not mean else 3e-4
    np.testing.assert_allclose(found, layer_norm(x, factor, shift), rtol=0, atol=limit)


def rope(rows, tokens):
    table = rope_table((tokens, 1, 1), 128)
    if rows is None:
        return table
    return tuple(jnp.stack([jnp.roll(t, n, axis=0) for n in range(rows)]) for t in table)


def turned(x, scale, cos, sin):
    """Each head's pairs as complex numbers, after the norm over all heads."""
    x = np.asarray(x, np.float64)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * scale
    pairs = x.reshape(*x.shape[:2], -1, 64, 2)
    turns = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[..., None, :]
    whole = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
    return np.stack([whole.real, whole.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("tokens", [40, 700])
def test_rotated(kernel, rows, tokens):
    """With one table of positions for all rows, or one for each."""
    x, scale, table = numbers(2, tokens, 384), numbers(384), rope(rows, tokens)
    options = dict(eps=EPS, dtype=jnp.float32)
    if kernel:
        run = functools.partial(norms.rotated_kernel, interpret=True, **options)
    else:
        run = lambda x, scale, *table: norms.rotated(x, scale, table, **options)  # noqa: E731
    found = jax.jit(run)(x, scale, *table)
    np.testing.assert_allclose(found, turned(x, scale, *table), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_round_once(dtype):
    x, scale, table = numbers(1, 16, 128), numbers(128), rope(None, 16)
    for kernel, plain, others in (
        (norms.modulated_kernel, norms._modulated, (scale[None], scale[None])),
        (norms.rotated_kernel, norms._rotated, (scale, *table)),
    ):
        found = kernel(x, *others, eps=EPS, dtype=dtype, interpret=True)
        exact = plain(jnp.asarray(x), *others, eps=EPS, dtype=jnp.float32)
        assert found.dtype == dtype
        limit = jnp.finfo(dtype).eps / 2 * np.abs(exact) + 1e-6
        assert (np.abs(np.asarray(found, np.float32) - exact) <= limit).all()


def test_gradients_are_those_of_the_formula():
    x, factor, shift = numbers(2, 5, 128), numbers(2, 128), numbers(2, 128)
    weight = numbers(2, 5, 128)

    def loss(run, x):
        return (weight * run(x, factor, shift, eps=EPS, dtype=jnp.float32)).sum()

    found = jax.jit(jax.grad(functools.partial(loss, norms.modulated)))(x)
    want = jax.jit(jax.grad(functools.partial(loss, norms._modulated)))(x)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
