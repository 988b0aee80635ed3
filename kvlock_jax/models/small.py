"""Weights that take less of a device's memory: in 8 bits, or in the host's memory.

Nearly all of a transformer's memory is the kernels of its stacked blocks (`ParameterRules.large`).
With a kernel of 8-bit values `q` and a scale for each output channel, `W = q scale`, a layer
computes `(x q) scale`: every value is exact in bfloat16, so one product in the compute dtype
serves, and the wide kernel is never made. In the host's memory (`pinned_host`) a layer's kernels
come to the device where the scan over layers takes them (`layout.gathered_layer`).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from kvlock_jax.models.layout import ParameterRules

KINDS = {"int8": (jnp.int8, 127.0), "float8": (jnp.float8_e4m3fn, 448.0)}
"""Dtypes by name, and the largest value that a channel's largest weight becomes."""

HOST = "pinned_host"

TOGETHER = 8
"""Rows of an 8-bit kernel that lie in an axis of their own in the host's memory. XLA for TPUs keeps
an 8-bit matrix in tiles of 32 rows and multiplies it in tiles of 8. On the device that costs
nothing. From the host's memory it would copy the stacks of all layers, 12 GB of 14B, to the device
and back for each layer."""


def narrowed(
    kernel: Float[Array, "layers I O"], kind: str
) -> tuple[Num[Array, "layers I O"], Float[Array, "layers O"]]:
    """A stacked kernel as 8-bit values and the scale of each output channel, a layer at a time."""
    dtype, largest = KINDS[kind]

    def layer(kernel: Float[Array, "I O"]) -> tuple[Num[Array, "I O"], Float[Array, "O"]]:
        """One layer's."""
        wide = kernel.astype(jnp.float32)
        scale = jnp.abs(wide).max(axis=0) / largest
        scale = jnp.where(scale > 0, scale, 1.0)
        values = wide / scale
        return (jnp.round(values) if kind == "int8" else values).astype(dtype), scale

    return jax.lax.map(layer, kernel)


def in_8_bits(model: nnx.Module, rules: ParameterRules, kind: str) -> nnx.Module:
    """An abstract model whose large kernels are 8-bit values with scales; they fill it."""
    dtype, _ = KINDS[kind]
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if rules.is_large(".".join(map(str, path))):
            layer, shape = functools.reduce(getattr, path[:-1], model), leaf.get_value().shape
            layer.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
            scales = (*shape[:-2], shape[-1])
            layer.scale = nnx.Param(jax.ShapeDtypeStruct(scales, jnp.float32))
    return model


def parts(
    path: str, array: Array | jax.ShapeDtypeStruct, rules: ParameterRules, kind: str | None
) -> Mapping[str, Array | jax.ShapeDtypeStruct]:
    """A parameter under its path; a large one as values and scales, if a kind is given.

    The wide array is freed. Shapes give shapes. Scales lie whole on every device.
    """
    if kind is None or not rules.is_large(path):
        return {path: array}
    place, shape = array.sharding, array.shape
    whole = place.with_memory_kind("device")
    if isinstance(place, jax.sharding.NamedSharding):
        whole = whole.update(spec=jax.sharding.PartitionSpec())
    far, lies = _in_rows(place, shape) if place.memory_kind == HOST else (place, shape)

    def narrow(
        kernel: Float[Array, "layers I O"],
    ) -> tuple[Num[Array, "layers *rows O"], Float[Array, "layers O"]]:
        """Values as they lie, and scales."""
        values, scale = narrowed(kernel, kind)
        return values.reshape(lies), scale

    if isinstance(array, jax.ShapeDtypeStruct):
        found = jax.eval_shape(narrow, jax.ShapeDtypeStruct(shape, array.dtype))
        made = [
            jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where)
            for one, where in zip(found, (far, whole), strict=True)
        ]
    else:
        wide = jax.device_put(array, place.with_memory_kind("device"))
        on_device = jax.jit(narrow, out_shardings=(far.with_memory_kind("device"), whole))
        values, scale = on_device(wide)
        made = jax.block_until_ready((jax.device_put(values, far), scale))
        array.delete()
    return dict(zip((path, f"{path.removesuffix('kernel')}scale"), made, strict=True))


def _in_rows(
    place: jax.sharding.Sharding, shape: tuple[int, ...]
) -> tuple[jax.sharding.Sharding, tuple[int, ...]]:
    """Sharding and shape of a kernel `layers I O` as `layers I/TOGETHER TOGETHER O`.

    One whose shards have another number of rows stays as it is.
    """
    if place.shard_shape(shape)[1] % TOGETHER:
        return place, shape
    layers, inputs, outputs = shape
    if isinstance(place, jax.sharding.NamedSharding):
        of_layers, of_inputs, of_outputs = (*place.spec, None, None, None)[:3]
        spec = jax.sharding.PartitionSpec(of_layers, of_inputs, None, of_outputs)
        place = place.update(spec=spec)
    return place, (layers, inputs // TOGETHER, TOGETHER, outputs)
