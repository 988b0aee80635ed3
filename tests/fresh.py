"""Modules with random weights from NumPy."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def module(make, seed: int = 0):
    """The module that `make` describes; `make` is only traced.

    Kernels and tables are normal, of variance `1 / fan_in`; scales are 1 and biases 0. Initialising
    by JAX would compile a program for the shape of every parameter: seconds for a tiny model.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(make))

    def draw(path, leaf):
        like, name = leaf.get_value(), path[-1]
        if name in ("bias", "scale", "gamma"):
            values = np.full(like.shape, 0.0 if name == "bias" else 1.0)
        else:
            values = rng.normal(0, _fan_in(name, like.shape) ** -0.5, like.shape)
        return leaf.replace(jnp.asarray(values, like.dtype))

    flat = [(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Inputs of each output: a convolution's window too, but no axis of layers."""
    if name == "scale_shift_table":
        return shape[-1]
    return int(np.prod(shape[:-1] if len(shape) > 3 else shape[-2:-1]))
