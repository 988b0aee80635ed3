"""The conditioning of VACE beside noise and text (METHOD.md section 11).

Each latent cell has 96 channels: the VAE's latents of the video outside the mask (*inactive*) and
inside it (*reactive*), and the mask itself. Origin: `prepare_video_latents` and `prepare_masks` of
Diffusers' `WanVACEPipeline`, after the publisher's VACE code.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.shapes import VAE_STRIDES, Latents


def control(
    inactive: Latents,
    reactive: Latents,
    mask: Bool[Array, "B frames height width"],
    references: Sequence[Float[Array, "B 1 H W C"]] = (),
) -> Float[Array, "B T H W 96"]:
    """The conditioning channels of a video whose masked part is to be generated.

    With `x` the video in [-1, 1] and `m` the mask, METHOD.md section 11:

        inactive = VAE(x (1 - m)),    reactive = VAE(x m)

    An empty mask shows the model the whole video, a full one none of it.

    Args:
      inactive: latents of the video outside the mask.
      reactive: latents of the video under the mask.
      mask: true where the video is generated; `frames = 4 n + 1`, height and width multiples of 8.
      references: latents of reference pictures. Each becomes a latent frame before the video; the
        last picture comes first, as published.

    Returns:
      `T = len(references) + n + 1` frames of channels.
    """
    frames = [jnp.concatenate([inactive, reactive, fold_mask(mask)], axis=-1)]
    for latents in references:
        zeros = jnp.zeros((*latents.shape[:-1], frames[0].shape[-1] - latents.shape[-1]))
        frames.insert(0, jnp.concatenate([latents, zeros], axis=-1))
    return jnp.concatenate(frames, axis=1)


def fold_mask(mask: Bool[Array, "B frames height width"]) -> Float[Array, "B T H W 64"]:
    """Folds a pixel mask into channels of latent cells; 1.0 is generated.

    Channel `8 i + j` holds row i and column j of each cell's 8x8 pixels; of the `F` frames, latent
    frame t takes frame `floor((t + 1/2) F / T)`, `T = (F + 3) // 4` ("nearest-exact"). Latent frame
    t may decode to other frames: a mask of a single frame can vanish here, while
    `lock.to_latent_mask` keeps it.
    """
    batch, frames, height, width = mask.shape
    time, rows, columns = VAE_STRIDES
    count = (frames + time - 1) // time
    chosen = ((2 * np.arange(count) + 1) * frames) // (2 * count)
    cells = mask[:, chosen].reshape(batch, count, height // rows, rows, width // columns, columns)
    folded = cells.transpose(0, 1, 2, 4, 3, 5).reshape(*cells.shape[:3], width // columns, -1)
    return folded.astype(jnp.float32)


def on_canvas(
    picture: UInt8[np.ndarray, "rows columns 3"], height: int, width: int
) -> Float[Array, "height width 3"]:
    """Scales a reference picture to fit a video's size and centres it on white, in [-1, 1].

    Bilinear without antialiasing, as published. (Diffusers first resamples a picture whose sides
    are not multiples of 8, so results differ for such pictures.)
    """
    rows, columns = picture.shape[:2]
    scale = min(height / rows, width / columns)
    fitted = max(int(rows * scale), 1), max(int(columns * scale), 1)
    levels = jnp.asarray(picture, jnp.float32) / 127.5 - 1.0
    scaled = jax.image.resize(levels, (*fitted, 3), "linear", antialias=False)
    top, left = ((whole - part) // 2 for whole, part in zip((height, width), fitted, strict=True))
    return (
        jnp.ones((height, width, 3)).at[top : top + fitted[0], left : left + fitted[1]].set(scaled)
    )
