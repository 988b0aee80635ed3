"""The edits of the study of presets (`study.py`): regimes in which they fail, more or less often.

A regime is a way to sample and a kind of clip, mask and prompt. Its edits are functions of their
number: an edit's clip, target and noise are the same in all arms of a regime, so that differences
are paired. Even numbers are for choosing settings by, odd ones for reporting.
"""

import dataclasses
import math

import numpy as np

from kvlock_jax.demo.world import (
    COLOURS,
    SHAPES,
    SIZE,
    Scene,
    random_scene,
    render,
    shape_cover,
)

FIRST_SEED = 930_000_000  # training never comes near, nor does `eval_demo.py`


@dataclasses.dataclass(frozen=True)
class Regime:
    """A way to sample, and a kind of edits.

    Attributes:
      about: what is hard in it.
      steps: of a run.
      guidance: omega_0.
      margin: px of the mask's box round the object, on each side.
      opened: what the prompt leaves open, `"colour"` or nothing.
      context_scale: 0 makes VACE weights text-to-video.
      others: further objects in the clip, which are kept.
    """

    about: str
    steps: int
    guidance: float = 4.0
    margin: int = 4
    opened: str = ""
    context_scale: float = 1.0
    others: int = 0


REGIMES = {
    "few_steps": Regime("6 steps", 6),
    "tight_mask": Regime("a mask 1 px wider than the object, 12 steps", 12, margin=1),
    "loose_mask": Regime("a mask 16 px wider than the object, 12 steps", 12, margin=16),
    "strong_guidance": Regime("guidance 10, 20 steps", 20, guidance=10.0),
    "two_objects": Regime("a second object beside the mask, 20 steps", 20, others=1),
    "open_prompt": Regime("the prompt leaves the colour open, 25 steps", 25, opened="colour"),
    "text_to_video": Regime("no context: a text-to-video model, 25 steps", 25, context_scale=0.0),
    "plain": Regime("50 steps, as published", 50),
}
"""Regimes by name, the quick ones first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edit of which the truth is known.

    Attributes:
      number: in its regime.
      target: what the clip should show inside the mask.
      prompt: text that says so.
      video: frames of the clip.
      mask: frames of the mask, a box round the object.
      truth: frames of the clip with the target in it.
      open_colour: whether any colour is right.
    """

    number: int
    target: Scene
    prompt: str
    video: np.ndarray
    mask: np.ndarray
    truth: np.ndarray
    open_colour: bool


def case_of(regime: Regime, number: int) -> Case:
    """The edit of a number."""
    rng = np.random.default_rng([FIRST_SEED, number])
    scene = random_scene(FIRST_SEED + number, held_out=True)
    target = dataclasses.replace(
        scene,
        shape=str(rng.choice([s for s in SHAPES if s != scene.shape])),
        colour=str(rng.choice([c for c in COLOURS if c != scene.colour])),
    )
    video, truth = render(scene).video, render(target).video
    mask = box(scene, regime.margin)
    for _ in range(regime.others):
        video, truth = (_with_another(frames, scene, mask, number) for frames in (video, truth))
    prompt = f"a {target.shape}" if regime.opened == "colour" else target.caption
    return Case(number, target, prompt, video, mask, truth, regime.opened == "colour")


def box(scene: Scene, margin: int) -> np.ndarray:
    """A square round the object in each frame, `margin` px wider on each side."""
    y, x = np.mgrid[:SIZE, :SIZE]
    reach = scene.radius + margin
    return np.stack([np.maximum(abs(x - cx), abs(y - cy)) <= reach for cx, cy in scene.centres])


def _with_another(frames: np.ndarray, scene: Scene, mask: np.ndarray, number: int) -> np.ndarray:
    """The frames with a small object that stands in the corner farthest from the mask."""
    rng = np.random.default_rng([FIRST_SEED, number, 1])
    radius = 13.0
    low, high = radius + 1, SIZE - 2 - radius
    corners = [(x, y) for x in (low, high) for y in (low, high)]
    centre = max(corners, key=lambda at: min(math.dist(at, c) for c in scene.centres))
    shape, colour = str(rng.choice(SHAPES)), COLOURS[str(rng.choice(list(COLOURS)))]
    cover = shape_cover(shape, radius, centre)[..., None]
    drawn = np.rint((1 - cover) * frames + cover * np.array(colour)).astype(np.uint8)
    return np.where(mask[..., None], frames, drawn)
