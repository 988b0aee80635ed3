"""The keys and values of the source video, and how an edit's attention takes them in.

Self-attention of every block calls `fuse` on its keys and on its values, after QK-norm and RoPE and
before attending; queries and cross-attention are left alone (METHOD.md sections 3 and 4):

    k = fuse(k, lock.cache.k, lock.foreground, lock.fusion_ratio)
    v = fuse(v, lock.cache.v, lock.foreground, lock.fusion_ratio)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvlock_jax.shapes import Heads, PerEdit, TokenMask


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
class Lock:
    """What a transformer is handed to run locked onto a source (METHOD.md section 4)."""

    cache: KVCache  # layers B L N K; one layer's B L N K inside a block
    foreground: TokenMask  # B L, True where the edit keeps its own keys and values
    fusion_ratio: PerEdit  # B, alpha in [0, 1]


def fuse(
    new: Float[Array, "R L N K"], cached: Heads, foreground: TokenMask, fusion_ratio: PerEdit
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
