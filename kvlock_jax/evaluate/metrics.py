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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.lock.masks import dilate

Frames = UInt8[Array | np.ndarray, "frames height width 3"]
Mask = Bool[Array | np.ndarray, "frames height width"]

Picture = UInt8[np.ndarray, "height width 3"]
Pair = tuple[Picture, Picture, Bool[np.ndarray, "height width"]]

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
    ceiling = None if round_trip is None else background_psnr(source, round_trip, mask)
    return EditMetrics(
        psnr=psnr(source, edited),
        background_psnr=background_psnr(source, edited, mask),
        background_ssim=background_ssim(source, edited, mask),
        ring_error=ring_error(source, edited, mask),
        ring_flicker=ring_flicker(source, edited, mask),
        background_ceiling=ceiling,
    )


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio over all pixels.

    `10 log10(255^2 / MSE)` in dB, with the mean squared error over frames, pixels and channels;
    infinite if nothing differs. Raises as `measure` does.
    """
    return _psnr(a, b, np.ones(np.shape(a)[:3], bool))


def background_psnr(source: Frames, edited: Frames, mask: Mask, border: int = 8) -> float:
    """Peak signal-to-noise ratio over the background `d > border` alone.

    METHOD.md section 13: `10 log10(255^2 / MSE)` in dB, with the mean squared error over the
    background's own pixels; infinite if nothing differs. Raises as `measure` does.
    """
    return _psnr(source, edited, _background(mask, border))


def background_ssim(source: Frames, edited: Frames, mask: Mask, border: int = 8) -> float:
    """Mean of the structural similarity's map over the background `d > border`.

    METHOD.md section 13, with the map of Wang et al. (2004): a Gaussian window of 11 pixels and
    sigma 1.5, `k1 = 0.01`, `k2 = 0.03`, channels apart and then averaged, the frame mirrored at its
    edges. With a border of 5 or more no window touches the mask. Equal videos score 1. Raises as
    `measure` does.
    """
    region = _background(mask, border)

    def of_frame(a: Picture, b: Picture, inside: np.ndarray) -> float:
        """The sum of a frame's map over its background."""
        if not inside.any():
            return 0.0
        return float(np.asarray(_ssim_map(a, b), np.float64)[inside].sum())

    return _ratio(_sum(of_frame, _pairs(source, edited, region)), 3 * int(region.sum()))


def ring_error(source: Frames, edited: Frames, mask: Mask, width: int = 8) -> float:
    """Mean absolute error in the ring `0 < d <= width` around the mask, in levels of 255.

    METHOD.md section 13: the mean of `|e_t(p)|`, `e = edited - source`, over the ring's pixels and
    channels in all frames. Raises as `measure` does.
    """
    ring = _ring(mask, width)

    def of_frame(a: Picture, b: Picture, inside: np.ndarray) -> int:
        """The sum of a frame's errors."""
        return _total(np.abs(_error(a, b)), inside)

    return _ratio(_sum(of_frame, _pairs(source, edited, ring)), 3 * int(ring.sum()))


def ring_flicker(source: Frames, edited: Frames, mask: Mask, width: int = 8) -> float:
    """Mean change of the ring's error from frame to frame, in levels of 255.

    METHOD.md section 13: the mean of `|e_t(p) - e_{t-1}(p)|`, `e = edited - source` signed, over
    the channels and pixels that are in the ring of frame t and of frame t - 1. A constant error
    does not flicker. NaN for one frame. Raises as `measure` does.
    """
    ring = _ring(mask, width)
    both = ring[1:] & ring[:-1]
    frames = _pairs(source, edited, ring)

    def of_two(before: Pair, after: Pair, inside: np.ndarray) -> int:
        """The sum of changes from one frame to the next."""
        return _total(np.abs(_error(*after[:2]) - _error(*before[:2])), inside)

    changes = zip(frames[:-1], frames[1:], both, strict=True)
    return _ratio(_sum(of_two, changes), 3 * int(both.sum()))


def _background(mask: Mask, border: int) -> np.ndarray:
    return ~np.asarray(dilate(mask, border))


def _ring(mask: Mask, width: int) -> np.ndarray:
    return np.asarray(dilate(mask, width)) & ~np.asarray(mask)


def _psnr(a: Frames, b: Frames, region: np.ndarray) -> float:
    def of_frame(a: Picture, b: Picture, inside: np.ndarray) -> int:
        """The sum of a frame's squared errors."""
        return _total(np.square(_error(a, b), dtype=np.int32), inside)

    mse = _ratio(_sum(of_frame, _pairs(a, b, region)), 3 * int(region.sum()))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def _total(values: np.ndarray, inside: np.ndarray) -> int:
    """The exact sum of a frame's whole numbers over the channels of some pixels."""
    return int(values.sum(axis=-1, dtype=np.int32)[inside].sum(dtype=np.int64))


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _sum(function: Callable[..., float], frames: Iterable[tuple]) -> float:
    """The sum of a function of each frame, in as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(lambda frame: function(*frame), frames))


def _error(a: Picture, b: Picture) -> np.ndarray:
    return np.subtract(b, a, dtype=np.int16)


def _pairs(source: Frames, edited: Frames, region: np.ndarray) -> list[Pair]:
    """Each frame of both videos, and its region."""
    a, b = np.asarray(source), np.asarray(edited)
    if not (a.ndim == 4 and a.shape == b.shape == (*region.shape, 3)):
        shapes = f"{a.shape}, {b.shape} and {region.shape}"
        raise InputError(f"source, edit and mask must be of one size, found {shapes}")
    for name, video in (("source", a), ("edit", b)):
        if video.dtype != np.uint8:  # floats in 0..1 would score 48 dB too high
            raise InputError(f"the {name} must be uint8, found {video.dtype}")
    return list(zip(a, b, region, strict=True))


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
