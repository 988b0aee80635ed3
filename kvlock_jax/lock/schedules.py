"""How strongly to lock and to guide at each step, from the statistic (METHOD.md sections 5 to 8).

Everything here is a traced value, switches included: one compiled loop serves every setting. What
is not in `Knobs` is a shape or another program: the number of steps, the window's size, CFG or APG.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kvlock_jax.settings.schema import LockConfig
from kvlock_jax.shapes import CellMask, PerEdit

Number = Float32[Array, ""]
Count = Int32[Array, ""]
Switch = Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The settings of a run as traced scalars; names and ranges are those of `LockConfig`."""

    enabled: Switch
    warmup_fusion_ratio: Number
    adapt_fusion_ratio: Switch
    fusion_ratio: Number
    guidance_scale: Number  # omega_0
    adapt_guidance: Switch
    omega_floor: Number
    omega_ceiling: Number
    rescale_uncond: Switch
    tau: Number
    kappa: Count
    pin_background: Switch  # background = "source"
    detect_globally: Switch  # detection = "global"
    zero_init_steps: Count
    cache_every: Count
    apg_eta: Number
    apg_norm: Number
    apg_momentum: Number


def knobs(lock: LockConfig, guidance_scale: float) -> Knobs:
    """The traced settings of a run that starts from the guidance scale omega_0."""
    return Knobs(
        enabled=jnp.bool_(lock.enabled),
        warmup_fusion_ratio=jnp.float32(lock.warmup_fusion_ratio),
        adapt_fusion_ratio=jnp.bool_(lock.adapt_fusion_ratio),
        fusion_ratio=jnp.float32(lock.fusion_ratio),
        guidance_scale=jnp.float32(guidance_scale),
        adapt_guidance=jnp.bool_(lock.adapt_guidance),
        omega_floor=jnp.float32(lock.omega_floor),
        omega_ceiling=jnp.float32(lock.omega_ceiling),
        rescale_uncond=jnp.bool_(lock.rescale_uncond),
        tau=jnp.float32(lock.tau),
        kappa=jnp.int32(lock.kappa),
        pin_background=jnp.bool_(lock.background == "source"),
        detect_globally=jnp.bool_(lock.detection == "global"),
        zero_init_steps=jnp.int32(lock.zero_init_steps),
        cache_every=jnp.int32(lock.cache_every),
        apg_eta=jnp.float32(lock.apg_eta),
        apg_norm=jnp.float32(lock.apg_norm),
        apg_momentum=jnp.float32(lock.apg_momentum),
    )


def in_window(steps: int, kappa: Int[Array, ""] | int) -> Bool[Array, "steps"]:
    """The last `kappa` of the steps, the scheduled ones; all of them where kappa >= steps."""
    return jnp.arange(steps) >= steps - kappa


def source_needed(in_window: Bool[Array, "steps"], knobs: Knobs) -> Bool[Array, "steps"]:
    """The steps on which alpha can be over 0: on the others the source pass may be left out."""
    inside = knobs.adapt_fusion_ratio | (knobs.fusion_ratio > 0)
    # A schedule that has no statistic yet holds the warm-up's alpha, so `inside` covers it.
    return knobs.enabled & jnp.where(in_window, inside, knobs.warmup_fusion_ratio > 0)


def refreshed(needed: Bool[Array, "steps"], every: Int[Array, ""] | int) -> Bool[Array, "steps"]:
    """The steps that make the source's keys and values anew: each `every`th of those in a row."""
    step = jnp.arange(len(needed))
    before = jax.lax.cummax(jnp.where(needed, -1, step))  # the last one without
    return needed & ((step - before - 1) % every == 0)


def passes(lock: LockConfig) -> tuple[str, ...]:
    """The kinds of pass that a run with such a lock can be made of, decided before it.

    `"plain"` is without the source, `"full"` computes all tokens, `"foreground"` those alone that
    reach the result: none of the background does at alpha 1 where it is pinned (METHOD.md section
    8). Steps of which all is known before, as with `hard_lock`, leave one.
    """
    if not lock.enabled:
        return ("plain",)
    varies, idle = lock.adapt_fusion_ratio, _background_is_idle(lock)
    alphas = {lock.warmup_fusion_ratio, *([] if varies else [lock.fusion_ratio])}
    kinds = {
        "plain": 0 in alphas,
        "full": varies or any(0 < alpha < 1 or (alpha == 1 and not idle) for alpha in alphas),
        "foreground": idle and (varies or 1 in alphas),
    }
    return tuple(kind for kind, there in kinds.items() if there)


def _background_is_idle(lock: LockConfig) -> bool:
    """Whether nothing but its keys and values comes of the background, at alpha 1."""
    pinned, local = lock.background == "source", lock.detection == "local"
    return pinned and local and lock.guidance == "cfg"


def fusion_ratio(sigma2: PerEdit, ready: Switch, in_window: Switch, knobs: Knobs) -> PerEdit:
    """The fusion ratio alpha of a step, per edit, in [0, 1].

    METHOD.md section 6, with the statistic `sigma2` of the steps before, once it is `ready`:

        alpha = clip(sigma2 / tau, 0, 1)

    The warm-up's before the window, and in it until there is a statistic; a fixed ratio
    (`adapt_fusion_ratio` off) holds in the whole window. 0 where there is no lock.
    """
    warmup = knobs.warmup_fusion_ratio
    scheduled = jnp.where(ready, jnp.clip(sigma2 / knobs.tau, 0.0, 1.0), warmup)
    inside = jnp.where(knobs.adapt_fusion_ratio, scheduled, knobs.fusion_ratio)
    return jnp.where(knobs.enabled, jnp.where(in_window, inside, warmup), 0.0)


def guidance_scale(sigma2: PerEdit, ready: Switch, in_window: Switch, knobs: Knobs) -> PerEdit:
    """The guidance scale omega of a step, per edit; 1 is no guidance, 0 no prompt.

    METHOD.md section 6, in the window and once there is a statistic; omega_0 otherwise:

        omega = omega_0 clip(sigma2 / tau, omega_floor, omega_ceiling)
    """
    scheduled = jnp.clip(sigma2 / knobs.tau, knobs.omega_floor, knobs.omega_ceiling)
    adapts = knobs.adapt_guidance & in_window & ready
    return knobs.guidance_scale * jnp.where(adapts, scheduled, 1.0)


def uncond_scale(projection: Float[Array, "B"], knobs: Knobs) -> PerEdit:
    """The factor s of the unconditional velocity: the `projection` s*, or 1 for plain guidance."""
    return jnp.where(knobs.rescale_uncond, projection, 1.0)


def detection_region(foreground: CellMask, knobs: Knobs) -> CellMask:
    """Where the statistic is averaged, the foreground or everything (METHOD.md section 5)."""
    return foreground | knobs.detect_globally


def projection_region(foreground: CellMask, knobs: Knobs) -> CellMask:
    """Where s* is measured, the foreground if the rest is pinned (METHOD.md section 7)."""
    return foreground | ~knobs.pin_background
