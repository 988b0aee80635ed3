"""Takes long clips through the VAE, and their masks to latent cells, a piece at a time.

Neither a device nor this process's memory holds all pixels of a long clip. A clip of up to
`1 + LATENT_FRAMES` latent frames is one call of one program; a longer one takes two programs
whatever its length: of its first piece, and of those after, which start from the cache of the piece
before. The last piece is filled up by repeating its last frame: time is causal, so that changes
nothing before it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from kvlock_jax import lock
from kvlock_jax.media import room
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.parallel import sharding
from kvlock_jax.runtime.compile_cache import Call
from kvlock_jax.shapes import Frames, Latents

LATENT_FRAMES = 20
"""Latent frames of a piece, and one more of the first: the 81 frames that Wan was trained on."""

Clip = Shaped[np.ndarray, "frames height width *colours"]
Part = Shaped[np.ndarray, "_frames height width *colours"]


def encode(
    vae: autoencoder.WanVAE,
    clips: Sequence[Shaped[Array | np.ndarray, "frames height width 3"]],
    masks: Sequence[Bool[np.ndarray, "frames height width"]],
    inside: bool,
    run: Call,
) -> Latents | jax.ShapeDtypeStruct:
    """Latents of clips with all but the pixels inside, or outside, of their masks blank.

    Args:
      vae: network.
      clips: clips of one size, which are encoded together.
      masks: mask of each.
      inside: whether to show what their masks cover, or the rest.
      run: function that calls compiled programs.
    """

    def taken(first: int, last: int) -> tuple[Array | np.ndarray, Bool[np.ndarray, "B _f _h _w"]]:
        """Some frames of all clips, and where they are shown."""
        room.release(*(x for x in (*clips, *masks) if isinstance(x, np.ndarray)))
        levels = _stacked([_taken(clip, first, last) for clip in clips])
        covered = _stacked([_taken(mask, first, last) for mask in masks])
        return levels, covered if inside else ~covered

    time, frames = vae.config.strides[0], len(clips[0])
    size = LATENT_FRAMES * time
    if frames <= 1 + size:
        return run(autoencoder.encode, vae, *taken(0, frames))
    parts, cache = [], None
    for first, last in _spans(frames, size):
        latents, cache = run(autoencoder.encode_piece, vae, *taken(first, last), cache)
        parts.append(jax.block_until_ready(latents))  # or all pieces would wait in memory
    return run(_joined, parts, count=(frames - 1) // time + 1)


def decode(
    vae: autoencoder.WanVAE, latents: Latents | jax.ShapeDtypeStruct, run: Call
) -> Iterator[tuple[Any, Any]]:
    """Levels of videos a piece at a time, and whether each piece's pixels were finite.

    The last piece of a long clip may have more frames than the clip.
    """
    size = LATENT_FRAMES
    if latents.shape[1] <= 1 + size:
        yield run(autoencoder.decode, vae, latents)
        return
    cache = None
    for first, last in _spans(latents.shape[1], size):
        part = run(_part, latents, np.int32(first), size=last - first)
        levels, finite, cache = run(autoencoder.decode_piece, vae, part, cache)
        yield levels, finite


def gathered(
    decoded: Iterator[tuple[UInt8[Array, "B _frames height width 3"], Bool[Array, "B"]]],
    frames: int,
) -> list[Frames | None]:
    """The videos of `decode`; `None` stands for one with pixels that are not finite."""
    videos: list[Frames] = []
    sound, done = True, 0
    for levels, finite in decoded:
        levels, sound = np.asarray(levels), sound & np.asarray(finite)
        if levels.shape[1] == frames:
            videos = list(levels)
            break
        if not videos:
            shape = (frames, *levels.shape[2:])
            videos = [room.room(shape, np.uint8, "the decoded video") for _ in levels]
        last = min(done + levels.shape[1], frames)
        for video, piece in zip(videos, levels, strict=True):
            video[done:last] = piece[: last - done]
        room.release(*videos)
        done = last
    return [video if fine else None for video, fine in zip(videos, sound, strict=True)]


def latent_mask(
    mask: Bool[np.ndarray, "frames height width"], strides: tuple[int, int, int]
) -> Bool[np.ndarray, "T H W"]:
    """`lock.to_latent_mask` of one clip's mask."""
    size = LATENT_FRAMES * strides[0]
    if len(mask) <= 1 + size:
        return np.asarray(_cells(mask, strides))
    if room.is_still(mask):
        (cells,) = np.asarray(_cells(mask[:1], strides))
        return np.stack([cells] * (-(-(len(mask) - 1) // strides[0]) + 1))
    parts = []
    for first, last in _spans(len(mask), size):
        # after the first piece, an earlier frame stands before the whole strides
        cells = np.asarray(_cells(_taken(mask, max(first - 1, 0), last), strides))
        parts.append(cells[1:] if first else cells)
        room.release(mask)
    return np.concatenate(parts)[: -(-(len(mask) - 1) // strides[0]) + 1]


def _spans(frames: int, size: int) -> Iterator[tuple[int, int]]:
    """First frame and end of each piece: `1 + size` frames, then `size` each."""
    yield 0, 1 + size
    for first in range(1 + size, frames, size):
        yield first, first + size


def _taken(clip: Clip | Array, first: int, last: int) -> Part | Array:
    """Frames of a clip, whose last one stands for those after its end."""
    if (first, last) == (0, len(clip)):
        return clip
    piece = clip[first:last]
    missing = last - first - len(piece)
    return np.concatenate([piece, *[piece[-1:]] * missing]) if missing else piece


def _stacked(parts: Sequence[Part | Array]) -> Array | np.ndarray:
    """A batch, of a single clip without a copy."""
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


@functools.partial(jax.jit, static_argnames="strides")
def _cells(
    mask: Bool[Array, "frames height width"], strides: tuple[int, int, int]
) -> Bool[Array, "T H W"]:
    return sharding.everywhere(lock.to_latent_mask(mask, strides))


@functools.partial(jax.jit, static_argnames="count")
def _joined(parts: Sequence[Float[Array, "B _T H W C"]], count: int) -> Latents:
    return jnp.concatenate(parts, axis=1)[:, :count]


@functools.partial(jax.jit, static_argnames="size")
def _part(latents: Latents, first: Int[Array, ""], size: int) -> Float[Array, "B _T H W C"]:
    """A piece of latents; the last frame stands for those after the end."""
    frames = jnp.minimum(first + jnp.arange(size), latents.shape[1] - 1)
    return jnp.take(latents, frames, axis=1)
