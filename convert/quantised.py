"""Reads float8 and GGUF files: every tensor becomes the float32 numbers that it stands for.

Values are dequantised when a tensor is read, one at a time. A float8 matrix is multiplied by its
scale in float32, and a GGUF block by the definition of ggml, by its own library.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvlock_jax.convert.table import LazyTensor
from kvlock_jax.errors import CheckpointError

FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Safetensors' names."""

_SCALE = re.compile(r"(.*)\.(?:scale_weight|weight_scale)$")
_OF_ACTIVATIONS = re.compile(r"\.(?:scale_input|input_scale)$")
_FORMAT = ".comfy_quant"
_MARK = "scaled_fp8"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_PREFIXES = ("model.diffusion_model.", "net.", "model.")
_MANY = 5
"""Keys with a prefix over which it is one of all the model's."""


def dequantised(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """A file's tensors as a model has them: without a prefix, and with float8 times its scale.

    Scales are one for a matrix, one for each row, or one for each block of a row; those of
    activations are dropped.

    Args:
      path: file, for errors.
      tensors: tensors as they lie in the file.
      metadata: metadata of its header.

    Raises:
      CheckpointError: the file has a format or a scale of another kind.
    """
    tensors = without_prefix(tensors)
    layers = _json(path, metadata.get("_quantization_metadata", "{}")).get("layers", {})
    formats = {layer: facts.get("format") for layer, facts in layers.items()}
    scales, kept = {}, {}
    for key, tensor in tensors.items():
        if found := _SCALE.match(key):
            scales[f"{found[1]}.weight"] = tensor
        elif key.endswith(_FORMAT):
            text = bytes(tensor.read()).decode("utf-8", errors="replace")
            formats[key.removesuffix(_FORMAT)] = _json(path, text).get("format")
        elif key != _MARK and not _OF_ACTIVATIONS.search(key):
            kept[key] = tensor
    for layer, name in formats.items():
        if name not in _FORMATS:
            raise CheckpointError(
                f"{path} is quantised as {name} ({layer}); of ComfyUI's formats "
                f"{' and '.join(_FORMATS)} can be read"
            )
    if lost := sorted(set(scales) - set(kept)):
        raise CheckpointError(f"{path} has a scale for {lost[0]}, which it lacks")
    return {key: _wide(path, key, tensor, scales.get(key)) for key, tensor in kept.items()}


def without_prefix(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors behind a prefix that many have, under their own names; else all of them."""
    for prefix in _PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if len(inside) > _MANY:
            return inside
    return dict(tensors)


def _json(path: Path, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its note on quantisation is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: its note on quantisation must be a JSON object")
    return value


def _wide(path: Path, key: str, tensor: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    """A tensor in float32 if it is float8 or has a scale."""
    if tensor.dtype not in FLOAT8.values() and scale is None:
        return tensor
    factor = scale and _spread(tensor.shape, scale.shape)
    if scale and factor is None:
        raise CheckpointError(
            f"{path}: {key} is {list(tensor.shape)}, and its scale {list(scale.shape)}, which is "
            "none for a matrix, its rows or blocks of them"
        )

    def read() -> np.ndarray:
        """The numbers that the tensor stands for."""
        array = tensor.read().astype(np.float32)
        if scale is None:
            return array
        by = scale.read().astype(np.float32).reshape(factor)
        blocks = (len(array), by.shape[1], -1) if by.ndim == 3 else array.shape
        return (array.reshape(blocks) * by).reshape(array.shape)

    return dataclasses.replace(tensor, dtype=np.dtype(np.float32), read=read, rows=None)


def _spread(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape with which a scale multiplies; three axes are rows, blocks and a block."""
    if np.prod(scale) == 1:
        return (1,) * len(shape)
    if scale in ((shape[0],), (shape[0], 1)):
        return (shape[0], *[1] * (len(shape) - 1))
    if len(scale) == 3 and len(shape) == 2 and (scale[0], scale[2]) == (shape[0], 1):
        return scale if shape[1] % scale[1] == 0 else None
    return None


def open_reader(path: Path) -> Any:
    """A GGUF file as `gguf` reads it: its tensors and its fields.

    Raises:
      CheckpointError: gguf is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{path} takes gguf to read: pip install gguf") from error
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged, or no GGUF file: {error}") from error


def open_gguf(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a GGUF file.

    Raises:
      CheckpointError: gguf is not installed, the file is damaged, or has a type that gguf cannot
        read.
    """
    reader = open_reader(path)
    from gguf import quants

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if tensor.name.endswith("modulation") and len(shape) == 2:
            shape = (1, *shape)  # some writers drop the leading axis
        if field := reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}"):
            shape = tuple(int(field.parts[part][0]) for part in field.data)
        try:
            quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"{path}: {tensor.name} is {kind}, which gguf cannot read"
            ) from error
        read = functools.partial(_dequantise, tensor, shape)
        tensors[tensor.name] = LazyTensor(shape, np.dtype(np.float32), read)
    return without_prefix(tensors)


def _dequantise(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    from gguf import quants

    wide = quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(wide, np.float32).reshape(shape)
