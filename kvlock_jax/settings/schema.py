"""The settings of a run: sampling, lock and guidance, and the edit.

`configs/*.py` and the command line describe a run as a nested `ml_collections.ConfigDict`;
`fields.from_config_dict` checks each of its parts and turns it into one of these dataclasses.
"""

import dataclasses
import math
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from kvlock_jax.settings.fields import from_config_dict, require

MOST_STEPS = 10_000
"""Solver steps of a run, at most: ten for each timestep that the models were trained on."""

LARGEST_SIDE = 8192
"""Pixels of a side to work at, at most: XLA ends the process where a frame does not fit memory."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Solver, steps, guidance and seed of a run.

    Attributes:
      steps: number of solver steps; the only setting here whose change recompiles the loop.
      shift: `s` of METHOD.md section 1, over 0; a higher one spends more steps on high noise.
      guidance_scale: `omega_0` of METHOD.md section 6. 1 is no guidance: every step computes the
        conditional branch alone, and omega stays 1 whatever the lock's settings.
      guidance_scale_low: the same of the steps of a low-noise expert; 0 takes `guidance_scale`.
      boundary: share of 1000 from which on a timestep is the high-noise expert's, 0 to 1; only
        checkpoints of two experts read it. Published 0.875 (Wan 2.2).
      solver: `"unipc"`, `"euler"` or `"dpm++"`.
      grid: noise levels of the steps before the shift: `"diffusers"`, those of Diffusers' scheduler
        of the solver, or `"plain"`, equal parts of [0, 1] as in the publisher's own code.
      seed: seed of the noise that an edit starts from.
      long: clips of more frames than `window`: `"auto"` and `"windows"` run over windows of them
        (`sampling.joined`), `"whole"` runs them whole. With `"windows"` shorter clips are one
        window.
      window: frames of a window, 4n + 1: those of the clips that the model was trained on.
      window_overlap: frames that neighbouring windows share, a multiple of 4 under `window`. It
        may come out a fifth shorter where that saves a window.
      window_shift: whether windows move from step to step, so that no frame is always an edge.
    """

    steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    guidance_scale_low: float = 0.0
    boundary: float = 0.875
    solver: str = "unipc"
    grid: str = "diffusers"
    seed: int = 0
    long: str = "auto"
    window: int = 81
    window_overlap: int = 20
    window_shift: bool = False

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "at least 1")
        require(self.steps <= MOST_STEPS, self, "steps", f"at most {MOST_STEPS}")
        require(0 < self.shift < math.inf, self, "shift", "over 0, and finite")
        for name in ("guidance_scale", "guidance_scale_low"):
            require(0 <= getattr(self, name) < math.inf, self, name, "0 or more, and finite")
        require(0 <= self.boundary <= 1, self, "boundary", "between 0 and 1")
        require(
            self.solver in ("unipc", "euler", "dpm++"),
            self,
            "solver",
            "'unipc', 'euler' or 'dpm++'",
        )
        require(self.grid in ("diffusers", "plain"), self, "grid", "'diffusers' or 'plain'")
        require(0 <= self.seed < 2**32, self, "seed", "between 0 and 4294967295")
        expected = "'auto', 'windows' or 'whole'"
        require(self.long in ("auto", "windows", "whole"), self, "long", expected)
        require(self.window >= 5 and self.window % 4 == 1, self, "window", "4n + 1, 5 or more")
        shared = self.window_overlap
        is_part = 4 <= shared < self.window and shared % 4 == 0
        require(is_part, self, "window_overlap", f"a multiple of 4 under {self.window}")

    @property
    def branches(self) -> int:
        """Guidance branches that each step computes."""
        return 1 if set(self.guidance_scales.values()) == {1} else 2

    @property
    def guidance_scales(self) -> dict[str, float]:
        """`omega_0` by the role of the expert that takes a step."""
        high, low = self.guidance_scale, self.guidance_scale_low
        return {"high": high, "low": low or high}


