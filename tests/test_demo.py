"""The embedded model: it is small, Diffusers reads it, and it edits the bundled clip."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whole
from diffusers import AutoencoderKLWan, WanVACEPipeline, WanVACETransformer3DModel

import kvlock_jax as kvl
from kvlock_jax.demo.judge import judge
from kvlock_jax.media.decode import read_video
from kvlock_jax.media.masks import read_mask

DEMO = Path(kvl.__file__).parent / "demo"
WEIGHTS = DEMO / "weights"


@pytest.fixture(scope="module")
def model():
    return kvl.load("demo")


def test_assets_are_small():
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB")
    assert size < 30e6


def test_diffusers_reads_the_transformer(model):
    peer = WanVACETransformer3DModel.from_pretrained(
        WEIGHTS / "transformer", torch_dtype=torch.float32
    )
    keys = jax.random.split(jax.random.key(0), 3)
    z = jax.random.normal(keys[0], (1, 3, 12, 12, 16), jnp.float32)
    text = jax.random.normal(keys[1], (1, 8, 64), jnp.float32)
    control = jax.random.normal(keys[2], (1, 3, 12, 12, 96), jnp.float32)
    ours = model.checkpoint.transformer
    context = whole.WholeContext(text, control, jnp.full((1,), 0.7))
    found = whole.velocity(ours, z, jnp.full((1,), 700.0), context)

    def theirs(x):
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))

    hints = torch.full((len(model.checkpoint.configs.transformer.vace_layers),), 0.7)
    with torch.no_grad():
        expected = peer(
            theirs(z),
            torch.tensor([700.0]),
            torch.tensor(np.asarray(text)),
            control_hidden_states=theirs(control),
            control_hidden_states_scale=hints,
            return_dict=False,
        )[0]
    expected = np.moveaxis(expected.numpy(), 1, -1)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_diffusers_reads_the_vae(model):
    peer = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    assert tuple(peer.config.latents_std) == model.checkpoint.configs.vae.latents_std
    assert WanVACEPipeline.load_config(WEIGHTS)["_class_name"] == "WanVACEPipeline"


def test_the_bundled_clip_is_edited(model, tmp_path):
    """By a command that is compiled as a user's is, with the optimisations that the suite lacks."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "kvlock_jax.cli.main", "edit", "--ckpt_dir=demo"]
    command += [f"--src_video={DEMO / 'clip.mp4'}", f"--src_mask={DEMO / 'mask.mp4'}"]
    command += ["--prompt=a blue square", "--save_file=out.mkv", "--lossless"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    video, clip = read_video(tmp_path / "out.mkv").frames, read_video(DEMO / "clip.mp4").frames
    assert video.shape == clip.shape
    before, after = judge(clip), judge(video)
    assert (before.colour, before.shape) == ("red", "circle")
    assert (after.colour, after.shape) == ("blue", "square")
    unmasked = ~read_mask(DEMO / "mask.mp4", *clip.shape[:3])[..., None].repeat(3, -1)
    ceiling = kvl.round_trip(model, clip)
    moved, least = (np.abs(x.astype(int) - clip)[unmasked].mean() for x in (video, ceiling))
    assert moved < 2 * least + 1
