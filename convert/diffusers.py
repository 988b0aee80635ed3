"""Diffusers folders of Wan 2.1: their layout, their configs, and loading them.

A folder holds `model_index.json` and one folder each for the transformer, the VAE, the text
encoder, the tokenizer and the scheduler. Our modules keep its names, so the tables below only
rename leaves (`weight` to what it is), move layer indices to the stacked axis, and drop axes of
size 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvlock_jax import checkpoint
from kvlock_jax.checkpoint import Checkpoint, Configs, Contents
from kvlock_jax.config import UMT5Config, VAEConfig, WanConfig, from_config_dict
from kvlock_jax.convert.table import (
    Row,
    Table,
    assemble,
    kernel,
    patches,
    per_channel,
    plan,
    pointwise,
    stream,
    unbatched,
)
from kvlock_jax.convert.weights import open_folder, read_json
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models.umt5 import UMT5Encoder
from kvlock_jax.models.vae import WanVAE
from kvlock_jax.models.wan import WanTransformer

WAN: Table = (
    Row(r"patch_embedding\.kernel", "patch_embedding.weight", patches),
    Row(r"scale_shift_table", "scale_shift_table", unbatched),
    Row(r"blocks\.scale_shift_table", "blocks.*.scale_shift_table", unbatched),
    Row(r"blocks\.(.+\.to_out)\.kernel", r"blocks.*.\1.0.weight", kernel),  # 1 is dropout
    Row(r"blocks\.(.+\.to_out)\.bias", r"blocks.*.\1.0.bias"),
    Row(r"blocks\.ffn\.net_0\.kernel", "blocks.*.ffn.net.0.proj.weight", kernel),
    Row(r"blocks\.ffn\.net_0\.bias", "blocks.*.ffn.net.0.proj.bias"),
    Row(r"blocks\.ffn\.net_2\.kernel", "blocks.*.ffn.net.2.weight", kernel),
    Row(r"blocks\.ffn\.net_2\.bias", "blocks.*.ffn.net.2.bias"),
    Row(r"blocks\.(.+)\.kernel", r"blocks.*.\1.weight", kernel),
    Row(r"blocks\.(.+)\.scale", r"blocks.*.\1.weight"),
    Row(r"blocks\.(.+\.bias)", r"blocks.*.\1"),
    Row(r"(.+)\.kernel", r"\1.weight", kernel),
    Row(r"(.+\.bias)", r"\1"),
)

VAE: Table = (
    Row(r"(.+\.resample)\.kernel", r"\1.1.weight", kernel),  # 0 is the padding or enlargement
    Row(r"(.+\.resample)\.bias", r"\1.1.bias"),
    Row(r"(.*(?:conv_shortcut|to_qkv|proj|quant_conv))\.kernel", r"\1.weight", pointwise),
    Row(r"(.+)\.kernel", r"\1.weight", kernel),
    Row(r"(.+\.gamma)", r"\1", per_channel),
    Row(r"(.+\.bias)", r"\1"),
)

UMT5: Table = (
    Row(r"shared\.embedding", "shared.weight", aliases=("encoder.embed_tokens.weight",)),
    Row(r"(final_layer_norm)\.scale", r"encoder.\1.weight"),
    Row(r"block\.(.+)\.kernel", r"encoder.block.*.\1.weight", kernel),
    Row(r"block\.(.+)\.(?:scale|embedding)", r"encoder.block.*.\1.weight"),
)


@dataclasses.dataclass(frozen=True)
class Component:
    """A model of the folder.

    Attributes:
      name: of its folder, and of its field in `Configs` and `Checkpoint`.
      stem: of its weight files.
      family: class that its `config.json` must name.
      config: dataclass of its sizes; every field must be in `config.json`.
      fixed: what our module holds fixed; another value in `config.json` is another architecture.
      model: module, called with config, `dtype` and `rngs`.
      table: its layout.
    """

    name: str
    stem: str
    family: str
    config: type
    fixed: Mapping[str, Any]
    model: type[nnx.Module]
    table: Table


TRANSFORMER = Component(
    "transformer",
    "diffusion_pytorch_model",
    "WanTransformer3DModel",
    WanConfig,
    {
        "qk_norm": "rms_norm_across_heads",
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    },
    WanTransformer,
    WAN,
)

AUTOENCODER = Component(
    "vae",
    "diffusion_pytorch_model",
    "AutoencoderKLWan",
    VAEConfig,
    {
        "attn_scales": [],
        "decoder_base_dim": None,
        "in_channels": 3,
        "out_channels": 3,
        "is_residual": False,
        "patch_size": None,
    },
    WanVAE,
    VAE,
)

TEXT_ENCODER = Component(
    "text_encoder",
    "model",
    "UMT5EncoderModel",
    UMT5Config,
    {"feed_forward_proj": "gated-gelu"},
    UMT5Encoder,
    UMT5,
)

COMPONENTS = (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)

_PIPELINE_FIXED = {"transformer_2": None, "boundary_ratio": None, "expand_timesteps": False}
"""Of Wan 2.2, which has two transformers, or a timestep for every token."""


def read_configs(folder: str | Path) -> Configs:
    """Reads the configs of a Diffusers folder, and no weights.

    Raises:
      CheckpointError: if it is not a Wan 2.1 text-to-video folder, or a part of it is missing.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    described = read_json(index)
    _check_family(index, described, "WanPipeline", _PIPELINE_FIXED)
    parts = [component.name for component in COMPONENTS] + ["tokenizer", "scheduler"]
    if absent := [f"{part}/" for part in parts if not (folder / part).is_dir()]:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}")
    models = {c.name: read_config(folder / c.name, c) for c in COMPONENTS}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Configs(**models, scheduler=scheduler)


