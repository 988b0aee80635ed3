"""The networks of a model and their configs: builds them abstractly and fills in parameters."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models import small
from kvlock_jax.models.family import Family, Network
from kvlock_jax.models.wan.families import (
    KNOWN_TOKENS,
    TEXT_TO_VIDEO,
    TEXT_TO_VIDEO_EXPERTS,
    VACE,
    VACE_FUN,
)

FAMILIES: tuple[Family, ...] = (TEXT_TO_VIDEO, VACE, TEXT_TO_VIDEO_EXPERTS, VACE_FUN, KNOWN_TOKENS)
"""The model families that checkpoints may hold; a new one adds its line here."""

NETWORKS = ("transformer", "vae", "text_encoder")
"""The networks of every family; fields of `Configs` and `Checkpoint`."""

TRANSFORMERS = ("transformer", "transformer_2")
"""The networks that take the steps of a run; fields of `Configs` and `Checkpoint`."""

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


def on_host(place: Place, configs: "Configs") -> Place:
    """A `Place` with the transformers' large kernels in the host's memory."""

    def placed(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """The sharding of one parameter."""
        name, _, own = path.partition(".")
        large = name in TRANSFORMERS and network(getattr(configs, name)).parameters.is_large(own)
        found = place(path, shape)
        if not large:
            return found
        if isinstance(found, jax.sharding.SingleDeviceSharding):
            # JAX forgets the memory of a single device's sharding in a shape without its array.
            mesh = jax.sharding.Mesh(list(found.device_set), ("one",))
            found = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return found.with_memory_kind(small.HOST)

    return placed


def on_first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The `Place` of a model on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Configs:
    """Sizes of a checkpoint's networks.

    Attributes:
      transformer: sizes of the transformer, or of the first of two experts.
      vae: sizes of the VAE.
      text_encoder: sizes of the text encoder.
      scheduler: published JSON, unchanged.
      transformer_2: sizes of the second expert, those of the first; `None` where there is none.
      experts: role of each transformer where noise levels have one of their own (Wan 2.2's A14B):
        `("high", "low")`, or one of the two alone. Neither keys nor shapes tell it.
    """

    transformer: Any
    vae: Any
    text_encoder: Any
    scheduler: Mapping[str, Any]
    transformer_2: Any = None
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        second, roles = self.transformer_2, self.experts
        if second is None:
            known, fits = ("one of 'high' and 'low', or none", roles in ((), ("high",), ("low",)))
        else:
            known, fits = ("'high', 'low', of one size", roles == ("high", "low"))
            fits = fits and second == self.transformer
        if not fits:
            sizes = "" if roles == ("high", "low") and second is None else " of these sizes"
            raise ConfigError(f"experts must be {known}, found {roles!r}{sizes}")

    @property
    def unit(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels under a token: a stride and a patch in one."""
        strides, patch = self.vae.strides, self.transformer.patch_size
        time, height, width = (s * p for s, p in zip(strides, patch, strict=True))
        return time, height, width

    @property
    def transformers(self) -> tuple[str, ...]:
        """The names of the transformers, in the order of their steps."""
        return TRANSFORMERS[: 1 if self.transformer_2 is None else 2]

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the checkpoint's networks."""
        return (*NETWORKS, *self.transformers[1:])


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Models in memory, and the folder that `text.Tokenizer` opens."""

    configs: Configs
    transformer: nnx.Module
    vae: nnx.Module
    text_encoder: nnx.Module
    tokenizer: epath.PathLike
    transformer_2: nnx.Module | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights are not read yet.

    Attributes:
      shapes: checkpoint with shapes, dtypes and shardings in place of parameters.
      read: reads one of its networks.
    """

    shapes: Checkpoint
    read: Callable[[str], nnx.Module]

    def whole(self) -> Checkpoint:
        """The checkpoint with all of its networks in memory."""
        read = {name: self.read(name) for name in self.shapes.configs.networks}
        return dataclasses.replace(self.shapes, **read)


def family(configs: Configs) -> Family:
    """The family that a checkpoint's configs describe.

    Raises:
      CheckpointError: they are of networks that no family combines.
    """
    for known in FAMILIES:
        if known.describes(configs):
            return known
    names = ", ".join(known.name for known in FAMILIES)
    raise CheckpointError(f"the networks are of no one family, of {names}")


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


@dataclasses.dataclass(frozen=True)
class Filling:
    """Fills the networks of a checkpoint with parameters as these are read.

    Attributes:
      configs: sizes of the networks.
      compute_dtype: dtype of their matrix products.
      weights: kind of 8-bit values for the large kernels (`models.small.KINDS`); `None` keeps them.
    """

    configs: Configs
    compute_dtype: Any
    weights: str | None = None

    def __call__(self, name: str, arrays: Iterable[tuple[str, Any]]) -> nnx.Module:
        """A network of arrays by dotted path, or of their shapes, each narrowed as it comes."""
        config = getattr(self.configs, name)
        model, rules = abstract(config, self.compute_dtype), network(config).parameters
        if self.weights is not None:
            model = small.in_8_bits(model, rules, self.weights)
        found: dict[str, Any] = {}
        for path, array in arrays:
            found |= small.parts(path, array, rules, self.weights)
        return fill(model, found)


def not_finite(checkpoint: Checkpoint) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity, such as `vae.decoder.conv_in.bias`.

    It takes a pass over all weights, on the devices where they are.
    """
    return [
        ".".join(map(str, (name, *path)))
        for name in checkpoint.configs.networks
        for path, variable in nnx.to_flat_state(nnx.state(getattr(checkpoint, name)))
        if not bool(jnp.isfinite(variable.get_value()).all())
    ]
