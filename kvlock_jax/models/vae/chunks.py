"""Processes long and large videos piece by piece, which bounds memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvlock_jax.errors import InputError

Feature = Float[Array, "B _T _H _W _C"]
Coder = Callable[[Feature, Any], tuple[Feature, Any]]
"""Maps features and the cache of the chunk before, at first `None`, to features and a cache."""


def in_tiles(
    run: Callable[[Feature], Feature], x: Feature, *, tiles: int, unit: int, reach: int
) -> Feature:
    """Applies `run` to tiles of columns, one after another; the result is `run(x)`.

    Each tile includes `reach` units on either side, whose results are dropped. So tiles have no
    seams and need no blending.

    Args:
      run: convolutions.
      x: features, of a whole number of units in columns.
      tiles: number of tiles, at most.
      unit: columns of `x` that become a fixed number of columns.
      reach: units to either side on which a unit of the output depends.
    """
    if tiles == 1:
        return run(x)
    units = x.shape[3] // unit
    kept = -(-units // tiles)
    size = min(units, kept + 2 * reach)
    firsts = range(0, units, kept)
    starts = [min(max(first - reach, 0), units - size) for first in firsts]
    results = jax.lax.map(
        lambda start: run(jax.lax.dynamic_slice_in_dim(x, start * unit, size * unit, axis=3)),
        jnp.array(starts),
    )
    wide = results.shape[4] // size
    parts = []
    for tile, first, start in zip(results, firsts, starts, strict=True):
        last = min(first + kept, units)
        parts.append(tile[:, :, :, (first - start) * wide : (last - start) * wide])
    return jnp.concatenate(parts, axis=3)


def over_chunks(coder: Coder, x: Feature, size: int) -> Feature:
    """Runs a coder over the first frame, then over chunks of `size` frames in a scan."""
    rest = x[:, 1:]
    count, left = divmod(rest.shape[1], size)
    if left:
        raise InputError(
            f"a chunk must divide the frames after the first, found {rest.shape[1]} in {size}s"
        )
    first, cache = coder(x[:, :1], None)
    if count == 0:
        return first
    if count == 1:  # XLA on CPU compiles gradients of a loop's body badly
        return jnp.concatenate([first, coder(rest, cache)[0]], axis=1)
    chunks = jnp.moveaxis(rest.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)
    _, out = jax.lax.scan(lambda c, chunk: coder(chunk, c)[::-1], cache, chunks)
    out = jnp.moveaxis(out, 0, 1)
    return jnp.concatenate([first, out.reshape(x.shape[0], -1, *out.shape[3:])], axis=1)
