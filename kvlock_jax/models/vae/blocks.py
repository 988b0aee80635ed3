"""The blocks of Wan's causal VAE.

Each takes a chunk and its cache, and returns what it makes of both. Layout and arithmetic are those
of Wan-Video/Wan2.1, `wan/modules/vae.py`; attributes keep Diffusers' names (`AutoencoderKLWan`).
Wan 2.2's levels (`residual`) are made of the same blocks.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kvlock_jax.models.attention.dispatch import attend
from kvlock_jax.models.attention.kernels import logit_scale
from kvlock_jax.models.precision import precision_for
from kvlock_jax.models.vae.chunks import Coder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.vae.convolutions import (
    Cache,
    CausalConv3d,
    DoublingConv2d,
    Feature,
    HalvingConv2d,
    past,
)


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
        return y + (linear(self.conv_shortcut, x) if self.conv_shortcut else x), (first, second)


def linear(layer: nnx.Linear, x: Feature) -> Feature:
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
        qkv = linear(self.to_qkv, self.norm(x))
        q, k, v = jnp.split(qkv.reshape(batch * frames, height * width, 1, 3 * channels), 3, -1)
        y = attend(q * logit_scale(channels), k, v).astype(x.dtype)
        return x + linear(self.proj, y.reshape(x.shape))


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
    """Doubles rows and columns; if `temporal`, doubles frames but the first."""

    def __init__(self, c_in: int, c_out: int, temporal: bool, *, rngs):
        self.resample = DoublingConv2d(c_in, c_out, rngs=rngs)
        self.time_conv = CausalConv3d(c_in, 2 * c_in, 1, rngs=rngs) if temporal else None

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


class UpBlock(nnx.Module):
    """The residual blocks of one level of the decoder, and its upsampling if it has one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, temporal: bool | None, *, rngs):
        widths = [c_in] + [c_out] * blocks
        self.resnets = nnx.List([ResidualBlock(w, c_out, rngs=rngs) for w in widths])
        ups = [] if temporal is None else [Upsample(c_out, c_out // 2, temporal, rngs=rngs)]
        self.upsamplers = nnx.List(ups)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of all modules in turn."""
        return chain((*self.resnets, *self.upsamplers), x, cache)


def down_blocks(config: VAEConfig, *, rngs) -> list[nnx.Module]:
    """The encoder's levels in Wan 2.1's VAE, one list of all their blocks."""
    widths, blocks = config.encoder_widths, []
    for c_in, c_out, temporal in zip(widths[:-1], widths[1:], config.halvings, strict=True):
        for width in [c_in] + [c_out] * (config.num_res_blocks - 1):
            blocks.append(ResidualBlock(width, c_out, rngs=rngs))
        if temporal is not None:
            blocks.append(Downsample(c_out, temporal, rngs=rngs))
    return blocks


def up_blocks(config: VAEConfig, *, rngs) -> list[nnx.Module]:
    """The decoder's levels in Wan 2.1's VAE; each doubling but the last halves its channels."""
    first, *widths = config.decoder_widths
    entries = [first, *(width // 2 for width in widths[:-1])]
    count, levels = config.num_res_blocks, zip(entries, widths, config.doublings, strict=True)
    return [UpBlock(c_in, c_out, count, temporal, rngs=rngs) for c_in, c_out, temporal in levels]


def chain(modules: tuple[Coder, ...], x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs modules in turn, each with its own cache."""
    caches = []
    for module, before in zip(modules, cache or [None] * len(modules), strict=True):
        x, after = module(x, before)
        caches.append(after)
    return x, tuple(caches)
