"""Measures how well an edit kept the rest of the video (METHOD.md section 13).

Videos are uint8 RGB, masks boolean (true is edited), as NumPy or JAX arrays; results are Python
floats. Let `d(p)` be the distance in pixels from pixel `p` to the mask within its frame, the
greater of rows and columns, 0 on the mask. The *background* is `d > border`, the *ring* is
`0 < d <= width`. Both default to 8 pixels, the VAE's receptive border, so each pixel off the mask
lies in one of them. The border is spatial only: the VAE also mixes the up to four frames of a
latent frame, so where a mask moves, a frame's background may carry traces of its neighbours' mask.

The metric of an empty region is NaN.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.lock.masks import dilate
from kvlock_jax.media import room

Frames = UInt8[Array | np.ndarray, "frames height width 3"]
Mask = Bool[Array | np.ndarray, "frames height width"]

Picture = UInt8[np.ndarray, "height width 3"]
Region = Bool[np.ndarray, "height width"]
Sum = tuple[float, int]
"""A sum and how many numbers are in it."""

_NEAR = 8  # default border and width, in pixels
_RADIUS, _SIGMA = 5, 1.5  # SSIM's window of 11 pixels, from its paper


@dataclasses.dataclass(frozen=True)
class EditMetrics:
    """The metrics of one edit; each is the function of its name, at its defaults.

    Attributes:
      psnr: PSNR of whole frames, in dB; best for an edit that changes nothing.
      background_psnr: PSNR of the background, in dB.
      background_ssim: SSIM of the background, up to 1.
      ring_error: mean absolute error of the ring, in levels of 255.
      ring_flicker: mean change of the ring's error, in levels of 255 per frame.
      background_ceiling: background PSNR of a bare VAE round trip, in dB, which bounds that of any
        edit that does not composite; `None` if not measured.
    """

    psnr: float
    background_psnr: float
    background_ssim: float
    ring_error: float
    ring_flicker: float
    background_ceiling: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Name -> value, in the order above."""
        return dataclasses.asdict(self)


def measure(
    source: Frames, edited: Frames, mask: Mask, round_trip: Frames | None = None
) -> EditMetrics:
    """All metrics of an edit; none of them says whether the prompt came true.

    Args:
      source: video before the edit.
      edited: video after it.
      mask: edited pixels.
      round_trip: source after a bare VAE round trip, for the ceiling.

    Raises:
      InputError: the videos and the mask differ in frames, height or width.
    """
    near = _near(mask, _NEAR)
    ceiling = None if round_trip is None else _psnr(source, round_trip, near)
    return EditMetrics(
        psnr=psnr(source, edited),
        background_psnr=_psnr(source, edited, near),
        background_ssim=_ssim(source, edited, near),
        ring_error=_ring_error(source, edited, mask, near),
        ring_flicker=_ring_flicker(source, edited, mask, near),
        background_ceiling=ceiling,
    )


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio over all pixels.

    `10 log10(255^2 / MSE)` in dB, with the mean squared error over frames, pixels and channels;
    infinite if nothing differs. Raises as `measure` does.
    """
    return _psnr(a, b, np.broadcast_to(np.False_, np.shape(a)[:3]))


def background_psnr(source: Frames, edited: Frames, mask: Mask, border: int = _NEAR) -> float:
    """Peak signal-to-noise ratio over the background `d > border` alone.

    METHOD.md section 13: `10 log10(255^2 / MSE)` in dB, with the mean squared error over the
    background's own pixels; infinite if nothing differs. Raises as `measure` does.
    """
    return _psnr(source, edited, _near(mask, border))


def background_ssim(source: Frames, edited: Frames, mask: Mask, border: int = _NEAR) -> float:
    """Mean of the structural similarity's map over the background `d > border`.

    METHOD.md section 13, with the map of Wang et al. (2004): a Gaussian window of 11 pixels and
    sigma 1.5, `k1 = 0.01`, `k2 = 0.03`, channels apart and then averaged, the frame mirrored at its
    edges. With a border of 5 or more no window touches the mask. Equal videos score 1. Raises as
    `measure` does.
    """
    return _ssim(source, edited, _near(mask, border))


def ring_error(source: Frames, edited: Frames, mask: Mask, width: int = _NEAR) -> float:
    """Mean absolute error in the ring `0 < d <= width` around the mask, in levels of 255.

    METHOD.md section 13: the mean of `|e_t(p)|`, `e = edited - source`, over the ring's pixels and
    channels in all frames. Raises as `measure` does.
    """
    return _ring_error(source, edited, mask, _near(mask, width))


def ring_flicker(source: Frames, edited: Frames, mask: Mask, width: int = _NEAR) -> float:
    """Mean change of the ring's error from frame to frame, in levels of 255.

    METHOD.md section 13: the mean of `|e_t(p) - e_{t-1}(p)|`, `e = edited - source` signed, over
    the channels and pixels that are in the ring of frame t and of frame t - 1. A constant error
    does not flicker. NaN for one frame. Raises as `measure` does.
    """
    return _ring_flicker(source, edited, mask, _near(mask, width))


def _near(mask: Mask, distance: int) -> Mask:
    """The mask with all pixels up to a distance from it."""
    return room.once(lambda m: np.asarray(dilate(m, distance)), np.asarray(mask), "the mask")


def _psnr(a: Frames, b: Frames, near: Mask) -> float:
    def of_frame(a: Picture, b: Picture, near: Region) -> Sum:
        """A frame's squared errors."""
        return _total(np.square(_error(a, b), dtype=np.int32), ~near)

    mse = _mean(of_frame, *_checked(a, b, near))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def _ssim(source: Frames, edited: Frames, near: Mask) -> float:
    def of_frame(a: Picture, b: Picture, near: Region) -> Sum:
        """A frame's map."""
        if near.all():
            return 0.0, 0
        values = np.asarray(_ssim_map(a, b), np.float64)[~near]
        return float(values.sum()), values.size

    return _mean(of_frame, *_checked(source, edited, near))


