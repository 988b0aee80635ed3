"""KV-Lock (arXiv 2603.09657) as pure functions over arrays, for any diffusion transformer.

Read `masks`, `cache`, `variance`, `schedules`, `guidance`, `presets`, in this order. Your model
returns its velocity and the keys and values of its self-attention; given a `Lock`, its blocks pass
both through `Lock.lead` before they attend. Before the first step:

    latent_mask = to_latent_mask(mask)                         # your VAE's strides
    token_mask = to_token_mask(latent_mask)                    # your transformer's patch
    traced = knobs(preset("kvlock", omega_0), omega_0)
    scheduled = in_window(steps, traced.kappa)
    window, sigma2 = X0Window.zeros(10, z.shape), zeros(len(z))
    z = noise

Step k:

    alpha = fusion_ratio(sigma2, ready(window), scheduled[k], traced)
    omega = guidance_scale(sigma2, ready(window), scheduled[k], traced)

    z_source = (1 - sigma[k]) * source + sigma[k] * noise      # the noise that z started from
    _, cache = model(z_source, sigma[k], source_prompt)
    lock = Lock(cache, token_mask, alpha)
    v_cond, _ = model(z, sigma[k], prompt, lock)
    v_uncond, _ = model(z, sigma[k], negative_prompt, lock)

    s = projection_scale(v_cond, v_uncond, projection_region(latent_mask, traced))
    v = guide(v_cond, v_uncond, omega, uncond_scale(s, traced))
    window = push(window, z - sigma[k] * v)
    sigma2 = hallucination(window, detection_region(latent_mask, traced))
    z = ...                                                    # any solver's step along v

Where `source_needed(scheduled, traced)` is false, alpha is 0 and the source pass may be left out.
The baseline ProEdit adds `inject` to a step and `shift_start` before the first one.
"""

from kvlock_jax.lock.cache import KVCache, Lock, SourcePass, fuse, splice, take
from kvlock_jax.lock.guidance import apg, guide, projection_scale, zero_init
from kvlock_jax.lock.masks import dilate, to_latent_mask, to_token_mask
from kvlock_jax.lock.presets import PRESETS, preset, sampling
from kvlock_jax.lock.schedules import (
    Knobs,
    background_is_idle,
    detection_region,
    fusion_ratio,
    guidance_scale,
    in_window,
    inject,
    injected,
    knobs,
    passes,
    projection_region,
    refreshed,
    source_needed,
    uncond_scale,
    unguided,
)
from kvlock_jax.lock.start import shift_start
from kvlock_jax.lock.variance import X0Window, hallucination, newest, pooled, push, ready

__all__ = [
    "PRESETS",
    "KVCache",
    "Knobs",
    "Lock",
    "SourcePass",
    "X0Window",
    "apg",
    "background_is_idle",
    "detection_region",
    "dilate",
    "fuse",
    "fusion_ratio",
    "guidance_scale",
    "guide",
    "hallucination",
    "in_window",
    "inject",
    "injected",
    "knobs",
    "newest",
    "passes",
    "pooled",
    "preset",
    "projection_region",
    "projection_scale",
    "push",
    "ready",
    "refreshed",
    "sampling",
    "shift_start",
    "source_needed",
    "splice",
    "take",
    "to_latent_mask",
    "to_token_mask",
    "uncond_scale",
    "unguided",
    "zero_init",
]
