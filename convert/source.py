"""Recognises the layout of a published checkpoint, opens it, and loads it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.files import (
    NO_FILES,
    NO_LORAS,
    PARTS,
    ROLES,
    Files,
    Loras,
    beside,
    holds_tokenizer,
)
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import Checkpoint, Opened, PlaceFor
from kvlock_jax.convert import diffusers, original, sizes, videox_fun
from kvlock_jax.convert.lora import open_loras
from kvlock_jax.convert.parts import open_part, open_parts
from kvlock_jax.convert.published import Part, Published, Tokens, Weights, files_in
from kvlock_jax.convert.tokens import of_encoder
from kvlock_jax.convert.weights import files as weight_files
from kvlock_jax.convert.weights import open_folder, read_json, refuse
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
EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}
"""Files and folders of the publisher's layout."""


def is_published(folder: epath.PathLike) -> bool:
    """Whether a folder has the layout of a published checkpoint, complete or not."""
    return _is_diffusers(folder) or _is_original(folder) or _has(folder, *VAES)


def load(source: str | os.PathLike | None, *args: Any, **options: Any) -> Checkpoint:
    """Loads a published checkpoint whole; arguments and errors as in `open`."""
    return open(source, *args, **options).whole()


def open(
    source: str | os.PathLike | None,
    dtype: Any = None,
    compute_dtype: Any = jnp.float32,
    place_for: PlaceFor | None = None,
    weights: str | None = None,
    files: Files = NO_FILES,
    loras: Loras = NO_LORAS,
) -> Opened:
    """Opens a published checkpoint; see `Published.open`, and `open_source` for more errors.

    With `files`, which may be quantised, parameters are rounded to a compute dtype of 16 bits.
    """
    published = open_source(source, files, loras)
    if files.given and dtype is None and jnp.dtype(compute_dtype).itemsize == 2:
        dtype = compute_dtype
    return published.open(dtype, compute_dtype, place_for, weights)


def describe(source: str | os.PathLike | None, files: Files = NO_FILES) -> Contents:
    """Describes a published checkpoint without reading its weights; errors as in `open_source`."""
    return open_source(source, files).describe()


def open_source(
    source: str | os.PathLike | None, files: Files = NO_FILES, loras: Loras = NO_LORAS
) -> Published:
    """Opens a published checkpoint without reading its weights.

    Args:
      source: local folder in Diffusers' or the publisher's own layout; None where `files` are all
        that there is.
      files: files whose parts take the place of the folder's, which need not be there then.
      loras: files and strengths that change the transformers (`lora`).

    Raises:
      CheckpointError: the folder has neither layout, is not of Wan 2.1, or a file is missing,
        damaged or does not fit.
    """
    published = _opened(source, files)
    if files.given:
        _check_together(published)
    if loras == NO_LORAS:
        return published
    return dataclasses.replace(published, changes=open_loras(loras, published.configs))


def _opened(source: str | os.PathLike | None, files: Files) -> Published:
    given = open_parts(files)
    if source is None:
        return _of_files(files, given)
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
        if videox_fun.is_folder(folder):
            return videox_fun.open_published(folder, given)
        return diffusers.open_published(folder, given, _tokens(folder / "tokenizer", files))
    if format.is_checkpoint(folder):
        raise CheckpointError(f"{folder} is a converted checkpoint already")
    if given or _is_original(folder):
        return open_original(folder, given, _tokens(folder / TOKENIZER, files))
    for path in sorted(folder.iterdir()):
        refuse(path)
    raise CheckpointError(
        f"{folder} is no checkpoint that can be converted: it has neither {INDEX} (Diffusers' "
        f"layout) nor {' or '.join(WEIGHTS)} (the publisher's)"
    )


def _check_together(published: Published) -> None:
    """Raises if parts of several files are of models that do not go together."""
    parts, configs = published.weights, published.configs
    dit, channels, width = configs.transformer, configs.vae.z_dim, configs.text_encoder.d_model
    pairs = (
        ("vae", "latent channels", dit.in_channels, channels),
        ("vae", "latent channels", dit.out_channels, channels),
        ("text_encoder", "channels of text", dit.text_dim, width),
    )
    for name, what, wanted, found in pairs:
        if wanted != found:
            raise CheckpointError(
                f"{parts['transformer'].where} is for {wanted} {what}, but the {PARTS[name]} of "
                f"{parts[name].where} has {found}"
            )


