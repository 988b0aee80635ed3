"""The keys and values of the source video, and how an edit's attention takes them in.

Self-attention of every block calls `Lock.lead` on its keys and on its values, after QK-norm and
RoPE and before attending; queries and cross-attention are left alone (METHOD.md sections 3 and 4):

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

Cached = Float[Array, "sources L N K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Self-attention keys and values of one pass over the source at one noise level.

    METHOD.md section 3. Scanning over layers slices the leading axis off, and the slice is a
    `KVCache` of one layer, `B L N K`.
    """

    k: Float[Array, "*layers B L N K"]  # after QK-norm and RoPE
    v: Float[Array, "*layers B L N K"]

    @classmethod
    def abstract(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "KVCache":
        """The shapes and dtypes of a cache without its memory; `shape` is `layers B L N K`."""
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        return cls(k=leaf, v=leaf)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "KVCache":
        """An empty cache to start a loop from; `shape` is `layers B L N K`."""
        # Two arrays: one buffer under both names could not be donated.
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        """Memory of keys and values together; 5.6 GiB for Wan 1.3B at 81 frames of 480x832."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.k, self.v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourcePass:
    """A pass over the sources that runs beside the edits', block by block.

    Each block of the edits takes the keys and values that the source's has just made, so there is
    no cache of all layers.
    """

    latents: Any  # of the sources, at the edits' noise level
    time: Any
    conditioning: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lock:
    """What a transformer is handed to run locked onto a source (METHOD.md section 4).

    Attributes:
      cache: layers B L N K (one layer's B L N K inside a block), or the pass that makes it.
      foreground: B L, True where the edit keeps its own keys and values.
      fusion_ratio: B, alpha in [0, 1].
      computed: how many tokens of an edit the transformer computes, and gives the velocity of: the
        foreground's in their order, at most as many as this, and padding (METHOD.md section 8; for
        alpha = 1 alone). `None` is all tokens.
    """

    cache: KVCache | SourcePass
    foreground: TokenMask
    fusion_ratio: PerEdit
    computed: int | None = dataclasses.field(default=None, metadata={"static": True})

    def lead(self, new: Float[Array, "R n N K"], cached: Cached) -> Float[Array, "R L N K"]:
        """The keys (or values) of all tokens to attend to, inside a block."""
        if self.computed is None:
            return fuse(new, cached, self.foreground, self.fusion_ratio)
        return splice(new, cached, self.foreground)

    @property
    def tokens(self) -> Int[Array, "B n"]:
        """Which tokens are computed: the foreground's, then the last one again and again."""
        find = functools.partial(jnp.nonzero, size=self.computed, fill_value=-1)
        return jax.vmap(lambda row: find(row)[0])(self.foreground)


def take(rows: Shaped[Array, "R L *d"], tokens: Int[Array, "B n"]) -> Shaped[Array, "R n *d"]:
    """Those `tokens` of each edit's rows."""
    index = _per_row(tokens, rows)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *[1] * (rows.ndim - 2)), axis=1)


def fuse(
    new: Float[Array, "R L N K"], cached: Cached, foreground: TokenMask, fusion_ratio: PerEdit
) -> Float[Array, "R L N K"]:
    """The keys (or values) to attend to: the edit's own, drawn to the source's in the background.

    METHOD.md section 4, for a fusion ratio alpha in [0, 1] and the foreground m:

        mix = new + (1 - m) alpha (cached - new)

    Rows lie source by source, within it edit by edit, within it branch by branch: `new` has all of
    them, `cached` one of each source, the mask and alpha one of each edit. The mix is computed in
    float32 and returned in `new`'s dtype. Where alpha is 0, and in the foreground, it is bit for
    bit `new`; in the background at alpha 1, bit for bit `cached` in that dtype.
    """
    sources, edits = len(cached), len(foreground)
    rows = new.reshape(sources, edits // sources, -1, *new.shape[1:]).astype(jnp.float32)
    alpha = fusion_ratio.astype(jnp.float32)[:, None]
    weight = jnp.where(foreground, 0.0, alpha).reshape(*rows.shape[:2], 1, -1, 1, 1)
    mix = _interpolate(rows, cached.astype(jnp.float32)[:, None, None], weight)
    return mix.reshape(new.shape).astype(new.dtype)


def splice(
    new: Float[Array, "R n *d"], whole: Float[Array, "sources L *d"], foreground: TokenMask
) -> Float[Array, "R L *d"]:
    """What `fuse` gives at alpha 1, of edits whose foreground tokens alone were computed.

    METHOD.md section 8. Rows lie as in `fuse`; `new` holds each row's foreground tokens in order,
    and may go on after them.
    """
    axes = [1] * (whole.ndim - 2)
    place = _per_row(jnp.cumsum(foreground, axis=1) - 1, new)
    own = jnp.take_along_axis(new, place.reshape(*place.shape, *axes), axis=1, mode="clip")
    inside = _per_row(foreground, new).reshape(*place.shape, *axes)
    return jnp.where(inside, own, _per_row(whole, new).astype(new.dtype))


def _per_row(per_edit: Shaped[Array, "B *d"], rows: Shaped[Array, "R *e"]) -> Shaped[Array, "R *d"]:
    """For every row what its edit (or its source) has."""
    return jnp.repeat(per_edit, len(rows) // len(per_edit), axis=0)


@jax.custom_jvp
def _interpolate(new: Array, cached: Array, weight: Array) -> Array:
    """`new + weight (cached - new)`, exact at both ends."""
    mix = new + weight * (cached - new)
    # The sum alone is not: 1e8 + 1 (1 - 1e8) is 0 in float32, -0.0 + 0 is 0.0, and 0 inf is NaN.
    return jnp.where(weight == 0, new, jnp.where(weight == 1, cached, mix))


@_interpolate.defjvp
def _interpolate_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Differentiating the selection would say that nothing depends on alpha at alpha 0 and 1.
    new, cached, weight = primals
    d_new, d_cached, d_weight = tangents
    slope = (1 - weight) * d_new + weight * d_cached + d_weight * (cached - new)
    return _interpolate(new, cached, weight), slope
