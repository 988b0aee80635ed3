"""Wan 2.1's causal video VAE.

Time is causal: a frame depends on itself and earlier frames only. So the VAE encodes and decodes a
clip chunk by chunk, with each convolution passing its last input frames on as a cache, and memory
does not grow with the clip's length. The first chunk is one frame and has no cache (`None`); every
later chunk is a whole number of latent frames, and a `lax.scan` runs over them.

Layout and arithmetic are the published checkpoint's (Wan-Video/Wan2.1, `AutoencoderKLWan` in
Diffusers); attributes keep its names. Products of float32 operands keep all bits on every backend
(`models.precision`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.models.attention.dispatch import attend
from kvlock_jax.models.attention.kernels import logit_scale
from kvlock_jax.models.precision import precision_for
from kvlock_jax.models.vae.chunks import Coder, in_tiles, over_chunks
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.vae.convolutions import (
    Cache,
    CausalConv3d,
    DoublingConv2d,
    Feature,
    HalvingConv2d,
    past,
)
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import VAE_STRIDES, Latents

Video = Float[Array, "B frames height width 3"]

_CELLS = 1024
"""Most latent cells of a chunk. Convolutions of few cells run slower, and every chunk reads all
weights."""


class RMSNorm(nnx.Module):
    """Divides by the root mean square over channels, in float32."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: Feature) -> Feature:
        """`sqrt(C) x / max(|x|, 1e-12) * gamma`, with the norm over channels."""
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        # max inside the root, since the gradient of the root at 0 is infinite
        unit = wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return (unit * (x.shape[-1] ** 0.5) * self.gamma[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two normalised causal convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, *, rngs):
        self.norm1 = RMSNorm(c_in)
        self.conv1 = CausalConv3d(c_in, c_out, rngs=rngs)
        self.norm2 = RMSNorm(c_out)
        self.conv2 = CausalConv3d(c_out, c_out, rngs=rngs)
        self.conv_shortcut = nnx.Linear(c_in, c_out, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the block's output and the caches of its two convolutions."""
        first, second = (None, None) if cache is None else cache
        y, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        y, second = self.conv2(jax.nn.silu(self.norm2(y)), second)
        return y + (_linear(self.conv_shortcut, x) if self.conv_shortcut else x), (first, second)


def _linear(layer: nnx.Linear, x: Feature) -> Feature:
    """A 1x1x1 convolution, in the dtype of `x`."""
    kernel, bias = (p[...].astype(x.dtype) for p in (layer.kernel, layer.bias))
    return jnp.matmul(x, kernel, precision=precision_for(x.dtype)) + bias


class AttentionBlock(nnx.Module):
    """Single-head self-attention among the cells of each frame."""

    def __init__(self, channels: int, *, rngs):
        self.norm = RMSNorm(channels)
        self.to_qkv = nnx.Linear(channels, 3 * channels, rngs=rngs)
        self.proj = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x: Feature) -> Feature:
        """Adds its self-attention to every frame."""
        batch, frames, height, width, channels = x.shape
        qkv = _linear(self.to_qkv, self.norm(x))
        q, k, v = jnp.split(qkv.reshape(batch * frames, height * width, 1, 3 * channels), 3, -1)
        y = attend(q * logit_scale(channels), k, v).astype(x.dtype)
        return x + _linear(self.proj, y.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, *, rngs):
        self.resnets = nnx.List([ResidualBlock(channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs)])

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of both residual blocks."""
        first, second = (None, None) if cache is None else cache
        x, first = self.resnets[0](x, first)
        x, second = self.resnets[1](self.attentions[0](x), second)
        return x, (first, second)


class Downsample(nnx.Module):
    """Halves rows and columns; if `temporal`, also all frames but the first."""

    def __init__(self, channels: int, temporal: bool, *, rngs):
        self.resample = HalvingConv2d(channels, channels, rngs=rngs)
        make = CausalConv3d(channels, channels, 1, 2, rngs=rngs) if temporal else None
        self.time_conv = make

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the smaller chunk and, as cache, its last frame before halving time."""
        x = self.resample(x)
        if self.time_conv is None:
            return x, ()
        if cache is None:
            return x, x[:, -1:]
        return self.time_conv.valid(jnp.concatenate([cache, x], axis=1)), x[:, -1:]


class Upsample(nnx.Module):
    """Doubles rows and columns, halves channels; if `temporal`, doubles frames but the first."""

    def __init__(self, channels: int, temporal: bool, *, rngs):
        self.resample = DoublingConv2d(channels, channels // 2, rngs=rngs)
        self.time_conv = CausalConv3d(channels, 2 * channels, 1, rngs=rngs) if temporal else None

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the larger chunk; its time convolution never sees the clip's first frame."""
        if self.time_conv is None:
            cache = ()
        elif cache is None:
            cache = past(x)
        else:
            y, cache = self.time_conv(x, cache)
            batch, frames, *space, channels = x.shape
            y = jnp.moveaxis(y.reshape(batch, frames, *space, 2, channels), -2, 2)
            x = y.reshape(batch, 2 * frames, *space, channels)
        return self.resample(x), cache


class Encoder(nnx.Module):
    """Pixels to the mean and log-variance of latents, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, widths[0], rngs=rngs)
        self.down_blocks = nnx.List([])
        for level, c_out in enumerate(widths[1:]):
            c_in = widths[level]
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(c_in, c_out, rngs=rngs))
                c_in = c_out
            if level < len(config.temperal_downsample):
                temporal = config.temperal_downsample[level]
                self.down_blocks.append(Downsample(c_out, temporal, rngs=rngs))
        self.mid_block = MidBlock(widths[-1], rngs=rngs)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, rngs=rngs)
        self.unit = 2 ** len(config.temperal_downsample)
        steps = [2**level for level in range(len(config.dim_mult))]
        pixels = 1 + 2 * config.num_res_blocks * sum(steps) + 2 * sum(steps[:-1])
        self.reach = -(-pixels // self.unit)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Encodes one chunk: 1 frame without a cache, else 4 frames per latent frame."""
        return _chain((self.wide, self.narrow), x, cache)

    def wide(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers above the lowest resolution, which see a bounded part of a frame."""
        return _chain((self.conv_in, *self.down_blocks), x, cache)

    def narrow(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers at the lowest resolution, which see whole frames."""
        return _run((self.mid_block,), self, x, cache)


class UpBlock(nnx.Module):
    """The residual blocks of one level of the decoder, and its upsampling if it has one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, temporal: bool | None, *, rngs):
        widths = [c_in] + [c_out] * blocks
        self.resnets = nnx.List([ResidualBlock(w, c_out, rngs=rngs) for w in widths])
        ups = [] if temporal is None else [Upsample(c_out, temporal, rngs=rngs)]
        self.upsamplers = nnx.List(ups)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of all modules in turn."""
        return _chain((*self.resnets, *self.upsamplers), x, cache)


class Decoder(nnx.Module):
    """Latents to pixels, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        temporal = (*reversed(config.temperal_downsample), None)
        self.up_blocks = nnx.List([])
        for level, c_out in enumerate(widths[1:]):
            c_in = widths[level] // (1 if level == 0 else 2)  # an Upsample halves its channels
            block = UpBlock(c_in, c_out, config.num_res_blocks, temporal[level], rngs=rngs)
            self.up_blocks.append(block)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, rngs=rngs)
        steps = [2.0**-level for level in range(len(config.dim_mult))]
        convolutions = 2 * (config.num_res_blocks + 1)
        self.reach = math.ceil(convolutions * sum(steps) + sum(steps[1:]) + steps[-1])

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Decodes one chunk: 1 latent frame to 1 frame without a cache, else 4 frames for each."""
        return _chain((self.narrow, self.wide), x, cache)

    def narrow(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers at the lowest resolution, which see whole frames."""
        return _chain((self.conv_in, self.mid_block), x, cache)

    def wide(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """The layers above the lowest resolution, which see a bounded part of a frame."""
        return _run(tuple(self.up_blocks), self, x, cache)


def _chain(modules: tuple[Coder, ...], x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs modules in turn, each with its own cache."""
    caches = []
    for module, before in zip(modules, cache or [None] * len(modules), strict=True):
        x, after = module(x, before)
        caches.append(after)
    return x, tuple(caches)


def _run(body: tuple, owner: Any, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs a body, then its owner's output layers."""
    inner, last = (None, None) if cache is None else cache
    x, inner = _chain(body, x, inner)
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
          video: pixels in [-1, 1]; 4n + 1 frames, sides a multiple of 8.
          chunk: latent frames to encode at once after the first; must divide n.

        Raises:
          InputError: the video's size does not fit the VAE's strides, or the chunk its length.
        """
        frames, *sides = video.shape[1:4]
        time, *space = VAE_STRIDES
        if (frames - 1) % time or any(n % s for n, s in zip(sides, space, strict=True)):
            raise InputError(
                f"a video to encode must have 4n + 1 frames and sides that are multiples of 8, "
                f"found {frames} frames of {sides[0]}x{sides[1]}"
            )
        x, wide = video.astype(self.dtype), self.encoder.wide
        if self.tiles == 1:
            mean_logvar = over_chunks(self.encoder, x, time * chunk)
        else:
            sizes = {"tiles": self.tiles, "unit": self.encoder.unit, "reach": self.encoder.reach}
            x = in_tiles(lambda tile: over_chunks(wide, tile, time * chunk), x, **sizes)
            mean_logvar = over_chunks(self.encoder.narrow, x, chunk)
        mean_logvar = _linear(self.quant_conv, mean_logvar).astype(jnp.float32)
        mean, logvar = jnp.split(mean_logvar, 2, axis=-1)
        return mean, logvar

    def encode(self, video: Video, chunk: int = 1) -> Feature:
        """Normalised mean latents of a video in [-1, 1]: `(mu - mean) / std`, float32."""
        mean, _ = self.moments(video, chunk)
        return (mean - jnp.array(self.config.latents_mean)) / jnp.array(self.config.latents_std)

    def decode(self, latents: Feature, chunk: int = 1) -> Video:
        """Pixels of normalised latents, float32, about [-1, 1] and not clamped."""
        z = latents * jnp.array(self.config.latents_std) + jnp.array(self.config.latents_mean)
        z = _linear(self.post_quant_conv, z.astype(self.dtype))
        if self.tiles == 1:
            return over_chunks(self.decoder, z, chunk).astype(jnp.float32)
        sizes = {"tiles": self.tiles, "unit": 1, "reach": self.decoder.reach}
        x, wide = over_chunks(self.decoder.narrow, z, chunk), self.decoder.wide
        x = in_tiles(lambda tile: over_chunks(wide, tile, chunk), x, **sizes)
        return x.astype(jnp.float32)


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
    time, *space = VAE_STRIDES
    rest, sides = (video.shape[1] - 1) // time, video.shape[2:4]
    cells = math.prod(side // stride for side, stride in zip(sides, space, strict=True))
    return vae.encode(video, _chunk(rest, cells))


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