@dataclasses.dataclass(frozen=True)
class LockConfig:
    """The lock and the guidance of one run (METHOD.md sections 4 to 8); a preset fills it in.

    Attributes:
      enabled: whether the source branch runs, and its keys and values are fused, at all.
      warmup_fusion_ratio: alpha before the scheduled window, 0 to 1.
      adapt_fusion_ratio: whether alpha follows the statistic inside the window.
      fusion_ratio: alpha inside the window where it does not follow the statistic, 0 to 1.
      adapt_guidance: whether omega follows the statistic inside the window.
      guidance_ratio: omega / omega_0 inside the window where it does not follow the statistic, 0 or
        more.
      omega_floor: lower bound of omega / omega_0 in the window; published 0.
      omega_ceiling: upper bound `b` of omega / omega_0 in the window; published 2.
      rescale_uncond: whether the unconditional velocity is scaled by s* (METHOD.md section 7).
      background: `"model"`; `"source"` to pin the background latents (METHOD.md section 8); or
        `"clean"` to give background tokens to the model as known ones, the clean source at timestep
        0, as Wan 2.2's 5B was trained to take them.
      detection: `"local"` averages the statistic over the foreground, `"global"` over everything.
      tau: the statistic at which alpha reaches 1, over 0.
      window: number of clean estimates in the statistic, 2 or more.
      kappa: number of scheduled steps, the last of a run.
      guidance: `"cfg"` or `"apg"` (METHOD.md section 10).
      pool_seeds: samples of one edit, from seeds of their own, that share one statistic, their
        average; the first is the result (METHOD.md section 5). 1 shares nothing.
      injected_steps: number of first steps with alpha 1 and beta in the foreground (ProEdit,
        METHOD.md section 10).
      foreground_ratio: beta = 1 - d, the source's share in the foreground in those steps, 0 to 1.
      start_shift: share of ProEdit's shift of the start latents, 0 to 1.
      zero_init_steps: number of first steps with zero velocity (CFG-Zero*).
      apg_eta: share of the parallel part that APG keeps.
      apg_norm: bound on the norm of APG's difference; infinity for none.
      apg_momentum: momentum of APG's buffer.
      cache: `"fused"` computes the source's keys and values block by block beside the edit's, and
        stores none; `"carried"` stores those of all blocks from step to step.
      cache_every: number of steps that a carried cache serves, 1 or more.
      lock_contexts: whether a VACE model's context blocks are locked as its main blocks are, and
        left out with them; an approximation, since the source shows them an empty mask.
      skip_background: whether a pass leaves out the background's tokens where they cannot reach
        the result (METHOD.md section 8).
      skip_guidance: whether a step leaves out the unconditional branch where omega is 1 to within
        `UNGUIDED`, and takes it as 1.
    """

    enabled: bool = True
    warmup_fusion_ratio: float = 0.0
    adapt_fusion_ratio: bool = True
    fusion_ratio: float = 1.0
    adapt_guidance: bool = True
    guidance_ratio: float = 1.0
    omega_floor: float = 0.0
    omega_ceiling: float = 2.0
    rescale_uncond: bool = True
    background: str = "model"
    detection: str = "local"
    tau: float = 0.01
    window: int = 10
    kappa: int = 20
    guidance: str = "cfg"
    pool_seeds: int = 1
    injected_steps: int = 0
    foreground_ratio: float = 0.0
    start_shift: float = 0.0
    zero_init_steps: int = 0
    apg_eta: float = 0.0
    apg_norm: float = float("inf")
    apg_momentum: float = 0.0
    cache: str = "fused"
    cache_every: int = 1
    lock_contexts: bool = False
    skip_background: bool = True
    skip_guidance: bool = False

    def __post_init__(self) -> None:
        ratios = ("warmup_fusion_ratio", "fusion_ratio", "foreground_ratio", "start_shift")
        for name in ratios:
            require(0 <= getattr(self, name) <= 1, self, name, "between 0 and 1")
        require(
            0 <= self.omega_floor <= self.omega_ceiling,
            self,
            "omega_floor",
            "between 0 and omega_ceiling",
        )
        require(
            0 <= self.guidance_ratio < math.inf, self, "guidance_ratio", "0 or more, and finite"
        )
        for name in ("omega_ceiling", "apg_eta", "apg_momentum"):
            require(math.isfinite(getattr(self, name)), self, name, "finite")
        expected = "'model', 'source' or 'clean'"
        require(self.background in ("model", "source", "clean"), self, "background", expected)
        require(self.detection in ("local", "global"), self, "detection", "'local' or 'global'")
        require(self.tau > 0, self, "tau", "over 0")
        require(self.window >= 2, self, "window", "2 or more")
        require(self.kappa >= 0, self, "kappa", "0 or more")
        require(self.guidance in ("cfg", "apg"), self, "guidance", "'cfg' or 'apg'")
        # APG does not scale the unconditional velocity: s* would be traced and never applied.
        require(
            self.guidance == "cfg" or not self.rescale_uncond,
            self,
            "rescale_uncond",
            "off with guidance 'apg'",
        )
        require(self.pool_seeds >= 1, self, "pool_seeds", "1 or more")
        require(self.injected_steps >= 0, self, "injected_steps", "0 or more")
        require(self.zero_init_steps >= 0, self, "zero_init_steps", "0 or more")
        require(self.apg_norm > 0, self, "apg_norm", "over 0")
        require(self.cache in ("fused", "carried"), self, "cache", "'fused' or 'carried'")
        require(self.cache_every >= 1, self, "cache_every", "1 or more")
        require(
            self.cache == "carried" or self.cache_every == 1,
            self,
            "cache_every",
            "1 with cache 'fused', which stores nothing",
        )

    @property
    def uses_source(self) -> bool:
        """Whether the run needs the source's latents."""
        return self.enabled or self.background != "model"


