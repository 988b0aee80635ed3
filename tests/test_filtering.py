"""Filters against plain sums of products, by hand and in NumPy, and their rounding errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kvlock_jax.models.vae import filtering
from kvlock_jax.models.vae.filtering import DOUBLED, FOUR, TWO, looped, stacked, unrolled

USUAL = filtering._toom_cook(0.0, 1.0, -1.0, 2.0, -2.0)


@pytest.mark.parametrize("form", [TWO, FOUR, USUAL])
def test_a_filter_is_three_taps_at_every_output(form):
    outputs, window = len(form.of_products), form.of_inputs.shape[1]
    assert (outputs, window) == (form.stride, form.stride + 2)
    for tap in range(3):
        for place in range(window):
            g, d = np.eye(3)[tap], np.eye(window)[place]
            y = form.of_products @ ((form.of_taps @ g) * (form.of_inputs @ d))
            np.testing.assert_allclose(y, [place == i + tap for i in range(outputs)], atol=1e-12)


def test_a_doubled_window_by_hand():
    a, b, c = 2.0, 3.0, 5.0
    g = np.array([7.0, 11.0, 13.0])
    products = (DOUBLED.of_taps @ g) * (DOUBLED.of_inputs @ [a, b, c])
    want = [7 * a + 11 * b + 13 * b, 7 * b + 11 * b + 13 * c]
    np.testing.assert_allclose(DOUBLED.of_products @ products, want)


def plain(x, taps):
    """Sums over taps along the first axis."""
    return sum(x[t : len(x) - 2 + t] @ taps[t] for t in range(3))


@pytest.mark.parametrize("form", [TWO, FOUR])
@pytest.mark.parametrize("each", [unrolled, stacked, looped])
@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_any_length_and_every_way(form, each, count):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(count + 2, 5, 3)), rng.normal(size=(3, 3, 2))
    run = functools.partial(filtering.convolve, product=jnp.matmul, form=form, axis=0, each=each)
    found = jax.jit(run)(jnp.float32(x), jnp.float32(taps))
    assert found.shape == (count, 5, 2)
    np.testing.assert_allclose(found, plain(x, taps), atol=1e-5)


@pytest.mark.parametrize("each", [unrolled, stacked, looped])
def test_another_axis_and_its_gradient(each):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(4, 9, 3)), rng.normal(size=(3, 3, 2))

    def filtered(x, taps):
        return filtering.convolve(x, taps, jnp.matmul, FOUR, axis=1, each=each)

    def direct(x, taps):
        return jnp.moveaxis(plain(jnp.moveaxis(x, 1, 0), taps), 0, 1)

    given = jnp.float32(x), jnp.float32(taps)
    np.testing.assert_allclose(filtered(*given), direct(*given), atol=1e-5)
    for found, want in zip(
        *(
            jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), argnums=(0, 1))(*given)
            for f in (filtered, direct)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_rounding_of_three_nested_axes():
    """Errors are about half of those with the usual points."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(6, 18, 18, 64)), rng.normal(size=(3, 3, 3, 64, 32)) / 41.6
    given = (
        torch.tensor(x.transpose(3, 0, 1, 2)[None]),
        torch.tensor(kernel.transpose(4, 3, 0, 1, 2)),
    )
    want = torch.nn.functional.conv3d(*given).numpy()

    def nested(form):
        columns = functools.partial(filtering.convolve, product=jnp.matmul, form=TWO, axis=2)
        rows = functools.partial(filtering.convolve, product=columns, form=form, axis=1)
        y = filtering.convolve(jnp.float32(x), jnp.float32(kernel), rows, form, axis=0)
        return np.asarray(y).transpose(3, 0, 1, 2)[None]

    def error(y):
        return np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2))

    assert error(nested(FOUR)) < 2e-6
    assert error(nested(FOUR)) < 0.75 * error(nested(USUAL))
