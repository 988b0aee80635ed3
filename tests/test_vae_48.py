"""Wan 2.2's VAE of 48 channels against Diffusers and the publisher's outputs."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from peers import relative_l2
from test_vae import channels_last, jitted

from kvlock_jax.checkpoints import registry
from kvlock_jax.convert import diffusers, original, parts, sizes, table, weights
from kvlock_jax.errors import ConfigError, InputError
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.config import VAEConfig

DATA = Path(__file__).parent / "data"

PUBLISHED = VAEConfig(
    base_dim=160,
    z_dim=48,
    latents_mean=sizes.LATENTS_MEAN_48,
    latents_std=sizes.LATENTS_STD_48,
    decoder_base_dim=256,
    is_residual=True,
    patch_size=2,
)

CASES = {
    "as published": dict(base_dim=4, z_dim=6, num_res_blocks=1, decoder_base_dim=6),
    "other widths": dict(base_dim=6, z_dim=3, dim_mult=(1, 2, 2, 2), num_res_blocks=2),
    "time halved first": dict(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(True, True, False),
        decoder_base_dim=8,
    ),
}


@functools.cache
def built(name):
    """Diffusers' VAE, all parameters far from their initial values, and ours from its files."""
    rng, given = np.random.default_rng(0), CASES[name]
    config = VAEConfig(
        **given,
        latents_mean=tuple(rng.normal(size=given["z_dim"])),
        latents_std=tuple(rng.uniform(0.5, 2.0, given["z_dim"])),
        is_residual=True,
        patch_size=2,
    )
    torch.manual_seed(0)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    pixels = {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    peer = AutoencoderKLWan(**values, **pixels).eval()
    for key, parameter in peer.named_parameters():
        norm = key.endswith("gamma")
        scale = math.prod(parameter.shape[1:]) ** -0.5 if key.endswith("weight") else 0.3
        scale *= 0.05 if "decoder.conv_out" in key else 1.0  # Diffusers clamps pixels
        torch.nn.init.normal_(parameter, float(norm), scale)
    return peer, config


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    peer, config = built(request.param)
    folder = tmp_path_factory.mktemp("vae")
    peer.save_pretrained(folder)
    ours = diffusers.load_model(folder, diffusers.AUTOENCODER)
    assert ours.config.strides == config.strides
    return peer, ours


@pytest.mark.parametrize("frames", [1, 9])
def test_equals_diffusers(pair, frames):
    peer, ours = pair
    config = ours.config
    rng = np.random.default_rng(1)
    video = rng.uniform(-1, 1, (1, frames, 32, 48, 3)).astype(np.float32)
    latents = rng.normal(size=(1, (frames + 3) // 4, 2, 3, config.z_dim)).astype(np.float32)
    mean, std = (np.array(x, np.float32) for x in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        moved = torch.from_numpy(video).permute(0, 4, 1, 2, 3)
        want = (channels_last(peer.encode(moved).latent_dist.mean) - mean) / std
        moved = torch.from_numpy(latents * std + mean).permute(0, 4, 1, 2, 3)
        pixels = channels_last(peer.decode(moved).sample)
    assert relative_l2(jitted(WanVAE.encode, ours)(video), want) < 1e-5
    assert np.abs(pixels).max() < 1
    assert relative_l2(jitted(WanVAE.decode, ours)(latents), pixels) < 1e-5


@functools.cache
def published():
    """The publisher's tiny VAE, and what it returned."""
    with np.load(DATA / "wan22" / "vae_io.npz") as data:
        arrays = dict(data)
    given = json.loads((DATA / "wan22" / "config.json").read_text())["vae"]
    config = VAEConfig(
        base_dim=given["dim"],
        z_dim=given["z_dim"],
        dim_mult=tuple(given["dim_mult"]),
        num_res_blocks=given["num_res_blocks"],
        temperal_downsample=tuple(given["temperal_downsample"]),
        latents_mean=tuple(arrays["latents_mean"].tolist()),
        latents_std=tuple(arrays["latents_std"].tolist()),
        decoder_base_dim=given["dec_dim"],
        is_residual=True,
        patch_size=2,
    )
    graph, abstract = nnx.split(registry.abstract(config))
    tensors = weights.open_file(DATA / "wan22" / "vae.safetensors")
    return nnx.merge(graph, table.fill(abstract, tensors, original.vae(config), "vae")), arrays


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_equals_the_publisher(frames):
    model, arrays = published()
    given = {key: np.moveaxis(x, 1, -1) for key, x in arrays.items() if x.ndim == 5}
    encode, decode = jitted(WanVAE.encode, model), jitted(WanVAE.decode, model)
    latents = given[f"latents_{frames}"]
    assert relative_l2(encode(given[f"video_{frames}"]), latents) < 1e-5
    assert relative_l2(decode(latents), given[f"decoded_{frames}"]) < 1e-5
    noise = decode(given[f"noise_{frames}"])
    assert relative_l2(noise, given[f"decoded_noise_{frames}"]) < 1e-5


def test_sizes_follow_from_the_publishers_tensors():
    model, _ = published()
    tensors = weights.open_file(DATA / "wan22" / "vae.safetensors")
    found = sizes.vae(tensors, Path("vae"))
    assert found.strides == (4, 16, 16)
    statistics = (model.config.latents_mean, model.config.latents_std)
    assert found == VAEConfig(
        **{**vars(model.config), "latents_mean": statistics[0], "latents_std": statistics[1]}
        | {"latents_mean": sizes.LATENTS_MEAN_48, "latents_std": sizes.LATENTS_STD_48}
    )


@pytest.mark.parametrize("chunk, tiles", [(2, 1), (1, 2)])
def test_chunks_and_tiles_change_nothing(chunk, tiles):
    model, _ = published()
    rng = np.random.default_rng(2)
    video = rng.uniform(-1, 1, (1, 9, 32, 256, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 3, 2, 16, 48)).astype(np.float32)
    cut = nnx.merge(*nnx.split(model))
    cut.tiles = tiles
    for function, x in ((WanVAE.encode, video), (WanVAE.decode, latents)):
        want = jitted(function, model)(x)
        got = jitted(functools.partial(function, chunk=chunk), cut)(x)
        assert relative_l2(got, want) < 1e-6


# -- names and sizes -----------------------------------------------------------------------------


def listed(layout: str) -> dict:
    text = (DATA / "layouts" / f"wan2.2-vae.{layout}.json").read_text()
    kind = np.dtype(np.float32)
    shapes = json.loads(text).items()
    return {key: table.LazyTensor(tuple(shape), kind, pytest.fail) for key, shape in shapes}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_published_key_lands_on_one_parameter(layout):
    tensors = listed(layout)
    rows = original.vae(PUBLISHED) if layout == "original" else diffusers.VAE
    model = nnx.state(registry.abstract(PUBLISHED))
    sources = table.plan(model, tensors, rows, layout)
    assert sorted(key for source in sources for key in source.keys) == sorted(tensors)
    assert len(sources) == len(jax.tree.leaves(model))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_published_file_needs_no_config(layout):
    assert parts.read_part("vae", listed(layout), Path("vae")).config == PUBLISHED


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="dim_mult must be of widths that the shortcuts"):
        VAEConfig(base_dim=6, dim_mult=(1, 1, 1, 5), is_residual=True, patch_size=2)
    model, _ = published()
    with pytest.raises(InputError, match="multiples of 16"):
        model.moments(np.zeros((1, 5, 24, 32, 3), np.float32))
