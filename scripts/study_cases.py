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
    Thing,
    caption,
    centres_of,
    post_cover,
    random_pair,
    random_scene,
    render,
    render_background,
    shape_cover,
    with_post,
)

FIRST_SEED = 940_000_000  # training never comes near, nor does `eval_demo.py`


@dataclasses.dataclass(frozen=True)
class Regime:
    """A way to sample, and a kind of edits.

    Attributes:
      about: what is hard in it.
      steps: of a run.
      guidance: omega_0.
      margin: px of the mask's box round the object, on each side.
      scene: `"one"` object; `"post"`, one behind a post; `"beside"`, one of two; `"both"` of two.
      still: whether the mask is one box for all frames, which gives no motion away.
      opened: whether the prompt leaves the colour open.
      context_scale: 0 makes VACE weights text-to-video.
    """

    about: str
    steps: int
    guidance: float = 4.0
    margin: int = 4
    scene: str = "one"
    still: bool = False
    opened: bool = False
    context_scale: float = 1.0


REGIMES = {
    "plain": Regime("50 steps, as published", 50),
    "text_to_video": Regime("no context: a text-to-video model", 25, context_scale=0.0),
    "few_steps": Regime("4 steps", 4),
    "open_prompt": Regime("the prompt leaves the colour open", 12, opened=True),
    "loose_mask": Regime("a mask 12 px wider than the way of the object", 8, 4.0, 12, still=True),
    "post": Regime("a post stands in front", 8, 4.0, 6, "post", still=True),
    "both": Regime("two objects, whose colours the prompt must not mix up", 8, 4.0, 6, "both"),
    "strong_guidance": Regime("guidance 10", 8, 10.0),
    "beside": Regime("one of two objects, both in the prompt", 8, 4.0, 6, "beside", still=True),
    "tight_mask": Regime("a mask 1 px wider than the object", 8, margin=1),
}
"""Regimes by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """An object that an edit should put into a clip.

    Attributes:
      thing: the object, whose place and size are free within a few pixels.
      centres: its centre (x, y) in every frame.
      mask: frames of the part of the mask that it belongs into.
      reach: px by which its centre may lie elsewhere, so that the mask still holds it.
      front: share of each pixel that lies behind other things, 0-1.
      behind: frames without it.
      open_colour: whether any colour is right.
    """

    thing: Thing
    centres: np.ndarray
    mask: np.ndarray
    reach: int
    front: np.ndarray
    behind: np.ndarray
    open_colour: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edit of which the truth is known.

    Attributes:
      number: in its regime.
      targets: what the clip should show inside the mask.
      prompt: text that says so.
      video: frames of the clip.
      mask: frames of the mask.
      truth: frames of the clip with the targets in it.
    """

    number: int
    targets: tuple[Target, ...]
    prompt: str
    video: np.ndarray
    mask: np.ndarray
    truth: np.ndarray


def case_of(regime: Regime, number: int) -> Case:
    """The edit of a number."""
    seed = FIRST_SEED + number
    rng = np.random.default_rng([FIRST_SEED, number])
    is_pair = regime.scene in ("beside", "both")
    scene = random_pair(seed, held_out=True) if is_pair else random_scene(seed, held_out=True)
    scene = with_post(scene, seed) if regime.scene == "post" else scene
    edited = 1 + (regime.scene == "both")
    before = things_of(scene)
    wanted = list(before)
    for place in range(edited):
        taken = {thing.colour for thing in (*before, *wanted)}
        new = {
            "shape": str(rng.choice([s for s in SHAPES if s != before[place].shape])),
            "colour": str(rng.choice([c for c in COLOURS if c not in taken])),
        }
        wanted[place] = dataclasses.replace(before[place], **new)
    after = scene_of(scene, wanted)
    masks = [box(thing, scene.frames, regime) for thing in before[:edited]]
    if edited == 2:  # what lies in both belongs to neither
        masks = [masks[0] & ~masks[1], masks[1] & ~masks[0]]
    targets = tuple(_target(after, place, masks[place], regime.opened) for place in range(edited))
    mask = np.any([box(thing, scene.frames, regime) for thing in before[:edited]], axis=0)
    prompt = caption(after.shape) if regime.opened else after.caption
    return Case(number, targets, prompt, render(scene).video, mask, render(after).video)


def things_of(scene: Scene) -> list[Thing]:
    """The objects of a scene."""
    names = [field.name for field in dataclasses.fields(Thing)]
    first = Thing(**{name: getattr(scene, name) for name in names})
    return [first, scene.other] if scene.other else [first]


def scene_of(scene: Scene, things: list[Thing]) -> Scene:
    """The scene with other objects."""
    other = things[1] if len(things) > 1 else None
    return dataclasses.replace(scene, **dataclasses.asdict(things[0]), other=other)


def box(thing: Thing, frames: int, regime: Regime) -> np.ndarray:
    """A square round an object in each frame, or round its whole way."""
    y, x = np.mgrid[:SIZE, :SIZE]
    reach = thing.radius + regime.margin
    centres = centres_of(thing, frames)
    mask = np.stack([np.maximum(abs(x - cx), abs(y - cy)) <= reach for cx, cy in centres])
    return np.broadcast_to(mask.any(0), mask.shape) if regime.still else mask


def _target(scene: Scene, place: int, mask: np.ndarray, open_colour: bool) -> Target:
    """One of a scene's objects, as a target."""
    things = things_of(scene)
    centres = centres_of(things[place], scene.frames)
    clear = np.broadcast_to(1 - post_cover(scene), mask.shape)
    for thing in things[place + 1 :]:
        covers = [shape_cover(thing.shape, thing.radius, at) for at in centres_of(thing, len(mask))]
        clear = clear * (1 - np.stack(covers))
    behind, reach = _without(scene, place), _slack(things[place], centres, mask)
    return Target(things[place], centres, mask, reach, 1 - clear, behind, open_colour)


def _slack(thing: Thing, centres: np.ndarray, mask: np.ndarray) -> int:
    """How far a mask reaches beyond an object, at most; 3 to 16 px."""
    found = 3.0
    for centre, frame in zip(centres, mask, strict=True):
        y, x = np.nonzero(frame)
        if len(x):
            ends = (centre[0] - x.min(), x.max() - centre[0], centre[1] - y.min())
            found = max(found, *(end - thing.radius for end in (*ends, y.max() - centre[1])))
    return min(16, math.ceil(found))


def _without(scene: Scene, place: int) -> np.ndarray:
    """The frames of a scene without one of its objects."""
    left = [thing for number, thing in enumerate(things_of(scene)) if number != place]
    return render(scene_of(scene, left)).video if left else render_background(scene)
