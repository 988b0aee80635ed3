"""The edit that others are compared with, and its settings."""

import tiny

import kvlock_jax as kvl
from kvlock_jax.settings.schema import run_config

STEPS, PROMPT = 3, "a blue star"
FRAMES, HEIGHT, WIDTH = tiny.SHAPE
BOX = (8, 8, 16, 16)
CLIP, MASK = tiny.clip(), tiny.mask()[..., 0] > 127


def config_of(preset="kvlock_anchor", steps=STEPS, **edit_settings):
    config = run_config(preset, steps=steps, shift=3.0, guidance_scale=4.0)
    config.edit.update(edit_settings)
    return config


def edit(model, clip=CLIP, mask=MASK, prompt=PROMPT, *, config=None, **rest):
    return kvl.edit(model, clip, mask, prompt, config=config or config_of(), **rest)
