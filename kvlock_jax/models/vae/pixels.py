"""Patches of pixels as channels, and back."""

from jaxtyping import Array, Float

Frames = Float[Array, "B frames _height _width _channels"]
"""Frames of pixels, or of patches with their pixels as channels."""


def fold(video: Frames, side: int) -> Frames:
    """Each `side` x `side` pixels as the channels of one cell.

    Channel `side^2 c + side column + row` is colour `c` of the patch's pixel, column before row
    (`patchify` in Wan-Video/Wan2.2, `wan/modules/vae2_2.py`). `side` divides height and width.
    """
    batch, frames, height, width, colours = video.shape
    x = video.reshape(batch, frames, height // side, side, width // side, side, colours)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(*x.shape[:3], width // side, -1)


def unfold(x: Frames, side: int) -> Frames:
    """The inverse of `fold`."""
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames, height, width, -1, side, side).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(batch, frames, height * side, width * side, -1)
