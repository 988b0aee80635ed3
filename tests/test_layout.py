"""The letters of every parameter against the shapes of the published sizes."""

import math
import types

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kvlock_jax.checkpoints import registry
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.text import config as text_config
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.models.wan.vace import wan_transformer
from kvlock_jax.parallel.mesh import make_mesh

SIZES = {
    "1.3b": WanConfig(12, 128, 30, 8960, vace_layers=tuple(range(0, 30, 2))),
    "14b": WanConfig(40, 128, 40, 13824, vace_layers=tuple(range(0, 40, 5))),
}
TEXT = UMT5Config(256_384, 4096, 64, 10_240, 24, 64)


@pytest.fixture
def mesh():
    return make_mesh(data=1, frames=4, model=2)


def parameters(kind, config):
    state = nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    return {".".join(map(str, p)): v.get_value().shape for p, v in nnx.to_flat_state(state)}


@pytest.mark.parametrize("size", SIZES)
def test_letters_name_the_dimensions_they_stand_for(size):
    config = SIZES[size]
    wanted = {"D": config.dim, "N": config.dim, "F": config.ffn_dim}
    named = 0
    for path, shape in parameters(wan_transformer, config).items():
        letters = PARAMETERS.dimensions(path)
        if letters:
            named += 1
            names = letters.split()
            assert len(names) == len(shape), path
            assert all(wanted.get(n, s) == s for n, s in zip(names, shape, strict=True)), path
            is_stacked = path.split(".")[0] in ("blocks", "vace_blocks")
            assert (names[0] == "layers") == is_stacked, path
    assert named == 2 * (2 * (3 * 2 + 2 + 1) + 3) + 2


def test_heads_are_on_the_outputs_of_queries_and_the_inputs_of_what_follows(mesh):
    configs = types.SimpleNamespace(transformer=SIZES["1.3b"], vae=VAEConfig())

    def spec(path, shape, spread):
        return registry.on_mesh(mesh, configs, spread=spread)(path, shape).spec

    query = ("transformer.blocks.attn1.to_q.kernel", (30, 1536, 1536))
    out = ("transformer.blocks.attn1.to_out.kernel", (30, 1536, 1536))
    first = ("transformer.blocks.ffn.net_0.kernel", (30, 1536, 8960))
    assert spec(*query, False) == P(None, None, "model")
    assert spec(*query, True) == P(None, "frames", "model")
    assert spec(*out, False) == P(None, "model", None)
    assert spec(*out, True) == P(None, "model", "frames")
    assert spec(*first, True) == P(None, "frames", "model")
    assert spec("transformer.patch_embedding.kernel", (64, 1536), True) == P()
    assert spec("vae.decoder.conv_in.kernel", (3, 3, 3, 16, 384), True) == P()
    # neither axis divides a width of 9
    assert spec("transformer.blocks.attn1.to_q.kernel", (2, 9, 9), True) == P(None, None, None)


@pytest.mark.parametrize("size, gib", [("1.3b", 0.6), ("14b", 4.3)])
def test_spread_weights_are_an_eighth_of_them(mesh, size, gib):
    held = total = 0
    for path, shape in parameters(wan_transformer, SIZES[size]).items():
        place = PARAMETERS.sharding(mesh, path, shape, spread=True)
        held += 2 * math.prod(place.shard_shape(shape))
        total += 2 * math.prod(shape)
    assert held / total == pytest.approx(1 / 8, rel=0.08)
    assert held / 2**30 == pytest.approx(gib, abs=0.1)


def test_the_text_encoder_lies_on_all_devices(mesh):
    held = total = 0
    for path, shape in parameters(UMT5Encoder, TEXT).items():
        place = text_config.PARAMETERS.sharding(mesh, path, shape, spread=False)
        held += math.prod(place.shard_shape(shape))
        total += math.prod(shape)
    assert held / total == pytest.approx(1 / 8, rel=1e-3)


def test_a_layer_is_gathered_for_its_products(mesh):
    config = WanConfig(4, 12, 3, 40, 4, 4, 16, 8)
    state = nnx.state(registry.abstract(config))
    blocks = state["blocks"]

    def first_layer(blocks):
        return gathered_layer(jax.tree.map(lambda x: x[0], blocks), PARAMETERS)

    with jax.set_mesh(mesh):
        compiled = jax.jit(first_layer).lower(blocks).compile()
    found = {
        ".".join(map(str, path)): leaf.get_value().spec
        for path, leaf in nnx.to_flat_state(compiled.output_shardings)
    }
    assert found["attn1.to_q.kernel"] == P(None, "model")
    assert found["attn2.to_out.kernel"] == P("model")
    assert found["ffn.net_2.kernel"] == P("model")
    assert found["scale_shift_table"] == P()
    # without a mesh there is no constraint
    assert jax.tree.leaves(gathered_layer(blocks, PARAMETERS)) == jax.tree.leaves(blocks)
