"""The parameters that keep their dtype when weights are rounded are exactly those that must."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import whole
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.registry import NETWORKS
from kvlock_jax.convert import converter, source
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

RULES = {name: network.parameters for name, network in registry.FAMILIES[1].networks.items()}
LOW, WIDE = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def values(model) -> dict:
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def replaced(model, **changes):
    """A copy with other values of some parameters, in their own dtype."""
    graph, state = nnx.split(model)
    flat = [
        (path, v.replace(jnp.asarray(changes.get(".".join(map(str, path)), v[...]))))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def telling(model):
    """A copy whose parameters are random: no zeros, no ones, none that bfloat16 holds."""
    rng = np.random.default_rng(0)
    drawn = {k: rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in values(model).items()}
    return replaced(model, **drawn)


@pytest.fixture(scope="module")
def low(tiny_vace_checkpoint):
    """The tiny VACE, float32, computing in bfloat16."""
    return source.load(tiny_vace_checkpoint, compute_dtype=jnp.bfloat16)


# -- what a module makes of its parameters -------------------------------------------------------


@nnx.jit
def velocity(model, seed):
    shapes = ((1, 2, 4, 6, 4), (1, 3, 16), (1, 2, 4, 6, 72))
    keys = jax.random.split(jax.random.key(seed), 3)
    latents, text, control = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    context = whole.WholeContext(text, control, jnp.ones((1,)))
    return whole.velocity(model, latents, jnp.array([500.0]), context)


@nnx.jit
def hidden(model, seed):
    ids = jax.random.randint(jax.random.key(seed), (1, 6), 0, 16)
    return model(ids, jnp.ones_like(ids))


RUNS = {"transformer": velocity, "text_encoder": hidden}


@pytest.mark.parametrize("name", RUNS)
def test_conversion_rounds_what_the_module_rounds(low, name):
    """Storing a parameter in bfloat16 changes a bit of the result, unless the rule rounds it."""
    model, run = telling(getattr(low, name)), RUNS[name]
    exact = [np.asarray(run(model, seed)) for seed in range(8)]
    assert np.isfinite(exact).all()
    for path, array in values(model).items():
        stored = replaced(model, **{path: array.astype(LOW).astype(WIDE)})
        same = all(np.array_equal(run(stored, seed), exact[seed]) for seed in range(8))
        rounded = RULES[name].dtype(path, WIDE, LOW) == LOW
        # the vocabulary is published in bfloat16 and used in float32
        assert rounded == (same or path == "shared.embedding"), path


@pytest.mark.parametrize("dtype", converter.DTYPES)
def test_converted(tiny_vace_checkpoint, tmp_path, dtype):
    asked = converter.DTYPES[dtype]
    contents = converter.convert(tiny_vace_checkpoint, tmp_path / "own", asked)
    expected = {dtype, "float32"}
    kinds = {name: set(model.dtypes) for name, model in contents.models.items()}
    assert kinds == {"transformer": expected, "vae": {"float32"}, "text_encoder": expected}
    got, want = format.load(tmp_path / "own"), source.load(tiny_vace_checkpoint)
    for name in NETWORKS:
        theirs, kept = values(getattr(want, name)), set()
        for path, array in values(getattr(got, name)).items():
            np.testing.assert_array_equal(array, theirs[path].astype(array.dtype))
            kept |= {path.split(".")[-1]} if array.dtype == WIDE else set()
        if name == "transformer" and asked != WIDE:
            # `kernel` is the time embedding's
            assert kept == {"bias", "scale", "scale_shift_table", "kernel"}


def test_islands_are_widened_and_never_rounded():
    """They stay float16 in a conversion to bfloat16, and widen in one to float32."""
    island, product = "blocks.norm2.scale", "blocks.attn1.to_q.kernel"
    rules = RULES["transformer"]
    half = np.dtype(np.float16)
    assert [rules.dtype(p, half, LOW) for p in (island, product)] == [half, LOW]
    assert [rules.dtype(p, LOW, WIDE) for p in (island, product)] == [WIDE, WIDE]
    assert [rules.dtype(p, half, None) for p in (island, product)] == [half, half]


def test_an_edit_in_bfloat16_has_its_vae_in_float32(low, tiny_vace_checkpoint, tmp_path):
    converter.convert(tiny_vace_checkpoint, tmp_path / "own")
    restored = format.load(tmp_path / "own", compute_dtype=jnp.bfloat16)
    for models in (low, restored):
        kinds = {name: jnp.dtype(getattr(models, name).dtype) for name in NETWORKS}
        assert kinds == {"transformer": LOW, "vae": WIDE, "text_encoder": LOW}


# -- published sizes -----------------------------------------------------------------------------

LARGE = WanConfig(40, 128, 40, 13824)
SIZES = {
    "wan2.1-t2v-1.3b": WanConfig(12, 128, 30, 8960),
    "wan2.1-t2v-14b": LARGE,
    "wan2.1-vace-14b": dataclasses.replace(LARGE, vace_layers=tuple(range(0, 40, 5))),
    "wan2.1-vae": VAEConfig(),
    "umt5-xxl-encoder": UMT5Config(256384, 4096, 64, 10240, 24, 64),
}
# From the publisher's lists: the time embedding, its projection, tables, norms and biases.
ISLANDS = r"time_|modulation|norm|bias|pos_embedding"


@pytest.mark.parametrize("name", SIZES)
def test_bytes_of_the_islands_of_published_sizes(name):
    """Counts the publisher's own tensors: two bytes more for each number of an island."""
    listed = json.loads((Path(__file__).parent / f"data/layouts/{name}.original.json").read_text())
    config = SIZES[name]
    networks = registry.FAMILIES[0].networks
    field = next(n for n, network in networks.items() if isinstance(config, network.config))
    model = registry.abstract(config)
    stored = sum(
        math.prod(v.shape) * RULES[field].dtype(".".join(map(str, p)), WIDE, LOW).itemsize
        for p, v in nnx.to_flat_state(nnx.state(model))
    )
    wide = sum(
        math.prod(shape)
        for key, shape in listed.items()
        if field == "vae" or re.search(ISLANDS, key)
    )
    total = sum(map(math.prod, listed.values()))
    assert stored == 2 * total + 2 * wide
    if field != "vae":
        assert wide / total < 0.015


# -- devices -------------------------------------------------------------------------------------


def test_a_published_folder_goes_where_it_is_placed(tiny_vace_checkpoint):
    mesh = jax.make_mesh((8,), ("model",))

    def place(name, shape):
        axes = [i for i, size in enumerate(shape) if size % 8 == 0]
        spec = [None] * len(shape)
        for axis in axes[-1:]:
            spec[axis] = "model"
        return NamedSharding(mesh, PartitionSpec(*spec))

    got, want = (
        source.load(tiny_vace_checkpoint, place_for=p) for p in (lambda configs: place, None)
    )
    inner = 0
    for name in NETWORKS:
        theirs = values(getattr(want, name))
        for path, variable in nnx.to_flat_state(nnx.state(getattr(got, name))):
            dotted, array = ".".join(map(str, path)), variable[...]
            assert array.sharding == place(f"{name}.{dotted}", array.shape)
            np.testing.assert_array_equal(array, theirs[dotted], strict=True)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, theirs[dotted][shard.index], strict=True)
            inner += array.ndim == 3 and array.sharding.spec[1] == "model"
    assert inner  # stacked kernels, over what each layer takes in
    alone = want.transformer.proj_out.kernel.sharding
    assert alone == SingleDeviceSharding(jax.devices()[0])
