"""A linear layer that multiplies in a compute dtype and sums in float32."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax.models.precision import precision_for

_ROWS, _COLUMNS = 256, 192
"""Largest rows and columns of a product that XLA on CPU computes in a single thread."""


class Linear(nnx.Module):
    """`x W + b`; `nnx.Linear` would round the sum and the bias to the compute dtype.

    Args:
      c_in: width of the input.
      c_out: width of the output.
      dtype: compute dtype of the product, to which inputs and kernel are cast.
      rngs: source of the initial kernel.
    """

    def __init__(self, c_in: int, c_out: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.dtype = dtype
        self.scale = nnx.data(None)  # of each output, where the kernel has 8 bits (`models.small`)

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """The layer's output, float32."""
        y = _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        y = y if self.scale is None else y * self.scale[...]
        return y + self.bias[...].astype(jnp.float32)


def together(layers: Sequence[Linear], x: Float[Array, "*rows I"]) -> list[Float[Array, "*rows O"]]:
    """Applies layers of equal size to one input; a CPU computes small ones in a single product."""
    rows, c_out = x.size // x.shape[-1], layers[0].kernel.shape[-1]
    shared = jax.sharding.get_abstract_mesh().size > 1 or layers[0].scale is not None
    if shared or rows > _ROWS or c_out > _COLUMNS:
        return _apart(layers, x)
    return jax.lax.platform_dependent(layers, x, cpu=_joined, default=_apart)


def _apart(layers: Sequence[Linear], x: Float[Array, "*rows I"]) -> list[Float[Array, "*rows O"]]:
    return [layer(x) for layer in layers]


def _joined(layers: Sequence[Linear], x: Float[Array, "*rows I"]) -> list[Float[Array, "*rows O"]]:
    dtype = layers[0].dtype
    kernel = jnp.concatenate([layer.kernel[...].astype(dtype) for layer in layers], axis=1)
    parts = jnp.split(_matmul(x.astype(dtype), kernel), len(layers), axis=-1)
    return [y + layer.bias[...].astype(jnp.float32) for y, layer in zip(parts, layers, strict=True)]


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    """A product with float32 sums."""
    exact = precision_for(x.dtype)
    return jnp.matmul(x, kernel, precision=exact, preferred_element_type=jnp.float32)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    # The cotangent is float32. Without the cast XLA would widen the other operand and multiply in
    # float32, bypassing the matrix units that multiply the compute dtype.
    x, kernel = saved
    g = cotangent.astype(x.dtype)
    product = functools.partial(
        jnp.einsum, precision=precision_for(x.dtype), preferred_element_type=jnp.float32
    )
    d_x = product("...O,IO->...I", g, kernel)
    d_kernel = product("...I,...O->IO", x, g)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_matmul.defvjp(_forward, _backward)
