"""VACE's transformer against Diffusers and the publisher's outputs; its lock, gradients, size."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whole
from flax import nnx
from peers import relative_l2
from vaces import (
    CASES,
    LOCKED,
    ORIGINAL,
    SMALL,
    built,
    call_peer,
    inputs,
    keys_values_of,
    run_peer,
    velocity_of,
)

from kvlock_jax.checkpoints import registry
from kvlock_jax.convert import diffusers, original, table, weights
from kvlock_jax.lock import KVCache, Lock
from kvlock_jax.models.wan.block import Modulation
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.transformer import Pass, WanTransformer
from kvlock_jax.models.wan.vace import VACEBlock, WanVACETransformer

# -- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name):
    peer, ours = built(name)
    given = inputs(name)
    want, keys, values = run_peer(peer, *given)
    got, cache = keys_values_of(ours, *given)
    assert got.dtype == cache.k.dtype == cache.v.dtype == jnp.float32
    assert relative_l2(got, want) < 1e-5
    for layer in range(CASES[name].config.num_layers):
        assert relative_l2(cache.k[layer], keys[layer]) < 1e-5
        assert relative_l2(cache.v[layer], values[layer]) < 1e-5


def test_asking_for_the_cache_changes_nothing():
    _, ours = built(SMALL)
    velocity, _ = keys_values_of(ours, *inputs(SMALL))
    np.testing.assert_array_equal(velocity_of(ours, *inputs(SMALL)), velocity)


@functools.cache
def published():
    """The publisher's tiny model, and its inputs and outputs."""
    sizes = json.loads((ORIGINAL / "config.json").read_text())["dit"]
    config = WanConfig(
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        num_layers=sizes["num_layers"],
        ffn_dim=sizes["ffn_dim"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        vace_layers=tuple(sizes["vace_layers"]),
        vace_in_channels=sizes["vace_in_dim"],
    )
    graph, abstract = nnx.split(registry.abstract(config))
    tensors = weights.open_file(ORIGINAL / "vace.safetensors")
    model = nnx.merge(graph, table.fill(abstract, tensors, original.WAN, "vace"))
    with np.load(ORIGINAL / "vace_io.npz") as data:
        arrays = dict(data)
    text = np.pad(arrays["context"], ((0, sizes["text_len"] - len(arrays["context"])), (0, 0)))
    return model, arrays, text


@pytest.mark.parametrize(
    ("scale", "key"), [(0.7, "velocity_scale_0p7"), (1.0, "velocity_scale_1p0")]
)
def test_equals_the_publisher(scale, key):
    model, arrays, text = published()
    latents, control = (
        jnp.asarray(np.moveaxis(arrays[name], 0, -1)[None]) for name in ("latents", "vace_context")
    )
    context = whole.WholeContext(jnp.asarray(text)[None], control, jnp.array([scale], jnp.float32))
    got = velocity_of(model, latents, jnp.asarray(arrays["timestep"]), context)
    assert relative_l2(np.moveaxis(got[0], -1, 0), arrays[key]) < 1e-5


# -- text-to-video inside ------------------------------------------------------------------------


def main_model(model: WanVACETransformer) -> WanTransformer:
    """The text-to-video model of the same main weights."""
    config = dataclasses.replace(model.config, vace_layers=())
    graph, abstract = nnx.split(registry.abstract(config, model.dtype))
    mine = dict(nnx.to_flat_state(nnx.state(model)))
    own = nnx.from_flat_state([(path, mine[path]) for path, _ in nnx.to_flat_state(abstract)])
    return nnx.merge(graph, own)


def test_scale_0_is_text_to_video():
    _, ours = built(LOCKED)
    latents, timestep, context = inputs(LOCKED)
    off = dataclasses.replace(context, scale=jnp.zeros(2))
    main = main_model(ours)
    assert type(main) is WanTransformer
    plain, cache = keys_values_of(main, latents, timestep, context.text)
    got, same = keys_values_of(ours, latents, timestep, off)
    np.testing.assert_allclose(got, plain, rtol=0, atol=1e-6 * np.abs(plain).max())
    assert relative_l2(same.k, cache.k) < 1e-6 and relative_l2(same.v, cache.v) < 1e-6
    assert relative_l2(keys_values_of(ours, latents, timestep, context)[0], plain) > 1e-2


def test_hints_of_a_new_model_are_zero():
    """So it is text-to-video, as where the publisher started training."""
    block = VACEBlock(CASES[SMALL].config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for parameter in jax.tree.leaves(nnx.state(block.proj_out)):
        assert not np.any(parameter)
    assert np.any(block.ffn.net_0.kernel[...])


# -- the lock (METHOD.md sections 4 and 11) ------------------------------------------------------


def source_cache(model, seed=5):
    """The cache of a pass over other latents, under another context."""
    return keys_values_of(model, *inputs(LOCKED, seed))[1]


def test_locked_pass_equals_a_peer_whose_main_blocks_are_locked():
    peer, ours = built(LOCKED)
    given, source = inputs(LOCKED), inputs(LOCKED, 5)
    _, keys, values = run_peer(peer, *source)
    cache = source_cache(ours)
    foreground = np.random.default_rng(3).random(cache.k.shape[1:3]) < 0.4
    alpha = np.array([0.3, 0.85], np.float32)

    def fuse(edit, block, k, v):
        for mine, theirs in ((k, keys[block, edit]), (v, values[block, edit])):
            for token in np.flatnonzero(~foreground[edit]):
                mine[token] *= 1 - alpha[edit]
                mine[token] += alpha[edit] * theirs[token]
        return k, v

    want, fused_keys, fused_values = run_peer(peer, *given, fuse)
    assert relative_l2(want, run_peer(peer, *given)[0]) > 1e-2  # the lock does something
    lock = Lock(cache, jnp.asarray(foreground), jnp.asarray(alpha))
    got, fused = keys_values_of(ours, *given, lock)
    assert relative_l2(got, want) < 1e-5
    assert relative_l2(fused.k, fused_keys) < 1e-5
    assert relative_l2(fused.v, fused_values) < 1e-5


def test_ends_of_the_lock():
    _, ours = built(LOCKED)
    given, cache = inputs(LOCKED), source_cache(ours)
    nowhere = jnp.zeros(cache.k.shape[1:3], bool)
    plain, own = keys_values_of(ours, *given)
    for ratio, want in ((0.0, own), (1.0, cache)):
        velocity, fused = keys_values_of(ours, *given, Lock(cache, nowhere, jnp.full(2, ratio)))
        np.testing.assert_array_equal(fused.k, want.k)
        np.testing.assert_array_equal(fused.v, want.v)
        if ratio:
            assert relative_l2(velocity, plain) > 1e-2
        else:
            np.testing.assert_array_equal(velocity, plain)


# -- the loop over layers ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "unroll"), [(LOCKED, 1), (SMALL, 2)])
def test_gradients_of_context_blocks_equal_the_peers(name, unroll):
    """As they are trained: the rest of the model is frozen."""
    peer, ours = built(name)
    peer.zero_grad()
    latents, timestep, context = inputs(name)
    context = dataclasses.replace(context, scale=jnp.full(len(latents), 0.8))
    velocity = call_peer(peer, latents, timestep, context)
    target = np.random.default_rng(4).normal(size=velocity.shape).astype(np.float32)
    (velocity * torch.tensor(target)).sum().backward()
    tensors = {
        name: table.LazyTensor(tuple(p.shape), np.dtype(np.float32), p.grad.numpy)
        for name, p in peer.named_parameters()
    }
    graph, state = nnx.split(ours)
    want = table.fill(state, tensors, diffusers.WAN, "gradients")
    model = nnx.merge(graph, state)
    model.unroll = unroll

    is_trained = nnx.All(nnx.Param, lambda path, _: path[0].startswith("vace_"))

    @nnx.jit
    @nnx.grad(argnums=nnx.DiffState(0, is_trained))
    def gradient(model, latents, timestep, context):
        velocity = whole.velocity(model, latents, timestep, context)
        return jnp.sum(velocity * target)

    got = dict(nnx.to_flat_state(gradient(model, latents, timestep, context)))
    assert {path[0] for path in got} == {"vace_blocks", "vace_proj_in", "vace_patch_embedding"}
    oracle = dict(nnx.to_flat_state(want))
    for path, value in got.items():
        pair = np.asarray(value[...]), np.asarray(oracle[path][...])
        stacks = zip(*pair, strict=True) if path[0] == "vace_blocks" else [pair]
        assert max(relative_l2(*layer) for layer in stacks) < 1e-4, path


def test_program_does_not_grow_with_layers():
    def size(layers: int, hints: tuple[int, ...]) -> int:
        config = WanConfig(2, 12, layers, 20, 4, 4, 16, 8, vace_layers=hints, vace_in_channels=6)
        graph, params = nnx.split(registry.abstract(config))
        context = whole.WholeContext(jnp.zeros((1, 3, 16)), jnp.zeros((1, 1, 2, 4, 6)), jnp.ones(1))
        latents = jnp.zeros((1, 1, 2, 4, 4))

        def program(params):
            model = nnx.merge(graph, params)
            return whole.velocity(model, latents, jnp.ones(1), context)

        return str(jax.make_jaxpr(program)(params)).count(" = ")

    assert size(4, (0, 2)) == size(12, (0, 2, 4, 6, 8, 10))
    assert size(9, (0, 3, 6)) == size(18, (0, 3, 6, 9, 12, 15))
    assert size(2, (0, 1)) == size(9, tuple(range(9)))


@pytest.mark.parametrize(
    "layers, hints, groups",
    [
        (4, (0, 2), [([0, 1], [0, 2], 2)]),
        (9, (0, 4, 5), [([0], [0], 4), ([1], [4], 1), ([2], [5], 4)]),
        (5, (0, 2, 4), [([0, 1], [0, 2], 2), ([2], [4], 1)]),
        (3, (0,), [([0], [0], 3)]),
        (3, (), []),
    ],
)
def test_groups_of_equal_length_run_together(layers, hints, groups):
    assert WanConfig(2, 12, layers, 20, vace_layers=hints).hint_groups == groups


# -- dtypes, published sizes ---------------------------------------------------------------------


def test_bfloat16_is_near_float32():
    given = inputs(LOCKED)
    exact, cache = keys_values_of(built(LOCKED)[1], *given)
    rounded, halves = keys_values_of(built(LOCKED, jnp.bfloat16)[1], *given)
    assert rounded.dtype == jnp.float32
    assert halves.k.dtype == halves.v.dtype == jnp.bfloat16
    assert 1e-4 < relative_l2(rounded, exact) < 2e-2
    assert relative_l2(halves.k, cache.k) < 2e-2


def test_hints_are_added_in_float32_under_bfloat16():
    """A small hint would be lost in a bfloat16 stream, which steps by 4 at 1000."""
    _, ours = built(LOCKED, jnp.bfloat16)
    latents, timestep, context = inputs(LOCKED)
    context = dataclasses.replace(context, scale=jnp.full(2, 1e-5))

    @nnx.jit
    def first_hint(model, latents, timestep, context):
        given = whole.conditioning(model, latents, context)
        x = jnp.full((*given.control.shape[:2], model.config.dim), 1000.0)
        modulation = Modulation(model.times(timestep).modulation)
        one = Pass(x, given.text, modulation, given.positions, None, None)
        beside = model._beside(x, one, given, lambda tokens: tokens)

        def block(streams, layer, hints):
            """Changes nothing but what the hints do; the cache keeps its dtype."""
            text = jax.tree.map(lambda p: p[..., :1, :], given.text)
            return tuple(jax.tree.map(jnp.add, streams, tuple(hints))), text

        passes = [dataclasses.replace(one, beside=beside)]
        return model._through(block, passes, ((), (given.text,)), None, None)[0][0]

    x = first_hint(ours, latents, timestep, context)
    assert x.dtype == jnp.float32
    moves = np.abs(np.asarray(x) - 1000)
    assert moves.max() < 1 and np.unique(moves).size > 40


FULL = {
    "1.3b": (WanConfig(12, 128, 30, 8960, vace_layers=tuple(range(0, 30, 2))), 5.6),
    "14b": (WanConfig(40, 128, 40, 13824, vace_layers=tuple(range(0, 40, 5))), 25.0),
}


@pytest.mark.parametrize("size", FULL)
def test_published_size_without_memory(size):
    config, gibibytes = FULL[size]
    model = registry.abstract(config, jnp.bfloat16)
    latents, timestep, *context = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 21, 60, 104, 16), (1,), (1, 512, 4096), (1, 21, 60, 104, 96), (1,))
    )
    velocity, cache = nnx.eval_shape(
        whole.keys_values, model, latents, timestep, whole.WholeContext(*context)
    )
    assert velocity.shape == latents.shape and velocity.dtype == jnp.float32
    shape = (config.num_layers, 1, 32_760, config.dim)
    assert cache == KVCache.abstract(shape, jnp.dtype(jnp.bfloat16))
    assert cache.nbytes / 2**30 == pytest.approx(gibibytes, abs=0.05)