def _ring_error(source: Frames, edited: Frames, mask: Mask, near: Mask) -> float:
    def of_frame(a: Picture, b: Picture, mask: Region, near: Region) -> Sum:
        """A frame's errors."""
        return _total(np.abs(_error(a, b)), near & ~mask)

    return _mean(of_frame, *_checked(source, edited, mask, near))


def _ring_flicker(source: Frames, edited: Frames, mask: Mask, near: Mask) -> float:
    def of_two(*pair: np.ndarray) -> Sum:
        """Changes from one frame to the next."""
        before, after = pair[::2], pair[1::2]
        ring = (before[3] & ~before[2]) & (after[3] & ~after[2])
        return _total(np.abs(_error(*after[:2]) - _error(*before[:2])), ring)

    clips = _checked(source, edited, mask, near)
    return _mean(of_two, *(part for clip in clips for part in (clip[:-1], clip[1:])))


def _total(values: np.ndarray, inside: Region) -> Sum:
    """The exact sum of a frame's whole numbers over the channels of some pixels; their count."""
    total = values.sum(axis=-1, dtype=np.int32)[inside].sum(dtype=np.int64)
    return int(total), values.shape[-1] * int(np.count_nonzero(inside))


def _mean(function: Callable[..., Sum], *clips: np.ndarray) -> float:
    """The mean over all frames of clips, in as many threads as there are cores."""
    total, count = 0.0, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for piece in room.pieces(*clips):
            for part, size in pool.map(function, *(clip[piece] for clip in clips)):
                total, count = total + part, count + size
    return total / count if count else math.nan


def _error(a: Picture, b: Picture) -> np.ndarray:
    return np.subtract(b, a, dtype=np.int16)


def _checked(source: Frames, edited: Frames, *regions: Mask) -> list[np.ndarray]:
    """Two videos and their regions as NumPy arrays of one size."""
    a, b, *masks = (np.asarray(x) for x in (source, edited, *regions))
    if not (a.ndim == 4 and all(x == a.shape for x in (b.shape, *((*m.shape, 3) for m in masks)))):
        shapes = f"{a.shape}, {b.shape} and {masks[0].shape}"
        raise InputError(f"source, edit and mask must be of one size, found {shapes}")
    for name, video in (("source", a), ("edit", b)):
        if video.dtype != np.uint8:  # floats in 0..1 would score 48 dB too high
            raise InputError(f"the {name} must be uint8, found {video.dtype}")
    return [a, b, *masks]


@jax.jit
def _ssim_map(
    a: UInt8[Array, "height width 3"], b: UInt8[Array, "height width 3"]
) -> Float[Array, "height width 3"]:
    import dm_pix  # here, so that an edit starts without it

    unit = (image.astype(jnp.float32) / 255.0 for image in (a, b))
    return dm_pix.ssim(*unit, return_map=True, filter_fn=_window)


def _window(image: Float[Array, "height width 3"]) -> Float[Array, "height width 3"]:
    """Gaussian mean around each pixel, mirrored at the edges; dm-pix's own crops them."""
    offsets = range(-_RADIUS, _RADIUS + 1)
    weights = [math.exp(-0.5 * (offset / _SIGMA) ** 2) for offset in offsets]
    for axis in (0, 1):
        size = image.shape[axis]
        margins = [(_RADIUS, _RADIUS) if i == axis else (0, 0) for i in range(3)]
        wide = jax.lax.optimization_barrier(jnp.pad(image, margins, mode="symmetric"))
        taps = (jax.lax.slice_in_dim(wide, i, i + size, axis=axis) for i in range(len(weights)))
        image = sum(tap * (w / sum(weights)) for tap, w in zip(taps, weights, strict=True))
    return image
