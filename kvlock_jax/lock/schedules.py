"""The strength of lock and guidance at each step, from the statistic (METHOD.md sections 5 to 8).

All settings here are traced values, switches included, so one compiled loop serves every preset.
A setting that is missing from `Knobs` changes a shape or the program: the number of steps, the
window's size, CFG or APG.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kvlock_jax.settings.schema import LockConfig
from kvlock_jax.shapes import CellMask, PerEdit

UNGUIDED = 0.02
"""Distance of omega from 1 up to which a step may do without the unconditional velocity."""

Number = Float32[Array, "..."]
Count = Int32[Array, "..."]
Switch = Bool[Array, "..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """A run's settings as traced scalars, with the names and ranges of `LockConfig`.

    `guidance_scale` is omega_0, of all steps or, with an axis of steps, of each.
    """

    enabled: Switch
    warmup_fusion_ratio: Number
    adapt_fusion_ratio: Switch
    fusion_ratio: Number
    guidance_scale: Number
    adapt_guidance: Switch
    guidance_ratio: Number
    omega_floor: Number
    omega_ceiling: Number
    rescale_uncond: Switch
    tau: Number
    kappa: Count
    pin_background: Switch  # background = "source" or "clean"
    detect_globally: Switch  # detection = "global"
    zero_init_steps: Count
    cache_every: Count
    injected_steps: Count
    foreground_ratio: Number
    start_shift: Number
    apg_eta: Number
    apg_norm: Number
    apg_momentum: Number


def knobs(lock: LockConfig, guidance_scale: float | Float[np.ndarray, "steps"]) -> Knobs:
    """The traced settings of a run with the guidance scale omega_0, of all steps or of each."""
    return Knobs(
        enabled=jnp.bool_(lock.enabled),
        warmup_fusion_ratio=jnp.float32(lock.warmup_fusion_ratio),
        adapt_fusion_ratio=jnp.bool_(lock.adapt_fusion_ratio),
        fusion_ratio=jnp.float32(lock.fusion_ratio),
        guidance_scale=jnp.float32(guidance_scale),
        adapt_guidance=jnp.bool_(lock.adapt_guidance),
        guidance_ratio=jnp.float32(lock.guidance_ratio),
        omega_floor=jnp.float32(lock.omega_floor),
        omega_ceiling=jnp.float32(lock.omega_ceiling),
        rescale_uncond=jnp.bool_(lock.rescale_uncond),
        tau=jnp.float32(lock.tau),
        kappa=jnp.int32(lock.kappa),
        pin_background=jnp.bool_(lock.background != "model"),
        detect_globally=jnp.bool_(lock.detection == "global"),
        zero_init_steps=jnp.int32(lock.zero_init_steps),
        cache_every=jnp.int32(lock.cache_every),
        injected_steps=jnp.int32(lock.injected_steps),
        foreground_ratio=jnp.float32(lock.foreground_ratio),
        start_shift=jnp.float32(lock.start_shift),
        apg_eta=jnp.float32(lock.apg_eta),
        apg_norm=jnp.float32(lock.apg_norm),
        apg_momentum=jnp.float32(lock.apg_momentum),
    )


def in_window(steps: int, kappa: Int[Array, ""] | int) -> Bool[Array, "steps"]:
    """Marks the scheduled steps, the last `kappa`; all steps where kappa >= steps."""
    return jnp.arange(steps) >= steps - kappa


def injected(steps: int, count: Int[Array, ""] | int) -> Bool[Array, "steps"]:
    """Marks ProEdit's injected steps, the first `count` (METHOD.md section 10)."""
    return jnp.arange(steps) < count


def source_needed(in_window: Bool[Array, "steps"], knobs: Knobs) -> Bool[Array, "steps"]:
    """Marks the steps on which alpha can be over 0; the others do without the source pass."""
    inside = knobs.adapt_fusion_ratio | (knobs.fusion_ratio > 0)
    # A schedule that has no statistic yet holds the warm-up's alpha, so `inside` covers it.
    scheduled = jnp.where(in_window, inside, knobs.warmup_fusion_ratio > 0)
    return knobs.enabled & (scheduled | injected(len(in_window), knobs.injected_steps))


def refreshed(
    needed: Bool[Array, "steps"],
    interval: Int[Array, ""] | int,
    switches: Bool[Array | np.ndarray, "steps"] | bool = False,
) -> Bool[Array, "steps"]:
    """Marks the steps that recompute a carried cache.

    In every run of consecutive needed steps these are the first and each `interval`-th after it.
    A step that `switches` to another model begins a run: no cache serves two.
    """
    step = jnp.arange(len(needed))
    before = jnp.where(switches, step - 1, -1)
    last_without = jax.lax.cummax(jnp.where(needed, before, step))
    return needed & ((step - last_without - 1) % interval == 0)


