"""The embedded model: it is small, Diffusers reads it, and it edits the bundled clip."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

import kvlock_jax as kvl
from kvlock_jax.demo.judge import judge
from kvlock_jax.video import read_mask, read_video

DEMO = Path(kvl.__file__).parent / "demo"
WEIGHTS = DEMO / "weights"


@pytest.fixture(scope="module")
def model():
    return kvl.load("demo")


def test_assets_are_small():
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB")
    assert size < 25e6


def test_diffusers_reads_the_transformer(model):
    peer = WanTransformer3DModel.from_pretrained(WEIGHTS / "transformer", torch_dtype=torch.float32)
    keys = jax.random.split(jax.random.key(0))
    z = jax.random.normal(keys[0], (1, 3, 12, 12, 16), jnp.float32)
    context = jax.random.normal(keys[1], (1, 8, 64), jnp.float32)
    ours = model.checkpoint.transformer
    found = ours(z, jnp.full((1,), 700.0), ours.condition(context, (3, 6, 6)))
    with torch.no_grad():
        expected = peer(
            torch.tensor(np.moveaxis(np.asarray(z), -1, 1)),
            torch.tensor([700.0]),
            torch.tensor(np.asarray(context)),
            return_dict=False,
        )[0]
    expected = np.moveaxis(expected.numpy(), 1, -1)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_diffusers_reads_the_vae(model):
    peer = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    assert tuple(peer.config.latents_std) == model.checkpoint.configs.vae.latents_std


def test_the_bundled_clip_is_edited(model):
    clip = read_video(DEMO / "clip.mp4").frames
    mask = read_mask(DEMO / "mask.mp4", *clip.shape[:3])
    before = judge(clip)
    assert (before.colour, before.shape) == ("red", "circle")
    result = kvl.edit(model, clip, mask, "a blue square", config=kvl.config("demo"))
    after = judge(result.video)
    ceiling = kvl.round_trip(model, clip)
    print(after.colour, after.shape, result.metrics)
    assert result.video.shape == clip.shape
    assert after.colour == "blue"
    unmasked = ~mask[..., None].repeat(3, -1)
    moved = np.abs(result.video.astype(int) - clip)[unmasked].mean()
    assert moved < 2 * np.abs(ceiling.astype(int) - clip)[unmasked].mean() + 1
