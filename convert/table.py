"""Maps a model's parameters to the tensors of a published checkpoint, and reads them.

A table is a tuple of `Row`s and describes one published layout. It is applied from the model's
side: the first row that matches the path of a parameter gives the tensor's published name. So each
parameter has exactly one source, errors name a missing tensor as it is published, and parameters
can be read a layer at a time. A tensor that no parameter asks for is unexpected.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from kvlock_jax.checkpoints.registry import Place, on_first_device
from kvlock_jax.checkpoints.store import Parameter
from kvlock_jax.errors import CheckpointError

TOGETHER = 1 << 23
"""Largest parameter, in bytes, whose layers are read and stored together."""

ROWS = 1 << 26
"""Bytes over which an untransformed tensor is read by rows: UMT5's embedding has 2 GB."""

_BLOCK = 1 << 18
"""Numbers that `all_finite` looks at together."""

_EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
}
"""The bits of 16 that are all set in a NaN or an infinity, and in no other number."""

Path = tuple[str | int, ...]
Transform = Callable[[np.ndarray], np.ndarray]
DtypeOf = Callable[[str, np.dtype], np.dtype]
"""Maps a parameter's dotted path and the dtype of its tensors to the parameter's dtype."""


Changes = Mapping[str, Mapping[int | None, Sequence[Callable[[], np.ndarray]]]]
"""By a parameter's dotted path and layer (`None` where it is not stacked): functions that return
what is added, in the parameter's layout, float32."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint whose shape and dtype are known before its values are read.

    `rows`, if given, reads the rows from a first to an exclusive last.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: Callable[[int, int], np.ndarray] | None = None


def as_found(path: str, found: np.dtype) -> np.dtype:
    """Keeps the dtype of the checkpoint."""
    return found


def same(array: np.ndarray) -> np.ndarray:
    """Keeps embeddings, biases and the scales of norms as they are."""
    return array


def kernel(array: np.ndarray) -> np.ndarray:
    """A linear or convolution weight, `[out, in, *space]` to `[*space, in, out]`."""
    return np.moveaxis(array, (0, 1), (-1, -2))


def pointwise(array: np.ndarray) -> np.ndarray:
    """A convolution over one cell, `[out, in, 1, ...]` to a linear kernel `[in, out]`."""
    return squeezed(array, 2).T


def patches(array: np.ndarray) -> np.ndarray:
    """A convolution over patches, `[out, in, *patch]`, to a linear kernel `[(*patch, in), out]`."""
    return kernel(array).reshape(-1, array.shape[0])


def unbatched(array: np.ndarray) -> np.ndarray:
    """Drops a leading axis of size 1."""
    return array.squeeze(0)


def per_channel(array: np.ndarray) -> np.ndarray:
    """A scale with axes of space, `[C, 1, ...]` to `[C]`."""
    return squeezed(array, 1)


def squeezed(array: np.ndarray, rank: int) -> np.ndarray:
    """Drops axes of size 1 after the first `rank`; others stay, and the shape then misfits."""
    return array.squeeze(tuple(i for i in range(rank, array.ndim) if array.shape[i] == 1))


@dataclasses.dataclass(frozen=True)
class Row:
    """The published tensors of the parameters whose paths match.

    Attributes:
      path: regular expression for the whole dotted path in our module.
      key: published name; `\\1` is the match of the first group of `path`, and `*` the index along
        the leading axis of a stacked parameter.
      transform: function from the published array to ours; it raises ValueError for a shape of
        another rank.
      aliases: other names of the same tensor, in exports that tie it or store it twice; read only
        if `key` is missing.
    """

    path: str
    key: str
    transform: Transform = same
    aliases: tuple[str, ...] = ()


Table = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of one parameter: one tensor, or one for each layer to be stacked."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    keys: tuple[str, ...]
    stacked: bool
    transform: Transform


def plan(
    abstract: nnx.State, tensors: Mapping[str, LazyTensor], table: Table, source: str
) -> tuple[Source, ...]:
    """Pairs every parameter of a model with its tensors, without reading values.

    Args:
      abstract: abstract parameters of the model, as from `nnx.eval_shape`.
      tensors: tensors of the checkpoint.
      table: layout of the checkpoint.
      source: name of the checkpoint in errors.

    Raises:
      CheckpointError: tensors are missing, unexpected or misshapen; the message lists all of them.
    """
    missing, misshapen, used, sources = [], [], set(), []
    for path, variable in nnx.to_flat_state(abstract):
        row, names, stacked = published_names(path, variable.shape, table)
        keys = []
        for name, *aliases in names:
            used.update((name, *aliases))
            key = next((n for n in (name, *aliases) if n in tensors), None)
            if key is None:
                missing.append(name)
            else:
                keys.append(key)
        want = variable.shape[1:] if stacked else variable.shape
        misshapen += _misshapen(keys, tensors, row.transform, want)
        dtypes = {tensors[key].dtype for key in keys}
        # float32 if layers differ, since nothing would report that wider ones are rounded
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        sources.append(Source(path, variable.shape, dtype, tuple(keys), stacked, row.transform))
    unexpected = sorted(set(tensors) - used)
    if missing or unexpected or misshapen:
        raise CheckpointError(_report(source, missing, unexpected, misshapen))
    return tuple(sources)


def parameters(
    sources: Iterable[Source], tensors: Mapping[str, LazyTensor], dtype: DtypeOf = as_found
) -> dict[str, Parameter]:
    """The parameters of a plan by dotted path, whose values are read on demand.

    Reading one raises a `CheckpointError` that names the tensor if it holds a NaN or an infinity,
    or a number that its new dtype cannot hold.

    Args:
      sources: result of `plan`, or a part of it.
      tensors: tensors of the checkpoint.
      dtype: dtype of each array.
    """
    by_path = {".".join(map(str, source.path)): source for source in sources}
    return {
        path: _parameter(source, tensors, np.dtype(dtype(path, source.dtype)))
        for path, source in by_path.items()
    }


def changed(parameter: Parameter, kind: np.dtype, by_layer: Mapping) -> Parameter:
    """A parameter with its changes, rounded to `kind`; it is read in float32."""

    def read(first: int, last: int) -> np.ndarray:
        """Some rows of the leading axis."""
        array = np.array(parameter.read(first, last), np.float32)
        for layer, functions in by_layer.items():
            for change in functions:
                if layer is None:
                    array += change()[first:last]
                elif first <= layer < last:
                    array[layer - first] += change()
        return array.astype(kind)

    return Parameter(parameter.shape, kind, parameter.rows, read)


def _parameter(source: Source, tensors: Mapping[str, LazyTensor], kind: np.dtype) -> Parameter:
    shape, nbytes = source.shape, math.prod(source.shape) * kind.itemsize

    def layer(key: str) -> np.ndarray:
        """One tensor in the parameter's layout and dtype."""
        return cast(key, source.transform(tensors[key].read()))

    def cast(key: str, array: np.ndarray) -> np.ndarray:
        """Casts an array to the parameter's dtype; raises if it is not finite."""
        with np.errstate(over="ignore"):
            made = array.astype(kind, copy=False)
        if not all_finite(made):
            raise CheckpointError(_not_finite(source, key, array, made))
        return made

    if source.stacked:

        def layers(first: int, last: int) -> np.ndarray:
            """Some layers' tensors, stacked."""
            if last == first + 1:
                return layer(source.keys[first])[None]
            array = np.empty((last - first, *shape[1:]), kind)
            for target, key in zip(array, source.keys[first:last], strict=True):
                target[...] = layer(key)
            return array

        return Parameter(shape, kind, shape[0] if nbytes <= TOGETHER else 1, layers)

    (key,) = source.keys
    by_rows = tensors[key].rows
    if by_rows is None or source.transform is not same or nbytes <= ROWS:
        return Parameter(shape, kind, shape[0], lambda first, last: layer(key)[first:last])
    parts = -(-nbytes // ROWS)
    # in equal parts if possible, so that shards start where parts do
    parts = next((n for n in range(parts, 2 * parts) if shape[0] % n == 0), parts)
    return Parameter(
        shape,
        kind,
        -(-shape[0] // parts),
        lambda first, last: cast(key, by_rows(first, last)),
    )


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite, in blocks that stay in the CPU's cache."""
    flat = array.ravel(order="K")
    exponent = _EXPONENTS.get(array.dtype)
    for first in range(0, flat.size, _BLOCK):
        block = flat[first : first + _BLOCK]
        if exponent is None:
            finite = bool(np.isfinite(block).all())
        else:  # NumPy's own test of 16 bits takes ten times as long
            finite = int((block.view(np.uint16) & exponent).max()) != exponent
        if not finite:
            return False
    return True


def _not_finite(source: Source, key: str, array: np.ndarray, made: np.ndarray) -> str:
    """The message about a tensor that is not finite, or not any more after its cast."""
    path = ".".join(map(str, source.path))
    name = f"{key} (parameter {path})"
    if all_finite(array):
        return f"{name} holds numbers too large for {made.dtype}: convert to another --dtype"
    bad = int((~np.isfinite(array)).sum())
    return (
        f"{name} is not finite: {bad} of {array.size} numbers are NaN or infinite; the checkpoint "
        "is damaged or its training diverged: download it again"
    )


def fill(
    abstract: nnx.State, tensors: Mapping[str, LazyTensor], table: Table, source: str
) -> nnx.State:
    """Fills a model's parameters from a checkpoint: `plan`, `parameters`, and `read`."""
    return read(abstract, parameters(plan(abstract, tensors, table, source), tensors))


def read(
    abstract: nnx.State, values: Mapping[str, Parameter], place: Place = on_first_device
) -> nnx.State:
    """Reads parameters into the structure of an abstract state; `read_one` for each."""
    filled = []
    for path, variable in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        filled.append((path, variable.replace(read_one(name, values[name], place))))
    return nnx.from_flat_state(filled)


def read_one(path: str, value: Parameter, place: Place) -> jax.Array:
    """Reads a parameter to its sharding; a device receives only its own part."""
    host = value.whole()
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    sharding = place(path, host.shape)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def published_names(
    path: Path, shape: tuple[int, ...], table: Table
) -> tuple[Row, list[tuple[str, ...]], bool]:
    """A parameter's row, its layers' published names with aliases, and whether it is stacked."""
    dotted = ".".join(map(str, path))
    for row in table:
        if match := re.fullmatch(row.path, dotted):
            names = tuple(match.expand(name) for name in (row.key, *row.aliases))
            if "*" not in row.key:
                return row, [names], False
            layers = range(shape[0])
            return row, [tuple(n.replace("*", str(i)) for n in names) for i in layers], True
    raise KeyError(f"no row of the table matches the parameter {dotted}")


def _misshapen(
    keys: Iterable[str],
    tensors: Mapping[str, LazyTensor],
    transform: Transform,
    want: tuple[int, ...],
) -> list[str]:
    """One line for each tensor that does not have the wanted shape after its transform."""
    lines = []
    for key in keys:
        shape = tensors[key].shape
        try:
            # broadcast from one number, so that the transform takes no memory
            got = transform(np.broadcast_to(np.float32(0), shape)).shape
        except ValueError:  # of another rank
            got = None
        if got != want:
            becomes = "" if got in (None, shape) else f", which becomes {list(got)}"
            lines.append(f"{key} is {list(shape)}{becomes}; the model has {list(want)}")
    return lines


def _report(source: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """The message that lists every mismatch."""
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(misshapen)} misshapen"
    lines = [f"{source} does not fit the model that its config describes: {counts}"]
    lines += [f"  missing: {key}" for key in missing]
    lines += [f"  unexpected: {key}" for key in unexpected]
    lines += [f"  misshapen: {line}" for line in misshapen]
    return "\n".join(lines)
