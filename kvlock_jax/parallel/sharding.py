"""Which device holds what: the mesh, and the rules from the letters of shapes to its axes.

A shape annotation, an einsum and a spec use the same letters, so a spec cannot name the wrong
dimension (DESIGN.md section 3). Functions that constrain act in the ambient mesh, which
`jax.set_mesh` enters; outside of one they do nothing.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from kvlock_jax.errors import ConfigError

_T = TypeVar("_T")

RULES = {"B": "data", "L": "frames", "N": "model", "F": "model"}
"""The mesh axis that a letter's dimension is spread over; other letters lie on every device."""

SPREAD = RULES | {"D": "frames"}
"""The same for weights that are spread over `frames` too, and gathered layer by layer."""


SPACE = ("frames", "model")
"""The mesh axes that pixels are spread over; the VAE has no heads, so it takes both."""


def dimensions(letters: str) -> list[str]:
    """Names of an array's dimensions: `"BLNK"`, or with spaces where some are words."""
    return letters.split() if " " in letters else list(letters)


def spec(letters: str, rules: Mapping[str, str | tuple[str, ...]] = RULES) -> PartitionSpec:
    """The spec of an array, such as `P("data", "frames", "model", None)` of `"BLNK"`.

    Raises:
      ValueError: two dimensions would lie on one mesh axis.
    """
    axes = [rules.get(name) for name in dimensions(letters)]
    used = [axis for axis in axes if axis]
    if len(used) != len(set(used)):
        raise ValueError(f"{letters!r} spreads two dimensions over one mesh axis: {axes}")
    return PartitionSpec(*axes)


def shards(letter: str) -> int:
    """Count of the ambient mesh's devices that a letter's dimension is spread over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get(RULES.get(letter), 1)


def constrain(tree: _T, letters: str) -> _T:
    """Lays arrays of the same dimensions on the ambient mesh as the rules say.

    Fewer rows than `data` has devices lie whole on each.

    Raises:
      ConfigError: a dimension does not divide. JAX would drop the constraint without a word.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def lay(x: jax.Array) -> jax.Array:
        """Constrains one array."""
        rules = RULES
        for size, name in zip(x.shape, dimensions(letters), strict=True):
            if name == "B" and size < shards(name):
                rules = {letter: axis for letter, axis in RULES.items() if letter != name}
            elif size % shards(name):
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise ConfigError(
                    f"{name} of {letters!r} is {size}, not a multiple of the {shards(name)} "
                    f"devices on mesh axis {RULES[name]!r}; these would do: {fitting}"
                )
        return jax.lax.with_sharding_constraint(x, spec(letters, rules))

    return jax.tree.map(lay, tree)


def everywhere(tree: _T) -> _T:
    """Lays arrays whole on every device of the ambient mesh, so that every host can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def space(shape: tuple[int, ...]) -> PartitionSpec | None:
    """The spec of frames, `"B T H W C"`, over all devices but the `data` axis'; none off a mesh.

    By columns where they divide, else by rows, else every device has them all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    wanted = (PartitionSpec("data", None, *axes) for axes in ((None, SPACE), (SPACE, None)))
    ways = mesh.shape["frames"] * mesh.shape["model"]
    fitting = (s for s, n in zip(wanted, (shape[3], shape[2]), strict=True) if n % ways == 0)
    return dividing(next(fitting, PartitionSpec("data")), shape, mesh)


def spread_space(x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
    """Lays frames on the ambient mesh as `space` says."""
    spec = space(x.shape)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def dividing(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """A spec of a parameter without the axes that its sizes do not divide by."""

    def ways(axis: str | tuple[str, ...] | None) -> int:
        """Devices of the axes."""
        names = (axis,) if isinstance(axis, str) else axis or ()
        return math.prod(mesh.shape[name] for name in names)

    kept = (a if n % ways(a) == 0 else None for n, a in zip(shape, spec, strict=False))
    return PartitionSpec(*kept)


def worth_spreading(weights: float, memory: float) -> bool:
    """Whether a transformer's bytes of weights should not lie whole on devices of this memory.

    The text encoder's shard, the VAE, the cache and a step's activations lie beside them, so the
    weights may take a quarter of the memory.
    """
    return weights > memory / 4
