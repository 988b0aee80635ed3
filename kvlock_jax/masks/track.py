"""Goes after one object from one keyframe, frame by frame."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool

from kvlock_jax.masks.appearance import Look
from kvlock_jax.masks.motion import (
    LEAST,
    STILL,
    Motion,
    Points,
    carried,
    chain,
    common,
    corners,
    flow,
    inverse,
    moved,
    opencv,
)
from kvlock_jax.shapes import Frames, Image

_SIDE = 96  # px of the object's longer side to work at: large frames are made smaller
_FEW = 0.6  # share of the points at which new ones are taken
_AGREED = 0.4  # share of the keyframe's points that must find themselves again to correct a motion
_GROWTH = 1.05  # in a frame, at most: what covers an object seems to shrink it
_ROUGH = 0.5  # of the object's side, by which one that was found again may be off
_CORRECTION = 0.05  # of the object's side, or 3 px: what drifts off further was never on the object


@dataclasses.dataclass(frozen=True, eq=False)
class _Keyframe:
    """Where a pass begins, at the size to work at."""

    image: Image
    mask: Bool[np.ndarray, "height width"]
    points: Points


@dataclasses.dataclass(frozen=True, eq=False)
class _Sight:
    """An object in the last frame that a pass looked at.

    Attributes:
      image: the frame.
      motion: from the keyframe to it, or to the last frame that shows the object.
      marks: points in the keyframe.
      points: the same in this frame.
      count: how many there were when they were taken.
      look: of the object so far.
      is_lost: whether it is not seen here.
      is_rough: whether it was found again, and not yet matched with the keyframe.
    """

    image: Image
    motion: Motion
    marks: Points
    points: Points
    count: int
    look: Look
    is_lost: bool = False
    is_rough: bool = False


def motions(
    frames: Frames, number: int, mask: Bool[np.ndarray, "height width"], others: Iterable[int]
) -> Iterator[Motion | None]:
    """An object's motion from its keyframe to each of other frames; None where it is lost.

    Args:
      frames: the clip; each frame is looked at once, in turn.
      number: the keyframe.
      mask: the object in it.
      others: numbers of frames, each beside the one before it, the first beside the keyframe.
    """
    cv2 = opencv()
    y, x = np.nonzero(mask)
    scale = min(1.0, _SIDE / (max(np.ptp(x), np.ptp(y)) + 1))
    height, width = mask.shape
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    ratio = np.array(size) / (width, height)
    smaller = np.c_[np.diag(ratio), (ratio - 1) / 2]  # pixels' centres lie at whole numbers

    def resized(image: np.ndarray) -> np.ndarray:
        """The image at the size to work at."""
        return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)

    image = resized(frames[number])
    small = resized(mask.astype(np.uint8) * 255) > 127
    if not small.any():  # a speck, narrower than a pixel of the smaller frame
        small = resized(mask.astype(np.uint8) * 255) > 0
    points = corners(image, small)
    keyframe = _Keyframe(image, small, points)
    sight = _Sight(image, STILL, points, points, len(points), Look.of(image, small))
    for other in others:
        sight = _next(keyframe, sight, resized(frames[other]))
        yield None if sight.is_lost else chain(smaller, sight.motion, inverse(smaller))


def _next(keyframe: _Keyframe, sight: _Sight, image: Image) -> _Sight:
    """What is seen in the next frame: the object where its points went, or where it looks alike."""
    went, good = flow(sight.image, image, sight.points)
    motion, shared = common(sight.marks[good], went[good])
    is_rough = sight.is_rough
    if motion is not None and not _is_as_large(motion, sight.motion):
        shift = np.median((went - sight.points)[good][shared], axis=0)
        motion = chain(sight.motion, np.c_[np.eye(2), shift])
    if sight.is_lost or motion is None or not sight.look.is_at(image, motion):
        motion, shared = sight.look.found(image, sight.motion), shared[:0]
        is_rough = True
        if motion is None:
            none = sight.points[:0]
            return dataclasses.replace(sight, image=image, marks=none, points=none, is_lost=True)
    corrected = _corrected(keyframe, image, motion, is_rough)
    if corrected is not None and sight.look.is_at(image, corrected):
        motion, shared, is_rough = corrected, shared[:0], False
    if shared.sum() >= _FEW * sight.count:
        marks, points, count = sight.marks[good][shared], went[good][shared], sight.count
    else:
        points = corners(image, carried(keyframe.mask, motion))
        marks, count = moved(points, inverse(motion)), len(points)
    look = sight.look.after(image, motion)
    return _Sight(image, motion, marks, points, count, look, is_rough=is_rough)


def _is_as_large(motion: Motion, other: Motion) -> bool:
    """Whether the object is as large after both, but for the growth of a frame."""
    areas = np.linalg.det(motion[:, :2]) / np.linalg.det(other[:, :2])
    return 1 / _GROWTH < np.sqrt(areas) < _GROWTH


def _corrected(keyframe: _Keyframe, image: Image, motion: Motion, is_rough: bool) -> Motion | None:
    """The motion that matches the frame with the keyframe itself, so that no error adds up.

    None where the object does not look as it did there. A rough motion may be far off.
    """
    cv2 = opencv()
    size = image.shape[1::-1]
    expected = cv2.warpAffine(keyframe.image, motion, size, borderMode=cv2.BORDER_REPLICATE)
    points = moved(keyframe.points, motion)
    went, good = flow(expected, image, points, is_near=not is_rough)
    in_frame = ((points >= 0) & (points < size)).all(-1).sum()
    needed = max(LEAST, _AGREED * in_frame)
    if good.sum() < needed:
        return None
    found, shared = common(keyframe.points[good], went[good])
    if found is None or shared.sum() < needed or not _is_as_large(found, motion):
        return None
    y, x = np.nonzero(keyframe.mask)
    ends = np.array([[x.min(), y.min()], [x.max(), y.max()]], np.float32)
    limit = max(3.0, (_ROUGH if is_rough else _CORRECTION) * np.ptp(ends, axis=0).max())
    off = np.abs(moved(ends, found) - moved(ends, motion)).max()
    return found if off <= limit else None
