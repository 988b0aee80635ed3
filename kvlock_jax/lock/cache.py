"""The source video's keys and values, and their fusion into the edit's self-attention.

The self-attention of every block passes its keys and its values through `Lock.lead`, after QK-norm
and RoPE and before it attends. Queries and cross-attention stay as they are (METHOD.md sections 3
and 4):

    k = lock.lead(k, lock.cache.k)
    v = lock.lead(v, lock.cache.v)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kvlock_jax.shapes import PerEdit, TokenMask

Cached = Float[Array, "sources L *d"]

Number = Float[Array, ""] | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Self-attention keys and values of one pass over the source at one noise level.

    METHOD.md section 3. Heads lie side by side, `D = N K`, as linear layers write them. A scan over
    layers slices off the leading axis; each slice is the `KVCache` of one layer, `B L D`.
    """

    k: Float[Array, "*layers B L D"]  # after QK-norm and RoPE
    v: Float[Array, "*layers B L D"]

    @classmethod
    def abstract(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "KVCache":
        """Shapes and dtypes of a cache, without its memory; `shape` is `layers B L D`."""
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        return cls(k=leaf, v=leaf)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "KVCache":
        """An empty cache for a loop to start from; `shape` is `layers B L D`."""
        # Two arrays: JAX cannot donate one buffer under two names.
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together; 5.6 GiB for Wan 1.3B at 81 frames of 480x832."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.k, self.v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourcePass:
    """Inputs of a source pass that runs beside the edit's pass, block by block.

    Each block first computes the source's keys and values, then the edit's rows take them, so no
    cache of all layers is stored.

    Attributes:
      latents: source latents at the edit's noise level.
      time: timestep of each row, in the model's own form.
      conditioning: source prompt (and more), in the model's own form.
    """

    latents: Any
    time: Any
    conditioning: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lock:
    """Locks a transformer's pass onto a source (METHOD.md section 4).

    Attributes:
      cache: keys and values, `layers B L D` (`B L D` inside a block), or the pass that
        computes them.
      foreground: token mask, `B L`; true where the edit keeps its own keys and values.
      fusion_ratio: alpha, the source's share in the background, `B`, 0 to 1.
      computed: number of tokens that the transformer computes and returns the velocity of: an
        edit's foreground tokens in order, then padding. Only for alpha 1 and beta 0 (METHOD.md
        section 8). `None` computes all tokens.
      foreground_ratio: beta, the source's share in the foreground, 0 to 1; over 0 only in
        ProEdit's injected steps (METHOD.md section 10).
      contexts: whether the lock acts on blocks that condition the main ones too (METHOD.md
        section 11's context blocks).
    """

    cache: KVCache | SourcePass
    foreground: TokenMask
    fusion_ratio: PerEdit
    computed: int | None = dataclasses.field(default=None, metadata={"static": True})
    foreground_ratio: Number = 0.0
    contexts: bool = dataclasses.field(default=False, metadata={"static": True})

    def lead(self, new: Float[Array, "R n *d"], cached: Cached) -> Float[Array, "R L *d"]:
        """The keys (or values) of all tokens that a block's self-attention attends to."""
        if self.computed is None:
            return fuse(new, cached, self.foreground, self.fusion_ratio, self.foreground_ratio)
        return splice(new, cached, self.foreground)

    @property
    def tokens(self) -> Int[Array, "B n"]:
        """Positions of the computed tokens: the foreground's, then the last one as padding."""
        positions = functools.partial(jnp.nonzero, size=self.computed, fill_value=-1)
        return jax.vmap(lambda row: positions(row)[0])(self.foreground)


def take(rows: Shaped[Array, "R L *d"], tokens: Int[Array, "B n"]) -> Shaped[Array, "R n *d"]:
    """The rows' tokens at each edit's positions `tokens`."""
    index = _per_row(tokens, rows)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *[1] * (rows.ndim - 2)), axis=1)


def fuse(
    new: Float[Array, "R L *d"],
    cached: Cached,
    foreground: TokenMask,
    fusion_ratio: PerEdit,
    foreground_ratio: Number = 0.0,
) -> Float[Array, "R L *d"]:
    """The keys (or values) to attend to: the edit's own, mixed with the source's token by token.

    METHOD.md section 4, with the foreground m, and section 10 for the ratio beta:

        mix = new + w (cached - new),    w = (1 - m) alpha + m beta

    Rows are ordered by source, then edit, then guidance branch: `new` has all of them, `cached`
    one per source, the mask and alpha one per edit. The mix is computed in float32 and returned in
    `new`'s dtype. Where w is 0 it equals `new` bit for bit, where w is 1 `cached` in that dtype.

    Args:
      new: keys (or values) of the edits.
      cached: keys (or values) of the sources.
      foreground: token mask m.
      fusion_ratio: alpha, the source's share in the background, 0 to 1.
      foreground_ratio: beta, the source's share in the foreground, 0 to 1.
    """
    sources, edits = len(cached), len(foreground)
    rows = new.reshape(sources, edits // sources, -1, *new.shape[1:]).astype(jnp.float32)
    alpha = fusion_ratio.astype(jnp.float32)[:, None]
    beta = jnp.asarray(foreground_ratio, jnp.float32)
    axes = [1] * (new.ndim - 2)
    weight = jnp.where(foreground, beta, alpha).reshape(*rows.shape[:2], 1, -1, *axes)
    mix = _interpolate(rows, cached.astype(jnp.float32)[:, None, None], weight)
    return mix.reshape(new.shape).astype(new.dtype)


def splice(
    new: Float[Array, "R n *d"], whole: Float[Array, "sources L *d"], foreground: TokenMask
) -> Float[Array, "R L *d"]:
    """`fuse` at alpha 1 and beta 0, for a pass that computed the foreground's tokens alone.

    METHOD.md section 8. Rows are ordered as in `fuse`; `new` holds each row's foreground tokens in
    order, with any padding after them.
    """
    axes = [1] * (whole.ndim - 2)
    position = _per_row(jnp.cumsum(foreground, axis=1) - 1, new)
    position = position.reshape(*position.shape, *axes)
    edited = jnp.take_along_axis(new, position, axis=1, mode="clip")
    inside = _per_row(foreground, new).reshape(position.shape)
    return jnp.where(inside, edited, _per_row(whole, new).astype(new.dtype))


def _per_row(per_edit: Shaped[Array, "B *d"], rows: Shaped[Array, "R *e"]) -> Shaped[Array, "R *d"]:
    """Repeats each edit's (or source's) entry for all of its rows."""
    return jnp.repeat(per_edit, len(rows) // len(per_edit), axis=0)


@jax.custom_jvp
def _interpolate(new: Array, cached: Array, weight: Array) -> Array:
    """`new + weight (cached - new)`, exact at both ends."""
    mix = new + weight * (cached - new)
    # The sum alone is not: in float32 1e8 + 1 (1 - 1e8) is 0, -0.0 + 0 is 0.0, 0 inf is NaN.
    return jnp.where(weight == 0, new, jnp.where(weight == 1, cached, mix))


@_interpolate.defjvp
def _interpolate_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # The derivative of the selection would be 0 in the weight at weights 0 and 1.
    new, cached, weight = primals
    d_new, d_cached, d_weight = tangents
    slope = (1 - weight) * d_new + weight * d_cached + d_weight * (cached - new)
    return _interpolate(new, cached, weight), slope
