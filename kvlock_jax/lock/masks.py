"""Masks of pixels, of latent cells and of a transformer's tokens (METHOD.md section 2).

True is foreground: the part that the edit may change.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from kvlock_jax.errors import ConfigError, InputError
from kvlock_jax.shapes import PATCH, VAE_STRIDES


def to_latent_mask(
    mask: Shaped[Array | np.ndarray, "*B frames height width"],
    strides: tuple[int, int, int] = VAE_STRIDES,
) -> Bool[Array, "*B T H W"]:
    """The latent cells that cover at least one foreground pixel.

    METHOD.md section 2: latent frame 0 covers pixel frame 0, latent frame t >= 1 the pixel frames
    `1 + 4 (t - 1) .. 4 t`, and a cell an 8x8 block of each. So `T = 1 + ceil((frames - 1) / 4)`,
    `H = ceil(height / 8)`, `W = ceil(width / 8)`; pixels beyond the edges count as background.

    Raises:
      InputError: the mask is not boolean.
    """
    _require_bool("mask", mask)
    still = [(0, 0)] * (mask.ndim - 3)
    # The first latent frame covers one pixel frame, the others a full stride: empty frames in front
    # make all blocks alike.
    padded = jnp.pad(mask, [*still, (strides[0] - 1, 0), (0, 0), (0, 0)])
    return _any_in_block(padded, strides)


def to_token_mask(
    latent_mask: Shaped[Array | np.ndarray, "*B T H W"], patch: tuple[int, int, int] = PATCH
) -> Bool[Array, "*B L"]:
    """The tokens, in frame-major order, whose patch holds a foreground cell.

    METHOD.md section 2. Sizes that the patch does not divide are padded with background.

    Raises:
      InputError: the mask is not boolean.
    """
    _require_bool("latent mask", latent_mask)
    tokens = _any_in_block(latent_mask, patch)
    return tokens.reshape(*tokens.shape[:-3], -1)


def dilate(
    mask: Shaped[Array | np.ndarray, "*B frames height width"], radius: int
) -> Bool[Array, "*B frames height width"]:
    """The mask of each frame, grown by `radius` pixels to all sides and corners.

    METHOD.md section 2: the maximum over a square of `2 radius + 1` pixels, before any pooling.
    `radius` is static and 0 or more; 0 changes nothing.

    Raises:
      ConfigError: the radius is negative.
      InputError: the mask is not boolean.
    """
    if radius < 0:
        raise ConfigError(f"dilate must be 0 pixels or more, found {radius}")
    _require_bool("mask", mask)
    # A square is a row of columns: two passes of 2r+1 pixels instead of one of (2r+1)^2.
    columns = _any_along(jnp.asarray(mask), mask.ndim - 2, radius)
    return _any_along(columns, mask.ndim - 1, radius)


def _any_along(mask: Bool[Array, "..."], axis: int, radius: int) -> Bool[Array, "..."]:
    """Whether any entry within `radius` along `axis` is set."""
    window = [1] * mask.ndim
    window[axis] = 2 * radius + 1
    return jax.lax.reduce_window(mask, False, jax.lax.max, window, [1] * mask.ndim, "SAME")


def _any_in_block(
    mask: Bool[Array | np.ndarray, "*B t h w"], block: tuple[int, int, int]
) -> Bool[Array, "*B T H W"]:
    """Whether any entry of each block is set; background fills up the last blocks."""
    *lead, t, h, w = mask.shape
    counts = [-(-size // b) for size, b in zip((t, h, w), block, strict=True)]
    missing = [n * b - size for n, b, size in zip(counts, block, (t, h, w), strict=True)]
    padded = jnp.pad(mask, [(0, 0)] * len(lead) + [(0, m) for m in missing])
    split = [size for pair in zip(counts, block, strict=True) for size in pair]
    return padded.reshape(*lead, *split).any(axis=(-5, -3, -1))


def _require_bool(name: str, mask: Array | np.ndarray) -> None:
    # A mask of 0..255 or of antialiased floats would count its faintest grey as foreground.
    if mask.dtype != jnp.bool_:
        raise InputError(f"the {name} must be boolean (1 where over 0.5), found {mask.dtype}")
