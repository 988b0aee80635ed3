"""The levels of Wan 2.2's VAE: Wan 2.1's blocks beside a shortcut without parameters.

The encoder's shortcut is a mean of what a level halves, the decoder's copies what it doubles. Both
act within a chunk. Origin: `AvgDown3D`, `DupUp3D`, `Down_ResidualBlock` and `Up_ResidualBlock` of
Wan-Video/Wan2.2, `wan/modules/vae2_2.py`; attributes keep Diffusers' names.
"""

import jax.numpy as jnp
from flax import nnx

from kvlock_jax.models.vae.blocks import Downsample, ResidualBlock, Upsample, chain
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.vae.convolutions import Cache, Feature


def average(x: Feature, channels: int, time: int, side: int) -> Feature:
    """Means of blocks of `time` frames and `side` x `side` cells, as `channels` channels.

    The numbers of a block, in the order channel, frame, row, column, are cut into `channels` groups
    of equal length, and each becomes its mean. So with as many channels as before, a block of one
    frame becomes the mean of its cells; with twice as many, two frames become two channels.

    Zeros stand before a chunk whose frames `time` does not divide: the clip's first, of one frame.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    batch, frames, height, width, c_in = x.shape
    counts = frames // time, height // side, width // side
    x = x.reshape(batch, counts[0], time, counts[1], side, counts[2], side, c_in)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(batch, *counts, channels, -1).mean(axis=-1)


def copies(x: Feature, channels: int, time: int, side: int) -> Feature:
    """Blocks of `time` frames and `side` x `side` cells of `channels` channels, filled with copies.

    The numbers of a block, in the order channel, frame, row, column, are those of a cell of `x`,
    each repeated equally often.
    """
    batch, frames, height, width, c_in = x.shape
    repeats = channels * time * side * side // c_in
    # a broadcast, since `jnp.repeat` has a slow gradient
    x = jnp.broadcast_to(x[..., None], (*x.shape, repeats))
    x = x.reshape(batch, frames, height, width, channels, time, side, side)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, frames * time, height * side, width * side, channels)


class DownBlock(nnx.Module):
    """A level of the encoder; `temporal` is None where it halves nothing."""

    def __init__(self, c_in: int, c_out: int, blocks: int, temporal: bool | None, *, rngs):
        widths = [c_in] + [c_out] * (blocks - 1)
        self.resnets = nnx.List([ResidualBlock(w, c_out, rngs=rngs) for w in widths])
        halves = temporal is not None
        self.downsampler = Downsample(c_out, temporal, rngs=rngs) if halves else None
        self.shortcut = c_out, 2 if temporal else 1, 2 if halves else 1

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of all modules in turn."""
        modules = (*self.resnets, *([self.downsampler] if self.downsampler else []))
        y, cache = chain(modules, x, cache)
        return y + average(x, *self.shortcut), cache


class UpBlock(nnx.Module):
    """A level of the decoder; one that doubles nothing, with `temporal` None, has no shortcut."""

    def __init__(self, c_in: int, c_out: int, blocks: int, temporal: bool | None, *, rngs):
        widths = [c_in] + [c_out] * blocks
        self.resnets = nnx.List([ResidualBlock(w, c_out, rngs=rngs) for w in widths])
        doubles = temporal is not None
        self.upsampler = Upsample(c_out, c_out, temporal, rngs=rngs) if doubles else None
        self.shortcut = c_out, 2 if temporal else 1, 2

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of all modules in turn."""
        if self.upsampler is None:
            return chain(tuple(self.resnets), x, cache)
        y, after = chain((*self.resnets, self.upsampler), x, cache)
        # the clip's first frame is not doubled, so of its copies the last is left
        return y + copies(x, *self.shortcut)[:, -y.shape[1] :], after


def down_blocks(config: VAEConfig, *, rngs) -> list[nnx.Module]:
    """The encoder's levels."""
    widths, count = config.encoder_widths, config.num_res_blocks
    levels = zip(widths[:-1], widths[1:], config.halvings, strict=True)
    return [DownBlock(c_in, c_out, count, temporal, rngs=rngs) for c_in, c_out, temporal in levels]


def up_blocks(config: VAEConfig, *, rngs) -> list[nnx.Module]:
    """The decoder's levels."""
    widths, count = config.decoder_widths, config.num_res_blocks
    levels = zip(widths[:-1], widths[1:], config.doublings, strict=True)
    return [UpBlock(c_in, c_out, count, temporal, rngs=rngs) for c_in, c_out, temporal in levels]
