"""Rules for the parameters of a network: how a mesh shards them, and which may be rounded.

In a stacked block a kernel's dimensions are `layers`, its inputs and its outputs. `N` stands for
heads times their size, with the head as the outer part; a parameter without letters lies whole on
every device.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from kvlock_jax.parallel import sharding

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterRules:
    """The rules of a network's parameters, which are named by their dotted path.

    Attributes:
      letters: dimensions by a pattern for the end of the path, such as `"layers D N"`.
      axes: mesh axis of each letter; by default `sharding.RULES`.
      spread_axes: the same where the user spreads the weights over `frames` too.
      rounded: pattern for the whole path of parameters that the network takes in its compute dtype,
        and that a checkpoint may therefore store in it. All others are taken in float32 (DESIGN.md
        section 3).
      large: pattern for the whole path of stacked kernels, nearly all of the network's memory,
        which may be kept in 8 bits or in the host's memory (`models.small`).
    """

    letters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Any] = dataclasses.field(default_factory=lambda: sharding.RULES)
    spread_axes: Mapping[str, Any] = dataclasses.field(default_factory=lambda: sharding.SPREAD)
    rounded: str = "(?!)"
    large: str = "(?!)"

    def is_large(self, path: str) -> bool:
        """Whether a parameter is one of the `large` ones."""
        return re.fullmatch(self.large, path) is not None

    def sharding(
        self, mesh: Mesh, path: str, shape: tuple[int, ...], *, spread: bool
    ) -> NamedSharding:
        """The sharding of a parameter on a mesh; a dimension that does not divide stays whole.

        Args:
          mesh: mesh of the axes `mesh.AXES`.
          path: dotted path of the parameter in its network.
          shape: shape of the parameter.
          spread: whether the weights are spread over `frames` too.
        """
        spec = sharding.spec(self.dimensions(path), self.spread_axes if spread else self.axes)
        return NamedSharding(mesh, sharding.dividing(spec, shape, mesh))

    def dimensions(self, path: str) -> str:
        """The letters of a parameter's dimensions; empty for one that is not sharded."""
        ends = (v for k, v in self.letters.items() if re.search(rf"(^|\.){k}$", path))
        return next(ends, "")

    def dtype(self, path: str, stored: np.dtype, wanted: Any) -> np.dtype:
        """The dtype of a parameter where `wanted` is asked for; only some may be rounded.

        Args:
          path: dotted path of the parameter in its network.
          stored: dtype in the checkpoint.
          wanted: dtype that the user asks for; None keeps the stored one.
        """
        stored, wanted = np.dtype(stored), np.dtype(stored if wanted is None else wanted)
        rounds = wanted.itemsize < np.dtype(np.float32).itemsize
        return stored if rounds and not re.fullmatch(self.rounded, path) else wanted


def gathered_layer(weights: _T, rules: ParameterRules) -> _T:
    """Gathers one layer's weights for its products; heads and feed-forward stay sharded.

    Weights in the host's memory come to the device. The constraint stands inside the scan over
    layers, so that one layer is gathered at a time. XLA by itself may sum partial products over all
    tokens instead.
    """
    weights = jax.tree.map(_on_device, weights)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weights
    flat = []
    for path, leaf in nnx.to_flat_state(weights):
        letters = rules.dimensions(".".join(map(str, path))).removeprefix("layers ")
        value = leaf.get_value()
        spec = sharding.dividing(sharding.spec(letters), value.shape, mesh)
        flat.append((path, leaf.replace(jax.lax.with_sharding_constraint(value, spec))))
    return nnx.from_flat_state(flat)


def _on_device(array: Array) -> Array:
    """A layer's parameter, from the host's memory as the matrix it is (`models.small.TOGETHER`)."""
    if jax.typeof(array).memory_space == jax.memory.Space.Device:
        return array
    array = jax.device_put(array, jax.memory.Space.Device)
    return array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array
