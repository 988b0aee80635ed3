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

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.models.vae import blocks, residual
from kvlock_jax.models.vae.blocks import MidBlock, RMSNorm, chain, linear
from kvlock_jax.models.vae.chunks import Coder, Frames, in_tiles, over_chunks
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
        return self._moments(video, chunk, lambda pixels: pixels, None)[0]

    def encode(self, video: Video, chunk: int = 1) -> Feature:
        """Normalised mean latents of a video in [-1, 1]: `(mu - mean) / std`, float32."""
        return self.encode_piece(video, chunk, lambda pixels: pixels, None)[0]

    def encode_piece(
        self, levels: Frames, chunk: int, pixels: Callable[[Frames], Video], cache: Cache
    ) -> tuple[Feature, Cache]:
        """`encode` of a clip's next frames, with the cache of those before; returns the cache too.

        Args:
          levels: frames of any form, in which the whole piece is held.
          chunk: latent frames to encode at once.
          pixels: function from a chunk's frames to pixels in [-1, 1].
          cache: cache that the piece before returned; `None` where a clip begins.

        Raises:
          InputError: as `moments`; after the first piece, frames are to be 4n.
        """
        (mean, _), cache = self._moments(levels, chunk, pixels, cache)
        statistics = jnp.array(self.config.latents_mean), jnp.array(self.config.latents_std)
        return (mean - statistics[0]) / statistics[1], cache

    def decode(self, latents: Feature, chunk: int = 1) -> Video:
        """Pixels of normalised latents, float32, about [-1, 1] and not clamped."""
        return self.decode_piece(latents, chunk, lambda pixels: pixels, None)[0]

    def decode_piece(
        self, latents: Feature, chunk: int, levels: Callable[[Video], Frames], cache: Cache
    ) -> tuple[Frames, Cache]:
        """`decode` of a clip's next latent frames, as `encode_piece`; `levels` maps the pixels."""
        z = latents * jnp.array(self.config.latents_std) + jnp.array(self.config.latents_mean)
        z = linear(self.post_quant_conv, z.astype(self.dtype))

        def finished(body: Coder) -> Coder:
            """A coder whose pixels are mapped chunk by chunk."""

            def run(x: Feature, before: Cache) -> tuple[Frames, Cache]:
                """Decodes one chunk."""
                x, after = body(x, before)
                return levels(unfold(x, self.config.patch_size).astype(jnp.float32)), after

            return run

        if self.tiles == 1:
            return over_chunks(finished(self.decoder), z, chunk, cache)
        narrow, wide = (None, None) if cache is None else cache
        x, narrow = over_chunks(self.decoder.narrow, z, chunk, narrow)
        sizes = {"tiles": self.tiles, "unit": 1, "reach": self.decoder.reach}
        coder = finished(self.decoder.wide)
        x, wide = in_tiles(lambda tile, c: over_chunks(coder, tile, chunk, c), x, wide, **sizes)
        return x, (narrow, wide)

    def _moments(
        self, levels: Frames, chunk: int, pixels: Callable[[Frames], Video], cache: Cache
    ) -> tuple[tuple[Feature, Feature], Cache]:
        """`moments` of a clip's next frames."""
        frames, *sides = jax.tree.leaves(levels)[0].shape[1:4]
        time, side, _ = self.config.strides
        if (frames - (cache is None)) % time or any(n % side for n in sides):
            raise InputError(
                f"a video to encode must have {time}n + 1 frames and sides that are multiples of "
                f"{side}, found {frames} frames of {sides[0]}x{sides[1]}"
            )

        def prepared(body: Coder) -> Coder:
            """A coder of levels."""
            patch = self.config.patch_size
            return lambda x, c: body(fold(pixels(x).astype(self.dtype), patch), c)

        if self.tiles == 1:
            x, cache = over_chunks(prepared(self.encoder), levels, time * chunk, cache)
        else:
            wide, narrow = (None, None) if cache is None else cache
            unit = self.encoder.unit * self.config.patch_size
            sizes = {"tiles": self.tiles, "unit": unit, "reach": self.encoder.reach}
            coder = prepared(self.encoder.wide)
            x, wide = in_tiles(
                lambda tile, c: over_chunks(coder, tile, time * chunk, c), levels, wide, **sizes
            )
            x, narrow = over_chunks(self.encoder.narrow, x, chunk, narrow)
            cache = wide, narrow
        mean_logvar = linear(self.quant_conv, x).astype(jnp.float32)
        mean, logvar = jnp.split(mean_logvar, 2, axis=-1)
        return (mean, logvar), cache


