"""Each form of the VAE's convolutions on CPU is the convolution that other backends run."""

import contextlib
import re

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax.models.vae import convolutions
from kvlock_jax.models.vae.chunks import over_chunks
from kvlock_jax.models.vae.convolutions import CausalConv3d, DoublingConv2d, HalvingConv2d
from kvlock_jax.parallel import sharding
from kvlock_jax.parallel.mesh import make_mesh


def features(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def fresh_layer(kind, *sizes):
    return fresh.module(lambda: kind(*sizes, rngs=nnx.Rngs(0)))


def same(found, want):
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize(
    "c_in, size, frames",  # up to 32 channels three frames are convolved at once, over it one
    [(3, 1, 5), (3, 3, 5), (32, 1, 2), (32, 3, 5), (33, 1, 5), (33, 3, 1), (33, 3, 2), (33, 3, 5)],
)
def test_frames_on_cpu_are_the_whole_convolution(c_in, size, time_stride, frames):
    layer = fresh_layer(CausalConv3d, c_in, 5, size, time_stride)
    x, kernel = features(2, frames + 2, 6, 9, c_in), layer.kernel[...]
    same(jax.jit(layer._by_frames)(x, kernel), layer._whole(x, kernel))


@pytest.mark.parametrize("mesh", [None, (2, 4, 1), (1, 4, 2), (2, 2, 1)])
@pytest.mark.parametrize(
    "kind, sizes",
    [(CausalConv3d, (size, time_stride)) for size in (1, 3) for time_stride in (1, 2)]
    + [(HalvingConv2d, ()), (DoublingConv2d, ())],
)
def test_a_loop_over_taps_is_the_whole_convolution(kind, sizes, mesh):
    layer = fresh_layer(kind, 3, 5, *sizes)
    # columns divide by 2, rows by 4 and nothing by 8 before halving
    x, kernel = features(2, 5, 8, 12 if mesh == (2, 2, 1) else 6, 3), layer.kernel[...]
    where = jax.set_mesh(make_mesh(*mesh)) if mesh else contextlib.nullcontext()
    with where:
        found = jax.jit(lambda x, k: sharding.everywhere(layer._by_taps(x, k)))(x, kernel)
    same(found, layer._whole(x, kernel))


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_wide_channels_of_large_frames_are_filtered_and_the_same(frames):
    layer = fresh_layer(CausalConv3d, 104, 96)
    x, kernel = features(1, frames + 2, 23, 25, 104), layer.kernel[...]  # not whole tiles
    assert convolutions._filtered(x, kernel)
    same(jax.jit(layer._by_frames)(x, kernel), layer._whole(x, kernel))


def test_a_filter_holds_no_copies_of_its_inputs():
    layer = fresh_layer(CausalConv3d, 96, 96)
    x = jax.ShapeDtypeStruct((1, 6, 120, 208, 96), jnp.float32)
    memory = jax.jit(layer.valid).lower(x).compile().memory_analysis()
    # six products and the inputs of one; copies of six windows would be another input
    assert memory.temp_size_in_bytes < 2 * memory.argument_size_in_bytes


def test_a_scan_over_chunks_holds_no_filtered_kernels():
    layer = nnx.eval_shape(lambda: CausalConv3d(96, 96, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, 4, 16, 32, 96), jnp.float32)
    run = jax.jit(lambda layer, x: over_chunks(layer, x, 1)[0])
    program = run.lower(layer, x).compile().as_text()
    (carry,) = re.findall(r"= (\(.*\)) while\(", program)
    assert "f32[3,3,3,96,96]" in carry  # as it is
    assert "f32[4,96,96]" in program and "f32[4,96,96]" not in carry  # rows' products


@pytest.mark.parametrize("shape", [(1, 3, 22, 25, 95), (1, 3, 22, 23, 96)])
def test_narrow_channels_and_small_frames_are_not(shape):
    assert not convolutions._filtered(features(*shape), jnp.zeros((3, 3, 3, shape[-1], 96)))
    assert not convolutions._filtered(features(1, 3, 32, 32, 96), jnp.zeros((3, 1, 1, 96, 96)))


@pytest.mark.parametrize("channels", [6, 96])
@pytest.mark.parametrize("sides", [(22, 25), (1, 2)])
def test_a_doubled_frame_is_convolved_without_doubling(channels, sides):
    layer = fresh_layer(DoublingConv2d, channels, 96)
    x, kernel = features(2, 3, *sides, channels), layer.kernel[...]
    found = jax.jit(layer._filtered)(x, kernel)
    assert found.shape == (2, 3, 2 * sides[0], 2 * sides[1], 96)
    same(found, layer._whole(x, kernel))


def test_a_frame_is_doubled_cell_by_cell():
    x = features(1, 1, 2, 3, 4)
    want = np.repeat(np.repeat(np.asarray(x), 2, axis=2), 2, axis=3)
    np.testing.assert_array_equal(convolutions._doubled(x), want)


@pytest.mark.parametrize("module", [CausalConv3d, DoublingConv2d])
def test_other_dtypes_are_not_filtered(module):
    layer = fresh_layer(module, 96, 96)
    x = features(1, 6, 24, 24, 96).astype(jnp.bfloat16)
    form = layer._by_frames if module is CausalConv3d else layer._filtered
    found = form(x, layer.kernel[...].astype(x.dtype))
    want = layer._whole(x, layer.kernel[...].astype(x.dtype))
    error = np.linalg.norm(np.float32(found - want)) / np.linalg.norm(np.float32(want))
    assert found.dtype == jnp.bfloat16 and error < 6e-3


def test_halving_takes_a_row_and_column_after_the_frame():
    layer = fresh_layer(HalvingConv2d, 1, 1)
    layer.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[2, 2].set(1.0)
    x = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    np.testing.assert_array_equal(layer(x)[0, 0, ..., 0], [[10.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("c_in", [32, 33])
def test_a_cpu_convolves_no_more_than_a_frame(c_in):
    layer = fresh_layer(CausalConv3d, c_in, 5)
    x = features(2, 7, 6, 9, c_in)
    by_platform = {
        platform: jax.jit(layer.valid).trace(x).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    found = {platform: "[b, 0, 1, 2, f]" in text for platform, text in by_platform.items()}
    assert found == {"cpu": False, "cuda": True}
