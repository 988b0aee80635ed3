"""The conditioning of VACE beside noise and text (METHOD.md section 11).

Each latent cell has 96 channels: the VAE's latents of the video outside the mask (*inactive*) and
inside it (*reactive*), and the mask itself. Origin: `prepare_video_latents` and `prepare_masks` of
Diffusers' `WanVACEPipeline`, after the publisher's VACE code.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image as pillow

from kvlock_jax.grid import Grid
from kvlock_jax.models.family import Clips, EncodeClips, Encoded, Masks, Pictures
from kvlock_jax.models.wan.vace import VACEContext
from kvlock_jax.shapes import VAE_STRIDES, Image, Latents

Canvas = Float[Array | np.ndarray, "canvas_height canvas_width 3"]


def on_canvas(
    picture: UInt8[Array | np.ndarray, "rows columns 3"], height: int, width: int
) -> Canvas:
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


def on_canvas_of_fun(
    picture: UInt8[np.ndarray, "rows columns 3"], height: int, width: int
) -> Canvas:
    """`on_canvas` as VideoX-Fun has it: bicubic with antialiasing, by PIL.

    Origin: `padding_image` of its `videox_fun/utils/utils.py`, sides rounded as there.
    """
    rows, columns = picture.shape[:2]
    aspect = columns / rows
    fitted = (width, int(width / aspect)) if aspect > width / height else None
    fitted = fitted or (int(height * aspect), height)
    scaled = pillow.fromarray(picture).resize([max(side, 1) for side in fitted])
    canvas = pillow.new("RGB", (width, height), (255, 255, 255))
    canvas.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))
    return np.asarray(canvas, np.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class VACEConditioner:
    """The `Conditioner` of VACE: text, and the control channels of the clip and its mask.

    Attributes:
      canvas: function that puts a reference picture on a canvas of a video's size.
      newest_first: whether the last picture's latent frame comes first, as Wan 2.1's.
    """

    takes_references: bool = True
    sees_source: bool = True
    canvas: Callable[[Image, int, int], Canvas] = on_canvas
    newest_first: bool = True

    def canvases(self, pictures: Pictures, height: int, width: int) -> list[Array | np.ndarray]:
        """Reference pictures, `height width 3` in [-1, 1], in the order of their latent frames."""
        ordered = reversed(pictures) if self.newest_first else pictures
        return [self.canvas(picture, height, width) for picture in ordered]

    def encode(
        self,
        encode: EncodeClips,
        sources: Clips,
        masks: Masks,
        *,
        scale: float,
        show_masked: bool,
    ) -> tuple[Encoded, Encoded, Encoded, np.float32, Bool[np.ndarray, "B T H W 64"]]:
        """Encodes each clip outside its mask, under its mask (blank unless shown), and blank."""
        edits = len(masks) // len(sources)
        clips = [clip for clip in sources for _ in range(edits)]
        nothing = np.broadcast_to(np.False_, masks[0].shape)
        blank = encode(sources[:1], [nothing], inside=True)
        reactive = encode(clips, masks, inside=True) if show_masked else blank
        inactive = encode(clips, masks, inside=False)
        folded = np.concatenate([fold_mask(mask[None]) for mask in masks])
        return inactive, reactive, blank, np.float32(scale), folded

    def contexts(
        self,
        texts: Float[Array, "R S D"],
        source_texts: Float[Array, "sources S D"],
        latents: Float[Array, "sources T H W C"],
        references: Sequence[Float[Array, "sources 1 H W C"]],
        encoded: tuple[Encoded, Encoded, Encoded, Float[Array, ""], Bool[Array, "B T H W 64"]],
        grid: Grid,
    ) -> tuple[VACEContext, VACEContext]:
        """The text and the control channels of every row; a source's mask is empty."""
        inactive, reactive, blank = (clips.rows() for clips in encoded[:3])
        (scale, folded), sources = encoded[3:], len(latents)
        edits = len(folded) // sources
        reactive = jnp.broadcast_to(reactive, inactive.shape)
        channels = control(
            inactive, reactive, folded, [jnp.repeat(r, edits, axis=0) for r in references]
        )
        # with nothing masked, the inactive clip is the source itself
        empty = jnp.zeros_like(folded[:sources])
        whole = control(latents, jnp.broadcast_to(blank, latents.shape), empty, references)
        return (
            VACEContext(texts, grid.split(channels), jnp.full(len(folded), scale)),
            VACEContext(source_texts, grid.split(whole), jnp.full(sources, scale)),
        )


def control(
    inactive: Latents,
    reactive: Latents,
    folded: Bool[Array | np.ndarray, "B T H W 64"],
    references: Sequence[Float[Array, "B 1 H W C"]] = (),
) -> Float[Array, "B all_frames H W channels"]:
    """The conditioning channels of a video whose masked part is to be generated.

    With `x` the video in [-1, 1] and `m` the mask, METHOD.md section 11:

        inactive = VAE(x (1 - m)),    reactive = VAE(x m)

    An empty mask shows the model the whole video, a full one none of it.

    Args:
      inactive: latents of the video outside the mask.
      reactive: latents of the video under the mask.
      folded: `fold_mask` of what is generated; `frames = 4 n + 1`, height and width multiples of 8.
      references: latents of reference pictures, each a latent frame before the video.

    Returns:
      `T = len(references) + n + 1` frames of channels.
    """
    video = jnp.concatenate([inactive, reactive, folded.astype(jnp.float32)], axis=-1)
    missing = [(0, 0)] * 4 + [(0, video.shape[-1] - inactive.shape[-1])]
    return jnp.concatenate([*(jnp.pad(r, missing) for r in references), video], axis=1)


def fold_mask(
    mask: Bool[Array | np.ndarray, "B frames height width"],
) -> Bool[Array | np.ndarray, "B T H W 64"]:
    """Folds a pixel mask into channels of latent cells; true is generated.

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
    return cells.transpose(0, 1, 2, 4, 3, 5).reshape(*cells.shape[:3], width // columns, -1)
