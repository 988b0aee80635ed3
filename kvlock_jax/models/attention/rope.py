"""Rotary positions along time, height and width."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvlock_jax.shapes import Heads

Rope = tuple[Float[Array, "*B L K2"], Float[Array, "*B L K2"]]
"""Cosines and sines, float32, one of each for every pair of a head's numbers (`K2 = K / 2`), shared
by all rows or one table for each."""

_THETA = 10_000.0


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Numbers of a head that rotate with time, rows and columns (Wan 2.1)."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_table(grid: tuple[int, int, int], head_dim: int) -> Rope:
    """Cosines and sines of the angles that rotate each token's queries and keys.

    Pair i of an axis with d numbers rotates by `position * 10000^(-2i / d)`; time comes first in a
    head, then rows, then columns. Angles are computed in float64 as published.

    Args:
      grid: tokens `T H W`.
      head_dim: numbers `K` of a head, even.
    """
    parts = []
    for axis, (length, numbers) in enumerate(zip(grid, rope_axes(head_dim), strict=True)):
        frequency = _THETA ** (-np.arange(0, numbers, 2, dtype=np.float64) / numbers)
        angle = np.outer(np.arange(length), frequency)
        shape = [1, 1, 1, frequency.size]
        shape[axis] = length
        parts.append((angle.reshape(shape), (*grid, frequency.size)))

    def table(function: np.ufunc) -> Float[Array, "L K2"]:
        """Cosines or sines of all tokens' angles."""
        # Broadcast on the device: at full size the table is 8 MB, too much for a constant.
        axes = [jnp.broadcast_to(jnp.asarray(function(a), jnp.float32), s) for a, s in parts]
        return jnp.concatenate(axes, axis=-1).reshape(-1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(x: Heads, rope: Rope) -> Heads:
    """Rotates neighbouring pairs of every head by the token's angles; float32 in and out."""
    cos, sin = (t[..., None, :] for t in rope)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
