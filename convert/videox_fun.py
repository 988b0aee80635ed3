"""The layout of VideoX-Fun's own pipelines of Wan 2.2, which it saves as Diffusers saves its own.

Its `transformer` is the low-noise expert and `transformer_2` the high-noise one, the reverse of
Diffusers; tensors have the publisher's names. Origin: `pipeline_wan2_2_vace_fun.py` of
aigc-apps/VideoX-Fun.
"""

from collections.abc import Mapping
from pathlib import Path

from kvlock_jax.convert.parts import read_part
from kvlock_jax.convert.published import Part, Published, Tokens, files_in
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
        read = read_part(part, open_folder(place, stem), place)
        parts[part] = Part(read.config, read.weights, tuple(files(place, stem)))
    if not any(part.startswith("transformer") for part in parts):
        raise CheckpointError(f"{folder} has neither transformer/ nor transformer_2/")
    tokens = Tokens(folder / "tokenizer", tuple(files_in(folder / "tokenizer")))
    return Published.of_parts("videox-fun", folder, parts, tokens, {}, (folder / INDEX,))
