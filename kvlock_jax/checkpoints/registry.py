"""The networks that make a model, their configs, and how each is built and filled."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.transformer import WanTransformer
from kvlock_jax.models.wan.vace import wan_transformer

FAMILIES = ("wan2.1-t2v", "wan2.1-vace")

MODELS: Mapping[str, tuple[type, Callable[..., nnx.Module]]] = {
    "transformer": (WanConfig, wan_transformer),
    "vae": (VAEConfig, WanVAE),
    "text_encoder": (UMT5Config, UMT5Encoder),
}
"""Config of each field of `Configs` and `Checkpoint`, and what makes a module of it."""

WIDE = (WanVAE,)
"""What computes in float32 whatever is asked for, as the publisher and Diffusers run it."""

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""From a parameter's name, such as `transformer.proj_out.kernel`, and shape to its sharding."""


def on_first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The `Place` of a model on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Configs:
    """What a checkpoint says about itself; `scheduler` is the published JSON as it stands."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    scheduler: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Models in memory; `tokenizer` is the folder that `text.Tokenizer` opens."""

    configs: Configs
    transformer: WanTransformer
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: epath.PathLike


OnShapes = Callable[[Checkpoint], None]
"""Told of a checkpoint that is about to be read."""


def family(config: WanConfig) -> str:
    """The one of `FAMILIES` whose transformer a config describes."""
    return FAMILIES[bool(config.vace_layers)]


def abstract(
    kind: Callable[..., nnx.Module], config: Any, compute_dtype: Any = jnp.float32
) -> nnx.Module:
    """A model with shapes in place of parameters; those of `WIDE` compute in float32."""
    return nnx.merge(*_traced(kind, config, jnp.float32 if kind in WIDE else compute_dtype))


@functools.lru_cache
def _traced(kind: Callable[..., nnx.Module], config: Any, dtype: Any) -> tuple:
    """Structure and shapes of a model; tracing one takes a good part of a second."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0))))


def fill(model: nnx.Module, arrays: Mapping[str, Any]) -> nnx.Module:
    """An abstract model with its parameters, or others of their shapes, by dotted path."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    full = [(path, v.replace(arrays[".".join(map(str, path))])) for path, v in flat]
    return nnx.merge(graph, nnx.from_flat_state(full))


def not_finite(checkpoint: Checkpoint) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity, such as `vae.decoder.conv_in.bias`.

    It takes a pass over all weights, on the devices where they are.
    """
    return [
        ".".join(map(str, (name, *path)))
        for name in MODELS
        for path, variable in nnx.to_flat_state(nnx.state(getattr(checkpoint, name)))
        if not bool(jnp.isfinite(variable.get_value()).all())
    ]
