"""Saves models in Orbax and restores them straight to their devices.

A folder holds `kvlock.json` and one folder of data, which `kvlock.json` names. `save` writes the
data first, under a new name, and then replaces `kvlock.json` in one step. So the data that it names
are complete at every moment, and the next save removes all other data. (Renaming the folder would
not work: an object store copies to rename, and a full folder cannot be replaced in one step.)
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from kvlock_jax.checkpoints import metadata, store
from kvlock_jax.checkpoints.metadata import Metadata, Stored, is_data_name
from kvlock_jax.checkpoints.registry import (
    Checkpoint,
    Configs,
    Filling,
    Opened,
    PlaceFor,
    abstract,
    family,
    network,
    on_first_device,
)
from kvlock_jax.checkpoints.store import OnBytes, Parameter
from kvlock_jax.errors import CheckpointError

METADATA = "kvlock.json"
"""The file that makes a folder a converted checkpoint."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint, known without reading its weights.

    A converted checkpoint also has the `version` and `source` of its `Metadata`.
    """

    family: str
    configs: Configs
    models: Mapping[str, Stored]
    version: str = ""
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def contents(configs: Configs, arrays: Mapping[str, Iterable[Any]]) -> Contents:
    """Describes a checkpoint by its arrays on disk, or anything with their shape and dtype."""
    models = {}
    for name in configs.networks:
        # An array on disk may be a copy of another, so the model's own parameters are counted.
        model = nnx.state(abstract(getattr(configs, name)))
        stored = list(arrays[name])
        models[name] = Stored(
            sum(leaf.size for leaf in jax.tree.leaves(model)),
            tuple(sorted({str(array.dtype) for array in stored})),
            sum(math.prod(array.shape) * array.dtype.itemsize for array in stored),
        )
    return Contents(family(configs).name, configs, models)


def describe(folder: epath.PathLike) -> Contents:
    """Describes a checkpoint that `save` wrote.

    Raises:
      CheckpointError: the folder holds no checkpoint, or files are missing.
    """
    metadata = read_metadata(folder)
    data = epath.Path(folder) / metadata.data
    if absent := [f"  missing: {name}" for name in metadata.files if not (data / name).exists()]:
        raise CheckpointError("\n".join([f"{data} is damaged:", *absent]))
    return Contents(
        metadata.family, metadata.configs, metadata.models, metadata.version, metadata.source
    )


def is_checkpoint(folder: epath.PathLike) -> bool:
    """Whether a folder is a converted checkpoint, sound or damaged."""
    return (epath.Path(folder) / METADATA).exists()


def save(
    folder: epath.PathLike,
    configs: Configs,
    parameters: Mapping[str, Mapping[str, Parameter]],
    tokenizer: epath.PathLike,
    source: Callable[[], Mapping[str, Any]],
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Writes a checkpoint; the folder's previous one stays usable until this one is complete.

    Args:
      folder: destination, local or of a scheme that etils knows, such as `gs://`; made if missing.
      configs: sizes of the models, which the parameters fit.
      parameters: parameters of each of `configs.networks`, by dotted path, read in turn.
      tokenizer: folder of the tokenizer, whose files are copied.
      source: function that returns `Metadata.source`; called last, so that its checksums can be
        computed while the parameters are written.
      on_bytes: called with the size of each piece of a parameter that is being written.

    Raises:
      CheckpointError: the folder cannot be made, the disk is full, or the tokenizer cannot be read.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_data(folder, keep=_current(folder))
        data = folder / f"kvlock-{uuid.uuid4().hex[:8]}"
        data.mkdir()
        for name in configs.networks:
            store.write(data / name, parameters[name], on_bytes)
        (data / "tokenizer").mkdir()
        for name, content in _files(epath.Path(tokenizer)).items():
            (data / "tokenizer" / name).write_bytes(content)
        metadata = Metadata(
            family(configs).name,
            importlib.metadata.version("kvlock-jax"),
            source(),
            configs,
            contents(configs, {n: p.values() for n, p in parameters.items()}).models,
            data.name,
            store.sums(data),
        )
        partial = folder / f"{METADATA}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")
        partial.replace(folder / METADATA)
        _remove_data(folder, keep=data.name)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error


def read_metadata(folder: epath.PathLike) -> Metadata:
    """Reads `kvlock.json`, and no weights.

    Raises:
      CheckpointError: the file is missing, damaged, or of another family, or a field of it does not
        fit (`metadata.parse`).
    """
    path = epath.Path(folder) / METADATA
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        reason = "it is no converted checkpoint (kvlock convert makes one)"
        if path.parent.is_dir() and any(map(_is_data, path.parent.iterdir())):
            reason = "the conversion to this folder did not finish; run it again"
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: it is {values!r:.60}")
    return metadata.parse(values, path)


def load(folder: epath.PathLike, *args: Any, **options: Any) -> Checkpoint:
    """Restores a checkpoint whole; arguments and errors as in `open`."""
    return open(folder, *args, **options).whole()


def open(
    folder: epath.PathLike,
    dtype: Any = None,
    compute_dtype: Any = jnp.float32,
    place_for: PlaceFor | None = None,
    weights: str | None = None,
    change: Callable[[str, str, jax.Array], jax.Array] = lambda name, path, array: array,
) -> Opened:
    """Opens a checkpoint after checking shapes; a network's files are verified as it is read.

    Args:
      folder: folder that `save` wrote.
      dtype: dtype of the parameters that may be rounded; None keeps each as it was saved.
      compute_dtype: dtype of the modules' matrix products.
      place_for: sharding of each parameter, to which its file is read directly; None is the first
        device.
      weights: kind of 8-bit values for the large kernels (`models.small.KINDS`).
      change: changes a network's parameter of a path as it is read.

    Raises:
      CheckpointError: the folder holds no checkpoint, files are missing or damaged, or parameters
        do not fit the models that the configs describe; the message lists all of them.
    """
    metadata = read_metadata(folder)
    place = place_for(metadata.configs) if place_for else on_first_device
    data, networks = epath.Path(folder) / metadata.data, metadata.configs.networks
    models = {name: abstract(getattr(metadata.configs, name), compute_dtype) for name in networks}
    with _explained(data, metadata.files):
        stored = {name: store.describe(data / name) for name in networks}
        problems = [
            line
            for name, model in models.items()
            for line in _misfits(name, _flat(nnx.state(model)), stored[name])
        ]
        if problems:
            raise CheckpointError("\n".join([f"{data} does not fit its configs:", *problems]))
    targets: dict[str, dict[str, jax.ShapeDtypeStruct]] = {name: {} for name in models}
    for name in models:
        rules = network(getattr(metadata.configs, name)).parameters
        for path, array in stored[name].items():
            kind = rules.dtype(path, array.dtype, dtype)
            sharding = place(f"{name}.{path}", array.shape)
            targets[name][path] = jax.ShapeDtypeStruct(array.shape, kind, sharding=sharding)
    _verify(data, metadata.files, "tokenizer")
    filling = Filling(metadata.configs, compute_dtype, weights)
    shapes = {name: filling(name, targets[name].items()) for name in models}

    def read(name: str) -> nnx.Module:
        """Restores a network while another thread verifies its files."""
        with _checked(data, metadata.files, name):
            arrays = store.read(data / name, targets[name])
            return filling(name, ((path, change(name, path, array)) for path, array in arrays))

    return Opened(Checkpoint(metadata.configs, **shapes, tokenizer=data / "tokenizer"), read)


def _verify(data: epath.Path, files: Mapping[str, str], folder: str) -> None:
    """Raises an error of all damaged files, if any of a folder is."""
    own = {name: crc for name, crc in files.items() if name.startswith(f"{folder}/")}
    with _explained(data, files):
        store.check(data, own)


@contextlib.contextmanager
def _explained(data: epath.Path, files: Mapping[str, str]) -> Iterator[None]:
    """Replaces an error by one about damaged or missing files, if there are any."""
    try:
        yield
    except Exception:
        store.check(data, files)
        raise


@contextlib.contextmanager
def _checked(data: epath.Path, files: Mapping[str, str], folder: str) -> Iterator[None]:
    """Verifies a folder's files in another thread while the `with` block reads them.

    The error about a damaged file replaces any error that the damage caused in the block.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        check = pool.submit(_verify, data, files, folder)
        try:
            yield
        finally:
            check.result()


def _flat(state: nnx.State) -> dict[str, Any]:
    """Arrays (or their shapes) of a state by dotted path."""
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}


def _misfits(name: str, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """One line for each parameter that is missing, unexpected or misshapen."""
    lines = [f"  missing: {name}.{path}" for path in wanted if path not in stored]
    lines += [f"  unexpected: {name}.{path}" for path in stored if path not in wanted]
    lines += [
        f"  misshapen: {name}.{path} is {stored[path].shape}, the model has {array.shape}"
        for path, array in wanted.items()
        if path in stored and stored[path].shape != array.shape
    ]
    return lines


def _files(folder: epath.Path) -> dict[str, bytes]:
    """The contents of a folder's files by name; a tokenizer's are small."""
    try:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        path = error.filename or folder
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _current(folder: epath.Path) -> str | None:
    """The data that `kvlock.json` names, even if another version wrote the file."""
    try:
        return json.loads((folder / METADATA).read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_data(folder: epath.Path, keep: str | None) -> None:
    """Removes the data of other saves, and nothing else."""
    for path in filter(_is_data, folder.iterdir()):
        if path.name != keep:
            path.rmtree()


def _is_data(path: epath.Path) -> bool:
    return is_data_name(path.name)
