"""The transformer against Diffusers and the publisher's outputs; its lock, dtypes, full sizes."""

import json
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import torch
import whole
from diffusers.models.transformers import transformer_wan
from flax import nnx
from peers import pair, relative_l2

from kvlock_jax.convert import diffusers, original, table, weights
from kvlock_jax.lock import KVCache, Lock
from kvlock_jax.models.attention import dispatch, kernels
from kvlock_jax.models.wan import block as wan_block
from kvlock_jax.models.wan.config import WanConfig

DATA = Path(__file__).parent / "data"


class Case(NamedTuple):
    """Sizes of a model and of its inputs."""

    config: WanConfig
    latents: tuple[int, int, int, int]  # B T H W
    tokens: int  # of text
    timestep: tuple[float, ...]


CASES = {
    "batch of 2, turning 8 6 6 of a head": Case(
        WanConfig(2, 20, 3, 36, in_channels=4, out_channels=4, text_dim=24, freq_dim=16),
        (2, 3, 4, 6),
        7,
        (900.0, 30.5),
    ),
    "one frame, three heads, 10 6 6": Case(
        WanConfig(3, 22, 2, 40, in_channels=5, out_channels=3, text_dim=12, freq_dim=10),
        (1, 1, 8, 4),
        1,
        (0.0,),
    ),
    "no norm before cross-attention, 10 8 8": Case(
        WanConfig(1, 26, 2, 30, text_dim=16, freq_dim=256, cross_attn_norm=False, eps=1e-5),
        (2, 2, 2, 10),
        19,
        (999.7, 501.25),
    ),
    "another patch, one layer, 8 4 4": Case(
        WanConfig(*(4, 16, 1, 24), in_channels=3, out_channels=2, text_dim=8, patch_size=(2, 3, 1)),
        (3, 4, 6, 5),
        4,
        (1000.0, 999.0, 1.0),
    ),
}
LOCKED = next(iter(CASES))


# -- the peer and ours, from the same files ------------------------------------------------------


def built(name, dtype=jnp.float32):
    """The peer of a case and our model."""
    return pair(CASES[name].config, dtype)


