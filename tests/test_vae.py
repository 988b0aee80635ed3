"""The video VAE against Diffusers and the publisher's outputs; its chunks, memory and errors."""

import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from peers import relative_l2

from kvlock_jax.convert import diffusers, original, table, weights
from kvlock_jax.errors import InputError
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.autoencoder import RMSNorm, WanVAE
from kvlock_jax.models.vae.config import VAEConfig

DATA = Path(__file__).parent / "data"

CASES = {
    "one residual block": (
        VAEConfig(
            base_dim=4,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=(0.1, -0.2, 0.3, 0.0),
            latents_std=(1.5, 1.0, 0.5, 2.0),
        ),
        (2, 16, 24),  # edits, height, width
    ),
    "two residual blocks": (
        VAEConfig(
            base_dim=6,
            z_dim=3,
            dim_mult=(1, 2, 2, 3),
            num_res_blocks=2,
            latents_mean=(-0.5, 0.25, 1.0),
            latents_std=(0.7, 1.3, 2.5),
        ),
        (1, 32, 16),
    ),
    "time halved first, widths that shrink": (
        VAEConfig(
            base_dim=4,
            z_dim=5,
            dim_mult=(2, 1, 3, 2),
            num_res_blocks=1,
            temperal_downsample=(True, True, False),
            latents_mean=(0.3, 0.0, -1.0, 0.2, 0.1),
            latents_std=(0.5, 2.0, 1.1, 0.9, 1.0),
        ),
        (1, 8, 40),
    ),
}
SMALL = next(iter(CASES))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 4, 1).numpy()


@functools.cache
def built(name):
    """Diffusers' VAE, all parameters far from their initial values, and ours from its files."""
    config, _ = CASES[name]
    torch.manual_seed(0)
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    peer = AutoencoderKLWan(**sizes).eval()
    for key, parameter in peer.named_parameters():
        norm = key.endswith("gamma")
        scale = math.prod(parameter.shape[1:]) ** -0.5 if key.endswith("weight") else 0.3
        # Diffusers clamps pixels to [-1, 1]: kept small, so that no error hides at the bounds
        scale *= 0.05 if "decoder.conv_out" in key else 1.0
        torch.nn.init.normal_(parameter, float(norm), scale)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = diffusers.load_model(folder, diffusers.AUTOENCODER)
    assert ours.config == config
    return peer, ours


@functools.cache
def jitted(function, model):
    """`function(model, x)` of `x`, compiled; twice as fast without LLVM's optimisation."""
    graph, params = nnx.split(model)
    options = {"xla_backend_optimization_level": 0}
    program = jax.jit(lambda p, x: function(nnx.merge(graph, p), x), compiler_options=options)
    return functools.partial(program, params)


