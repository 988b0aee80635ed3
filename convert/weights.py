"""Opens the weight files of a checkpoint without reading their values."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kvlock_jax.checkpoints.files import beside
from kvlock_jax.convert.quantised import FLOAT8, dequantised, open_gguf
from kvlock_jax.convert.table import LazyTensor
from kvlock_jax.errors import CheckpointError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_LORA = re.compile(r"lora_|\.alpha$|\.diff(_b)?$|\.(hada|lokr|oft)_|\.dora_scale$")
_QUANTISED = re.compile(
    r"weight_scale_2|weight_format|quant_(state|map)|\.(absmax|SCB|qweight|qzeros|g_idx)$"
)
"""Keys that bitsandbytes, GPTQ and writers of packed formats add beside the weights."""

_BYTES = re.compile(r"(?:^|\.)(?:comfy_quant|spiece_model)$")
"""Keys of ComfyUI's under which no weights lie."""

_SCALED = re.compile(r"weight_scale|scale_weight|scale_input|input_scale|scaled_fp8")
"""Keys of scaled float8 files, which only safetensors are."""


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def open_folder(folder: Path, stem: str) -> dict[str, LazyTensor]:
    """Tensors of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` lists.

    Raises:
      CheckpointError: shards are missing (the message names all), a file is damaged, or a shard
        lacks a tensor.
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
    if strange := [name for name in where.values() if Path(str(name)).name != name]:
        raise CheckpointError(f"{index} must list names of files beside it, found {strange[0]!r}")
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
    """Tensors of one safetensors file, whose values are read on demand.

    Raises:
      CheckpointError: the file is damaged or cut short, is a LoRA, or is quantised in a way that
        `quantised.dequantised` does not read.
    """
    kinds = _kinds(path)
    _check_keys(path, kinds)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return dequantised(path, lazy_tensors(path), metadata)


def lazy_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file as they lie in it, on demand."""
    return {key: _lazy(path, key, *kind) for key, kind in _kinds(path).items()}


def _kinds(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            entries = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(e.get_shape()), e.get_dtype()) for key, e in entries.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one safetensors, GGUF or `.pth` file.

    Errors are those of `open_file`, `open_gguf` and `open_pickle`.
    """
    if path.suffix == ".gguf":
        return open_gguf(path)
    return open_pickle(path) if path.suffix == ".pth" else open_file(path)


def _lazy(path: Path, key: str, shape: tuple[int, ...], kind: str) -> LazyTensor:
    if kind in FLOAT8 or _BYTES.search(key):
        return _raw(path, key, shape, FLOAT8.get(kind, np.dtype(np.uint8)))
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: {key} is {kind}, probably quantised; expected one of {', '.join(_DTYPES)}"
        )

    def read(part: Callable[[safe_open], np.ndarray]) -> np.ndarray:
        """Reads a part of the tensor from the file."""
        # Opened for each read: while a file stays mapped, its pages stay in memory, in the end all.
        try:
            with safe_open(path, framework="numpy") as file:
                return part(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {key} of {path}: {error}") from error

    return LazyTensor(
        shape,
        _DTYPES[kind],
        lambda: read(lambda file: file.get_tensor(key)),
        lambda first, last: read(lambda file: file.get_slice(key)[first:last]),
    )


def _raw(path: Path, key: str, shape: tuple[int, ...], kind: np.dtype) -> LazyTensor:
    """A tensor of a dtype that safetensors does not give to NumPy, by its place in the file."""

    def read() -> np.ndarray:
        """Reads the tensor from the file."""
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                first, last = json.loads(file.read(size))[key]["data_offsets"]
                file.seek(8 + size + first)
                data = file.read(last - first)
            return np.frombuffer(data, kind).reshape(shape)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot read {key} of {path}: {error}") from error

    return LazyTensor(shape, kind, read)


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a `.pth`, or of a `.safetensors` of the same stem beside it.

    No code in the pickle is run. This function alone imports Torch.

    Raises:
      CheckpointError: neither file exists, the file is damaged or holds anything but float tensors,
        or Torch is not installed.
    """
    converted = beside(path)
    if converted != path:
        return open_file(converted)
    if not path.is_file():
        other = path.with_suffix(".safetensors").name
        raise CheckpointError(f"{path.parent} has neither {path.name} nor {other}")
    tensors = _unpickle(path)
    _check_keys(path, tensors)
    if scaled := list(filter(_SCALED.search, tensors)):
        raise CheckpointError(f"{path} is quantised (it holds {scaled[0]}), which no .pth may be")
    kinds = _torch_dtypes()
    strange = [
        key for key, tensor in tensors.items() if getattr(tensor, "dtype", None) not in kinds
    ]
    if strange:
        found = getattr(tensors[strange[0]], "dtype", type(tensors[strange[0]]).__name__)
        raise CheckpointError(
            f"{path}: {strange[0]} is {found}, expected a tensor of one of {', '.join(_DTYPES)}"
        )
    # While a file stays mapped its pages stay in memory; files from before 2020 cannot be mapped.
    unmapped = tensors if not zipfile.is_zipfile(path) else None
    return {
        key: LazyTensor(
            tuple(tensor.shape),
            kinds[tensor.dtype],
            lambda key=key: _numpy((unmapped or _unpickle(path))[key]),
            lambda first, last, key=key: _numpy((unmapped or _unpickle(path))[key][first:last]),
        )
        for key, tensor in tensors.items()
    }


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} takes Torch to read: pip install torch, or put "
            f"{path.with_suffix('.safetensors').name} beside it"
        ) from error
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged, or no file of weights: {reason}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected tensors by name")
    return dict(loaded)


def _torch_dtypes() -> dict[Any, np.dtype]:
    import torch

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    return {kind: _DTYPES[name] for name, kind in (names | {"BF16": torch.bfloat16}).items()}


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor's memory as an array, without a copy; Torch knows no bfloat16 of NumPy."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def files(folder: Path, stem: str) -> list[Path]:
    """The files that `open_folder` reads."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    return [
        index,
        *(folder / name for name in sorted(set(read_json(index)["weight_map"].values()))),
    ]


def refuse(path: Path) -> None:
    """Raises an error that identifies a file which is no checkpoint, if it can be identified.

    Raises:
      CheckpointError: the file is a LoRA, is quantised, or is damaged.
    """
    if path.suffix in (".safetensors", ".gguf"):
        open_weights(path)


def _check_keys(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        if _LORA.search(key):
            raise CheckpointError(
                f"{path} is a LoRA (it holds {key}), which changes a checkpoint and is none"
            )
        if _QUANTISED.search(key):
            raise CheckpointError(
                f"{path} is quantised (it holds {key}): convert the published checkpoint"
            )
