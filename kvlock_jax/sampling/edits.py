"""The sampling loop's inputs: a batch of edits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax.grid import Grid, Patches, PatchMask
from kvlock_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """A batch of edits.

    Several edits of one source start from the same noise and share its branch. Rows are ordered by
    source, then edit; the number of sources divides the number of edits, `B`.

    Attributes:
      source: normalised latents of the source videos.
      noise: noise of unit variance that the edits start from and that is added to the source
        (METHOD.md section 3).
      foreground: latent cells to edit, never those of references or padding.
      prompts: text embeddings (and more) that `Denoiser.condition` takes, `2 B` rows: each edit's
        prompt and negative prompt.
      source_prompts: the same for the source branch, one row per source.
      grid: order of the latents in a row of tokens.
      references: number of first latent frames that hold reference pictures (METHOD.md section
        11). They are neither foreground nor background nor part of the statistic, but they count
        for s* over all cells.
      pools: number of the edit that each row samples, where rows share a statistic
        (`lock.pooled`); `None` where each row has its own.
    """

    source: Float[Array | np.ndarray, "sources L cells C"]
    noise: Float[Array | np.ndarray, "sources L cells C"]
    foreground: PatchMask
    prompts: Any
    source_prompts: Any
    grid: Grid = dataclasses.field(metadata={"static": True})
    references: int = dataclasses.field(default=0, metadata={"static": True})
    pools: Int[Array, "B"] | None = None

    @property
    def shown(self) -> Bool[Array, "L one"]:
        """The video's tokens: all but references and padding."""
        _, rows, columns = self.grid.axes
        token = jnp.arange(self.grid.length)[:, None]
        return (token >= self.references * rows * columns) & (token < self.grid.tokens)

    @property
    def own(self) -> Bool[Array, "B L"]:
        """The tokens that keep their own keys and values: foreground and references."""
        _, rows, columns = self.grid.axes
        first = jnp.arange(self.grid.length) < self.references * rows * columns
        return self.foreground.any(axis=-1) | first

    def spread(self, per_source: Float[Array | np.ndarray, "sources L cells C"]) -> Patches:
        """Each source's entry, repeated for all its edits."""
        edits = len(self.foreground) // len(per_source)
        wide = jnp.broadcast_to(
            per_source[:, None], (len(per_source), edits, *per_source.shape[1:])
        )
        return sharding.constrain(wide.reshape(-1, *per_source.shape[1:]), "B L cells C")


def bucket(tokens: int, grid: Grid) -> int | None:
    """The number of tokens that a foreground pass computes, rounded up to serve many masks.

    The unit is a sixty-fourth of the video, in equal parts for the devices that share it. `None`
    where the foreground is over three quarters of the video.
    """
    ways = sharding.shards("L")
    unit = -(-grid.length // 64)
    unit = -(-unit // ways) * ways
    computed = max(1, -(-tokens // unit)) * unit
    return computed if computed <= 3 * grid.length // 4 else None
