"""Opens files of single parts of a checkpoint, in every layout in which people hold them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kvlock_jax.checkpoints.files import PARTS, Files, beside
from kvlock_jax.convert import diffusers, original, sizes
from kvlock_jax.convert.published import Part, Weights
from kvlock_jax.convert.sizes import Tensors
from kvlock_jax.convert.tokens import SPIECE
from kvlock_jax.convert.weights import open_weights
from kvlock_jax.errors import CheckpointError

_Renames = tuple[tuple[str, str], ...]

_VAE: _Renames = (
    (r"encoder\.conv_in\.", "encoder.conv1."),
    (r"post_quant_conv\.", "conv2."),
    (r"encoder\.down_blocks\.(\d+)\.conv1\.", r"encoder.downsamples.\1.residual.2."),
    (r"encoder\.down_blocks\.(\d+)\.(resample|time_conv)\.", r"encoder.downsamples.\1.\2."),
    (
        r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.",
        r"encoder.downsamples.\1.downsamples.\2.residual.2.",
    ),
    (
        r"encoder\.down_blocks\.(\d+)\.downsampler\.(resample|time_conv)\.",
        r"encoder.downsamples.\1.downsamples.9.\2.",  # after all residual blocks
    ),
    (r"decoder\.conv_in\.", "decoder.conv1."),
)
"""Diffusers' names of what `sizes.vae` reads, and the publisher's."""

_UMT5: _Renames = (
    (r"(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.", r"blocks.\1.attn.q."),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
)
"""Transformers' names of what `sizes.umt5` reads, and the publisher's."""

_LLAMA: _Renames = (
    (r"token_embd\.", "shared."),
    (r"enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"enc\.blk\.(\d+)\.attn_rel_b\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
)
"""llama.cpp's names of a T5 encoder, and Transformers'."""


def open_parts(files: Files) -> dict[str, Part]:
    """The parts that files are given for.

    Raises:
      CheckpointError: a file is missing or damaged, or is another model's.
    """
    if absent := [(name, path) for name, path in files.given.items() if not path.is_file()]:
        raise CheckpointError(f"{absent[0][1]}: no such file of a {PARTS[absent[0][0]]}")
    return {name: open_part(name, path) for name, path in files.given.items()}


def open_part(name: str, path: Path) -> Part:
    """A part from its file; errors as in `open_parts`."""
    place = beside(path)
    part = read_part(name, open_weights(path), place)
    return dataclasses.replace(part, apart={f"{name}/{place.name}": place})


def read_part(name: str, tensors: Tensors, where: Path) -> Part:
    """A part of tensors; errors as in `open_parts`."""
    return Part(*_READERS[name](tensors, where))


def _transformer(tensors: Tensors, path: Path) -> tuple[sizes.WanConfig, Weights]:
    return sizes.transformer(tensors, {}, path), Weights(tensors, original.WAN, path)


def _vae(tensors: Tensors, path: Path) -> tuple[sizes.VAEConfig, Weights]:
    if "encoder.conv1.weight" in tensors:
        config = sizes.vae(tensors, path)
        return config, Weights(tensors, original.vae(config), path)
    if "encoder.conv_in.weight" in tensors:
        config = sizes.vae(_renamed(tensors, _VAE), path)
        return config, Weights(tensors, diffusers.VAE, path)
    raise CheckpointError(
        f"{path} is no VAE of Wan: it has neither encoder.conv1.weight (the publisher's names) nor "
        "encoder.conv_in.weight (Diffusers')"
    )


def _text_encoder(tensors: Tensors, path: Path) -> tuple[sizes.UMT5Config, Weights]:
    tensors = {key: tensor for key, tensor in tensors.items() if key != SPIECE}
    if "token_embedding.weight" in tensors:
        return sizes.umt5(tensors, path), Weights(tensors, original.UMT5, path)
    if "token_embd.weight" in tensors:
        tensors = _renamed(tensors, _LLAMA)
    named = _renamed(tensors, _UMT5)
    if "token_embedding.weight" not in named:
        raise CheckpointError(
            f"{path} is no UMT5 encoder: it has no token_embedding.weight (the publisher's names), "
            "shared.weight (Transformers') or token_embd.weight (llama.cpp's)"
        )
    biases = sum(".pos_embedding." in key for key in named)
    config = sizes.umt5(named, path)
    if biases != config.num_layers:
        raise CheckpointError(
            f"{path} is a T5, not a UMT5: {biases} of {config.num_layers} blocks have a "
            "relative_attention_bias, expected all"
        )
    return config, Weights(tensors, diffusers.UMT5, path)


_READERS: Mapping[str, Callable[[Tensors, Path], tuple]] = {
    **dict.fromkeys(("transformer", "transformer_high", "transformer_low"), _transformer),
    "vae": _vae,
    "text_encoder": _text_encoder,
}


def _renamed(tensors: Tensors, renames: _Renames) -> Tensors:
    """Tensors under the names of another layout, where there is one."""

    def name(key: str) -> str:
        """The new name of a tensor."""
        for pattern, new in renames:
            if found := re.match(pattern, key):
                return found.expand(new) + key[found.end() :]
        return key

    return {name(key): tensor for key, tensor in tensors.items()}
