"""The latents that an edit starts from (ProEdit's Latents-Shift, METHOD.md section 10)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from kvlock_jax.shapes import CellMask, Cells

Number = Float[Array, ""] | float


def shift_start(
    start: Cells, fresh: Cells, region: CellMask, ratio: Number
) -> Float32[Array, "B *space C"]:
    """Moves the start latents of a region toward the statistics of fresh noise.

    METHOD.md section 10, with the mean `mu` and the deviation `sd` of each channel of an edit over
    the region's cells, for `z` the start latents and `n` the fresh noise:

        z <- z + ratio ((z - mu_z) / sd_z sd_n + mu_n - z)

    As in the authors' code, `sd` is biased and 1e-5 is added to the variance. Latents outside the
    region, and all of them at ratio 0, stay the same bit for bit.

    Args:
      start: latents to shift.
      fresh: noise of unit variance, independent of `start`.
      region: cells to shift and to measure, normally the foreground.
      ratio: share of the shift, 0 to 1.
    """
    z, noise = start.astype(jnp.float32), fresh.astype(jnp.float32)
    inside = region[..., None]
    mean, deviation = _statistics(z, inside)
    fresh_mean, fresh_deviation = _statistics(noise, inside)
    target = (z - mean) / deviation * fresh_deviation + fresh_mean
    return jnp.where(inside & (ratio > 0), z + ratio * (target - z), z)


def _statistics(x: Cells, inside: Bool[Array, "B *space one"]) -> tuple[Array, Array]:
    """Mean and deviation of each channel over the cells that are inside."""
    axes = tuple(range(1, x.ndim - 1))
    count = jnp.maximum(inside.sum(axis=axes, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.where(inside, x, 0.0).sum(axis=axes, keepdims=True) / count
    squares = jnp.where(inside, jnp.square(x - mean), 0.0).sum(axis=axes, keepdims=True)
    return mean, jnp.sqrt(squares / count + 1e-5)
