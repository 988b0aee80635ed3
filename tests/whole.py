"""A transformer on whole latents, `B T H W C`, which it takes and gives as patches."""

import dataclasses

from kvlock_jax.grid import Grid
from kvlock_jax.models.wan.vace import VACEContext


def grid_of(model, latents) -> Grid:
    return Grid.of(latents.shape[1:4], model.config.patch_size)


def conditioning(model, latents, context):
    """What `model.condition` makes of a text, or of a `VACEContext` whose control is whole."""
    grid = grid_of(model, latents)
    if isinstance(context, VACEContext):
        context = dataclasses.replace(context, control=grid.split(context.control))
    return model.condition(context, grid)


def velocity(model, latents, timestep, context, lock=None):
    """What the sampling loop calls."""
    grid = grid_of(model, latents)
    told = conditioning(model, latents, context)
    return grid.join(model(grid.split(latents), timestep, told, lock))


def keys_values(model, latents, timestep, context, lock=None):
    grid = grid_of(model, latents)
    told = conditioning(model, latents, context)
    velocity, cache = model.keys_values(grid.split(latents), timestep, told, lock)
    return grid.join(velocity), cache
