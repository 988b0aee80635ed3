"""Recognises the layout of a published checkpoint, opens it, and loads it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import Checkpoint, Configs, OnShapes, PlaceFor
from kvlock_jax.convert import diffusers, original, sizes
from kvlock_jax.convert.lora import Lora, open_loras
from kvlock_jax.convert.published import Published, Weights, files_in
from kvlock_jax.convert.weights import (
    files,
    open_folder,
    open_pickle,
    open_weights,
    read_json,
    refuse,
)
from kvlock_jax.errors import CheckpointError

INDEX = "model_index.json"
"""The file that marks a Diffusers folder."""

TRANSFORMER = "diffusion_pytorch_model"
WEIGHTS = (f"{TRANSFORMER}.safetensors", f"{TRANSFORMER}.safetensors.index.json")
VAE = "Wan2.1_VAE.pth"
VAE_48 = "Wan2.2_VAE.pth"
VAES = (VAE, "Wan2.1_VAE.safetensors", VAE_48, "Wan2.2_VAE.safetensors")
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
"""Files and folders of the publisher's layout."""


def is_published(folder: epath.PathLike) -> bool:
    """Whether a folder has the layout of a published checkpoint, complete or not."""
    return _is_diffusers(folder) or _is_original(folder) or _has(folder, *VAES)


def load(
    source: str | os.PathLike,
    dtype: Any = None,
    compute_dtype: Any = jnp.float32,
    place_for: PlaceFor | None = None,
    on_shapes: OnShapes = lambda checkpoint: None,
    transformer: Path | None = None,
    loras: Sequence[Lora] = (),
) -> Checkpoint:
    """Loads a published checkpoint; see `Published.load`, and `open_source` for more errors.

    With a `transformer` from a file of its own, which may be quantised, parameters are rounded to a
    compute dtype of 16 bits.
    """
    published = open_source(source, transformer, loras)
    if transformer and dtype is None and jnp.dtype(compute_dtype).itemsize == 2:
        dtype = compute_dtype
    return published.load(dtype, compute_dtype, place_for, on_shapes)


def describe(source: str | os.PathLike, transformer: Path | None = None) -> Contents:
    """Describes a published checkpoint without reading its weights; errors as in `open_source`."""
    return open_source(source, transformer).describe()


def open_source(
    source: str | os.PathLike, transformer: Path | None = None, loras: Sequence[Lora] = ()
) -> Published:
    """Opens a published checkpoint without reading its weights.

    Args:
      source: local folder in Diffusers' or the publisher's own layout.
      transformer: safetensors or GGUF file with the publisher's names, whose transformer takes the
        place of the folder's. One in the publisher's layout need not have one then.
      loras: files and strengths that change the transformer (`lora`).

    Raises:
      CheckpointError: the folder has neither layout, is not of Wan 2.1, or a file is missing,
        damaged or does not fit.
    """
    published = _opened(source, transformer)
    if not loras:
        return published
    model = registry.abstract(published.configs.transformer, jnp.float32)
    return dataclasses.replace(published, changes=open_loras(loras, model))


def _opened(source: str | os.PathLike, transformer: Path | None) -> Published:
    if transformer is not None and not transformer.is_file():
        raise CheckpointError(f"{transformer}: no such file of a transformer")
    if "://" in os.fspath(source):
        raise CheckpointError(f"{source}: published checkpoints are read from local folders only")
    folder = Path(source).expanduser()
    if folder.is_file():
        refuse(folder)
        raise CheckpointError(
            f"{folder} is a file; give the folder of a whole checkpoint, and a transformer's file "
            "as --transformer"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if _is_diffusers(folder):
        published = diffusers.open_published(folder)
        return published if transformer is None else _with_transformer(published, transformer)
    if format.is_checkpoint(folder):
        raise CheckpointError(f"{folder} is a converted checkpoint already")
    if _is_original(folder) or (transformer is not None and _has(folder, *VAES)):
        return open_original(folder, transformer)
    for path in sorted(folder.iterdir()):
        refuse(path)
    raise CheckpointError(
        f"{folder} is no checkpoint that can be converted: it has neither {INDEX} (Diffusers' "
        f"layout) nor {' or '.join(WEIGHTS)} (the publisher's)"
    )


def _with_transformer(published: Published, file: Path) -> Published:
    """A checkpoint with the transformer of a file in place of its own."""
    tensors = open_weights(file)
    config = sizes.transformer(tensors, {}, file)
    return dataclasses.replace(
        published,
        configs=dataclasses.replace(published.configs, transformer=config),
        weights={**published.weights, "transformer": Weights(tensors, original.WAN, file)},
        apart=(file,),
    )


def open_original(folder: Path, transformer: Path | None = None) -> Published:
    """Opens a folder in the publisher's own layout, as `open_source` does."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() and transformer is None else {}
    one_of = (diffusers.TRANSFORMER.family, diffusers.VACE_TRANSFORMER.family)
    if values.get("_class_name") in one_of:
        raise CheckpointError(
            f"{folder} is one model of a Diffusers folder; give the one with model_index.json"
        )
    vae = next((name for name in (VAE, VAE_48) if _beside(folder / name).is_file()), VAE)
    parts = {name: _beside(folder / name) for name in (vae, TEXT_ENCODER)}
    absent = [name for name, path in parts.items() if not path.is_file()]
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        absent.append(f"{TOKENIZER}/tokenizer.json")
    if absent:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}")
    own = open_folder(folder, TRANSFORMER) if transformer is None else open_weights(transformer)
    tensors = {
        "transformer": own,
        "vae": open_pickle(folder / vae),
        "text_encoder": open_pickle(folder / TEXT_ENCODER),
    }
    configs = Configs(
        sizes.transformer(own, values, transformer or folder),
        sizes.vae(tensors["vae"], parts[vae]),
        sizes.umt5(tensors["text_encoder"], parts[TEXT_ENCODER]),
        {},  # the publisher's solver is code
    )
    weights = {
        "transformer": Weights(own, original.WAN, transformer or folder),
        "vae": Weights(tensors["vae"], original.vae(configs.vae), parts[vae]),
        "text_encoder": Weights(tensors["text_encoder"], original.UMT5, parts[TEXT_ENCODER]),
    }
    read = [*parts.values(), *files_in(folder / TOKENIZER)]
    if transformer is None:
        read += files(folder, TRANSFORMER)
    if values:
        read.append(config)
    tokenizer = folder / TOKENIZER
    apart = () if transformer is None else (transformer,)
    return Published("original", folder, configs, weights, tokenizer, tuple(read), apart)


def _is_diffusers(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / INDEX).exists()


def _is_original(folder: epath.PathLike) -> bool:
    return _has(folder, *WEIGHTS)


def _has(folder: epath.PathLike, *names: str) -> bool:
    """Whether a folder has any of some files."""
    return any((epath.Path(folder) / name).exists() for name in names)


def _beside(path: Path) -> Path:
    """The file that `open_pickle` reads for a path."""
    converted = path.with_suffix(".safetensors")
    return converted if converted.is_file() else path
