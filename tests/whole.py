"""A transformer on whole latents, `B T H W C`, which it takes and gives as patches."""

import dataclasses

import jax

from kvlock_jax.grid import Grid
from kvlock_jax.models.wan.vace import VACEContext


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeContext:
    """A `VACEContext` whose control is whole, `B T H W C`."""

    text: jax.Array
    control: jax.Array
    scale: jax.Array


def grid_of(model, latents) -> Grid:
    return Grid.of(latents.shape[1:4], model.config.patch_size)


def conditioning(model, latents, context):
    """The model's conditioning on a text or a `WholeContext`."""
    grid = grid_of(model, latents)
    if isinstance(context, WholeContext):
        context = VACEContext(context.text, grid.split(context.control), context.scale)
    return model.condition(context, grid)


def velocity(model, latents, timestep, context, lock=None):
    """What the sampling loop calls."""
    grid = grid_of(model, latents)
    condition = conditioning(model, latents, context)
    return grid.join(model(grid.split(latents), timestep, condition, lock))


def keys_values(model, latents, timestep, context, lock=None):
    grid = grid_of(model, latents)
    condition = conditioning(model, latents, context)
    velocity, cache = model.keys_values(grid.split(latents), timestep, condition, lock)
    return grid.join(velocity), cache