def _is_whole(text: str) -> bool:
    """Whether a text is a whole number over 0, of any length."""
    return text.isascii() and text.isdecimal() and bool(text.strip("0"))


FITS = ("crop", "pad", "stretch")
"""Ways of `media.fit.Resize` to bring a video to a size of another shape."""


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """The settings of one video, its mask and its prompts.

    Attributes:
      negative_prompt: text that guidance leads away from.
      source_prompt: text of the source branch (METHOD.md section 3).
      invert_mask: whether black marks the part to edit, instead of white.
      dilate: pixels by which the mask grows, before any other use of it.
      composite: whether the result takes the pixels outside the mask from the source.
      size: `"832*480"` (width, height) to work at another size; empty keeps the video's.
      fit: `"crop"`, `"pad"` or `"stretch"`, for a `size` of another shape than the video's
        (`media.fit.Resize`).
      frame_num: number of frames to take from the start of the video; 0 takes all.
      fps: frames per second of a folder of images, which has no rate of its own; 0 takes 16, Wan's.
      no_audio: whether the source's sound is left out of the result.
      context_scale: factor of a VACE model's hints, 0 or more; published 1.
      show_masked: whether a VACE model sees the pixels under the mask, which it then follows as a
        sketch. By default x of METHOD.md section 11 is blank (grey) there, as the publisher's
        inpainting hands it over, so `reactive` is of a blank video.
      ceiling: whether to measure the background PSNR of a bare VAE round trip beside the edit's
        (METHOD.md section 13); it costs one more decode.
    """

    negative_prompt: str = ""
    source_prompt: str = ""
    invert_mask: bool = False
    dilate: int = 0
    composite: bool = False
    size: str = ""
    fit: str = "crop"
    frame_num: int = 0
    fps: float = 0.0
    no_audio: bool = False
    context_scale: float = 1.0
    show_masked: bool = False
    ceiling: bool = False

    def __post_init__(self) -> None:
        scale = self.context_scale
        require(0 <= scale < math.inf, self, "context_scale", "0 or more, and finite")
        require(self.dilate >= 0, self, "dilate", "0 or more pixels")
        require(self.frame_num >= 0, self, "frame_num", "0 or more frames")
        require(0 <= self.fps < math.inf, self, "fps", "over 0 frames per second, or 0 for 16")
        sides = self._sides if self.size else ["1", "1"]
        is_size = len(sides) == 2 and all(_is_whole(side) for side in sides)
        require(is_size, self, "size", "width*height, such as 832*480")
        is_held = all(len(side) < 9 and int(side) <= LARGEST_SIDE for side in sides)
        require(is_held, self, "size", f"of at most {LARGEST_SIDE} pixels a side")
        require(self.fit in FITS, self, "fit", "'crop', 'pad' or 'stretch'")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """The size to work at, or `None` for the video's own."""
        if not self.size:
            return None
        width, height = (int(side) for side in self._sides)
        return height, width

    @property
    def _sides(self) -> list[str]:
        return [side.strip() for side in re.split(r"[*xX\u00d7]", self.size)]


def run_config(preset: str, **sample: Any) -> ConfigDict:
    """The `ConfigDict` of a run with a preset, and `SampleConfig` with the given fields.

    Its parts are `preset`, `sample`, `edit` and `kvlock` (a `ConfigDict` has a method `lock`). A
    None in `kvlock` stands for the preset's own value (METHOD.md section 9).
    """
    kinds = {field.name: field.type for field in dataclasses.fields(LockConfig)}
    return ConfigDict(
        {
            "preset": preset,
            "sample": dataclasses.asdict(from_config_dict(SampleConfig, sample)),
            "edit": dataclasses.asdict(EditConfig()),
            "kvlock": {name: config_dict.placeholder(kind) for name, kind in kinds.items()},
        }
    )
