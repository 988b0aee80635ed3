"""Opens Diffusers folders of Wan 2.1: their layout and their configs.

A folder holds `model_index.json` and one folder each for the transformer, the VAE, the text
encoder, the tokenizer and the scheduler. Our modules keep its names, so the tables below only
rename leaves (`weight` to what it is), move layer indices to the stacked axis, and drop axes of
size 1.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvlock_jax.checkpoints import registry
from kvlock_jax.convert.published import Part, Published, Tokens, Weights, files_in
from kvlock_jax.convert.table import (
    Row,
    Table,
    fill,
    kernel,
    patches,
    per_channel,
    pointwise,
    unbatched,
)
from kvlock_jax.convert.weights import files as weight_files
from kvlock_jax.convert.weights import open_folder, read_json
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.settings.fields import from_config_dict

WAN: Table = (
    Row(r"(\w*patch_embedding)\.kernel", r"\1.weight", patches),
    Row(r"vace_proj_in\.kernel", "vace_blocks.0.proj_in.weight", kernel),
    Row(r"vace_proj_in\.bias", "vace_blocks.0.proj_in.bias"),
    Row(r"scale_shift_table", "scale_shift_table", unbatched),
    Row(r"(\w*blocks)\.scale_shift_table", r"\1.*.scale_shift_table", unbatched),
    Row(r"(\w*blocks)\.(.+\.to_out)\.kernel", r"\1.*.\2.0.weight", kernel),  # 1 is dropout
    Row(r"(\w*blocks)\.(.+\.to_out)\.bias", r"\1.*.\2.0.bias"),
    Row(r"(\w*blocks)\.ffn\.net_0\.kernel", r"\1.*.ffn.net.0.proj.weight", kernel),
    Row(r"(\w*blocks)\.ffn\.net_0\.bias", r"\1.*.ffn.net.0.proj.bias"),
    Row(r"(\w*blocks)\.ffn\.net_2\.kernel", r"\1.*.ffn.net.2.weight", kernel),
    Row(r"(\w*blocks)\.ffn\.net_2\.bias", r"\1.*.ffn.net.2.bias"),
    Row(r"(\w*blocks)\.(.+)\.kernel", r"\1.*.\2.weight", kernel),
    Row(r"(\w*blocks)\.(.+)\.scale", r"\1.*.\2.weight"),
    Row(r"(\w*blocks)\.(.+\.bias)", r"\1.*.\2"),
    Row(r"(.+)\.kernel", r"\1.weight", kernel),
    Row(r"(.+\.bias)", r"\1"),
)
"""VACE's context blocks have the layout of the main blocks."""

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
      name: name of its folder, and of its field in `Configs` and `Checkpoint`.
      stem: stem of its weight files' names.
      family: class that its `config.json` must name.
      config: dataclass of its sizes; `config.json` must hold every field except the `absent`.
      fixed: values that our module assumes; another value in `config.json` is another architecture.
      table: layout of its weights.
      absent: fields of `config` that this family lacks.
      part: the part of a checkpoint that it is, one of `files.PARTS`; by default its name.
      optional: fields of `config` that older exports lack; Diffusers' default is ours.
      implied: values of `config.json` that follow from a config; others are another architecture.
    """

    name: str
    stem: str
    family: str
    config: type
    fixed: Mapping[str, Any]
    table: Table
    absent: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    implied: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    part: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", self.part or self.name)


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
    WAN,
    absent=("vace_layers", "vace_in_channels"),
)

VACE_TRANSFORMER = dataclasses.replace(TRANSFORMER, family="WanVACETransformer3DModel", absent=())

AUTOENCODER = Component(
    "vae",
    "diffusion_pytorch_model",
    "AutoencoderKLWan",
    VAEConfig,
    {"attn_scales": []},
    VAE,
    optional=("decoder_base_dim", "is_residual", "patch_size"),
    implied=lambda config: dict.fromkeys(("in_channels", "out_channels"), config.pixel_channels),
)

TEXT_ENCODER = Component(
    "text_encoder",
    "model",
    "UMT5EncoderModel",
    UMT5Config,
    {"feed_forward_proj": "gated-gelu"},
    UMT5,
)

PIPELINES = {
    "WanPipeline": (TRANSFORMER, AUTOENCODER, TEXT_ENCODER),
    "WanVACEPipeline": (VACE_TRANSFORMER, AUTOENCODER, TEXT_ENCODER),
}
"""The models of a folder, by the class that its `model_index.json` names."""

SCHEDULER = "scheduler/scheduler_config.json"

EXPERTS = {"transformer": "high", "transformer_2": "low"}
"""The roles of the transformers of Wan 2.2's A14B, by the names of their folders."""


