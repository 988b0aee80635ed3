"""Loads a model to edit with, from any checkpoint that the package knows."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Shaped
from ml_collections import ConfigDict

from kvlock_jax import demo
from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.files import NO_FILES, NO_LORAS, Files, Loras
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import Checkpoint, Configs, Opened, Place
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.media.fit import Fit
from kvlock_jax.media.storage import FilePath
from kvlock_jax.models import small
from kvlock_jax.models.attention.sharded import Attend, overlapped
from kvlock_jax.models.text.tokenizer import Tokenizer
from kvlock_jax.pipeline.settings import config, default_config_name


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint, ready to edit with; or its shapes, for compilation ahead of the weights.

    Attributes:
      name: source that it was loaded from, or the transformer's file.
      checkpoint: three networks and their configs.
      tokenizer: tokenizer of the text encoder.
      mesh: devices of the networks; `None` is the first device.
      read: reads a network of the checkpoint, which holds shapes alone then; `None` where they are
        in memory.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    mesh: Mesh | None = None
    read: Callable[[str], nnx.Module] | None = None

    def kept(self) -> "Model":
        """The model with all of its networks in memory."""
        if self.read is None:
            return self
        networks = Opened(self.checkpoint, self.read).whole()
        return dataclasses.replace(self, checkpoint=networks, read=None)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[nnx.Module]:
        """One of the networks, in memory for as long as the context is open."""
        if self.read is None:
            yield getattr(self.checkpoint, name)
            return
        network = self.read(name)
        try:
            yield network
        finally:
            for parameter in jax.tree.leaves(nnx.state(network)):
                parameter.delete()  # whoever still holds the module

    def fit(self, video: Shaped[np.ndarray, "frames height width *colours"]) -> Fit:
        """The padding of a video or a mask for this model."""
        return Fit(*video.shape[:3], self.checkpoint.configs.unit)

    def on_mesh(self) -> AbstractContextManager:
        """Makes its mesh the ambient one, in which its programs must be compiled and run."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()


def default_dtype(mesh: Mesh | None = None) -> np.dtype:
    """The compute dtype of a model's devices: float32 on CPUs, bfloat16 on TPUs and GPUs.

    Accelerators multiply bfloat16 several times as fast, and their attention kernels are made for
    it; a CPU has to widen it first.

    Args:
      mesh: devices of the model; `None` is the first device.
    """
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    return jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)


_DEMO = Path(demo.__file__).parent / "weights"