def read_config(folder: Path, component: Component) -> Any:
    """The config dataclass of one component's folder.

    Raises:
      CheckpointError: if `config.json` is missing, of another family or architecture, or lacks a
        size. (Diffusers would fill in its own default; ours may differ.)
    """
    path = folder / "config.json"
    values = read_json(path)
    _check_family(path, values, component.family, component.fixed)
    names = [field.name for field in dataclasses.fields(component.config)]
    if absent := [name for name in names if name not in values]:
        raise CheckpointError(f"{path} has no {', '.join(absent)}")
    try:
        return from_config_dict(component.config, {name: values[name] for name in names})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_family(path: Path, values: dict, family: str, fixed: Mapping[str, Any]) -> None:
    """Raises where a config is not of the family, or has another value than a fixed one."""
    # Diffusers names its class in one way, Transformers in another
    found = values.get("_class_name") or (values.get("architectures") or [None])[0]
    if found != family:
        raise CheckpointError(f"{path} is of a {found}, expected a {family}")
    for name, expected in fixed.items():
        value = values.get(name, expected)
        # model_index.json writes a component that is not there as two nulls
        if value != expected and not (expected is None and value == [None, None]):
            raise CheckpointError(f"{path}: {name} is {value!r}, supported is only {expected!r}")


def describe(folder: str | Path) -> Contents:
    """What a Diffusers folder holds, without reading its weights.

    Raises:
      CheckpointError: if it is not a Wan 2.1 text-to-video folder, or a file is missing or damaged.
    """
    folder = Path(folder)
    configs = read_configs(folder)
    tensors = {c.name: open_folder(folder / c.name, c.stem).values() for c in COMPONENTS}
    return checkpoint.contents(configs, tensors)


def load(folder: str | Path, dtype: Any = None, compute_dtype: Any = jnp.float32) -> Checkpoint:
    """Loads a Diffusers folder.

    All tensors of all models are checked before any is read.

    Args:
      folder: the folder with `model_index.json`.
      dtype: of the parameters; None keeps the checkpoint's.
      compute_dtype: of the modules' matrix products.

    Raises:
      CheckpointError: if it is not a Wan 2.1 text-to-video folder, a file is missing or damaged, or
        tensors do not fit; then it lists every one of every model.
    """
    folder = Path(folder)
    configs = read_configs(folder)
    readers, problems = {}, []
    for component in COMPONENTS:
        config = getattr(configs, component.name)
        try:
            model = abstract(component, config, compute_dtype)
            readers[component.name] = _prepare(folder / component.name, component, model)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    models = {name: read(dtype) for name, read in readers.items()}
    return Checkpoint(configs, **models, tokenizer=folder / "tokenizer")


def load_model(
    folder: str | Path, component: Component, dtype: Any = None, compute_dtype: Any = jnp.float32
) -> nnx.Module:
    """Loads one component from its own folder, such as `vae/`; the rest is as in `load`."""
    folder = Path(folder)
    model = abstract(component, read_config(folder, component), compute_dtype)
    return _prepare(folder, component, model)(dtype)


def abstract(component: Component, config: Any, compute_dtype: Any = jnp.float32) -> nnx.Module:
    """The model of a component with shapes in place of parameters."""
    return checkpoint.abstract(component.model, config, compute_dtype)


def _prepare(folder: Path, component: Component, model: nnx.Module) -> Callable[[Any], nnx.Module]:
    """Checks the tensors of a component; what it returns reads them, in the dtype it is given."""
    graph, state = nnx.split(model)
    tensors = open_folder(folder, component.stem)
    sources = plan(state, tensors, component.table, f"{folder}")
    return lambda dtype: nnx.merge(graph, assemble(state, stream(sources, tensors, dtype)))
