"""Points on an object, where they went, and the motion that most of them share (OpenCV).

A motion is a similarity: it takes pixels (x, y) of one frame to those of another.
"""

import types

import numpy as np
from jaxtyping import Bool, Float

from kvlock_jax.errors import InputError
from kvlock_jax.shapes import Image

Motion = Float[np.ndarray, "2 3"]
Points = Float[np.ndarray, "points 2"]
Good = Bool[np.ndarray, "points"]

STILL = np.eye(2, 3)
LEAST = 4  # points that a motion needs

_CORNERS = 150  # at most, in each colour channel
_WINDOW = (13, 13)  # px that a point is recognised by: larger ones take in more of the background
_LEVELS = 4  # of the pyramid: for motions of up to some 50 px a frame
_EIGENVALUE = 1e-5  # least texture of a window; OpenCV's default drops half of the outline's points
_RETURN = 1.0  # px that a point may miss its start by when it is followed back
_TOLERANCE = 1.5  # px that a point may lie off the common motion


def opencv() -> types.ModuleType:
    """OpenCV, imported when it is needed.

    Raises:
      InputError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError("following an object needs OpenCV: pip install '.[masks]'") from error
    return cv2


def corners(image: Image, mask: Bool[np.ndarray, "height width"]) -> Points:
    """Corners inside a mask, of each colour channel: shapes may differ in colour alone.

    The mask grows by a pixel first, for its outline is all that is seen of a plain object's motion.
    """
    cv2 = opencv()
    y, x = np.nonzero(mask)
    none = np.zeros((0, 2), np.float32)
    if not len(x):
        return none
    top, left = max(y.min() - 8, 0), max(x.min() - 8, 0)
    part = np.s_[top : y.max() + 9, left : x.max() + 9]
    inside = cv2.dilate(mask[part].astype(np.uint8), np.ones((3, 3), np.uint8))
    apart = max(2.0, np.sqrt(len(x) / _CORNERS) / 2)
    found = [
        cv2.goodFeaturesToTrack(np.ascontiguousarray(channel), _CORNERS, 0.01, apart, mask=inside)
        for channel in np.moveaxis(image[part], -1, 0)
    ]
    points = [channel.reshape(-1, 2) for channel in found if channel is not None]
    return np.concatenate([none, *points]) + np.array([left, top], np.float32)


def flow(before: Image, after: Image, points: Points, is_near: bool = False) -> tuple[Points, Good]:
    """Where points went, and which of them came back when they were followed in reverse.

    Args:
      before: frame that the points lie in.
      after: frame to look for them in.
      points: (x, y) of each.
      is_near: whether they moved by few pixels, so that no coarse level may lead them astray.
    """
    cv2 = opencv()
    if not len(points):
        return points, np.zeros(0, bool)
    levels = 1 if is_near else _LEVELS
    how = {"winSize": _WINDOW, "maxLevel": levels, "minEigThreshold": _EIGENVALUE}
    went, there, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, **how)
    came, back, _ = cv2.calcOpticalFlowPyrLK(after, before, went, None, **how)
    returned = np.abs(came - points).max(-1) < _RETURN
    inside = ((went >= 0) & (went <= (after.shape[1] - 1, after.shape[0] - 1))).all(-1)
    return went, returned & inside & (there[:, 0] > 0) & (back[:, 0] > 0)


def common(before: Points, after: Points) -> tuple[Motion | None, Good]:
    """The motion that most points share, by RANSAC, and which of them; None where few do."""
    none = np.zeros(len(before), bool)
    if len(before) < LEAST:
        return None, none
    cv2 = opencv()
    motion, shared = cv2.estimateAffinePartial2D(before, after, ransacReprojThreshold=_TOLERANCE)
    if motion is None or shared.sum() < LEAST:
        return None, none
    return motion, shared[:, 0] > 0


def moved(points: Points, motion: Motion) -> Points:
    """The points after a motion."""
    return (points @ motion[:, :2].T + motion[:, 2]).astype(np.float32)


def chain(*motions: Motion) -> Motion:
    """Motions one after another, the first first."""
    whole = np.eye(3)
    for motion in motions:
        whole = np.vstack([motion, [0, 0, 1]]) @ whole
    return whole[:2]


def inverse(motion: Motion) -> Motion:
    """The motion back."""
    return np.linalg.inv(np.vstack([motion, [0, 0, 1]]))[:2]


def carried(mask: Bool[np.ndarray, "height width"], motion: Motion) -> np.ndarray:
    """The mask after a motion, in a frame of the same size."""
    cv2 = opencv()
    return cv2.warpAffine(mask.astype(np.uint8) * 255, motion, mask.shape[::-1]) > 127
