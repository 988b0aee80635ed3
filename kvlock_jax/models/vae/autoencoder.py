"""Wan's causal video VAE.

Time is causal: a frame depends on itself and earlier frames only. So the VAE encodes and decodes a
clip chunk by chunk, with each convolution passing its last input frames on as a cache, and memory
does not grow with the clip's length. The first chunk is one frame and has no cache (`None`); every
later chunk is a whole number of latent frames, and a `lax.scan` runs over them.

Layout and arithmetic are those of the published checkpoints (Wan-Video/Wan2.1 and, with 48 latent
channels, Wan-Video/Wan2.2; `AutoencoderKLWan` in Diffusers); attributes keep Diffusers' names. The
two differ in their levels (`blocks`, `residual`) and in the pixels of a cell of the first layer.
Products of float32 operands keep all bits on every backend (`models.precision`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.models.vae import blocks, residual
from kvlock_jax.models.vae.blocks import MidBlock, RMSNorm, chain, linear
from kvlock_jax.models.vae.chunks import in_tiles, over_chunks
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.vae.convolutions import Cache, CausalConv3d, Feature
from kvlock_jax.models.vae.pixels import fold, unfold
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import Latents

Video = Float[Array, "B frames height width 3"]

_CELLS = 1024
"""Most latent cells of a chunk. Convolutions of few cells run slower, and every chunk reads all
weights."""


class Encoder(nnx.Module):
    """Pixels to the mean and log-variance of latents, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths, levels = config.encoder_widths, residual if config.is_residual else blocks
        self.conv_in = CausalConv3d(config.pixel_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(levels.down_blocks(config, rngs=rngs))
        self.mid_block = MidBlock(widths[-1], rngs=rngs)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, rngs=rngs)
        self.unit = 2 ** len(config.temperal_downsample)
        steps = [2**level for level in range(len(config.dim_mult))]
        pixels = 1 + 2 * config.num_res_blocks * sum(steps) + 2 * sum(steps[:-1])
        self.reach = -(-pixels // self.unit)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Encodes one chunk: 1 frame without a cache, else 4 frames per latent frame."""
        return chain((self.wide, self.narrow), x, cache)

    def wide(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers above the lowest resolution, which see a bounded part of a frame."""
        return chain((self.conv_in, *self.down_blocks), x, cache)

    def narrow(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers at the lowest resolution, which see whole frames."""
        return _run((self.mid_block,), self, x, cache)


class Decoder(nnx.Module):
    """Latents to pixels, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths, levels = config.decoder_widths, residual if config.is_residual else blocks
        self.conv_in = CausalConv3d(config.z_dim, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        self.up_blocks = nnx.List(levels.up_blocks(config, rngs=rngs))
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.pixel_channels, rngs=rngs)
        steps = [2.0**-level for level in range(len(config.dim_mult))]
        convolutions = 2 * (config.num_res_blocks + 1)
        self.reach = math.ceil(convolutions * sum(steps) + sum(steps[1:]) + steps[-1])

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Decodes one chunk: 1 latent frame to 1 frame without a cache, else 4 frames for each."""
        return chain((self.narrow, self.wide), x, cache)

    def narrow(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers at the lowest resolution, which see whole frames."""
        return chain((self.conv_in, self.mid_block), x, cache)

    def wide(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers above the lowest resolution, which see a bounded part of a frame."""
        return _run(tuple(self.up_blocks), self, x, cache)


def _run(body: tuple, owner: Any, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs a body, then its owner's output layers."""
    inner, last = (None, None) if cache is None else cache
    x, inner = chain(body, x, inner)
    x, last = owner.conv_out(jax.nn.silu(owner.norm_out(x)), last)
    return x, (inner, last)


class WanVAE(nnx.Module):
    """The VAE; latents outside of it are normalised to unit variance per channel.

    Args:
      config: sizes and latent statistics.
      dtype: compute dtype of convolutions; norms are float32.
      rngs: source of the initial parameters.

    Attributes:
      tiles: number of column tiles of a frame that are processed one by one, to save memory. The
        result is the same: each tile includes the 10 to 13 latent columns on either side that it
        depends on, and the layers at the lowest resolution, with attention, see whole frames.
    """

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = nnx.Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = nnx.Linear(config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.tiles = 1

    def moments(self, video: Video, chunk: int = 1) -> tuple[Feature, Feature]:
        """Mean and log-variance of the posterior, not normalised.

        Args:
          video: pixels in [-1, 1]; frames and sides as the strides ask, such as 4n + 1 frames and
            multiples of 8.
          chunk: latent frames to encode at once after the first; must divide n.

        Raises:
          InputError: the video's size does not fit the VAE's strides, or the chunk its length.
        """
        frames, *sides = video.shape[1:4]
        time, side, _ = self.config.strides
        if (frames - 1) % time or any(n % side for n in sides):
            raise InputError(
                f"a video to encode must have {time}n + 1 frames and sides that are multiples of "
                f"{side}, found {frames} frames of {sides[0]}x{sides[1]}"
            )
        x, wide = fold(video.astype(self.dtype), self.config.patch_size), self.encoder.wide
        if self.tiles == 1:
            mean_logvar = over_chunks(self.encoder, x, time * chunk)
        else:
            sizes = {"tiles": self.tiles, "unit": self.encoder.unit, "reach": self.encoder.reach}
            x = in_tiles(lambda tile: over_chunks(wide, tile, time * chunk), x, **sizes)
            mean_logvar = over_chunks(self.encoder.narrow, x, chunk)
        mean_logvar = linear(self.quant_conv, mean_logvar).astype(jnp.float32)
        mean, logvar = jnp.split(mean_logvar, 2, axis=-1)
        return mean, logvar

    def encode(self, video: Video, chunk: int = 1) -> Feature:
        """Normalised mean latents of a video in [-1, 1]: `(mu - mean) / std`, float32."""
        mean, _ = self.moments(video, chunk)
        return (mean - jnp.array(self.config.latents_mean)) / jnp.array(self.config.latents_std)

    def decode(self, latents: Feature, chunk: int = 1) -> Video:
        """Pixels of normalised latents, float32, about [-1, 1] and not clamped."""
        z = latents * jnp.array(self.config.latents_std) + jnp.array(self.config.latents_mean)
        z = linear(self.post_quant_conv, z.astype(self.dtype))
        if self.tiles == 1:
            x = over_chunks(self.decoder, z, chunk)
        else:
            sizes = {"tiles": self.tiles, "unit": 1, "reach": self.decoder.reach}
            x, wide = over_chunks(self.decoder.narrow, z, chunk), self.decoder.wide
            x = in_tiles(lambda tile: over_chunks(wide, tile, chunk), x, **sizes)
        return unfold(x, self.config.patch_size).astype(jnp.float32)


@jax.jit
def encode(
    vae: WanVAE,
    video: UInt8[Array, "B frames height width 3"] | Video,
    shown: Bool[Array, "B frames height width"] | None = None,
) -> Latents:
    """Normalised latents of a video of uint8 levels, or of floats in [-1, 1].

    Pixels that are not `shown` become 0, which is grey.
    """
    if jnp.issubdtype(video.dtype, jnp.integer):
        video = video.astype(jnp.float32) / 127.5 - 1.0
    if shown is not None:
        video = jnp.where(shown[..., None], video, 0.0)
    (time, *space), (frames, *sides) = vae.config.strides, video.shape[1:4]
    cells = math.prod(side // stride for side, stride in zip(sides, space, strict=True))
    return vae.encode(video, _chunk((frames - 1) // time, cells))


@jax.jit
def decode(
    vae: WanVAE, latents: Latents
) -> tuple[UInt8[Array, "B frames height width 3"], Bool[Array, "B"]]:
    """Videos of uint8 levels, and whether their pixels were finite before rounding."""
    rest, cells = latents.shape[1] - 1, math.prod(latents.shape[2:4])
    pixels = vae.decode(latents, _chunk(rest, cells))
    levels = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
    finite = jnp.isfinite(pixels).all(axis=(1, 2, 3, 4))
    return sharding.everywhere((levels.astype(jnp.uint8), finite))


def _chunk(frames: int, cells: int) -> int:
    """Latent frames of a chunk after the first: a divisor of all of them."""
    most = min(frames, _CELLS // max(cells, 1))
    return next((size for size in range(most, 1, -1) if frames % size == 0), 1)
