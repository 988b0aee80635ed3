"""What the sampling loop is given."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvlock_jax.grid import Grid, Patches, PatchMask
from kvlock_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """A batch of edits, known before the loop.

    A source may have several edits, which then start from one noise and share its branch. Rows lie
    source by source, within it edit by edit: `B` edits of `sources`, which divides `B`.

    Attributes:
      source: normalised latents of the source videos.
      noise: of unit variance; the edits start from it, and it noises the source (METHOD.md 3).
      foreground: latent cells to edit; none of references or padding.
      prompts: what `Model.condition` takes, `2 B` rows: each edit's prompt and negative prompt.
      source_prompts: the same for the source branch, a row for each source.
      grid: how latents lie in a row of tokens.
      references: first latent frames that hold reference pictures (METHOD.md section 11): never
        foreground, background, or part of the statistic (but of s* over everything).
    """

    source: Float[Array | np.ndarray, "sources L cells C"]
    noise: Float[Array | np.ndarray, "sources L cells C"]
    foreground: PatchMask
    prompts: Any
    source_prompts: Any
    grid: Grid = dataclasses.field(metadata={"static": True})
    references: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shown(self) -> Bool[Array, "L one"]:
        """Tokens of the video, neither of references nor padding."""
        _, rows, columns = self.grid.axes
        token = jnp.arange(self.grid.length)[:, None]
        return (token >= self.references * rows * columns) & (token < self.grid.tokens)

    @property
    def own(self) -> Bool[Array, "B L"]:
        """Tokens that keep their own keys and values: the foreground's and the references'."""
        _, rows, columns = self.grid.axes
        first = jnp.arange(self.grid.length) < self.references * rows * columns
        return self.foreground.any(axis=-1) | first

    def spread(self, per_source: Float[Array | np.ndarray, "sources L cells C"]) -> Patches:
        """For every edit, what its source has."""
        edits = len(self.foreground) // len(per_source)
        wide = jnp.broadcast_to(
            per_source[:, None], (len(per_source), edits, *per_source.shape[1:])
        )
        return sharding.constrain(wide.reshape(-1, *per_source.shape[1:]), "B L cells C")


def bucket(tokens: int, grid: Grid) -> int | None:
    """Tokens to compute in a pass of the foreground alone, so that one program serves many masks.

    The unit is a sixty-fourth of the video, in equal parts for the devices that share it. `None`
    where most would have to be computed.
    """
    ways = sharding.shards("L")
    unit = -(-grid.length // 64)
    unit = -(-unit // ways) * ways
    found = max(1, -(-tokens // unit)) * unit
    return found if found <= 3 * grid.length // 4 else None
