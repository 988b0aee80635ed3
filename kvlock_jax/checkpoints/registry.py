"""The networks of a model and their configs: builds them abstractly and fills in parameters."""

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
"""Config class and module constructor of each field of `Configs` and `Checkpoint`."""

WIDE = (WanVAE,)
"""Modules that compute in float32 whatever the compute dtype, as the publisher and Diffusers do."""

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Maps a parameter's name, such as `transformer.proj_out.kernel`, and its shape to a sharding."""


def on_first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The `Place` of a model on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Configs:
    """Sizes of the three models; `scheduler` is the published JSON, unchanged."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    scheduler: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Models in memory, and the folder that `text.Tokenizer` opens."""

    configs: Configs
    transformer: WanTransformer
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: epath.PathLike


OnShapes = Callable[[Checkpoint], None]
"""Called with a checkpoint of shapes, before its weights are read."""


def family(config: WanConfig) -> str:
    """The family, of `FAMILIES`, of a transformer's config."""
    return FAMILIES[bool(config.vace_layers)]


def abstract(
    kind: Callable[..., nnx.Module], config: Any, compute_dtype: Any = jnp.float32
) -> nnx.Module:
    """A model with shapes in place of parameters; modules in `WIDE` compute in float32."""
    return nnx.merge(*_traced(kind, config, jnp.float32 if kind in WIDE else compute_dtype))


@functools.lru_cache
def _traced(kind: Callable[..., nnx.Module], config: Any, dtype: Any) -> tuple:
    """Structure and shapes of a model; cached, since tracing one takes most of a second."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, dtype=dtype, rngs=nnx.Rngs(0))))


def fill(model: nnx.Module, arrays: Mapping[str, Any]) -> nnx.Module:
    """Fills an abstract model with arrays, or with anything of their shapes, by dotted path."""
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
