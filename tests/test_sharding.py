"""The mesh and its rules, and whole edits on 8 devices against the same on one."""

import collections
import dataclasses
import functools
import math
import re

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kvlock_jax import lock
from kvlock_jax.checkpoints import registry
from kvlock_jax.errors import ConfigError
from kvlock_jax.grid import Grid
from kvlock_jax.models.attention.sharded import gathered, ring
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.parallel.mesh import make_mesh, parse_mesh
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Program, sample

MESHES = ((1, 8, 1), (2, 2, 2), (8, 1, 1))
FRAMES, TOKENS = 7, 63  # of 9 tokens each: every mesh that shards tokens pads them, to 64
EDITS, STEPS, HEADS, SIZE, LAYERS, TEXT = 8, 4, 4, 12, 3, 6
CONFIG = WanConfig(
    HEADS, SIZE, LAYERS, ffn_dim=40, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
    vace_layers=(0, 2), vace_in_channels=6,
)  # fmt: skip


# -- rules -----------------------------------------------------------------------------------------


def test_a_spec_follows_the_letters():
    assert sharding.spec("BLNK") == P("data", "frames", "model", None)
    assert sharding.spec("layers B L N K") == P(None, "data", "frames", "model", None)
    assert sharding.spec("BTHWC") == P("data", None, None, None, None)
    assert sharding.spec("layers D F", sharding.SPREAD) == P(None, "frames", "model")
    with pytest.raises(ValueError, match="two dimensions over one mesh axis"):
        sharding.spec("BLNF")


def test_a_mesh_is_written_as_text():
    mesh = parse_mesh("data=2, frames=4")
    assert dict(mesh.shape) == {"data": 2, "frames": 4, "model": 1}
    assert parse_mesh("frames=2").size == 2  # of the first devices


