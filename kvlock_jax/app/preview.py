"""Pictures of a run's clean estimate, by a linear map from latents to colours.

A VAE's decoder takes longer than a step. Colours are nearly linear in its latents, so a map fitted
once to a clip shows what the estimate is about to become, one pixel for each latent cell.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image as pillow

from kvlock_jax.pipeline.encode import encode_clips
from kvlock_jax.pipeline.load import Model
from kvlock_jax.runtime.compile_cache import Call
from kvlock_jax.shapes import Frames, NewImage

FITTED_TO = 81
"""Frames of a clip that a map is fitted to, at most."""

HEIGHT = 160
"""Pixels of a preview's height, at least."""

_COPIES, _DISCS = 3, 6  # copies of the clip that the map is fitted to, and discs in each
_SHOWN = 3  # latent frames in a picture


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """A linear map from latents to colours.

    Attributes:
      matrix: colours in [0, 255] of each channel, and of none in the last row.
    """

    matrix: Float[np.ndarray, "channels_and_one 3"]

    @classmethod
    def fitted(cls, model: Model, clip: Frames, run: Call) -> "Preview":
        """The map that fits the latents of a clip best, and of copies with coloured discs in it.

        The discs bring colours that an edit may have and the clip has not.

        Args:
          model: loaded model.
          clip: frames of the source, up to `FITTED_TO`.
          run: function that calls compiled programs.
        """
        strides = model.checkpoint.configs.vae.strides
        clip = model.fit(clip).apply(clip)
        random = np.random.default_rng(0)
        clips = [clip, *(_with_discs(clip, random) for _ in range(_COPIES))]
        whole = [np.broadcast_to(np.True_, clip.shape[:3])] * len(clips)
        with model.on_mesh(), model.using("vae") as vae:
            encoded = encode_clips(vae, clips, whole, run)
        latents = np.concatenate([np.asarray(part) for part in encoded.parts])[encoded.index]
        known = np.concatenate([_with_one(one) for one in latents])
        wanted = np.concatenate([_means(one, strides).reshape(-1, 3) for one in clips])
        return cls(np.linalg.lstsq(known, wanted, rcond=None)[0])

    def colours(self, latents: Float[np.ndarray, "T H W C"]) -> Frames:
        """The colour of each latent cell."""
        colours = _with_one(latents) @ self.matrix
        return np.clip(np.rint(colours), 0, 255).astype(np.uint8).reshape(*latents.shape[:3], 3)

    def drawn(self, latents: Float[np.ndarray, "T H W C"]) -> NewImage:
        """A picture of the first, the middle and the last latent frame, side by side."""
        last = len(latents) - 1
        numbers = sorted({round(last * n / (_SHOWN - 1)) for n in range(_SHOWN)})
        frames = self.colours(latents[numbers])
        scale = -(-HEIGHT // frames.shape[1])
        size = (frames.shape[2] * scale, frames.shape[1] * scale)
        large = [pillow.fromarray(x).resize(size, pillow.Resampling.BICUBIC) for x in frames]
        return np.concatenate([np.asarray(one) for one in large], axis=1)


def _with_one(latents: Float[np.ndarray, "T H W C"]) -> Float[np.ndarray, "cells C1"]:
    """Latents in a row, with a channel of ones."""
    return np.concatenate([latents, np.ones_like(latents[..., :1])], -1).reshape(
        -1, latents.shape[-1] + 1
    )


def _means(clip: Frames, strides: tuple[int, int, int]) -> Float[np.ndarray, "T H W 3"]:
    """The mean colour of the pixels of each latent cell; the first latent frame has one frame."""
    time, rows, columns = strides
    padded = np.concatenate([np.repeat(clip[:1], time - 1, axis=0), clip])
    frames, height, width = padded.shape[:3]
    cells = padded.reshape(frames // time, time, height // rows, rows, width // columns, columns, 3)
    return cells.mean(axis=(1, 3, 5))


def _with_discs(clip: Frames, random: np.random.Generator) -> Frames:
    """A copy of a clip with discs in it that move, of any colour or of a strong one."""
    drawn, (height, width) = clip.copy(), clip.shape[1:3]
    y, x = np.mgrid[:height, :width]
    for _ in range(_DISCS):
        strong = random.random() < 0.5
        colour = random.choice([20, 230], 3) if strong else random.integers(0, 256, 3)
        radius = random.uniform(0.1, 0.3) * min(height, width)
        centre, speed = random.uniform(0, (height, width)), random.uniform(-0.01, 0.01, 2) * height
        for number, frame in enumerate(drawn):
            row, column = centre + number * speed
            frame[np.hypot(y - row, x - column) < radius] = colour
    return drawn
