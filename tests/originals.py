"""The publisher's tiny models (tests/data/original) in a folder as the publisher lays one out."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from kvlock_jax.models.text import tokenizer

DATA = Path(__file__).parent / "data" / "original"
SIZES = json.loads((DATA / "config.json").read_text())
CLASSES = {"t2v": "WanModel", "vace": "VaceWanModel"}


def golden_inputs() -> list:
    """Latents, timestep and padded context of the tiny text-to-video model's golden velocity."""
    with np.load(DATA / "t2v_io.npz") as data:
        latents, timestep, context = (data[key] for key in ("latents", "timestep", "context"))
    padding = SIZES["dit"]["text_len"] - len(context)
    context = np.pad(context, ((0, padding), (0, 0)))[None]
    return [jnp.asarray(x) for x in (np.moveaxis(latents, 0, -1)[None], timestep, context)]


def wide_transformer() -> dict[str, np.ndarray]:
    """Random tensors of the tiny text-to-video model with a head of 128, as its sizes then tell."""
    rng, twice = np.random.default_rng(0), {64: 128, 6 * 64: 6 * 128}
    shapes = {key: tensor.shape for key, tensor in load_file(DATA / "t2v.safetensors").items()}
    wide = {key: [twice.get(n, n) for n in shape] for key, shape in shapes.items()}
    out = shapes["head.head.bias"][0]  # of latents, which happen to be as many
    wide |= {"head.head.weight": [out, 128], "head.head.bias": [out]}
    return {key: rng.normal(size=shape) for key, shape in wide.items()}


def write_folder(folder: Path, family: str = "t2v") -> Path:
    """One of `CLASSES`, as an original folder; Torch loads only where this is called."""
    folder.mkdir()
    shutil.copy(DATA / f"{family}.safetensors", folder / "diffusion_pytorch_model.safetensors")
    write_config(folder, family)
    write_pickle(DATA / "vae.safetensors", folder / "Wan2.1_VAE.pth")
    write_pickle(DATA / "umt5.safetensors", folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer.write_word_tokenizer(folder / "google" / "umt5-xxl", ["a", "red", "star"], 24)
    return folder


def write_config(folder: Path, family: str, **changes) -> None:
    """The transformer's `config.json`, with some values of its own; None leaves one out."""
    sizes = SIZES["dit"] | {"_class_name": CLASSES[family], "model_type": family} | changes
    if family == "t2v":
        sizes = {name: value for name, value in sizes.items() if "vace" not in name}
    written = {name: value for name, value in sizes.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(written))


def write_pickle(source: Path, target: Path, **kwargs) -> None:
    """The tensors of a safetensors file, pickled by Torch."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(source), target, **kwargs)