def video_of(name, frames, seed=0):
    edits, height, width = CASES[name][1]
    shape = (edits, frames, height, width, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def latents_of(name, frames):
    config, (edits, height, width) = CASES[name]
    shape = (edits, (frames + 3) // 4, height // 8, width // 8, config.z_dim)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# -- parity --------------------------------------------------------------------------------------

# 1 is the first frame alone, 5 one chunk after it, 17 a loop over chunks.
LENGTHS = [(SMALL, 1), (SMALL, 5), *((name, 17) for name in CASES)]


def posterior_of(peer, video):
    """Diffusers' mean and log-variance."""
    with torch.no_grad():
        posterior = peer.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
    return [channels_last(x) for x in posterior.parameters.chunk(2, dim=1)]


@pytest.mark.parametrize("name, frames", LENGTHS)
def test_encodes_as_diffusers(name, frames):
    peer, ours = built(name)
    mean, _ = posterior_of(peer, video_of(name, frames))
    config, (edits, height, width) = CASES[name]
    want = (mean - np.array(config.latents_mean)) / np.array(config.latents_std)
    got = jitted(WanVAE.encode, ours)(video_of(name, frames))
    assert got.dtype == jnp.float32
    assert got.shape == (edits, (frames + 3) // 4, height // 8, width // 8, config.z_dim)
    assert relative_l2(got, want) < 1e-5


def test_moments_are_those_of_diffusers():
    peer, ours = built(SMALL)
    video = video_of(SMALL, 5)
    for got, want in zip(
        jitted(WanVAE.moments, ours)(video), posterior_of(peer, video), strict=True
    ):
        assert relative_l2(got, want) < 1e-5


@pytest.mark.parametrize("name, frames", LENGTHS)
def test_decodes_as_diffusers(name, frames):
    peer, ours = built(name)
    latents, config = latents_of(name, frames), CASES[name][0]
    raw = latents * np.array(config.latents_std) + np.array(config.latents_mean)
    with torch.no_grad():
        raw = torch.tensor(raw, dtype=torch.float32).permute(0, 4, 1, 2, 3)
        want = channels_last(peer.decode(raw).sample)
    assert np.abs(want).max() < 1
    got = jitted(WanVAE.decode, ours)(latents)
    assert got.dtype == jnp.float32
    assert relative_l2(got, want) < 1e-5


def test_equals_the_publisher():
    sizes = json.loads((DATA / "original" / "config.json").read_text())["vae"]
    with np.load(DATA / "original" / "vae_io.npz") as data:
        video, latents, decoded, mean, std = (
            data[key] for key in ("video", "latents", "decoded", "latents_mean", "latents_std")
        )
    config = VAEConfig(
        base_dim=sizes["dim"],
        z_dim=sizes["z_dim"],
        dim_mult=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temperal_downsample=tuple(sizes["temperal_downsample"]),
        latents_mean=tuple(mean.tolist()),
        latents_std=tuple(std.tolist()),
    )
    graph, abstract = nnx.split(diffusers.abstract(diffusers.AUTOENCODER, config))
    tensors = weights.open_file(DATA / "original" / "vae.safetensors")
    model = nnx.merge(graph, table.fill(abstract, tensors, original.vae(config), "vae"))
    video, latents, decoded = (np.moveaxis(x, 1, -1) for x in (video, latents, decoded))
    assert relative_l2(jitted(WanVAE.encode, model)(video), latents) < 1e-5
    assert relative_l2(jitted(WanVAE.decode, model)(latents), decoded) < 1e-5


def test_every_key_of_the_publisher_lands_on_one_parameter():
    shapes = json.loads((DATA / "layouts" / "wan2.1-vae.original.json").read_text())
    tensors = {
        key: table.LazyTensor(tuple(shape), np.dtype(np.float32), pytest.fail)
        for key, shape in shapes.items()
    }
    model = nnx.state(diffusers.abstract(diffusers.AUTOENCODER, VAEConfig()))
    sources = table.plan(model, tensors, original.vae(VAEConfig()), "vae")
    assert sorted(key for source in sources for key in source.keys) == sorted(shapes)


# -- chunks --------------------------------------------------------------------------------------


def test_larger_chunks_give_the_same():
    _, ours = built(SMALL)
    for function, x in (
        (WanVAE.encode, video_of(SMALL, 17)),
        (WanVAE.decode, latents_of(SMALL, 17)),
    ):
        one = jitted(function, ours)(x)
        two = jitted(functools.partial(function, chunk=2), ours)(x)
        for got, want in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
            assert relative_l2(got, want) < 1e-6


@pytest.mark.parametrize(
    ("frames", "cells", "size"),
    [
        (0, 4, 1),  # the first alone
        (2, 144, 2),
        (20, 144, 5),  # 7 would fit, and do not divide
        (7, 300, 1),
        (2, 512, 2),
        (2, 513, 1),
        (20, 6240, 1),
    ],
)
def test_small_frames_are_coded_together(frames, cells, size):
    assert autoencoder._chunk(frames, cells) == size


@pytest.mark.parametrize("chunk", [1, 2])
def test_frames_are_coded_in_chunks_of_the_chosen_size(chunk, monkeypatch):
    _, ours = built(SMALL)
    _, (_, height, width) = CASES[SMALL]
    monkeypatch.setattr(autoencoder, "_CELLS", chunk * height * width // 64)
    sizes = []
    over = autoencoder.over_chunks
    monkeypatch.setattr(
        autoencoder, "over_chunks", lambda *args: sizes.append(args[2]) or over(*args)
    )
    encode, decode = (f.__wrapped__ for f in (autoencoder.encode, autoencoder.decode))
    # as functions of their own, so that they are traced here and now
    latents = jax.eval_shape(lambda *args: encode(*args), ours, video_of(SMALL, 9))
    jax.eval_shape(lambda *args: decode(*args), ours, latents)
    assert sizes == [4 * chunk, chunk]


def test_memory_does_not_grow_with_length():
    config = dataclasses.replace(CASES[SMALL][0], base_dim=8)
    vae = diffusers.abstract(diffusers.AUTOENCODER, config)

    def temporary(function, shape):
        """Bytes beside parameters, input and output; and bytes of those."""
        program = jitted(function, vae)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        memory = program.func.lower(*program.args, x).compile().memory_analysis()
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return memory.temp_size_in_bytes, arrays

    for function, shape in (
        (WanVAE.encode, lambda n: (1, 4 * n + 1, 64, 64, 3)),
        (WanVAE.decode, lambda n: (1, n + 1, 8, 8, config.z_dim)),
    ):
        short, short_arrays = temporary(function, shape(4))
        long, long_arrays = temporary(function, shape(8))
        # a copy of pixels and latents, cut into chunks; features would be 20 times that
        assert long - short < 1.1 * (long_arrays - short_arrays)
        assert long - short < 0.2 * short


# -- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, found",
    [
        ((1, 4, 16, 16, 3), "found 4 frames of 16x16"),
        ((1, 5, 20, 16, 3), "found 5 frames of 20x16"),
        ((1, 5, 16, 12, 3), "found 5 frames of 16x12"),
    ],
)
def test_sizes_that_do_not_fit(shape, found):
    _, ours = built(SMALL)
    with pytest.raises(InputError, match=f"4n \\+ 1 frames.*{found}"):
        ours.encode(jnp.zeros(shape))


@pytest.mark.parametrize("frames, chunk", [(9, 4), (13, 2), (17, 3)])
def test_chunks_that_do_not_divide(frames, chunk):
    _, ours = built(SMALL)
    for function, x in ((ours.encode, video_of), (ours.decode, latents_of)):
        with pytest.raises(InputError, match="chunk"):
            function(jnp.asarray(x(SMALL, frames)), chunk)


@pytest.mark.nightly
def test_gradient_is_finite():
    config = dataclasses.replace(CASES[SMALL][0], dim_mult=(1, 1), temperal_downsample=(True,))
    graph, params = nnx.split(diffusers.abstract(diffusers.AUTOENCODER, config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), params)

    def loss(params, video):
        vae = nnx.merge(graph, params)
        mean, logvar = vae.moments(video)
        return jnp.sum(vae.decode(mean)) + jnp.sum(logvar)

    options = {"xla_backend_optimization_level": 0}
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options)
    video = video_of(SMALL, 9)  # two chunks, so in a loop
    for leaf in map(np.asarray, jax.tree.leaves(gradient(params, video))):
        assert np.isfinite(leaf).all() and leaf.any()


def test_norm_of_zero_has_a_gradient():
    norm = RMSNorm(3)
    x = jnp.zeros((1, 1, 1, 2, 3)).at[..., 0, :].set(jnp.array([3.0, 0.0, -4.0]))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(norm(x)[..., 0]))(x)
    assert value == pytest.approx(3**0.5 * 3 / 5)
    assert jnp.isfinite(gradient).all()
    # d(x0 / |x|) = (|x|^2 - x0^2, -x0 x1, -x0 x2) / |x|^3
    want = 3**0.5 * np.array([25 - 9, 0, 12]) / 125
    np.testing.assert_allclose(gradient[0, 0, 0, 0], want, rtol=1e-6, atol=1e-7)


def test_bfloat16_keeps_its_latents_float32():
    _, ours = built(SMALL)
    graph, params = nnx.split(ours)
    rounded = nnx.merge(graph, params)
    rounded.dtype = jnp.bfloat16
    exact = jitted(WanVAE.decode, ours)(latents_of(SMALL, 1))
    got = jitted(WanVAE.decode, rounded)(latents_of(SMALL, 1))
    assert got.dtype == jnp.float32
    assert 1e-4 < relative_l2(got, exact) < 5e-2