Levels = UInt8[Array, "B frames height width 3"]


@jax.jit
def encode(
    vae: WanVAE,
    video: Levels | Video,
    shown: Bool[Array, "B frames height width"] | None = None,
) -> Latents:
    """Normalised latents of a video of uint8 levels, or of floats in [-1, 1].

    Pixels that are not `shown` become 0, which is grey.
    """
    return _encode(vae, video, shown, None)[0]


@functools.partial(jax.jit, donate_argnames="cache")
def encode_piece(
    vae: WanVAE,
    video: Levels,
    shown: Bool[Array, "B frames height width"],
    cache: Cache,
) -> tuple[Latents, Cache]:
    """`encode` of a clip's next frames: 4n + 1 without a cache, else 4n; returns the next cache."""
    latents, cache = _encode(vae, video, shown, cache)
    return latents, _laid(cache)


@jax.jit
def decode(vae: WanVAE, latents: Latents) -> tuple[Levels, Bool[Array, "B"]]:
    """Videos of uint8 levels, and whether their pixels were finite before rounding."""
    levels, finite, _ = _decode(vae, latents, None)
    return sharding.everywhere((levels, finite))


@functools.partial(jax.jit, donate_argnames="cache")
def decode_piece(
    vae: WanVAE, latents: Latents, cache: Cache
) -> tuple[Levels, Bool[Array, "B"], Cache]:
    """`decode` of a clip's next latent frames, after those that left the cache; returns the next.

    Without a cache (`None`) a clip begins.
    """
    levels, finite, cache = _decode(vae, latents, cache)
    return *sharding.everywhere((levels, finite)), _laid(cache)


def _encode(
    vae: WanVAE,
    video: Levels | Video,
    shown: Bool[Array, "B frames height width"] | None,
    cache: Cache,
) -> tuple[Latents, Cache]:
    def pixels(frames: tuple[Array, Array | None]) -> Video:
        """A chunk in [-1, 1]; a whole clip of floats would take four times its levels."""
        levels, seen = frames
        if jnp.issubdtype(levels.dtype, jnp.integer):
            levels = levels.astype(jnp.float32) / 127.5 - 1.0
        return levels if seen is None else jnp.where(seen[..., None], levels, 0.0)

    (time, *space), (frames, *sides) = vae.config.strides, video.shape[1:4]
    cells = math.prod(side // stride for side, stride in zip(sides, space, strict=True))
    chunk = _chunk((frames - (cache is None)) // time, cells)
    return vae.encode_piece((video, shown), chunk, pixels, cache)


def _decode(vae: WanVAE, latents: Latents, cache: Cache) -> tuple[Levels, Bool[Array, "B"], Cache]:
    def levels(pixels: Video) -> tuple[Levels, Bool[Array, "B frames one width one"]]:
        """A chunk's levels, and which columns are finite."""
        rounded = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
        return rounded.astype(jnp.uint8), jnp.isfinite(pixels).all(axis=(2, 4), keepdims=True)

    rest, cells = latents.shape[1] - (cache is None), math.prod(latents.shape[2:4])
    (video, finite), cache = vae.decode_piece(latents, _chunk(rest, cells), levels, cache)
    return video, finite.all(axis=(1, 2, 3, 4)), cache


def _laid(cache: Cache) -> Cache:
    """A cache laid on the mesh alike after every piece, so that one program serves all the next."""

    def lay(x: Array) -> Array:
        """Constrains frames, or those of stacked tiles."""
        stacked = x.ndim - 5
        spec = sharding.space(x.shape[stacked:])
        return (
            x
            if spec is None
            else jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * stacked, *spec))
        )

    return jax.tree.map(lay, cache)


def _chunk(frames: int, cells: int) -> int:
    """Latent frames of a chunk after the first: a divisor of all of them."""
    most = min(frames, _CELLS // max(cells, 1))
    return next((size for size in range(most, 1, -1) if frames % size == 0), 1)