@pytest.mark.parametrize(
    "text, message",
    [
        ("frames=9", "data=1,frames=9,model=1 takes 9 devices, found 8"),
        ("frames=0", "every axis must be 1 or more"),
        ("frame=8", "cannot read 'frame=8'"),
        ("frames=8,frames=1", "cannot read 'frames=1'"),
        ("frames", "cannot read 'frames'"),
        ("frames=-1", "cannot read"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_mesh(text)


def test_a_constraint_that_does_not_divide_is_an_error():
    """JAX would drop it silently."""
    with jax.set_mesh(make_mesh(frames=8)):
        message = re.escape(
            "L of 'BLD' is 12, not a multiple of the 8 devices on mesh axis 'frames'"
        )
        with pytest.raises(ConfigError, match=message):
            sharding.constrain(jnp.zeros((1, 12, 3)), "BLD")
        laid = sharding.constrain(jnp.zeros((1, 16, 3)), "BLD")
        assert laid.sharding.spec == P("data", "frames", None)
    x = jnp.zeros((1, 12, 3))
    assert sharding.constrain(x, "BLD") is x  # no mesh


@pytest.mark.parametrize(
    "size, spec",
    [
        ((8, 16), P(None, None, None, ("frames", "model"))),
        ((8, 12), P(None, None, ("frames", "model"))),
        ((12, 12), P()),
    ],
)
def test_space_is_spread_by_columns_or_rows(size, spec):
    with jax.set_mesh(make_mesh(data=1, frames=4, model=2)):
        laid = jax.jit(sharding.spread_space)(jnp.zeros((1, 2, *size, 3)))
    wanted = jax.sharding.NamedSharding(laid.sharding.mesh, spec)
    assert laid.sharding.is_equivalent_to(wanted, 5)


@pytest.mark.parametrize(
    "tokens, shards, length",
    [(32_760, 8, 32_768), (32_760, 1, 32_760), (75_600, 8, 75_776), (80, 8, 80), (45, 8, 48)],
)
def test_a_row_of_tokens_is_padded_to_equal_shards(tokens, shards, length):
    assert padding.padded(tokens, shards) == length


# -- whole runs ------------------------------------------------------------------------------------


def make_edits() -> Edits:
    """Eight edits, as NumPy arrays, padded for the ambient mesh."""
    rng, space = np.random.default_rng(FRAMES), (FRAMES, 6, 6)
    source, noise = (rng.normal(size=(EDITS, *space, 4)).astype(np.float32) for _ in range(2))
    control = rng.normal(size=(EDITS, *space, 6)).astype(np.float32)
    text = rng.normal(size=(3 * EDITS, TEXT, 16)).astype(np.float32)
    foreground = np.zeros((EDITS, *space), bool)
    for n in range(EDITS):
        foreground[n, 1:, n % 4 : n % 4 + 3, 3:6] = True
    grid = Grid(space, padding.padded(Grid.of(space).tokens, sharding.shards("L")))
    source, noise, control, foreground = (
        np.asarray(grid.split(jnp.asarray(x))) for x in (source, noise, control, foreground)
    )
    scale = np.linspace(0.5, 1, EDITS, dtype=np.float32)
    prompts = VACEContext(text[: 2 * EDITS], control, scale)
    source_prompts = VACEContext(text[2 * EDITS :], control, scale)
    return Edits(source, noise, foreground, prompts, source_prompts, grid)


def model_of(attend=gathered):
    return fresh.module(lambda: wan_transformer(CONFIG, attend=attend, rngs=nnx.Rngs(0)))


def placed(module, name, mesh, spread):
    """The module with its parameters laid out as loading lays them out."""
    graph, state = nnx.split(module)
    rules, flat = registry.FAMILIES[1].networks[name].parameters, []
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value()
        place = rules.sharding(mesh, ".".join(map(str, path)), value.shape, spread=spread)
        flat.append((path, leaf.replace(jax.device_put(value, place))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def arguments(edits: Edits, model, preset="kvlock_anchor", kind="carried"):
    """Arguments of `sample`; `kind` is a cache's, or "foreground": fused, of those tokens alone."""
    settings = lock.preset(preset, 3.0)
    cache = "carried" if kind == "carried" else "fused"
    settings = dataclasses.replace(settings, tau=0.5, cache=cache)
    table = solvers.unipc(STEPS, 3.0)
    knobs = lock.knobs(settings, 3.0)
    tokens = bucket(int(edits.own.sum(axis=1).max()), edits.grid) if kind == "foreground" else None
    program = Program.of(settings, tokens)
    return (model, jnp.array(edits.noise), edits, table, knobs), program


@functools.cache
def on_one_device():
    edits = make_edits()
    args, program = arguments(edits, model_of())
    latents, trace = sample(*args, program=program)
    return np.asarray(edits.grid.join(latents)), jax.tree.map(np.asarray, trace)


@functools.cache
def on_a_mesh(shape: tuple[int, int, int], attend=gathered, kind="carried"):
    """Latents, trace, their sharding, and the compiled program of a run on a mesh."""
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        edits = make_edits()
        model = placed(model_of(attend), "transformer", mesh, True)
        args, program = arguments(edits, model, kind=kind)
        compiled = sample.lower(*args, program=program).compile()
        latents, trace = compiled(*args)
        joined = np.asarray(edits.grid.join(latents))
    return joined, jax.tree.map(np.asarray, trace), latents.sharding.spec, compiled.as_text()


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def assert_same_run(got, want):
    """Two runs' latents and traces, up to the order of sums."""
    assert relative(got[0], want[0]) < 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got[1], want[1]
    )


@pytest.mark.parametrize("shape", MESHES)
def test_a_sharded_run_equals_one_device(shape):
    latents, trace, spec, _ = on_a_mesh(shape)
    assert_same_run((latents, trace), on_one_device())
    wanted_spec = jax.sharding.NamedSharding(make_mesh(*shape), sharding.spec("BLcC"))
    got = jax.sharding.NamedSharding(make_mesh(*shape), spec)
    assert got.is_equivalent_to(wanted_spec, 4)


@pytest.mark.parametrize(
    "shape, kind, attend",
    [
        ((1, 8, 1), "foreground", ring),
        ((2, 2, 2), "fused", ring),
        ((2, 2, 2), "foreground", gathered),
    ],
)
def test_a_run_without_a_cache_equals_one_device(shape, kind, attend):
    latents, trace, _, text = on_a_mesh(shape, attend, kind)
    assert_same_run((latents, trace), on_one_device())
    share = 4 * 64 * 4 * EDITS // shape[0]  # numbers of a share's latents
    assert not any(math.prod(s) == share for kind, s in collectives(text) if kind == "all-gather")


def test_a_ring_is_the_same():
    latents, trace, _, text = on_a_mesh((2, 2, 2), ring)
    assert_same_run((latents, trace), on_one_device())
    heads = {s for kind, s in collectives(text) if kind == "all-gather" and len(s) == 4}
    assert not heads  # keys and values are never gathered
    assert "collective-permute" in {kind for kind, _ in collectives(text)}


# -- compiled programs, by their text: traffic and layout ---------------------------------------


def collectives(text: str) -> collections.Counter:
    """How often a program has a collective of a kind and of a shape of its result."""
    found = collections.Counter()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            for shape in re.findall(r"[a-z0-9]+\[([0-9,]*)\]", match[1]):
                found[match[2], tuple(int(n) for n in shape.split(",") if n)] += 1
    return found


@pytest.mark.parametrize("shape", MESHES)
def test_collectives_are_the_expected_ones(shape):
    data, frames, model = shape
    edits = EDITS // data
    length, wide = padding.padded(TOKENS, frames), CONFIG.dim
    local, heads = length // frames, HEADS // model
    found = collectives(on_a_mesh(shape)[3])
    expected = {("all-gather", (STEPS, EDITS))}  # the trace at the end, for whoever reads it
    if shape == (8, 1, 1):  # each device has an edit of its own
        assert set(found) == expected
        return
    for rows in (edits, 2 * edits):  # the source pass, the edit's branches
        # keys and values of one block: all tokens of this device's heads
        expected.add(("all-gather", (rows, length, heads, SIZE)))
        # a layer's kernels, for its products
        for c_in, c_out in ((wide, wide // model), (wide // model, wide), (wide, wide)):
            expected.add(("all-gather", (1, c_in, c_out)))
        expected.add(("all-gather", (1, wide, 40 // model)))
        expected.add(("all-gather", (1, 40 // model, wide)))
        if model > 1:
            # the norm of queries and keys spans all heads; both output projections sum over them
            expected |= {("all-reduce", (rows, local)), ("all-reduce", (rows, local, wide))}
            expected.add(("all-reduce", (rows, TEXT)))  # the same norm, of the text's keys
    # modulation of all steps: its kernel is spread over `frames`, each makes a part of the sum
    expected |= {("all-gather", (STEPS, wide)), ("all-reduce", (STEPS, 6 * wide))}
    expected.add(
        ("all-reduce", (edits,))
    )  # sigma2, s*, and whether all is finite: one number an edit
    assert set(found) <= expected
    # K, V; main, context blocks; two groups of layers
    assert found["all-gather", (2 * edits, length, heads, SIZE)] == 8
    # neither latents nor a cache of all layers
    gathered_sizes = [np.prod(s) for kind, s in found if kind == "all-gather"]
    assert max(gathered_sizes) <= 2 * edits * length * heads * SIZE


@pytest.mark.parametrize("shape", MESHES)
def test_the_carry_lies_in_shards(shape):
    """Shapes in the text of the compiled `while` are those of one device."""
    data, frames, model = shape
    edits, local = EDITS // data, padding.padded(TOKENS, frames) // frames
    text = on_a_mesh(shape)[3]
    carried = {
        tuple(int(n) for n in s.split(","))
        for line in text.splitlines()
        if " while(" in line
        for s in re.findall(r"f32\[([0-9,]+)\]", line.split(" while(")[0])
    }
    assert (LAYERS, edits, local, CONFIG.dim // model) in carried  # the cache
    assert (edits, local, 4, 4) in carried  # latents
    assert (10, edits, local, 4, 4) in carried  # clean estimates
    assert (LAYERS, CONFIG.dim // frames, CONFIG.dim // model) in carried  # queries' kernels
    assert (LAYERS, 40 // model, CONFIG.dim // frames) in carried
    if shape != (8, 1, 1):
        whole = {(LAYERS, EDITS, 64, HEADS, SIZE), (EDITS, 64, 4, 4), (10, EDITS, 64, 4, 4)}
        assert not whole & carried


def test_a_cache_is_laid_out_as_its_letters_say():
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        edits, model = make_edits(), placed(model_of(), "transformer", mesh, True)

        @jax.jit
        def source_pass(model, edits):
            conditioning = model.condition(edits.source_prompts, edits.grid)
            pass_ = model.keys_values(edits.source, jnp.full(EDITS, 500.0), conditioning)
            return conditioning, pass_

        conditioning, (velocity, cache) = source_pass(model, edits)
    held = sum(x.addressable_shards[0].data.nbytes for x in (cache.k, cache.v))
    assert held == cache.nbytes // 8
    for x, letters in (
        (cache.k, "layers B L N"),
        (cache.v, "layers B L N"),
        (velocity, "B L cells C"),
        (conditioning.text.k, "layers B S N"),
        (conditioning.control, "B L cells C"),
        (conditioning.positions.rope[0], "LK"),
    ):
        wanted = jax.sharding.NamedSharding(mesh, sharding.spec(letters))
        assert x.sharding.is_equivalent_to(wanted, x.ndim), letters


def test_heads_that_do_not_divide_are_refused():
    mesh = make_mesh(1, 1, 8)
    with jax.set_mesh(mesh):
        edits, model = make_edits(), model_of()
        args, program = arguments(edits, model)
        with pytest.raises(ConfigError, match=r"4 heads .* 8 devices .*: 1, 2, 4"):
            sample.lower(*args, program=program)


# -- the VAE ---------------------------------------------------------------------------------------


def make_vae():
    config = VAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=(1, 1, 1),
        temperal_downsample=(True, False),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    return fresh.module(lambda: autoencoder.WanVAE(config, rngs=nnx.Rngs(0)))


@functools.cache
def coded_on_one_device(size):
    """A video of noise, its latents, and its pixels after the round trip."""
    video = np.random.default_rng(0).integers(0, 256, (2, 9, *size, 3), np.uint8)
    latents = np.asarray(autoencoder.encode(make_vae(), video))
    return video, latents, np.asarray(autoencoder.decode(make_vae(), latents)[0])


# Spread by columns, and by rows over a part of the devices.
@pytest.mark.parametrize("shape, size", [((1, 8, 1), (32, 64)), ((2, 2, 2), (64, 32))])
def test_a_video_is_coded_in_parts(shape, size):
    video, latents, pixels = coded_on_one_device(size)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        networks = placed(make_vae(), "vae", mesh, False)
        found = np.asarray(autoencoder.encode(networks, video))
        decode = autoencoder.decode.lower(networks, latents).compile()
        decoded, finite = decode(networks, latents)
    assert relative(found, latents) < 1e-5
    difference = np.asarray(decoded).astype(int) - pixels.astype(int)
    assert finite.all() and np.abs(difference).max() <= 1
    halos = [s for kind, s in collectives(decode.as_text()) if kind == "collective-permute"]
    assert halos  # neighbours swap columns or rows
