"""The paper's method, its ablations and the baselines, as settings (METHOD.md sections 9, 10)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvlock_jax.errors import ConfigError
from kvlock_jax.settings.schema import LockConfig

PRESETS = {
    "kvlock": "the paper: alpha and omega follow the statistic, s*; for VACE weights",
    "kvlock_anchor": "ours, for text-to-video weights: locked from the start, background pinned",
    "hard_lock": "source keys and values everywhere in the background, at every step (KV-Edit)",
    "eased": "ours: hard_lock with s*, and half the guidance in the last 0.4 of the steps",
    "fast": "ours, for VACE: hard_lock over the foreground, the source's pass in some steps alone",
    "fixed_half": "ablation: alpha 0.5 in the window instead of the schedule",
    "kv_only": "ablation: only alpha follows the statistic; plain guidance",
    "omega_only": "ablation: only omega follows the statistic; no lock, plain guidance",
    "s_only": "ablation: only s*; no lock, constant omega",
    "s_omega": "ablation: s* and omega's schedule; no lock",
    "global_detection": "ablation: the statistic over the whole video, not the foreground",
    "cfg": "baseline: plain classifier-free guidance, no lock",
    "cfg_zero_star": "baseline: CFG-Zero*, s* and two steps of zero velocity, no lock",
    "apg": "baseline: adaptive projected guidance, no lock",
    "clean": "for Wan 2.2's 5B: background tokens are the clean source; plain guidance, no lock",
    "clean_anchor": "ours, for the same: kvlock_anchor over a clean background",
    "distilled": "ours, for LightX2V's and Lightning's LoRAs: kvlock_anchor in 4 unguided steps",
    "proedit": "baseline: ProEdit, the source injected in the first steps, none after them",
}
"""Presets and their descriptions, in the order of METHOD.md sections 9 and 10."""

_DISTILLED = {
    "steps": 4,
    "shift": 5.0,
    "guidance_scale": 1.0,
    "guidance_scale_low": 1.0,
    "solver": "euler",
    "grid": "plain",
}
"""As LightX2V samples its distilled Wan 2.1 and 2.2 (ModelTC/LightX2V)."""


def sampling(name: str) -> Mapping[str, Any]:
    """The fields of `SampleConfig` that a preset sets beside the lock; most set none.

    Weights that were distilled to few steps know their own noise levels alone, which `distilled`
    has: 1000, 937.5, 833.3 and 625 as timesteps, of which the first two are the high-noise
    expert's.
    """
    return _DISTILLED if name == "distilled" else {}


def preset(name: str, guidance_scale: float, steps: int = 50) -> LockConfig:
    """The settings of the preset `name` for a run with the guidance scale omega_0.

    METHOD.md sections 9 and 10. `kvlock_anchor`, what is made of it, and `eased` depend on omega_0:
    a floor 1 / omega_0 keeps omega at 1 or more, so that the prompt never fades. (The ceiling of 2
    comes first: an omega_0 under 1/2 stays under 1. `eased` leaves one under 1 as it is.)

    `eased` is what measured best on the demo model (docs/evidence.md): the lock is as firm as can
    be, and guidance, which the statistic would double where the model is unsure, falls late in the
    run instead, as in guidance over an interval of noise levels (arXiv 2404.07724). The share 0.4
    of the steps is the published 20 of 50.

    `clean` and `clean_anchor` need a model that was trained on a timestep for every token, as Wan
    2.2's 5B was on clips whose first frame is given.

    `fast` is `hard_lock` with the source's pass in every fifth step, and VACE's context blocks
    locked too: on the demo model equal to it within noise in 50 steps; in 4 its foreground is 0.4
    dB worse (docs/evidence.md).

    `distilled` depends on the number of steps: its window of estimates and its scheduled steps are
    the same parts of a run as of 50 steps, 2 and 2 of 4.

    `cfg_zero_star` starts with 2 steps of zero velocity, its authors' choice for Wan at 50 steps;
    for few steps set `zero_init_steps` lower. `apg` takes eta 0 from its paper, and norm 55 and
    momentum -0.75 from the public code that guides Wan 2.1 by it at 480x832 and 81 frames
    (MeiGen-AI/InfiniteTalk); a norm grows with the number of latents, so on small videos this one
    rarely binds. Its momentum needs many steps to settle: with 4 it ruins edits
    (docs/evidence.md), so for few steps set `apg_momentum` to 0.

    `proedit` (arXiv 2512.22118) takes its ratios from the authors' code for images
    (iSEE-Laboratory/ProEdit; they published none for video): d = 0.9, so beta = 0.1, and a shift
    of 0.25. They inject 5 of 15 steps; 17 is that third of Wan's 50, so for fewer steps set
    `injected_steps` lower. ProEdit starts from the source's inverted latents; here, as in all
    presets, noise that source and edit share takes their place, so the shift has little to move.

    Raises:
      ConfigError: the name is not in `PRESETS`.
    """
    published = LockConfig()
    unguided = dataclasses.replace(published, adapt_guidance=False, rescale_uncond=False)
    unlocked = dataclasses.replace(published, enabled=False)
    plain = dataclasses.replace(unguided, enabled=False)
    locked = dataclasses.replace(
        unguided,
        warmup_fusion_ratio=1.0,
        adapt_fusion_ratio=False,
        fusion_ratio=1.0,
        background="source",
    )
    match name:
        case "kvlock":
            return published
        case "kvlock_anchor" | "clean_anchor":
            # omega_0 may be 0; omega is then 0 whatever the floor.
            floor = min(1 / max(guidance_scale, 1e-6), published.omega_ceiling)
            anchored = dataclasses.replace(published, warmup_fusion_ratio=1.0, omega_floor=floor)
            pinned = "source" if name == "kvlock_anchor" else "clean"
            return dataclasses.replace(anchored, background=pinned)
        case "distilled":
            anchored = preset("kvlock_anchor", guidance_scale)
            window = max(2, round(published.window * steps / 50))
            kappa = max(1, round(published.kappa * steps / 50))
            return dataclasses.replace(anchored, window=window, kappa=kappa)
        case "hard_lock":
            return locked
        case "eased":
            ratio = min(1.0, max(0.5, 1 / max(guidance_scale, 1e-6)))
            late = max(1, round(0.4 * steps))
            return dataclasses.replace(
                locked, rescale_uncond=True, guidance_ratio=ratio, kappa=late
            )
        case "fast":
            return dataclasses.replace(locked, cache="carried", cache_every=5, lock_contexts=True)
        case "fixed_half":
            return dataclasses.replace(published, adapt_fusion_ratio=False, fusion_ratio=0.5)
        case "kv_only":
            return unguided
        case "omega_only":
            return dataclasses.replace(unlocked, rescale_uncond=False)
        case "s_only":
            return dataclasses.replace(unlocked, adapt_guidance=False)
        case "s_omega":
            return unlocked
        case "global_detection":
            return dataclasses.replace(published, detection="global")
        case "cfg":
            return plain
        case "clean":
            return dataclasses.replace(plain, background="clean")
        case "cfg_zero_star":
            return dataclasses.replace(plain, rescale_uncond=True, zero_init_steps=2)
        case "apg":
            return dataclasses.replace(
                plain, guidance="apg", apg_eta=0.0, apg_norm=55.0, apg_momentum=-0.75
            )
        case "proedit":
            return dataclasses.replace(
                unguided,
                adapt_fusion_ratio=False,
                fusion_ratio=0.0,
                injected_steps=17,
                foreground_ratio=0.1,
                start_shift=0.25,
            )
    raise ConfigError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
