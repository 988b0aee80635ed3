"""What an object looks like: whether it is where it is thought to be, and where else it may be."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from kvlock_jax.masks.motion import STILL, Motion, chain, inverse, opencv
from kvlock_jax.shapes import Image

_SIDE = 24  # px of the longer side of the look: layout and colours, not texture, which changes
_UNLIKE = 50.0  # of 255; rabbit and man of scripts/eval_masks.py stay under 35, what covers is 100
_LEAST_SEEN = 0.15  # share of the object inside the frame
_LEARNT = 0.25  # of a frame's look, by the next frame: an object turns within some ten
_SEARCHED = 480  # px of the longer side of the frame, at most, where a lost object is looked for


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """An object's small picture, upright and as large as in its keyframe.

    Attributes:
      to_look: takes the keyframe's pixels to the picture's.
      inside: the picture's pixels that belong to the object.
      picture: their colours, which follow the object's.
    """

    to_look: Motion
    inside: Bool[np.ndarray, "rows columns"]
    picture: Float[np.ndarray, "rows columns 3"]

    @classmethod
    def of(cls, image: Image, mask: Bool[np.ndarray, "height width"]) -> "Look":
        """The look of a keyframe."""
        cv2 = opencv()
        y, x = np.nonzero(mask)
        size = np.array([np.ptp(x) + 1, np.ptp(y) + 1])
        scale = min(1.0, _SIDE / size.max())
        to_look = np.array([[scale, 0, -x.min() * scale], [0, scale, -y.min() * scale]])
        columns, rows = np.ceil(size * scale).astype(int).tolist()
        inside = cv2.warpAffine(mask.astype(np.uint8) * 255, to_look, (columns, rows)) > 127
        blank = cls(to_look, inside | ~inside.any(), np.zeros((rows, columns, 3), np.float32))
        return dataclasses.replace(blank, picture=blank._picture(image, STILL)[0])

    def is_at(self, image: Image, motion: Motion) -> bool:
        """Whether the object is seen where a motion from its keyframe takes it."""
        return self._difference(image, motion) < _UNLIKE

    def after(self, image: Image, motion: Motion) -> "Look":
        """The look after a frame in which the object is seen; pixels that are covered stay."""
        picture, seen = self._picture(image, motion)
        learnt = seen & (np.abs(picture - self.picture).max(-1) < _UNLIKE)
        mixed = self.picture + _LEARNT * (picture - self.picture)
        return dataclasses.replace(self, picture=np.where(learnt[..., None], mixed, self.picture))

    def found(self, image: Image, last: Motion) -> Motion | None:
        """The motion to where the object is found again, as large and as turned as it was last.

        Half of it at least must be inside the frame.
        """
        cv2 = opencv()
        # The frame is brought to the look's size and turn, in which the object only shifts.
        turn = chain(inverse(last), self.to_look) * [1, 1, 0]
        height, width = image.shape[:2]
        ends = np.array([[0, 0], [width, 0], [0, height], [width, height]]) @ turn[:, :2].T
        fine = min(1.0, _SEARCHED / np.ptp(ends, axis=0).max())
        zoom = fine * np.eye(2, 3)
        look, inside = (
            cv2.resize(part, None, fx=fine, fy=fine, interpolation=cv2.INTER_AREA)
            for part in (self.picture, self.inside.astype(np.float32))
        )
        margin = np.array(inside.shape[::-1]) / 2
        shift = np.c_[np.eye(2), margin - fine * ends.min(0)]
        to_canvas = chain(turn, zoom, shift)
        size = np.ceil(fine * np.ptp(ends, axis=0) + 2 * margin).astype(int).tolist()
        canvas = cv2.warpAffine(image, to_canvas, size, borderMode=cv2.BORDER_REPLICATE)
        weights = np.repeat(inside[..., None], 3, axis=-1)
        errors = cv2.matchTemplate(canvas.astype(np.float32), look, cv2.TM_SQDIFF, mask=weights)
        place = np.array(cv2.minMaxLoc(errors)[2], float)
        motion = chain(self.to_look, zoom, np.c_[np.eye(2), place], inverse(to_canvas))
        return motion if self._difference(image, motion) < _UNLIKE / 2 else None

    def _difference(self, image: Image, motion: Motion) -> float:
        """The median over the object's pixels, of 0-255; infinite where too few are in the frame.

        The median stays small where less than half of the object is covered.
        """
        picture, seen = self._picture(image, motion)
        if seen.sum() < _LEAST_SEEN * self.inside.sum():
            return np.inf
        return float(np.median(np.abs(picture - self.picture).max(-1)[seen]))

    def _picture(
        self, image: Image, motion: Motion
    ) -> tuple[Float[np.ndarray, "rows columns 3"], Bool[np.ndarray, "rows columns"]]:
        """The object's picture in a frame, and its pixels that the frame shows."""
        cv2 = opencv()
        to_look = chain(inverse(motion), self.to_look)
        size = self.inside.shape[::-1]
        picture = cv2.warpAffine(image, to_look, size).astype(np.float32)
        frame = np.full(image.shape[:2], 255, np.uint8)
        return picture, self.inside & (cv2.warpAffine(frame, to_look, size) > 250)
