"""Pictures of a clip's mask: on a frame, and as the tokens that will be edited."""

import dataclasses

import numpy as np
from jaxtyping import Bool
from PIL import Image as pillow

from kvlock_jax import lock
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.media import room
from kvlock_jax.media.fit import Fit
from kvlock_jax.pipeline import pieces
from kvlock_jax.pipeline.report import outlined
from kvlock_jax.shapes import Image, Mask, NewImage

SIDE = 480
"""Pixels that the longer side of a picture has at least: small frames are shown larger."""

_TINT = np.array([255, 140, 0], np.float32)  # orange, which photographs seldom have
_SHARE = 0.45  # of the tint over the picture


def scale_of(height: int, width: int) -> int:
    """How many times larger a frame is shown."""
    return max(1, -(-SIDE // max(height, width)))


def enlarged(image: Image) -> NewImage:
    """A frame as large as it is shown, each pixel a square."""
    scale = scale_of(*image.shape[:2])
    return np.repeat(np.repeat(image, scale, 0), scale, 1)


def with_outline(image: Image, mask: Bool[np.ndarray, "height width"]) -> NewImage:
    """A frame with the outline of its mask, enlarged."""
    scale = scale_of(*image.shape[:2])
    large = np.repeat(np.repeat(mask, scale, 0), scale, 1)
    return outlined(enlarged(image)[None], large[None])[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The transformer's tokens that an edit computes.

    Attributes:
      chosen: whether each token touches the mask.
      unit: frames, rows and columns of pixels under a token.
    """

    chosen: Bool[np.ndarray, "T H W"]
    unit: tuple[int, int, int]

    @classmethod
    def of(cls, mask: Mask, configs: Configs) -> "Tokens":
        """The tokens of a mask, which has the size to work at."""
        fit = Fit(*mask.shape, configs.unit)
        padded = fit.apply_mask(mask)
        cells = pieces.latent_mask(padded, configs.vae.strides)
        tokens = lock.to_token_mask(cells, configs.transformer.patch_size)
        time, *space = configs.unit
        frames, *sides = fit.model_shape
        shape = (1 + (frames - 1) // time, *(s // u for s, u in zip(sides, space, strict=True)))
        return cls(np.asarray(tokens).reshape(shape), configs.unit)

    def drawn(self, image: Image, number: int) -> NewImage:
        """A frame with its edited tokens tinted and a grid over them, enlarged."""
        scale, (time, rows, columns) = scale_of(*image.shape[:2]), self.unit
        chosen = self.chosen[0 if number == 0 else 1 + (number - 1) // time]
        large = np.repeat(np.repeat(chosen, rows * scale, 0), columns * scale, 1)
        picture = enlarged(image).astype(np.float32)
        height, width = picture.shape[:2]
        large = large[:height, :width]
        picture[large] += _SHARE * (_TINT - picture[large])
        lines = np.zeros((height, width), bool)
        lines[:: rows * scale] = True
        lines[:, :: columns * scale] = True
        picture[lines] *= 0.75
        return picture.astype(np.uint8)


def coverage(mask: Mask, tokens: Tokens) -> str:
    """How much of a clip is edited, in a line."""
    count, chosen = tokens.chosen.size, int(tokens.chosen.sum())
    there = int(mask.any(axis=(1, 2)).sum())
    return (
        f"{100 * room.share(mask):.1f} % of the pixels, in {there} of {len(mask)} frames; "
        f"{chosen} of {count} tokens ({100 * chosen / count:.0f} %) are edited"
    )


def thumbnail(image: Image, side: int = 160) -> NewImage:
    """A small picture of a frame."""
    picture = pillow.fromarray(image)
    picture.thumbnail((side, side))
    return np.array(picture)
