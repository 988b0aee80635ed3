"""Long and large videos piece by piece, for the memory of a piece."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvlock_jax.errors import InputError

Feature = Float[Array, "B _T _H _W _C"]
Coder = Callable[[Feature, Any], tuple[Feature, Any]]
"""From features and a cache of the chunk before to the like; the cache is `None` at the start."""


def in_tiles(
    run: Callable[[Feature], Feature], x: Feature, *, tiles: int, unit: int, reach: int
) -> Feature:
    """`run(x)` of tiles of columns, one after another.

    Each tile takes in `reach` units on either side, and what `run` makes of these is dropped: there
    are no seams, and nothing to blend.

    Args:
      run: convolutions.
      x: its columns are whole units.
      tiles: how many, at most.
      unit: columns of `x` that become a fixed number of columns, whatever lies beside them.
      reach: units to either side that a unit of the output depends on.
    """
    if tiles == 1:
        return run(x)
    units = x.shape[3] // unit
    own = -(-units // tiles)
    size = min(units, own + 2 * reach)
    firsts = range(0, units, own)
    starts = [min(max(first - reach, 0), units - size) for first in firsts]
    made = jax.lax.map(
        lambda start: run(jax.lax.dynamic_slice_in_dim(x, start * unit, size * unit, axis=3)),
        jnp.array(starts),
    )
    wide = made.shape[4] // size
    parts = []
    for tile, first, start in zip(made, firsts, starts, strict=True):
        last = min(first + own, units)
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
    if count == 1:  # XLA on CPU compiles gradients of a loop's body far worse
        return jnp.concatenate([first, coder(rest, cache)[0]], axis=1)
    chunks = jnp.moveaxis(rest.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)
    _, out = jax.lax.scan(lambda c, chunk: coder(chunk, c)[::-1], cache, chunks)
    out = jnp.moveaxis(out, 0, 1)
    return jnp.concatenate([first, out.reshape(x.shape[0], -1, *out.shape[3:])], axis=1)
