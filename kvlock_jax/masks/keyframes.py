"""Boxes and masks of some frames, as users write them, and boxes of the frames between them."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from kvlock_jax.errors import InputError
from kvlock_jax.media.masks import Box, bbox_mask, parse_box
from kvlock_jax.shapes import Mask

Boxes = Mapping[int, Box]
"""Boxes by the number of their frame, from 0."""


def parse_boxes(given: Any) -> Box | Boxes:
    """A box for all frames, or boxes of some.

    Args:
      given: `"x0,y0,x1,y1"` or four whole numbers; `"0:x0,y0,x1,y1 40:..."`, a list of such parts,
        or a mapping from numbers of frames, which may be text, to boxes.

    Raises:
      InputError: it is none of these, or gives a frame twice.
    """
    if isinstance(given, Mapping):
        return _numbered("bbox", ((str(n).strip(), box) for n, box in given.items()))
    texts = [given] if isinstance(given, str) else given
    if not (isinstance(texts, Sequence) and texts and all(isinstance(t, str) for t in texts)):
        return parse_box(given)
    # Blanks part boxes only where a number follows: those after commas are the box's own.
    parts = re.split(r"\s+(?=[^\s,]*:)", " ".join(texts).strip())
    if len(parts) == 1 and ":" not in parts[0]:
        return parse_box(parts[0])
    return _numbered("bbox", (_parted("bbox", part, "x0,y0,x1,y1") for part in parts))


def _numbered(name: str, pairs: Iterable[tuple[str, Any]]) -> Boxes:
    found: dict[int, Box] = {}
    for number, box in pairs:
        _put(name, found, number, parse_box(box))
    if not found:
        raise InputError(f"{name}: no box is given")
    return dict(sorted(found.items()))


def parse_files(given: Sequence[str]) -> Mapping[int, str]:
    """Files of masks by the number of their frame, of parts such as `0:a.png`; a bare one is of 0.

    Raises:
      InputError: several files, and one is without a number, or two are of one frame.
    """
    if len(given) == 1 and not re.match(r"\d+:", given[0]):
        return {0: given[0]}
    found: dict[int, str] = {}
    for part in given:
        _put("src_mask", found, *_parted("src_mask", part, "FILE"))
    return dict(sorted(found.items()))


def _parted(name: str, part: str, what: str) -> tuple[str, str]:
    number, colon, rest = part.partition(":")
    if not colon or not number.strip().isdecimal() or not rest.strip():
        raise InputError(f"{name}: each of several must be FRAME:{what}, found {part!r}")
    return number.strip(), rest


def _put(name: str, found: dict[int, Any], number: str, value: Any) -> None:
    if not number.isdecimal():
        raise InputError(f"{name}: the number of a frame must be 0 or more, found {number!r}")
    if int(number) in found:
        raise InputError(f"{name}: frame {int(number)} is given twice")
    found[int(number)] = value


def check_numbers(name: str, numbers: Iterable[int], frames: int) -> None:
    """Refuses keyframes that a clip of so many frames does not have.

    Raises:
      InputError: naming the frame.
    """
    for number in numbers:
        if not 0 <= number < frames:
            last = f"the last frame of the video is {frames - 1}"
            raise InputError(f"{name}: there is no frame {number}, {last}")


def boxes(keyframes: Boxes, frames: int, height: int, width: int) -> Mask:
    """The masks of boxes that move in a line from each keyframe to the next.

    Before the first keyframe and after the last one the box stays as it is there. Edges are rounded
    to whole pixels.

    Args:
      keyframes: boxes `x0, y0, x1, y1` by the number of their frame, x1 and y1 exclusive.
      frames: number of the clip's frames.
      height: rows of the clip.
      width: columns of the clip.

    Raises:
      InputError: there is no keyframe, one is past the end, or a box is not inside the frame.
    """
    if not keyframes:
        raise InputError("bbox: no box is given")
    check_numbers("bbox", keyframes, frames)
    for box in keyframes.values():
        bbox_mask(box, 1, height, width)  # raises what is wrong with it
    numbers = sorted(keyframes)
    corners = np.array([parse_box(keyframes[number]) for number in numbers], float)
    edges = np.stack([np.interp(np.arange(frames), numbers, edge) for edge in corners.T], axis=-1)
    mask = np.zeros((frames, height, width), bool)
    # Halves go up, so that a box of one pixel keeps its pixel.
    for frame, (x0, y0, x1, y1) in zip(mask, np.floor(edges + 0.5).astype(int), strict=True):
        frame[y0:y1, x0:x1] = True
    return mask


def spans(chosen: Bool[np.ndarray, "frames"]) -> list[tuple[int, int]]:
    """The first and the last frame of each run of chosen ones."""
    runs = itertools.groupby(range(len(chosen)), key=lambda number: bool(chosen[number]))
    return [(run[0], run[-1]) for is_chosen, frames in runs if is_chosen and (run := [*frames])]