def passes(lock: LockConfig) -> tuple[str, ...]:
    """The kinds of pass that a run may need, known from its settings before it starts.

    `"plain"` leaves the source out. `"full"` computes all tokens. `"foreground"` computes the
    foreground's tokens alone, which suffices at alpha 1 and beta 0 where the background is pinned
    (METHOD.md section 8). A run whose ratios never change, such as `hard_lock`, needs one kind.
    """
    if not lock.enabled:
        return ("plain",)
    adapts, idle = lock.adapt_fusion_ratio, background_is_idle(lock)
    ratios = {(lock.warmup_fusion_ratio, 0.0)}  # (alpha, beta) of steps that have fixed ones
    if not adapts:
        ratios.add((lock.fusion_ratio, 0.0))
    if lock.injected_steps:
        ratios.add((1.0, lock.foreground_ratio))
    plain, firm = (0.0, 0.0), (1.0, 0.0)
    needed = {
        "plain": plain in ratios,
        "full": adapts or bool(ratios - {plain, firm}) or (firm in ratios and not idle),
        "foreground": idle and (adapts or firm in ratios),
    }
    return tuple(kind for kind, is_needed in needed.items() if is_needed)


def background_is_idle(lock: LockConfig) -> bool:
    """Whether only the source reaches the result from the background, at alpha 1."""
    pinned, local = lock.background != "model", lock.detection == "local"
    return pinned and local and lock.guidance == "cfg"


def fusion_ratio(sigma2: PerEdit, ready: Switch, in_window: Switch, knobs: Knobs) -> PerEdit:
    """The fusion ratio alpha of a step, per edit, in [0, 1].

    METHOD.md section 6, in the window, with the statistic `sigma2` of the steps before:

        alpha = clip(sigma2 / tau, 0, 1)

    The warm-up's ratio holds before the window, and inside it until the statistic is `ready`. A
    fixed ratio (`adapt_fusion_ratio` off) holds in the whole window. Without a lock alpha is 0.
    """
    warmup = knobs.warmup_fusion_ratio
    scheduled = jnp.where(ready, jnp.clip(sigma2 / knobs.tau, 0.0, 1.0), warmup)
    inside = jnp.where(knobs.adapt_fusion_ratio, scheduled, knobs.fusion_ratio)
    return jnp.where(knobs.enabled, jnp.where(in_window, inside, warmup), 0.0)


def inject(alpha: PerEdit, injected: Switch, knobs: Knobs) -> tuple[PerEdit, Number]:
    """The source's shares alpha in the background and beta in the foreground, of a step.

    METHOD.md section 10: ProEdit's injected steps take the background's keys and values from the
    source, alpha = 1, and mix a share beta = 1 - d of the source's into the foreground's. On all
    other steps `alpha` stands and beta is 0.
    """
    active = knobs.enabled & injected
    return jnp.where(active, 1.0, alpha), jnp.where(active, knobs.foreground_ratio, 0.0)


def guidance_scale(sigma2: PerEdit, ready: Switch, in_window: Switch, knobs: Knobs) -> PerEdit:
    """The guidance scale omega of a step, per edit; 1 is no guidance, 0 ignores the prompt.

    METHOD.md section 6, in the window once the statistic is `ready`; omega_0 otherwise:

        omega = omega_0 clip(sigma2 / tau, omega_floor, omega_ceiling)

    A fixed ratio (`adapt_guidance` off) holds in the whole window: omega = omega_0 guidance_ratio.
    """
    scheduled = jnp.clip(sigma2 / knobs.tau, knobs.omega_floor, knobs.omega_ceiling)
    adapted = jnp.where(ready, scheduled, 1.0)
    inside = jnp.where(knobs.adapt_guidance, adapted, knobs.guidance_ratio)
    return knobs.guidance_scale * jnp.where(in_window, inside, 1.0)


def unguided(omega: PerEdit) -> Switch:
    """Whether the unconditional velocity counts in no edit: omega is 1 to within `UNGUIDED`."""
    return (jnp.abs(omega - 1.0) <= UNGUIDED).all()


def uncond_scale(projection: Float[Array, "B"], knobs: Knobs) -> PerEdit:
    """The factor s of the unconditional velocity: the `projection` s*, or 1 for plain guidance."""
    return jnp.where(knobs.rescale_uncond, projection, 1.0)


def detection_region(foreground: CellMask, knobs: Knobs) -> CellMask:
    """The cells that the statistic averages over: foreground or all (METHOD.md section 5)."""
    return foreground | knobs.detect_globally


def projection_region(foreground: CellMask, knobs: Knobs) -> CellMask:
    """The cells that s* is computed from: all, or a pinned run's foreground (section 7)."""
    return foreground | ~knobs.pin_background