def _of_files(files: Files, given: Mapping[str, Part]) -> Published:
    """A checkpoint without a folder."""
    experts = any(f"transformer_{role}" in given for role in ROLES)
    needed = [name for name in registry.NETWORKS if not (experts and name == "transformer")]
    if absent := [name for name in needed if name not in given]:
        raise CheckpointError(
            f"without a checkpoint's folder, files of all parts are needed; not given: "
            f"{', '.join(f'--{name}' for name in absent)}"
        )
    return Published.of_parts("files", None, given, of_encoder(beside(files.text_encoder)), {})


def _tokens(folder: Path, files: Files) -> Tokens | None:
    """The tokenizer of a text encoder's file where a checkpoint's folder has none."""
    if holds_tokenizer(folder) or files.text_encoder is None:
        return None
    return of_encoder(beside(files.text_encoder))


def open_original(
    folder: Path, given: Mapping[str, Part] | None = None, tokens: Tokens | None = None
) -> Published:
    """Opens a folder in the publisher's own layout, but for parts that are given."""
    given = given or {}
    vae = next((name for name in (VAE, VAE_48) if beside(folder / name).is_file()), VAE)
    names = {"vae": vae, "text_encoder": TEXT_ENCODER}
    paths = {part: beside(folder / name) for part, name in names.items()}
    own = _own_transformers(folder, given)
    described = {name: _description(place) for name, place in own.items()}
    absent = [names[part] for part in names if part not in given and not paths[part].is_file()]
    if tokens is None and not holds_tokenizer(folder / TOKENIZER):
        absent.append(f"{TOKENIZER}/tokenizer.json")
    if absent:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}")
    parts = dict(given)
    parts |= {name: _transformer(place, described[name]) for name, place in own.items()}
    for name in names:
        if name not in given:
            part = open_part(name, folder / names[name])
            parts[name] = dataclasses.replace(part, files=(paths[name],), apart={})
    tokens = tokens or Tokens(folder / TOKENIZER, tuple(files_in(folder / TOKENIZER)))
    return Published.of_parts("original", folder, parts, tokens, {})  # its solver is code


def _own_transformers(folder: Path, given: Mapping[str, Part]) -> dict[str, Path]:
    """The folders of the transformers that a published one supplies, by the part's name."""
    experts = {f"transformer_{role}": folder / name for role, name in EXPERTS.items()}
    experts = {part: place for part, place in experts.items() if _is_original(place)}
    if not experts:
        any_given = any(name.startswith("transformer") for name in given)
        return {} if any_given else {"transformer": folder}
    return {part: place for part, place in experts.items() if part not in given}


def _description(folder: Path) -> Mapping[str, Any]:
    """The `config.json` of a transformer of the publisher's layout, empty if there is none."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    one_of = (diffusers.TRANSFORMER.family, diffusers.VACE_TRANSFORMER.family)
    if values.get("_class_name") in one_of:
        raise CheckpointError(
            f"{folder} is one model of a Diffusers folder; give the one with model_index.json"
        )
    return values


def _transformer(folder: Path, described: Mapping[str, Any]) -> Part:
    """A transformer of the publisher's layout, in a folder of its own."""
    tensors = open_folder(folder, TRANSFORMER)
    read = (*weight_files(folder, TRANSFORMER), *([folder / "config.json"] if described else []))
    weights = Weights(tensors, original.WAN, folder)
    return Part(sizes.transformer(tensors, described, folder), weights, read)


def _is_diffusers(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / INDEX).exists()


def _is_original(folder: epath.PathLike) -> bool:
    names = [f"{expert}/{name}" for expert in EXPERTS.values() for name in WEIGHTS]
    return _has(folder, *WEIGHTS, *names)


def _has(folder: epath.PathLike, *names: str) -> bool:
    """Whether a folder has any of some files."""
    return any((epath.Path(folder) / name).exists() for name in names)