def components(folder: str | Path) -> tuple[Component, ...]:
    """The models of a Diffusers folder.

    Where the pipeline has two transformers or a `boundary_ratio` between them, they are experts,
    one of which may be absent. A run takes the boundary of its own settings.

    Raises:
      CheckpointError: if it is not a Wan folder, of text-to-video or VACE.
    """
    index = Path(folder) / "model_index.json"
    described = read_json(index)
    _check_family(index, described, tuple(PIPELINES), {})
    first, *others = PIPELINES[_family(described)]
    absent = (None, [None, None])
    found = {"transformer": True, "transformer_2": None} | described
    there = [name for name in EXPERTS if found[name] not in absent]
    if not there:
        raise CheckpointError(f"{index} names neither transformer nor transformer_2")
    if there == ["transformer"] and described.get("boundary_ratio") is None:
        return (first, *others)
    experts = (
        dataclasses.replace(first, name=name, part=f"transformer_{EXPERTS[name]}") for name in there
    )
    return (*experts, *others)


def _check_folders(folder: Path, names: Iterable[str]) -> None:
    if absent := [f"{name}/" for name in names if not (folder / name).is_dir()]:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}")


def read_config(folder: Path, component: Component) -> Any:
    """The config dataclass of one component's folder.

    Raises:
      CheckpointError: `config.json` is missing, is of another family or architecture, or lacks a
        size. (Diffusers would use its own default, which may differ from ours.)
    """
    path = folder / "config.json"
    values = read_json(path)
    _check_family(path, values, (component.family,), component.fixed)
    fields = (field.name for field in dataclasses.fields(component.config))
    names = [name for name in fields if name not in component.absent]
    if absent := [name for name in names if name not in {*values, *component.optional}]:
        raise CheckpointError(f"{path} has no {', '.join(absent)}")
    try:
        config = from_config_dict(component.config, {name: values.get(name) for name in names})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_fixed(path, values, component.implied(config))
    return config


def _family(values: dict) -> Any:
    """The class that a config names: `_class_name` for Diffusers, `architectures` elsewhere."""
    architectures = values.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    return values.get("_class_name") or next(iter(listed), None)


def _check_family(
    path: Path, values: dict, families: tuple[str, ...], fixed: Mapping[str, Any]
) -> None:
    """Raises if a config is of another family, or has another value than a fixed one."""
    family = _family(values)
    if family not in families:
        raise CheckpointError(f"{path} is of a {family}, expected a {' or a '.join(families)}")
    _check_fixed(path, values, fixed)


def _check_fixed(path: Path, values: dict, fixed: Mapping[str, Any]) -> None:
    """Raises if a config has another value than a fixed one."""
    for name, expected in fixed.items():
        value = values.get(name, expected)
        # model_index.json writes an absent component as two nulls
        if value != expected and not (expected is None and value == [None, None]):
            raise CheckpointError(f"{path}: {name} is {value!r}, supported is only {expected!r}")


def open_published(
    folder: str | Path, given: Mapping[str, Part] | None = None, tokens: Tokens | None = None
) -> Published:
    """Opens a Diffusers folder without reading its weights.

    Args:
      folder: the folder.
      given: parts that take the place of the folder's, which need not be there.
      tokens: tokenizer that does the same.

    Raises:
      CheckpointError: the folder is not of Wan 2.1, or a file is missing or damaged.
    """
    folder, given = Path(folder), given or {}
    own = [part for part in components(folder) if part.part not in given]
    if any(name.startswith("transformer_") for name in given):
        own = [part for part in own if part.part != "transformer"]  # of no role beside experts
    names = [part.name for part in own] + ([] if tokens else ["tokenizer"])
    _check_folders(folder, [*names, "scheduler"])
    parts = {**given, **{part.part: _open_part(folder / part.name, part) for part in own}}
    tokens = tokens or Tokens(folder / "tokenizer", tuple(files_in(folder / "tokenizer")))
    others = (folder / "model_index.json", folder / SCHEDULER)
    scheduler = read_json(folder / SCHEDULER)
    return Published.of_parts("diffusers", folder, parts, tokens, scheduler, others)


def _open_part(place: Path, part: Component) -> Part:
    """A component in its own folder."""
    config, weights = read_config(place, part), open_folder(place, part.stem)
    files = (place / "config.json", *weight_files(place, part.stem))
    return Part(config, Weights(weights, part.table, place), files)


def load_model(
    folder: str | Path, component: Component, compute_dtype: Any = jnp.float32
) -> nnx.Module:
    """Loads one component from its own folder, such as `vae/`, to the first device.

    Raises:
      CheckpointError: the folder is another component's, is damaged, or its tensors do not fit.
    """
    folder = Path(folder)
    graph, state = nnx.split(abstract(component, read_config(folder, component), compute_dtype))
    tensors = open_folder(folder, component.stem)
    return nnx.merge(graph, fill(state, tensors, component.table, f"{folder}"))


def abstract(component: Component, config: Any, compute_dtype: Any = jnp.float32) -> nnx.Module:
    """The model of a component with shapes in place of parameters."""
    return registry.abstract(config, compute_dtype)
