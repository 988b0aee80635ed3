"""How a video of any length and size becomes one that the model takes, and how that is undone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvlock_jax.errors import InputError
from kvlock_jax.shapes import PATCH, VAE_STRIDES, Frames, Mask


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a video of any length and size becomes one the model takes, and how that is undone.

    Frames go up to the next 4n + 1, height and width to the next multiple of 16 (the VAE's stride
    times the transformer's patch), by repeating the last frame, the bottom row and the right column
    (DESIGN.md section 4). Nothing is resampled. Of a video: `Fit(*video.shape[:3])`.
    """

    frames: int
    height: int
    width: int

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """Frames, height and width as the model sees them."""
        time, rows, columns = (s * p for s, p in zip(VAE_STRIDES, PATCH, strict=True))
        height, width = -(-self.height // rows) * rows, -(-self.width // columns) * columns
        return -(-(self.frames - 1) // time) * time + 1, height, width

    def apply(self, video: Frames) -> Frames:
        """The video, padded."""
        return np.pad(video, (*self._padding(video), (0, 0)), mode="edge")

    def apply_mask(self, mask: Mask) -> Mask:
        """The mask, padded: repeated frames repeat theirs, added rows and columns are background.

        A repeated frame shares the last one's latent frame: its mask adds no foreground there.
        """
        time, *space = self._padding(mask)
        return np.pad(np.pad(mask, (time, (0, 0), (0, 0)), mode="edge"), ((0, 0), *space))

    def undo(self, video: Frames) -> Frames:
        """The video that the model made, cropped to the first one's length and size."""
        if video.shape[:3] != self.model_shape:
            raise InputError(f"the model's video must be {self.model_shape}, found {video.shape}")
        return video[: self.frames, : self.height, : self.width]

    def _padding(self, array: np.ndarray) -> list[tuple[int, int]]:
        sizes = (self.frames, self.height, self.width)
        if array.shape[:3] != sizes:
            raise InputError(f"the video or mask must be {sizes}, found {array.shape}")
        return [(0, to - at) for to, at in zip(self.model_shape, sizes, strict=True)]


def resize(video: Frames, height: int, width: int) -> Frames:
    """The video at another size: triangle filter, as wide as a source or a target pixel.

    Nothing is cropped: another shape of frame stretches the picture.
    """
    if video.shape[1:3] == (height, width):
        return video

    return np.stack([np.asarray(_resized(frame, height, width)) for frame in video])


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _resized(image: jax.Array, height: int, width: int) -> jax.Array:
    smooth = jax.image.resize(image.astype(jnp.float32), (height, width, 3), "linear")
    return jnp.clip(jnp.round(smooth), 0.0, 255.0).astype(jnp.uint8)
