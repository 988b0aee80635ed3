"""The VAE in tiles of columns is the VAE; tokens some at a time are tokens."""

import re

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvlock_jax as kvl
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.chunks import in_tiles
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.block import over_tokens
from kvlock_jax.parallel import sharding
from kvlock_jax.parallel.mesh import make_mesh

CONFIG = VAEConfig(4, 3, num_res_blocks=2, latents_mean=(0.1,) * 3, latents_std=(1.5,) * 3)
WIDTH = 44  # latent columns: three tiles of two reaches and an own part are narrower


@pytest.fixture(scope="module")
def network():
    return fresh.module(lambda: autoencoder.WanVAE(CONFIG, rngs=nnx.Rngs(0)))


def tiled(network, tiles):
    copy = nnx.clone(network)
    copy.tiles = tiles
    return copy


def test_tiles_change_nothing(network):
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 9, 16, 8 * WIDTH, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 3, 2, WIDTH, 3)).astype(np.float32)
    encode, decode = (jax.jit(lambda n, x, f=f: getattr(n, f)(x)) for f in ("encode", "decode"))
    for run, given in ((encode, video), (decode, latents)):
        want, got = run(network, given), run(tiled(network, 3), given)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_the_reach_is_what_a_column_depends_on(network, coder):
    """A column changes the output as far as it says, and nowhere further."""
    net = getattr(network, coder)
    unit, channels = (net.unit, 3) if coder == "encoder" else (1, CONFIG.dim_mult[-1] * 4)
    x = np.random.default_rng(0).normal(size=(1, 1, 8, WIDTH * unit, channels)).astype(np.float32)
    other = x.copy()
    middle = WIDTH // 2
    other[:, :, :, middle * unit : (middle + 1) * unit] += 1
    run = jax.jit(lambda x: net.wide(x, None)[0])
    moved = np.abs(np.asarray(run(x) - run(other))).max(axis=(0, 1, 2, 4))
    units = np.flatnonzero(moved.reshape(WIDTH, -1).max(axis=1) > 0)
    assert net.reach - 1 <= middle - units.min() <= net.reach
    assert units.max() - middle <= net.reach


@pytest.mark.parametrize("tiles", [2, 3, 5, 100])
def test_tiles_overlap_by_the_reach(tiles):
    """A sum over neighbours stands for convolutions; units of two columns become one of three."""

    def neighbours(x):
        units = x.reshape(1, 1, 2, -1, 2, 1).sum(axis=4)
        around = jnp.pad(units, [(0, 0)] * 3 + [(2, 2), (0, 0)])
        sums = sum(around[:, :, :, n : n + units.shape[3]] for n in range(5))
        return jnp.repeat(sums, 3, axis=3)

    x = jnp.arange(2.0 * 22).reshape(1, 1, 2, 22, 1)
    got, _ = in_tiles(lambda x, _: (neighbours(x), ()), x, None, tiles=tiles, unit=2, reach=2)
    np.testing.assert_array_equal(got, neighbours(x))


def test_one_tile_is_the_whole():
    x = jnp.ones((1, 1, 2, 8, 1))
    seen = []

    def run(x, cache):
        return seen.append(x.shape) or x + 1, cache

    got, _ = in_tiles(run, x, None, tiles=1, unit=1, reach=2)
    assert seen == [x.shape] and (got == 2).all()


def test_tiles_take_less_memory(network):
    def temporaries(tiles):
        z = jax.ShapeDtypeStruct((1, 3, 8, 160, 3), jnp.float32)
        lowered = autoencoder.decode.lower(tiled(network, tiles), z)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.7 * temporaries(1)


def test_a_model_is_loaded_to_run_in_tiles(tiny_checkpoint):
    assert kvl.load(tiny_checkpoint, vae_tiles=3).checkpoint.vae.tiles == 3


@pytest.mark.parametrize("most", [1, 5, 6, 7, 12, 26])
def test_tokens_may_be_run_some_at_a_time(most):
    x = jnp.arange(2 * 13 * 3, dtype=jnp.float32).reshape(2, 13, 3)
    sizes = []

    def run(x):
        sizes.append(x.shape)
        return x + 1

    np.testing.assert_array_equal(over_tokens(run, x, most), x + 1)
    expected = {1: {1}, 5: {1}, 6: {3, 1}, 7: {3, 1}, 12: {5, 3}, 26: {13}}[most]
    assert {shape[1] for shape in sizes} == expected


def test_each_device_runs_some_of_its_own_tokens():
    mesh = make_mesh(data=2, frames=4)
    x = np.random.default_rng(0).normal(size=(2, 40, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: over_tokens(jnp.sin, sharding.constrain(x, "BLD"), 4))
        compiled = program.lower(x).compile()
        np.testing.assert_allclose(compiled(x), np.sin(x), rtol=1e-6)
    text = compiled.as_text()
    assert "while" in text and not re.search("all-|collective-", text)
