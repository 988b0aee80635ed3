"""Weight files of a checkpoint, opened without reading their values."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kvlock_jax.convert.table import LazyTensor
from kvlock_jax.errors import CheckpointError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: if there is no such file, or it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def open_folder(folder: Path, stem: str) -> dict[str, LazyTensor]:
    """Tensors of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` lists.

    Raises:
      CheckpointError: naming all missing shards, a damaged file, or what a shard does not hold.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_shards(index)
    if single.is_file():
        return open_file(single)
    raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}")


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted(set(where.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index} lists {len(names)} shards; not in the folder: {', '.join(absent)}"
        )
    shards = {name: open_file(index.parent / name) for name in names}
    tensors = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    if lost := [f"{key} ({name})" for key, name in where.items() if key not in shards[name]]:
        raise CheckpointError(f"{index} lists tensors that are not in their shard: {lost}")
    return tensors


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one safetensors file; values are read from it when asked for.

    Raises:
      CheckpointError: if the file is damaged or cut short, or holds quantised weights.
    """
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    return {key: _lazy(file, key, path) for key in file.keys()}


def _lazy(file: safe_open, key: str, path: Path) -> LazyTensor:
    entry = file.get_slice(key)
    kind = entry.get_dtype()
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: {key} is {kind}, probably quantised; expected one of {', '.join(_DTYPES)}"
        )
    return LazyTensor(tuple(entry.get_shape()), _DTYPES[kind], lambda: file.get_tensor(key))
