"""Costs on paper against the models themselves: parameters, tokens, memory."""

import dataclasses
import functools
import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx
from workloads import LAYOUTS, LOCK, PUBLISHED, ROWS, SMALL, T2V, VACE, count, full, small, softmax

from kvlock_jax import lock
from kvlock_jax.estimate import costs
from kvlock_jax.estimate.costs import FLOAT32, Layout, Workload
from kvlock_jax.grid import Grid
from kvlock_jax.lock import KVCache
from kvlock_jax.models.wan import block as wan_block
from kvlock_jax.models.wan.block import FEED_FORWARD_TOKENS
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.parallel import padding
from kvlock_jax.sampling import loop, solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """Of texts; tokens have it from `softmax`."""
    monkeypatch.setattr(wan_block, "replicated_keys", softmax)


@pytest.mark.parametrize("config", [*PUBLISHED.values(), T2V, VACE])
def test_parameters_are_the_models(config):
    parts = costs.parameters(config)
    assert parts.total == count(config, "")
    assert dataclasses.asdict(parts) == {
        "patch_embedding": count(config, r"patch_embedding\."),
        "time": count(config, r"condition_embedder\.time_"),
        "text": count(config, r"condition_embedder\.text_"),
        "blocks": count(config, r"blocks\."),
        "head": count(config, r"(proj_out|scale_shift_table)"),
        "vace": count(config, "vace_"),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_publishers(name):
    listed = json.loads((LAYOUTS / f"{name}.diffusers.json").read_text())
    assert costs.parameters(PUBLISHED[name]).total == sum(map(math.prod, listed.values()))


def test_parameters_without_a_norm():
    config = dataclasses.replace(VACE, cross_attn_norm=False)
    assert costs.parameters(config).total == count(config, "")


@pytest.mark.parametrize("config", [*PUBLISHED.values(), T2V, VACE])
def test_a_pass_reads_all_but_what_is_made_before_the_loop(config):
    text = r".*(condition_embedder\.text_|attn2\.(to_k|to_v|norm_k)\.)"
    made = count(config, text)
    assert costs.pass_parameters(config) == count(config, "") - made


def test_tokens_and_their_padding():
    """METHOD.md section 2's strides; DESIGN.md section 3: 32,760 are padded to 32,768."""
    assert full("wan2.1-t2v-1.3b").latent_shape == (21, 60, 104)
    assert full("wan2.1-t2v-1.3b").tokens == 32_760
    assert full("wan2.1-t2v-1.3b", 720, 1280).tokens == 75_600
    assert full("wan2.1-vace-1.3b", references=2).tokens == 23 * 30 * 52
    assert small(T2V).tokens == 2 * 16 * 16
    assert Layout.of(1, False, 32_760).local(32_760) == 32_760
    assert Layout.of(8, False, 32_760).local(32_760) == 4_096
    assert Layout.of(8, False, 8_191).local(8_191) == 1_024  # few tokens are not padded to blocks
    assert Layout.of(8, False, 8_193).local(8_193) == 1_152
    assert Layout(devices=8).local(32_760) == 4_095
    assert Layout(devices=7, block=8).local(15) == 8


@pytest.mark.parametrize("tokens", [1, 108, 8_191, 8_192, 32_760, 75_600])
def test_padding_is_the_programs(tokens):
    for devices in (1, 2, 3, 8, 64):
        length = padding.padded(tokens, devices)
        assert devices * Layout.of(devices, False, tokens).local(tokens) == length
        assert tokens <= length < tokens + devices * 128
        assert length - tokens <= max(devices - 1, tokens // 8)


@pytest.mark.parametrize(("name", "gib"), [("wan2.1-t2v-1.3b", 5.6), ("wan2.1-vace-14b", 25.0)])
def test_cache_of_published_sizes(name, gib):
    """DESIGN.md section 2; context blocks have none."""
    workload, config = full(name), PUBLISHED[name]
    assert costs.keys_values_bytes(workload, Layout()) / 2**30 == pytest.approx(gib, rel=0.01)
    shape = (config.num_layers, 3, 4096, config.num_attention_heads, config.attention_head_dim)
    shard = KVCache.abstract(shape, jnp.dtype(jnp.bfloat16))
    assert costs.keys_values_bytes(full(name, batch=3), Layout.of(8, False, 32_760)) == shard.nbytes


def test_weights_on_a_device():
    workload = full("wan2.1-t2v-1.3b", weight_bytes=2)
    whole = 2 * count(SMALL, "")
    assert costs.weight_bytes(workload, Layout(8)) == whole
    assert costs.weight_bytes(workload, Layout(8, shard_weights=True)) == whole // 8


def test_activations_by_hand():
    """Two edits of VACE on 3 devices, tensor by tensor; 12 tokens, 4 on each."""
    config = WanConfig(
        2, 8, 3, 40, 4, 4, text_dim=32, freq_dim=16, vace_layers=(0, 2), vace_in_channels=12
    )
    workload = Workload(config, 5, 32, 48, batch=2, text_tokens=7)
    found = costs.activations(workload, Layout(3), LOCK)
    wide, tokens = 16, 4
    text = 0
    for _block in ("main", "main", "main", "context", "context"):
        for _row in ("prompt", "negative", "source") * 2:
            for _tensor in ("keys", "values"):
                text += 2 * 7 * wide
    assert found.text == text
    narrow, stream = 4 * tokens * 2 * wide, 4 * tokens * 4 * wide  # of two edits' two branches
    beside = 2 * tokens * 4 * wide  # of two sources
    assert found.stream == found.carried == 2 * (stream + beside)
    for other in ({"cache": "carried"}, {"enabled": False}):
        alone = costs.activations(workload, Layout(3), dataclasses.replace(LOCK, **other))
        assert alone == dataclasses.replace(found, stream=2 * stream, carried=2 * stream)
    assert found.control == 2 * tokens * 4 * wide * 2  # of two edits and two sources
    everywhere = 2 * 3 * narrow  # keys and values of all three devices
    attention = [narrow] * 3 + [stream, everywhere]
    feed_forward = [narrow, stream, 4 * tokens * 4 * 40, 4 * tokens * 2 * 40]
    projections = [narrow] + [stream] * 3
    assert found.block == max(map(sum, (attention, feed_forward, projections)))
    # Source, noise, latents, three of the solver, 10 estimates; a token has 4 cells of 4 channels.
    control = 2 * 12  # of the edit and of its source
    assert found.latents == ((1 + 1 + 1 + 3 + 10) * 4 + control) * 2 * tokens * 4 * 4
    assert found.positions == 2 * tokens * 4 * 4  # a cosine and a sine for each pair
    assert found.weights == 0 and found.total == sum(dataclasses.asdict(found).values())


def test_the_largest_part_of_a_block():
    def block(**changes):
        config = dataclasses.replace(SMALL, **changes)
        return lambda devices, side=64: (
            costs.activations(Workload(config, 5, side, side), Layout(devices), LOCK).block
        )

    rows, wide = 2 * 2 * 4 * 4, 1536
    assert block()(1) == rows * (6 * wide + 6 * 8960)
    assert block(ffn_dim=1)(1) == rows * (2 + 12) * wide
    assert block(ffn_dim=1)(2) == rows // 2 * (10 + 8) * wide
    rows, at_a_time = 2 * 2 * 40 * 40, FEED_FORWARD_TOKENS
    assert block(ffn_dim=20_000)(1, 640) == rows * 6 * wide + at_a_time * 6 * 20_000


def test_activations_grow_with_what_there_is():
    def of(name: str = "wan2.1-t2v-1.3b", devices: int = 8, **changes: int):
        workload = full(name, **changes)
        return costs.activations(workload, Layout.of(devices, False, workload.tokens), LOCK)

    block = 2 * count(SMALL, r"blocks\.") // SMALL.num_layers
    sharded = costs.activations(full("wan2.1-t2v-1.3b"), Layout(8, True, 128), LOCK)
    assert sharded == dataclasses.replace(of(), weights=block)
    shared = of().positions
    assert of(batch=3).total - shared == 3 * (of().total - shared)
    assert of().carried == of().control == 0
    # The keys and values of both rows stay whole on each device.
    assert of(devices=64).total > 2 * 2 * 2 * 32_760 * 1536


def test_activations_beside_a_compilers():
    """The whole loop, whose logits the CPU's compiler keeps: in float32, a width of 256."""
    config = dataclasses.replace(VACE, num_layers=6, vace_layers=(0, 3))
    workload = small(config, height=128, width=128, dtype_bytes=4)
    compiled = compiled_loop(config, workload).memory_analysis().temp_size_in_bytes
    logits = FLOAT32 * ROWS * config.num_attention_heads * workload.tokens**2
    cache = costs.cache_bytes(workload, Layout(), LOCK)
    estimate = costs.activations(workload, Layout(), LOCK).total + cache
    assert 0.7 * (estimate + logits) < compiled < 1.3 * (estimate + logits)


def compiled_loop(config: WanConfig, workload: Workload):
    """The sampling loop with a lock, from shapes alone."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    grid = Grid.of(workload.latent_shape)
    cells = shape((1, grid.length, 4, config.in_channels))

    def context(rows: int) -> VACEContext:
        text = shape((rows, workload.text_tokens, config.text_dim))
        return VACEContext(text, shape((*cells.shape[:3], config.vace_in_channels)), shape((1,)))

    mask = jax.ShapeDtypeStruct(cells.shape[:3], jnp.bool_)
    edits = Edits(cells, cells, mask, context(2), context(1), grid)
    table, knobs = solvers.table("unipc", 4, 3.0), lock.knobs(LOCK, 5.0)
    model = nnx.eval_shape(lambda: wan_transformer(config, attend=softmax, rngs=nnx.Rngs(0)))
    program = Program.of(LOCK)
    return loop.sample.lower(model, cells, edits, table, knobs, program=program).compile()
