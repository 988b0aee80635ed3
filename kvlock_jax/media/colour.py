"""Decoded frames to RGB: YUV matrices, HDR to SDR, transparency over white."""

import functools

import av
import numpy as np
from jaxtyping import Float, UInt8, UInt16

from kvlock_jax.shapes import Image

_BT709, _UNTAGGED, _BT601 = 1, 2, 6  # codes of YUV matrices, ITU-T H.273 table 4
_WIDE_PRIMARIES = 9  # BT.2020, table 2
_PQ, _HLG = 16, 18  # transfer functions, table 3
_HD_WIDTH, _HD_HEIGHT = 1280, 720  # untagged video from here on is BT.709, below BT.601

_REFERENCE_WHITE = 203.0  # cd/m2 of a white sheet in HDR, BT.2408: SDR's 255
_HLG_PEAK = 1000.0  # cd/m2 of the display that BT.2100 defines HLG's system gamma of 1.2 for
_SHOULDER = 0.8  # share of reference white from which highlights are compressed

# Linear BT.2020 to BT.709, BT.2087.
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def rgb(frame: av.VideoFrame) -> tuple[Image, UInt8[np.ndarray, "height width"] | None]:
    """A decoded frame as RGB over white, and its alpha where the pixel format has one.

    A YUV matrix that the file does not name is BT.709 from 1280 or 720 pixels on, BT.601 below. PQ
    and HLG are tone-mapped to SDR.
    """
    if frame.colorspace == _UNTAGGED:
        is_hd = frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT
        frame.colorspace = _BT709 if is_hd else _BT601
    if frame.color_trc in (_PQ, _HLG):
        return _tone_mapped(frame), None
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_ndarray(format="rgb24"), None
    return over_white(frame.to_ndarray(format="rgba"))


def over_white(
    rgba: UInt8[np.ndarray, "height width 4"],
) -> tuple[Image, UInt8[np.ndarray, "height width"]]:
    """A picture composed on white, and its alpha."""
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min() == 255:
        return np.ascontiguousarray(colours), alpha
    opacity = alpha[..., None].astype(np.float32) / 255
    composed = colours.astype(np.float32) * opacity + 255 * (1 - opacity)
    return np.rint(composed).astype(np.uint8), alpha


def _tone_mapped(frame: av.VideoFrame) -> Image:
    """An HDR frame in SDR: BT.709 primaries and the sRGB curve.

    Up to 0.8 of reference white, colours are those of the file; brighter ones are compressed, all
    channels by one factor, so that hues stay.
    """
    coded: UInt16[np.ndarray, "height width 3"] = frame.to_ndarray(format="rgb48le")
    light = _pq_light()[coded] if frame.color_trc == _PQ else _hlg_display(_hlg_light()[coded])
    if frame.color_primaries == _WIDE_PRIMARIES:
        light = np.maximum(light @ _TO_BT709.T, np.float32(0))
    brightest = light.max(axis=-1, keepdims=True)
    over = (brightest - _SHOULDER) / (1 - _SHOULDER)
    room = (1 - _SHOULDER) * over / (1 + np.maximum(over, 0))
    mapped = np.where(over > 0, _SHOULDER + room, brightest)
    light = light * (mapped / np.maximum(brightest, np.float32(1e-9)))
    return np.rint(255 * _srgb(np.clip(light, 0, 1))).astype(np.uint8)


@functools.cache
def _pq_light() -> Float[np.ndarray, "codes=65536"]:
    """Light of each 16-bit PQ code over reference white (SMPTE ST 2084)."""
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
    root = (np.arange(65536) / 65535) ** (1 / m2)
    light = 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    return (light / _REFERENCE_WHITE).astype(np.float32)


@functools.cache
def _hlg_light() -> Float[np.ndarray, "codes=65536"]:
    """Scene light, 0 to 1, of each 16-bit HLG code (BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    code = np.arange(65536) / 65535
    light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


def _hlg_display(scene: Float[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width 3"]:
    """Light of a display over reference white: BT.2100's system gamma of 1.2."""
    luma = np.maximum(scene @ _LUMA_2020, np.float32(1e-9))[..., None]
    return scene * luma**0.2 * np.float32(_HLG_PEAK / _REFERENCE_WHITE)


def _srgb(light: Float[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width 3"]:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
