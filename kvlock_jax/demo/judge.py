"""Recognises the object in a clip of the demo world, by colour distance and template overlap.

No part of it is learnt, so it cannot share a mistake with the model that it judges.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ..errors import InputError
from .world import COLOURS, SHAPES, shape_cover

THRESHOLD = 0.6
"""Lowest overlap that counts as an object; 600 renders gave 0.91 or more, noisy ones 0.85."""

_GREYS = (45.0, 185.0)  # the softened photos' lightness (world.py)
_RADII = np.arange(14.0, 28.0)  # the world has 18 to 24 px; a model may miss on either side
_SHIFTS = range(-2, 3)
_HALF = 42  # half the window in which blob and templates are compared, px


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """The object that `judge` recognised, if any."""

    colour: str | None
    """One of `world.COLOURS`; `None` without an object."""
    shape: str | None
    """One of `world.SHAPES`; `None` without an object."""
    overlap: float
    """Intersection over union with the best shape's template, 0-1, averaged over the frames."""
    centres: Float[np.ndarray, "frames 2"]
    """Fitted centre (x, y) in each frame, within 1.5 px; NaN where the frame shows no object."""


def judge(
    video: UInt8[np.ndarray, "frames height width 3"],
    region: Bool[np.ndarray, "frames height width"] | None = None,
) -> Verdict:
    """Recognises the one object of a clip, inside `region` if given.

    Each pixel votes for the nearest of the six colours, unless a grey is nearer. The pixels nearer
    to the winning colour than to any grey are the blob; the shape is the one with the highest
    overlap `|blob & template| / |blob | template|`, averaged over the frames, with the template's
    size and place fitted to each frame. A mean below `THRESHOLD` is no object.

    Raises:
      InputError: `video` is no uint8 RGB clip, or `region` is of another size.
    """
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8:
        raise InputError(
            f"judge: video must be uint8, frames height width 3, found {video.dtype} {video.shape}"
        )
    if region is not None and region.shape != video.shape[:3]:
        raise InputError(f"judge: region must be {video.shape[:3]}, found {region.shape}")

    to_colours, to_grey = _distances(video)
    if region is not None:
        to_grey = np.where(region, to_grey, 0)
    nearest = np.where(to_colours.min(-1) < to_grey, to_colours.argmin(-1), -1)
    winner = int(np.argmax([(nearest == i).sum() for i in range(len(COLOURS))]))
    overlaps, centres = _fit(to_colours[..., winner] < to_grey)

    means = overlaps.mean(0)
    best = int(means.argmax())
    centres = np.where(overlaps[:, best, None] >= THRESHOLD, centres[:, best], np.nan)
    recognised = means[best] >= THRESHOLD
    return Verdict(
        colour=list(COLOURS)[winner] if recognised else None,
        shape=SHAPES[best] if recognised else None,
        overlap=float(means[best]),
        centres=centres if recognised else np.full_like(centres, np.nan),
    )


def _distances(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared RGB distance of each pixel to each colour, and to the nearest background grey."""
    pixels = video.astype(np.float32)
    colours = np.array(list(COLOURS.values()), np.float32)
    # |p - c|^2 multiplied out: six clips of differences would be the judge's largest arrays.
    squares = (pixels * pixels).sum(-1)
    to_colours = squares[..., None] - 2 * pixels @ colours.T + (colours * colours).sum(-1)
    total = pixels.sum(-1)
    grey = np.clip(total / 3, *_GREYS)
    return to_colours, squares - 2 * grey * total + 3 * grey * grey


def _fit(blob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each frame's best overlap with each shape, and the centre (x, y) of that fit."""
    templates, sizes, offsets = _templates()
    middles = np.stack([_median(frame) for frame in blob])
    padded = np.pad(blob, [(0, 0), (_HALF, _HALF), (_HALF, _HALF)])
    windows = np.stack(
        [
            frame[y : y + 2 * _HALF + 1, x : x + 2 * _HALF + 1]
            for frame, (x, y) in zip(padded, middles, strict=True)
        ]
    )
    # 1,400 templates a frame: as bits, not as a float product, whose BLAS threads wait for one
    # another when the cores are busy with something else.
    both = _packed(windows)[:, None] & templates
    shared = np.bitwise_count(both).sum(-1, dtype=np.int64)
    # The whole frame's blob, not the window's: a second blob elsewhere must count against it.
    union = blob.sum((1, 2))[:, None] + sizes - shared
    overlaps = (shared / union).reshape(len(blob), len(SHAPES), -1)
    best = overlaps.argmax(-1)
    offsets = offsets.reshape(len(SHAPES), -1, 2)[np.arange(len(SHAPES)), best]
    return np.take_along_axis(overlaps, best[..., None], -1)[..., 0], middles[:, None] - offsets


def _median(blob: np.ndarray) -> np.ndarray:
    """The median (x, y) of a blob's pixels, which stray pixels move less than the mean."""
    y, x = np.nonzero(blob)
    if not len(x):
        return np.array([blob.shape[1] // 2, blob.shape[0] // 2])
    return np.array([int(np.median(x)), int(np.median(y))])


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every shape in every size and shift, as bits, with shape as the slowest axis.

    Also returns their areas, and the window's middle relative to each shape's centre, (x, y). A
    shift is relative to the template whose median lies at the window's middle, since the blob's
    window is centred on its median.
    """
    side = 2 * _HALF + 1
    images, offsets = [], []
    for shape in SHAPES:
        for radius in _RADII:
            centred = shape_cover(shape, radius, (_HALF, _HALF), side) > 0.5
            median = _median(centred) - _HALF
            for shift in ((x, y) for y in _SHIFTS for x in _SHIFTS):
                offset = median - shift
                # Nothing wraps round: radius, median and shift come to 27 + 11 + 2 px at most.
                images.append(np.roll(centred, -offset[::-1], axis=(0, 1)))
                offsets.append(offset)
    templates = np.stack(images)
    return _packed(templates), templates.sum((1, 2)), np.stack(offsets)


def _packed(images: np.ndarray) -> np.ndarray:
    """Boolean images, each as one row of 64-bit words."""
    bits = np.packbits(images.reshape(len(images), -1), axis=-1)
    return np.pad(bits, [(0, 0), (0, -bits.shape[1] % 8)]).view(np.uint64)
