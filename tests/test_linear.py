"""The linear layer against float64, and its float32 sums in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax.models.linear import Linear, together
from kvlock_jax.parallel.mesh import make_mesh


def layer(kernel, bias, dtype):
    made = Linear(*np.shape(kernel), dtype=dtype, rngs=nnx.Rngs(0))
    made.kernel[...] = jnp.asarray(kernel, jnp.float32)
    made.bias[...] = jnp.asarray(bias, jnp.float32)
    return made


def problem():
    """Input, kernel, bias and the gradient of a loss with respect to the output, in float64."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) for shape in ((2, 5, 7), (7, 3), (3,), (2, 5, 3)))


def gradients(model, x, weights):
    """Gradients of `sum(weights * model(x))` by input, kernel and bias."""
    graph, params = nnx.split(model)

    def loss(params, x):
        return jnp.sum(weights * nnx.merge(graph, params)(x))

    by_params, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    return by_x, by_params["kernel"][...], by_params["bias"][...]


def by_hand(x, kernel, weights):
    """The gradients in float64, from the definition `y_o = sum_i x_i W_io + b_o`."""
    by_x, by_kernel, by_bias = np.zeros(x.shape), np.zeros(kernel.shape), np.zeros(kernel.shape[1])
    for row in np.ndindex(x.shape[:-1]):
        for i, o in np.ndindex(kernel.shape):
            by_x[(*row, i)] += weights[(*row, o)] * kernel[i, o]
            by_kernel[i, o] += weights[(*row, o)] * x[(*row, i)]
        by_bias += weights[row]
    return by_x, by_kernel, by_bias


def test_float32():
    x, kernel, bias, weights = problem()
    model = layer(kernel, bias, jnp.float32)
    want = [[row @ column + b for column, b in zip(kernel.T, bias, strict=True)] for row in x[0]]
    got = model(jnp.asarray(x, jnp.float32))
    assert got.dtype == jnp.float32 and got.shape == (2, 5, 3)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)
    both = zip(
        gradients(model, jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)),
        by_hand(x, kernel, weights),
        strict=True,
    )
    for mine, theirs in both:
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients():
    x, kernel, bias, weights = problem()
    model = layer(kernel, bias, jnp.bfloat16)
    mine = gradients(model, jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32))
    for got, want in zip(mine, by_hand(x, kernel, weights), strict=True):
        assert got.dtype == jnp.float32  # so are the parameters and the input
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_bfloat16_sums_in_float32():
    # 1001 needs ten bits; bfloat16 has eight, and a running sum in it stops at 256
    model = layer(np.ones((1001, 1)), [2.0**-9], jnp.bfloat16)
    got = model(jnp.ones((1, 1001)))
    assert got.dtype == jnp.float32
    assert got.item() == 1001 + 2.0**-9


def test_bfloat16_rounds_what_it_multiplies():
    x, kernel, bias, _ = problem()
    got = layer(kernel, bias, jnp.bfloat16)(jnp.asarray(x, jnp.float32))
    rounded = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel))
    want = np.einsum("...I,IO->...O", *rounded) + bias.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradient_multiplies_nothing_in_float32():
    x, kernel, bias, weights = problem()
    model = layer(kernel, bias, jnp.bfloat16)
    args = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)
    program = jax.jit(lambda x, w: gradients(model, x, w)).lower(*args).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 2  # by input and by kernel
    for line in products:
        operands, result = line.split(" : ")[-1].split("->")
        assert operands.count("bf16") == 2 and result.endswith("xf32>")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_together_equal_each_layer(dtype):
    layers = [layer(kernel, bias, dtype) for _, kernel, bias, _ in (problem(), problem())]
    layers[1].kernel[...] *= 3.0
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    found = jax.jit(together)(layers, x)
    for mine, each in zip(found, layers, strict=True):
        np.testing.assert_allclose(mine, each(x), rtol=1e-5, atol=1e-6)
        assert mine.dtype == jnp.float32

    def gradients_of(run):
        graph, params = nnx.split(layers)
        return jax.grad(
            lambda params, x: sum(jnp.sin(y).sum() for y in run(nnx.merge(graph, params), x)),
            argnums=(0, 1),
        )(params, x)

    both = map(gradients_of, (together, lambda layers, x: [each(x) for each in layers]))
    mine, theirs = map(jax.tree.leaves, both)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-2 if dtype == jnp.bfloat16 else 1e-5)


def products(rows, c_out, platform="cpu"):
    layers = [Linear(8, c_out, dtype=jnp.float32, rngs=nnx.Rngs(0)) for _ in range(3)]
    traced = jax.jit(lambda x: together(layers, x)).trace(jnp.zeros((rows, 8)))
    return traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general")


def test_small_layers_are_one_product_on_one_cpu():
    assert products(256, 192) == 1
    assert products(257, 192) == products(256, 193) == products(256, 192, "tpu") == 3
    with jax.set_mesh(make_mesh(frames=2)):
        assert products(256, 192) == 3
