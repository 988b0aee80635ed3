"""Processes long and large videos piece by piece, which bounds memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvlock_jax.errors import InputError

Feature = Float[Array, "B _T _H _W _C"]
Frames = Any
"""A feature, or a tree of arrays `B T H W` with or without channels that go together."""
Coder = Callable[[Frames, Any], tuple[Frames, Any]]
"""Maps features and the cache of the chunk before, at first `None`, to features and a cache."""


def in_tiles(
    coder: Coder, x: Frames, cache: Any, *, tiles: int, unit: int, reach: int
) -> tuple[Frames, Any]:
    """Applies a coder to tiles of columns, one after another; the result is `coder(x, cache)`.

    Each tile includes `reach` units on either side, whose results are dropped. So tiles have no
    seams and need no blending. The caches of the tiles are stacked.

    Args:
      coder: convolutions.
      x: features, of a whole number of units in columns.
      cache: what the call for the frames before returned, at first `None`.
      tiles: number of tiles, at most.
      unit: columns of `x` that become a fixed number of columns.
      reach: units to either side on which a unit of the output depends.
    """
    if tiles == 1:
        return coder(x, cache)
    units = jax.tree.leaves(x)[0].shape[3] // unit
    kept = -(-units // tiles)
    size = min(units, kept + 2 * reach)
    firsts = range(0, units, kept)
    starts = [min(max(first - reach, 0), units - size) for first in firsts]

    def of_tile(place: tuple[Array, Any]) -> tuple[Frames, Any]:
        """Applies the coder to one tile."""
        start, before = place
        columns = start * unit, size * unit
        return coder(
            jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, *columns, axis=3), x), before
        )

    results, caches = jax.lax.map(of_tile, (jnp.array(starts), cache))

    def side_by_side(stacked: Array) -> Array:
        """The columns that each tile keeps."""
        wide = stacked.shape[4] // size
        parts = []
        for tile, first, start in zip(stacked, firsts, starts, strict=True):
            last = min(first + kept, units)
            parts.append(tile[:, :, :, (first - start) * wide : (last - start) * wide])
        return jnp.concatenate(parts, axis=3)

    return jax.tree.map(side_by_side, results), caches


def over_chunks(coder: Coder, x: Frames, size: int, cache: Any = None) -> tuple[Frames, Any]:
    """Runs a coder over chunks of `size` frames in a scan; returns its results and its last cache.

    Without a cache `x` begins a clip, and its first frame is a chunk of its own.

    Raises:
      InputError: the chunks do not divide the frames.
    """
    results = []
    if cache is None:
        first, cache = coder(_taken(x, 0, 1), None)
        x, results = _taken(x, 1, None), [first]
    batch, frames = jax.tree.leaves(x)[0].shape[:2]
    count, left = divmod(frames, size)
    if left:
        raise InputError(
            f"a chunk must divide the frames after the first, found {frames} in {size}s"
        )
    if count == 1:  # XLA on CPU compiles gradients of a loop's body badly
        last, cache = coder(x, cache)
        results.append(last)
    elif count:
        chunks = jax.tree.map(
            lambda y: jnp.moveaxis(y.reshape(batch, count, size, *y.shape[2:]), 1, 0), x
        )
        cache, out = jax.lax.scan(lambda c, chunk: coder(chunk, c)[::-1], cache, chunks)
        results.append(jax.tree.map(_in_a_row, out))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results), cache


def _taken(x: Frames, first: int, last: int | None) -> Frames:
    return jax.tree.map(lambda y: y[:, first:last], x)


def _in_a_row(out: Array) -> Array:
    """Results of a scan over chunks, one after another."""
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])
