"""Derives the sizes of an original folder's models from their tensors.

The transformer's `config.json` is sometimes missing, and the VAE and the text encoder never have
one: the publisher's code holds their sizes as arguments.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlock_jax.convert.table import LazyTensor
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.settings.fields import from_config_dict

Tensors = Mapping[str, LazyTensor]

HEAD = 128
"""Head size of every published transformer, which does not follow from any tensor."""

# Of the publisher's VAEs: Wan 2.1's (`wan/modules/vae.py`), as in the defaults of Diffusers'
# AutoencoderKLWan, and Wan 2.2's (`wan/modules/vae2_2.py`).
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENTS_MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
_STATISTICS = {16: (LATENTS_MEAN, LATENTS_STD), 48: (LATENTS_MEAN_48, LATENTS_STD_48)}
"""Means and deviations by the number of latent channels."""

_FAMILIES = {"WanModel": "t2v", "VaceWanModel": "vace"}
"""`model_type` by `_class_name` of the supported models' `config.json`."""


def transformer(tensors: Tensors, described: Mapping[str, Any], where: Path) -> WanConfig:
    """Sizes of a transformer, text-to-video or VACE.

    Args:
      tensors: tensors of the transformer.
      described: contents of its `config.json`, empty if there is none. Only this gives the number
        of heads and VACE's layers; without it heads have the published size, and context blocks
        are evenly spaced.
      where: path that errors name.

    Raises:
      CheckpointError: the tensors are another model's, or `config.json` contradicts them.
    """
    _check_family(tensors, described, where)
    dim, in_channels, *patch = _shape(tensors, "patch_embedding.weight", 5, where)
    layers, contexts = _count(tensors, r"blocks"), _count(tensors, r"vace_blocks")
    found = {
        "dim": dim,
        "in_dim": in_channels,
        "patch_size": patch,
        "num_layers": layers,
        "ffn_dim": _shape(tensors, "blocks.0.ffn.0.weight", 2, where)[0],
        "freq_dim": _shape(tensors, "time_embedding.0.weight", 2, where)[1],
        "text_dim": _shape(tensors, "text_embedding.0.weight", 2, where)[1],
        "out_dim": _shape(tensors, "head.head.weight", 2, where)[0] // math.prod(patch),
    }
    if contexts:
        found["vace_in_dim"] = _shape(tensors, "vace_patch_embedding.weight", 5, where)[1]
    for name, value in found.items():
        if described.get(name, value) != value:
            raise CheckpointError(
                f"{where}: config.json has {name} {described[name]!r}, the tensors have {value!r}"
            )
    heads = described.get("num_heads") or dim // HEAD
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 0:
        raise CheckpointError(
            f"{where}: num_heads of config.json must be a whole number, found {heads!r:.80}"
        )
    if not heads or dim % heads:
        raise CheckpointError(
            f"{where}: width {dim} is not of {heads or 'any'} heads"
            + ("" if described else f" of {HEAD}; put the publisher's config.json beside it")
        )
    values = {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_layers": layers,
        "ffn_dim": found["ffn_dim"],
        "in_channels": in_channels,
        "out_channels": found["out_dim"],
        "text_dim": found["text_dim"],
        "freq_dim": found["freq_dim"],
        "patch_size": patch,
        "cross_attn_norm": "blocks.0.norm3.weight" in tensors,
        "eps": described.get("eps"),
        "vace_layers": _context_layers(described, layers, contexts, where),
        "vace_in_channels": found.get("vace_in_dim"),
    }
    try:
        return from_config_dict(WanConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_family(tensors: Tensors, described: Mapping[str, Any], where: Path) -> None:
    name = described.get("_class_name", "WanModel")
    if name not in tuple(_FAMILIES):  # it may be of any type
        expected = " or ".join(_FAMILIES)
        raise CheckpointError(f"{where / 'config.json'} is of a {name}, expected a {expected}")
    kind = described.get("model_type")
    if kind not in (None, *_FAMILIES.values()) or any(
        key.startswith("img_emb.") for key in tensors
    ):
        raise CheckpointError(
            f"{where} is of model type {kind or 'i2v'!r}, supported are 't2v' and 'vace'"
        )


def _context_layers(
    described: Mapping[str, Any], layers: int, contexts: int, where: Path
) -> list[int]:
    """The blocks after which VACE adds a hint."""
    if not contexts:
        return []
    if listed := described.get("vace_layers"):
        if not isinstance(listed, list):
            raise CheckpointError(
                f"{where}: vace_layers of config.json must be a list, found {listed!r:.80}"
            )
        if len(listed) != contexts:
            raise CheckpointError(
                f"{where}: config.json has {len(listed)} vace_layers, the tensors have {contexts}"
            )
        return listed
    if layers % contexts:
        raise CheckpointError(
            f"{where}: {contexts} context blocks do not stand at even distances among {layers}; "
            "put the publisher's config.json beside it"
        )
    return list(range(0, layers, layers // contexts))


def vae(tensors: Tensors, where: Path) -> VAEConfig:
    """Sizes of a VAE, Wan 2.1's or Wan 2.2's, which nests the names of each level's modules.

    Raises:
      CheckpointError: the tensors are another model's, or its latents have no published statistics.
    """
    base, pixels = _shape(tensors, "encoder.conv1.weight", 5, where)[:2]
    z_dim = _shape(tensors, "conv2.weight", 5, where)[0]
    if z_dim not in _STATISTICS:
        expected = " and ".join(map(str, _STATISTICS))
        raise CheckpointError(
            f"{where} has {z_dim} latent channels, published are VAEs with {expected}"
        )
    mean, std = _STATISTICS[z_dim]
    top = "encoder.downsamples"
    levels = _numbered(tensors, top)
    nested = [one for level in levels for one in _numbered(tensors, f"{level}.downsamples")]
    widths, blocks, temporal, at_level = [], [], [], 0
    for path in nested or levels:
        if f"{path}.resample.1.weight" in tensors:
            temporal.append(f"{path}.time_conv.weight" in tensors)
            blocks.append(at_level)
            at_level = 0
            continue
        width = _shape(tensors, f"{path}.residual.2.weight", 5, where)[0]
        if at_level == 0:
            widths.append(width)
        at_level += 1
    if set(blocks) != {at_level} or any(width % base for width in widths):
        raise CheckpointError(f"{where} is no VAE of Wan: its levels are unlike each other")
    decoder = _shape(tensors, "decoder.conv1.weight", 5, where)[0] * base // widths[-1]
    try:
        return VAEConfig(
            base_dim=base,
            z_dim=z_dim,
            dim_mult=tuple(width // base for width in widths),
            num_res_blocks=at_level,
            temperal_downsample=tuple(temporal),
            latents_mean=mean,
            latents_std=std,
            decoder_base_dim=None if decoder == base else decoder,
            is_residual=bool(nested),
            patch_size=math.isqrt(pixels // 3),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def umt5(tensors: Tensors, where: Path) -> UMT5Config:
    """Sizes of a text encoder; distances and epsilon are constants of the publisher's code.

    Raises:
      CheckpointError: the tensors are another model's.
    """
    vocabulary, width = _shape(tensors, "token_embedding.weight", 2, where)
    buckets, heads = _shape(tensors, "blocks.0.pos_embedding.embedding.weight", 2, where)
    inner = _shape(tensors, "blocks.0.attn.q.weight", 2, where)[0]
    try:
        return UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=inner // heads,
            d_ff=_shape(tensors, "blocks.0.ffn.fc1.weight", 2, where)[0],
            num_layers=_count(tensors, r"blocks"),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _shape(tensors: Tensors, key: str, rank: int, where: Path) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(f"{where} has no {key}: it is no original checkpoint of Wan 2.1")
    shape = tensors[key].shape
    if len(shape) != rank or 0 in shape:
        expected = f"{rank} axes, none of length 0"
        raise CheckpointError(f"{where}: {key} is {list(shape)}, expected {expected}")
    return shape


def _numbered(tensors: Tensors, path: str) -> list[str]:
    """The numbered modules under a path, in order."""
    matches = (re.match(rf"{re.escape(path)}\.(\d+)\.", key) for key in tensors)
    return [f"{path}.{number}" for number in sorted({int(match[1]) for match in matches if match})]


def _count(tensors: Tensors, path: str) -> int:
    """The number of numbered modules under a path."""
    matches = (re.match(rf"{path}\.(\d+)\.", key) for key in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
