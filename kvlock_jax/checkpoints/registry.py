"""The networks of a model and their configs: builds them abstractly and fills in parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from kvlock_jax.models.family import Family, Network
from kvlock_jax.models.wan.families import TEXT_TO_VIDEO, VACE

FAMILIES: tuple[Family, ...] = (TEXT_TO_VIDEO, VACE)
"""The model families that checkpoints may hold; a new one adds its line here."""

NETWORKS = ("transformer", "vae", "text_encoder")
"""The networks of every family; fields of `Configs` and `Checkpoint`."""

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Maps a parameter's name, such as `transformer.proj_out.kernel`, and its shape to a sharding."""


PlaceFor = Callable[[Any], Place]
"""From the `Configs` of a checkpoint to the `Place` of its parameters."""


def on_mesh(mesh: jax.sharding.Mesh, configs: "Configs", *, spread: bool) -> Place:
    """The `Place` of a model on a mesh; `spread` as in `ParameterRules.sharding`."""

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """The sharding of one parameter."""
        name, _, path = path.partition(".")
        rules = network(getattr(configs, name)).parameters
        return rules.sharding(mesh, path, shape, spread=spread)

    return place


def on_first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The `Place` of a model on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Configs:
    """Sizes of the three models; `scheduler` is the published JSON, unchanged."""

    transformer: Any
    vae: Any
    text_encoder: Any
    scheduler: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Models in memory, and the folder that `text.Tokenizer` opens."""

    configs: Configs
    transformer: nnx.Module
    vae: nnx.Module
    text_encoder: nnx.Module
    tokenizer: epath.PathLike


OnShapes = Callable[[Checkpoint], None]
"""Called with a checkpoint of shapes, before its weights are read."""


def family(config: Any) -> Family:
    """The family whose transformer a config describes."""
    return next(known for known in FAMILIES if known.describes(config))


def family_named(name: str) -> Family | None:
    """The family of a name, if it is known."""
    return next((known for known in FAMILIES if known.name == name), None)


def network(config: Any) -> Network:
    """The network that a config of its sizes describes."""
    networks = (network for known in FAMILIES for network in known.networks.values())
    return next(found for found in networks if isinstance(config, found.config))


def abstract(config: Any, compute_dtype: Any = jnp.float32) -> nnx.Module:
    """The network of a config with shapes in place of parameters.

    It multiplies in `compute_dtype`, unless its family has it compute in float32 always.
    """
    return nnx.merge(*_traced(config, jnp.dtype(compute_dtype)))


@functools.lru_cache
def _traced(config: Any, dtype: jnp.dtype) -> tuple:
    """Structure and shapes of a network; tracing one takes most of a second."""
    found = network(config)
    dtype = jnp.float32 if found.float32 else dtype
    return nnx.split(nnx.eval_shape(lambda: found.build(config, dtype=dtype, rngs=nnx.Rngs(0))))


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
        for name in NETWORKS
        for path, variable in nnx.to_flat_state(nnx.state(getattr(checkpoint, name)))
        if not bool(jnp.isfinite(variable.get_value()).all())
    ]