def load(
    source: FilePath | None = None,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    spread: bool = False,
    attend: Attend = overlapped,
    vae_tiles: int = 1,
    weights: str | None = None,
    weights_on: str = "device",
    files: Files = NO_FILES,
    loras: str | Loras = NO_LORAS,
    keep_in_memory: bool = True,
    on_shapes: Callable[[Model], None] = lambda model: None,
) -> Model:
    """Loads a model to edit with.

    Args:
      source: `"demo"` for the embedded model, a published folder, or a converted checkpoint; left
        out where `files` are all that there is.
      dtype: compute dtype of matrix products, by default `default_dtype`; the parameters keep the
        checkpoint's.
      mesh: mesh of `make_mesh` that shares an edit between devices; `None` is the first device.
      spread: whether the mesh's `frames` axis also shares the transformer's weights, gathering each
        layer when it is used: for models that do not fit on each device.
      attend: self-attention between devices: `overlapped`, `gathered` or `ring`.
      vae_tiles: number of column tiles of a frame that the VAE processes one by one, to save
        memory; the result is the same.
      weights: `"int8"` or `"float8"` to keep the kernels of the transformers' blocks in 8 bits,
        with a scale for each output channel; by default they keep the checkpoint's dtype.
      weights_on: `"host"` to keep those kernels in the host's memory, from which each layer's come
        to the devices as it is used.
      files: files of single parts, float8 and block-quantised ones too, which take the place of a
        published folder's. Matrices are rounded to a compute dtype of 16 bits.
      loras: LoRA files that change the transformers: `"a.safetensors:0.8,b.safetensors"`, or those
        of each expert.
      keep_in_memory: whether all networks are read now, and stay; otherwise each stage of an edit
        reads those that it needs, and they leave the devices when it ends.
      on_shapes: called with the model before its weights are read, with shapes in their place.

    Raises:
      CheckpointError: the source is none of these, or is damaged; or a LoRA does not fit it.
      ConfigError: the mesh does not divide the model's heads.
    """
    from kvlock_jax.convert import lora

    reader, folder, own = _reader(source, files)
    loras = Loras(loras) if isinstance(loras, str) else loras
    restored = reader is format
    own |= {} if restored else {"loras": loras}
    dtype = default_dtype(mesh) if dtype is None else dtype
    if weights not in (None, *small.KINDS):
        raise ConfigError(f"weights must be one of {', '.join(small.KINDS)}, found {weights!r}")
    if weights_on not in ("device", "host"):
        raise ConfigError(f"weights_on must be 'device' or 'host', found {weights_on!r}")

    def place_for(configs: Configs) -> Place:
        """Where each parameter goes."""
        place = registry.on_first_device
        if mesh is not None:
            place = registry.on_mesh(mesh, configs, spread=spread)
        return registry.on_host(place, configs) if weights_on == "host" else place

    changes = {}
    if restored:
        changes |= lora.open_loras(loras, format.read_metadata(folder).configs)
        own["change"] = lambda part, path, x: lora.changed(path, x, changes.get(part, {}))
    options = {"compute_dtype": dtype, "place_for": place_for, "weights": weights}
    opened = reader.open(folder, **options, **own)
    tokenizer = Tokenizer(opened.shapes.tokenizer)
    name = os.fspath(next(iter(files.given.values())) if source is None else source)

    def placed(network: nnx.Module) -> nnx.Module:
        """A network, told how devices share it."""
        if hasattr(network, "attend"):
            network.attend = attend
        if hasattr(network, "tiles"):
            network.tiles = vae_tiles
        return network

    def read(part: str) -> nnx.Module:
        """Reads a network."""
        return placed(opened.read(part))

    for part in opened.shapes.configs.networks:
        placed(getattr(opened.shapes, part))
    model = Model(name, opened.shapes, tokenizer, mesh, read)
    on_shapes(dataclasses.replace(model, read=None))
    return model.kept() if keep_in_memory else model


def describe(source: FilePath | None, files: Files = NO_FILES) -> Contents:
    """Describes a checkpoint without reading its weights; arguments and errors as in `load`."""
    reader, folder, own = _reader(source, files)
    return reader.describe(folder, **own)


def _reader(
    source: FilePath | None, files: Files
) -> tuple[ModuleType, epath.Path | None, dict[str, Any]]:
    """The module that reads a checkpoint, the checkpoint's folder, and further arguments."""
    from kvlock_jax.convert import source as published

    if source is None:
        return published, None, {"files": files}
    folder = epath.Path(_DEMO if os.fspath(source) == "demo" else source).expanduser()
    try:
        exists = folder.is_dir()
    except ImportError as error:  # gs:// without gcsfs; the message says which package to install
        raise CheckpointError(f"{source}: {error}") from error
    if not exists:
        raise CheckpointError(f"{source}: no such folder; give 'demo' or a checkpoint's folder")
    if files.given and not format.is_checkpoint(folder):
        return published, folder, {"files": files}
    if files.given:
        raise CheckpointError(
            f"{source} is a converted checkpoint; files of single parts take a published folder"
        )
    return published if published.is_published(folder) else format, folder, {}


def default_config(model: Model) -> ConfigDict:
    """The publisher's settings for a loaded model's size."""
    return config(default_config_name(model.name, model.checkpoint.configs))