def inputs(name, seed=0):
    """Latents, timesteps and context of a case."""
    case, rng = CASES[name], np.random.default_rng(seed)
    latents = rng.normal(size=(*case.latents, case.config.in_channels))
    context = rng.normal(size=(case.latents[0], case.tokens, case.config.text_dim))
    arrays = (latents, np.array(case.timestep), context)
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def run_peer(peer, latents, timestep, context, fuse=lambda block, k, v: (k, v)):
    """The peer's velocity, and the K/V that each block's self-attention attended to, `B L D`.

    `fuse` may change them. Blocks call self-attention, then cross-attention, in turn.
    """
    attend, seen, calls = transformer_wan.dispatch_attention_fn, [], []

    def spy(q, k, v, **options):
        if len(calls) % 2 == 0:
            seen.append(fuse(len(calls) // 2, *(x.flatten(2).numpy().copy() for x in (k, v))))
            k, v = (torch.tensor(x).reshape(k.shape) for x in seen[-1])
        calls.append(q.shape)
        return attend(q, k, v, **options)

    arrays = [torch.tensor(np.asarray(a)) for a in (latents, timestep, context)]
    with mock.patch.object(transformer_wan, "dispatch_attention_fn", spy), torch.no_grad():
        velocity = peer(arrays[0].permute(0, 4, 1, 2, 3), *arrays[1:]).sample
    keys, values = (np.stack(x) for x in zip(*seen, strict=True))
    return velocity.permute(0, 2, 3, 4, 1).numpy(), keys, values


@nnx.jit
def velocity_of(model, latents, timestep, context, lock=None):
    return whole.velocity(model, latents, timestep, context, lock)


@nnx.jit
def keys_values_of(model, latents, timestep, context, lock=None):
    return whole.keys_values(model, latents, timestep, context, lock)


def source_cache(model, seed=5):
    """The cache of a pass over other latents, under another text."""
    return keys_values_of(model, *inputs(LOCKED, seed))[1]


def half_mask(cache):
    """A mask with foreground and background in both edits, not the same in each."""
    return jnp.asarray(np.random.default_rng(3).random(cache.k.shape[1:3]) < 0.4)


def assert_same_cache(got, want):
    np.testing.assert_array_equal(got.k, want.k)
    np.testing.assert_array_equal(got.v, want.v)


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


def test_feed_forward_layers_may_take_tokens_some_at_a_time(monkeypatch):
    monkeypatch.setattr(wan_block, "FEED_FORWARD_TOKENS", 7)
    peer, ours = built(LOCKED)
    run = nnx.jit(lambda *given: whole.velocity(*given))
    assert relative_l2(run(ours, *inputs(LOCKED)), run_peer(peer, *inputs(LOCKED))[0]) < 1e-5


def test_equals_the_publisher():
    sizes = json.loads((DATA / "original" / "config.json").read_text())["dit"]
    config = WanConfig(
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        num_layers=sizes["num_layers"],
        ffn_dim=sizes["ffn_dim"],
        in_channels=sizes["in_dim"],
        out_channels=sizes["out_dim"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        patch_size=tuple(sizes["patch_size"]),
        cross_attn_norm=sizes["cross_attn_norm"],
        eps=sizes["eps"],
    )
    graph, abstract = nnx.split(diffusers.abstract(diffusers.TRANSFORMER, config))
    tensors = weights.open_file(DATA / "original" / "t2v.safetensors")
    model = nnx.merge(graph, table.fill(abstract, tensors, original.WAN, "t2v"))
    with np.load(DATA / "original" / "t2v_io.npz") as data:
        want = data["velocity"]
    got = velocity_of(model, *originals.golden_inputs())
    assert relative_l2(np.moveaxis(got[0], -1, 0), want) < 1e-5


# -- the lock (METHOD.md sections 3 and 4) -------------------------------------------------------


def test_locked_pass_equals_a_locked_peer():
    peer, ours = built(LOCKED)
    given, source = inputs(LOCKED), inputs(LOCKED, 5)
    _, keys, values = run_peer(peer, *source)
    cache = source_cache(ours)
    foreground, alpha = half_mask(cache), np.array([0.3, 0.85], np.float32)

    def fuse(block, k, v):
        for mine, theirs in ((k, keys[block]), (v, values[block])):
            for edit, token in np.argwhere(~np.asarray(foreground)):
                mine[edit, token] *= 1 - alpha[edit]
                mine[edit, token] += alpha[edit] * theirs[edit, token]
        return k, v

    want, fused_keys, fused_values = run_peer(peer, *given, fuse)
    assert relative_l2(want, run_peer(peer, *given)[0]) > 1e-2  # the lock does something
    lock = Lock(cache, foreground, jnp.asarray(alpha))
    got, fused = keys_values_of(ours, *given, lock)
    assert relative_l2(got, want) < 1e-5
    assert relative_l2(fused.k, fused_keys) < 1e-5
    assert relative_l2(fused.v, fused_values) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ratio_0_is_bit_for_bit_the_plain_pass(dtype):
    _, ours = built(LOCKED, dtype)
    given, cache = inputs(LOCKED), source_cache(ours)
    off = Lock(cache, jnp.zeros(cache.k.shape[1:3], bool), jnp.zeros(2))
    plain = velocity_of(ours, *given)
    np.testing.assert_array_equal(velocity_of(ours, *given, off), plain)
    velocity, kept = keys_values_of(ours, *given)
    np.testing.assert_array_equal(velocity, plain)  # asking for the cache changes nothing
    velocity, fused = keys_values_of(ours, *given, off)
    np.testing.assert_array_equal(velocity, plain)
    assert_same_cache(fused, kept)


def test_ratio_is_each_edits_own():
    _, ours = built(LOCKED)
    given, cache = inputs(LOCKED), source_cache(ours)
    lock = Lock(cache, jnp.zeros(cache.k.shape[1:3], bool), jnp.array([0.0, 0.7]))
    plain, locked = velocity_of(ours, *given), velocity_of(ours, *given, lock)
    np.testing.assert_array_equal(locked[0], plain[0])
    assert relative_l2(locked[1], plain[1]) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ratio_1_without_foreground_attends_to_the_cache(dtype):
    _, ours = built(LOCKED, dtype)
    cache = source_cache(ours)
    full = Lock(cache, jnp.zeros(cache.k.shape[1:3], bool), jnp.ones(2))
    velocity, fused = keys_values_of(ours, *inputs(LOCKED), full)
    assert fused.k.dtype == dtype
    assert_same_cache(fused, cache)
    assert relative_l2(velocity, velocity_of(ours, *inputs(LOCKED))) > 1e-2


def test_source_locked_onto_itself_is_the_source():
    _, ours = built(LOCKED)
    source = inputs(LOCKED, 5)
    velocity, cache = keys_values_of(ours, *source)
    lock = Lock(cache, half_mask(cache), jnp.ones(2))
    np.testing.assert_array_equal(velocity_of(ours, *source, lock), velocity)


def test_foreground_keeps_its_own():
    _, ours = built(LOCKED)
    given, cache = inputs(LOCKED), source_cache(ours)
    foreground = half_mask(cache)
    _, own = keys_values_of(ours, *given)
    _, fused = keys_values_of(ours, *given, Lock(cache, foreground, jnp.ones(2)))
    for got, mine, theirs in ((fused.k, own.k, cache.k), (fused.v, own.v, cache.v)):
        np.testing.assert_array_equal(got[:, ~foreground], theirs[:, ~foreground])
        np.testing.assert_array_equal(got[0, foreground], mine[0, foreground])
        # further blocks see a stream that the lock has moved
        assert relative_l2(got[1:, foreground], mine[1:, foreground]) > 1e-3
        assert relative_l2(got[:, foreground], theirs[:, foreground]) > 0.1


def test_stacked_branches_share_the_cache():
    _, ours = built(LOCKED)
    latents, timestep, context = inputs(LOCKED)
    other = inputs(LOCKED, 8)[2]
    cache = source_cache(ours)
    lock = Lock(cache, half_mask(cache), jnp.array([0.4, 0.9]))
    pairs = ([latents] * 2, [timestep] * 2, [context, other])
    rows = [jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]) for x in pairs]
    both = velocity_of(ours, *rows, lock)
    for branch, text in zip((both[::2], both[1::2]), (context, other), strict=True):
        assert relative_l2(branch, velocity_of(ours, latents, timestep, text, lock)) < 1e-6
    assert relative_l2(both[:2], both[2:]) > 1e-2


def test_another_source_gives_another_velocity():
    _, ours = built(LOCKED)
    one, other = (
        Lock(cache, half_mask(cache), jnp.ones(2))
        for cache in (source_cache(ours, 5), source_cache(ours, 6))
    )
    a, b = (velocity_of(ours, *inputs(LOCKED), lock) for lock in (one, other))
    assert relative_l2(a, b) > 1e-2


# -- dtypes (DESIGN.md section 3) ----------------------------------------------------------------


def equations(jaxpr):
    """All equations of a program, those of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


MOVES = set(
    "broadcast_in_dim concatenate convert_element_type optimization_barrier reshape scan squeeze "
    "transpose".split()
)


def test_bfloat16_is_only_multiplied(monkeypatch):
    plain = dispatch.Choice(*[kernels.plain_output] * 4)  # whose arithmetic can be read
    monkeypatch.setattr(dispatch, "_OUTPUT", plain)
    _, ours = built(LOCKED, jnp.bfloat16)
    given, cache = inputs(LOCKED), source_cache(ours)
    lock = Lock(cache, half_mask(cache), jnp.full(2, 0.5))
    graph, params = nnx.split(ours)

    def program(params):
        model = nnx.merge(graph, params)
        return whole.velocity(model, *given, lock)

    seen = list(equations(jax.make_jaxpr(program)(params).jaxpr))
    assert {"exp", "tanh", "rsqrt"} <= {e.primitive.name for e in seen}  # of the blocks' inside
    made = {e.primitive.name for e in seen if any(v.aval.dtype == jnp.bfloat16 for v in e.outvars)}
    assert made <= MOVES
    kinds = [tuple(v.aval.dtype.name for v in e.invars) for e in seen]
    casts = [
        k for e, k in zip(seen, kinds, strict=True) if e.primitive.name == "convert_element_type"
    ]
    # nothing is rounded on its way: `fuse` widens K/V of edit and source, and nobody else widens
    assert casts.count(("bfloat16",)) == 4
    products = [k for e, k in zip(seen, kinds, strict=True) if e.primitive.name == "dot_general"]
    assert set(products) == {("bfloat16", "bfloat16"), ("float32", "float32")}
    assert products.count(("float32", "float32")) == 3  # the timestep's, where modulation is from


def test_bfloat16_is_near_float32():
    given = inputs(LOCKED)
    exact, cache = keys_values_of(built(LOCKED)[1], *given)
    rounded, halves = keys_values_of(built(LOCKED, jnp.bfloat16)[1], *given)
    assert rounded.dtype == jnp.float32
    assert halves.k.dtype == halves.v.dtype == jnp.bfloat16
    assert 1e-4 < relative_l2(rounded, exact) < 2e-2
    assert relative_l2(halves.k, cache.k) < 2e-2


# -- published sizes -----------------------------------------------------------------------------

FULL = {
    "1.3b": (WanConfig(12, 128, num_layers=30, ffn_dim=8960), 5.6),
    "14b": (WanConfig(40, 128, num_layers=40, ffn_dim=13824), 25.0),
}


@pytest.mark.parametrize("size", FULL)
def test_published_size_without_memory(size):
    config, gibibytes = FULL[size]
    model = diffusers.abstract(diffusers.TRANSFORMER, config, jnp.bfloat16)
    shapes = ((1, 21, 60, 104, 16), (1,), (1, 512, 4096))  # 81 frames of 480x832
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    velocity, cache = nnx.eval_shape(whole.keys_values, model, *given)
    assert velocity.shape == shapes[0] and velocity.dtype == jnp.float32
    shape = (config.num_layers, 1, 32_760, config.dim)
    assert cache == KVCache.abstract(shape, jnp.dtype(jnp.bfloat16))
    assert cache.nbytes / 2**30 == pytest.approx(gibibytes, abs=0.05)
