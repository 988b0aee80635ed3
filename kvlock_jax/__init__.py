"""KV-Lock in JAX: edit the masked part of a video with a frozen Wan, and keep the rest.

import kvlock_jax as kvl

model = kvl.load("demo")
result = kvl.edit(model, "in.mp4", "mask.mp4", prompt="a blue square")
result.video   # uint8, frames height width 3
"""

from kvlock_jax import masks
from kvlock_jax.checkpoints.files import Files, Loras
from kvlock_jax.errors import Error
from kvlock_jax.pipeline.api import Result, edit, round_trip
from kvlock_jax.pipeline.load import Model, default_config, load
from kvlock_jax.pipeline.settings import config

__all__ = [
    "Error",
    "Files",
    "Loras",
    "Model",
    "Result",
    "config",
    "default_config",
    "edit",
    "load",
    "masks",
    "round_trip",
]
