"""The layout of VideoX-Fun's own pipelines of Wan 2.2, which it saves as Diffusers saves its own.

Its `transformer` is the low-noise expert and `transformer_2` the high-noise one, the reverse of
Diffusers; tensors have the publisher's names. Origin: `pipeline_wan2_2_vace_fun.py` of
aigc-apps/VideoX-Fun.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlock_jax.convert import original, sizes
from kvlock_jax.convert.parts import read_part
from kvlock_jax.convert.published import Part, Published, Tokens, Weights, files_in
from kvlock_jax.convert.weights import files, open_folder, read_json
from kvlock_jax.errors import CheckpointError

INDEX = "model_index.json"
PIPELINES = ("Wan2_2VaceFunPipeline", "Wan2_2Pipeline")
"""The classes that `model_index.json` names."""

FOLDERS = {
    "transformer_high": ("transformer_2", "diffusion_pytorch_model"),
    "transformer_low": ("transformer", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
}
"""The folder of each part, and the stem of its weights."""

_CLASSES = ("_class_name", "model_type")


def is_folder(folder: Path) -> bool:
    """Whether a folder with an index is of this layout."""
    return read_json(folder / INDEX).get("_class_name") in PIPELINES


def open_published(folder: Path, given: Mapping[str, Part]) -> Published:
    """Opens a folder without reading its weights, but for parts that are given.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    parts = dict(given)
    for part, (name, stem) in FOLDERS.items():
        place = folder / name
        if part in given or (part.startswith("transformer") and not place.is_dir()):
            continue
        tensors, read = open_folder(place, stem), tuple(files(place, stem))
        if part.startswith("transformer"):
            config = sizes.transformer(tensors, _described(place), place)
            parts[part] = Part(config, Weights(tensors, original.WAN, place), read)
        else:
            parts[part] = dataclasses.replace(read_part(part, tensors, place), files=read)
    if not any(part.startswith("transformer") for part in parts):
        raise CheckpointError(f"{folder} has neither transformer/ nor transformer_2/")
    tokens = Tokens(folder / "tokenizer", tuple(files_in(folder / "tokenizer")))
    return Published.of_parts("videox-fun", folder, parts, tokens, {}, (folder / INDEX,))


def _described(place: Path) -> Mapping[str, Any]:
    """What a transformer's `config.json` says of its sizes, under the classes of VideoX-Fun."""
    path = place / "config.json"
    values = read_json(path) if path.is_file() else {}
    return {name: value for name, value in values.items() if name not in _CLASSES}
