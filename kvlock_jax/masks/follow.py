"""Masks of an object that moves, from its masks in some frames."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from kvlock_jax.errors import InputError
from kvlock_jax.masks.between import Shape, between, checked
from kvlock_jax.masks.motion import Motion, carried
from kvlock_jax.masks.track import motions
from kvlock_jax.shapes import Frames, Mask


@dataclasses.dataclass(frozen=True, eq=False)
class Followed:
    """Where an object went.

    Attributes:
      mask: its mask in every frame; empty where it is lost.
      lost: the frames in which it is not seen: it left, is covered, or changed too much.
    """

    mask: Mask
    lost: Bool[np.ndarray, "frames"]


def follow(frames: Frames, keyframes: Mapping[int, Shape]) -> Followed:
    """The mask of an object in every frame, from its masks in one frame or several.

    From each keyframe the object is followed forward and backward, to the next keyframe or the
    clip's end: points on it by optical flow, and of where they went the similarity that most of
    them share, matched with the keyframe itself as long as the object looks as it did there.
    Between two keyframes both passes are blended. An object that is half covered, or leaves the
    frame, is lost; its mask is empty until it is found again, which takes half of it.

    Args:
      frames: the clip, which may be mapped from a file: frames are looked at one at a time.
      keyframes: masks by the number of their frame.

    Raises:
      InputError: OpenCV is missing, or a keyframe is past the end, empty or not of the clip's size.
    """
    keyframes = checked(keyframes, len(frames))
    numbers = list(keyframes)
    for number, shape in keyframes.items():
        if shape.shape != frames.shape[1:3]:
            found = f"{shape.shape}, but the video has {frames.shape[1:3]}"
            raise InputError(f"the mask of frame {number} is of height and width {found}")
    mask = np.zeros(frames.shape[:3], bool)
    lost = np.zeros(len(frames), bool)
    for number, shape in keyframes.items():
        mask[number] = shape
    stops = [-1, *numbers, len(frames)]
    for first, last in itertools.pairwise(stops):
        # Motions are small: masks of both passes need not lie in memory at once.
        forward = _motions(frames, keyframes, first, range(first + 1, last))
        backward = _motions(frames, keyframes, last, range(last - 1, first, -1))[::-1]
        for number, ahead, back in zip(range(first + 1, last), forward, backward, strict=True):
            seen = [
                carried(keyframes[start], motion)
                for start, motion in ((first, ahead), (last, back))
                if motion is not None
            ]
            lost[number] = not seen
            if len(seen) == 2 and all(one.any() for one in seen):
                mask[number] = between(*seen, (number - first) / (last - first))
            else:
                mask[number] = np.any(seen, axis=0) if seen else False
    return Followed(mask, lost)


def _motions(
    frames: Frames, keyframes: Mapping[int, Shape], start: int, others: Sequence[int]
) -> list[Motion | None]:
    """The motion to each of the frames beside a keyframe; none where `start` is not one."""
    if start not in keyframes:
        return [None] * len(others)
    return list(motions(frames, start, keyframes[start], others))
