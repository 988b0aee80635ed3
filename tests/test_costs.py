"""Costs on paper against the models themselves: parameters, the compiler's count of operations."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax import costs, lock, sharding
from kvlock_jax.config import WanConfig
from kvlock_jax.costs import FLOAT32, Layout, Workload
from kvlock_jax.errors import ConfigError
from kvlock_jax.lock import KVCache
from kvlock_jax.models import block, kernels
from kvlock_jax.models.block import Block, Positions
from kvlock_jax.models.vace import VACEBlock, VACEContext, wan_transformer
from kvlock_jax.patches import Grid
from kvlock_jax.sampling import sampler, solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.sampler import Program

SMALL, LARGE = WanConfig(12, 128, 30, 8960), WanConfig(40, 128, 40, 13824)
PUBLISHED = {
    "wan2.1-t2v-1.3b": SMALL,
    "wan2.1-t2v-14b": LARGE,
    "wan2.1-vace-1.3b": dataclasses.replace(SMALL, vace_layers=tuple(range(0, 30, 2))),
    "wan2.1-vace-14b": dataclasses.replace(LARGE, vace_layers=tuple(range(0, 40, 5))),
}
LAYOUTS = Path(__file__).parent / "data" / "layouts"

# Wide enough that matrix products are nearly all there is to compute.
T2V = WanConfig(2, 128, 2, 640, in_channels=4, out_channels=4, text_dim=64, freq_dim=32)
VACE = dataclasses.replace(T2V, vace_layers=(0,), vace_in_channels=12)
ROWS = 2
LOCK = lock.preset("kvlock", 5.0)


def small(config: WanConfig, **changes: int) -> Workload:
    return Workload(
        config, **{"frames": 5, "height": 256, "width": 256, "text_tokens": 48} | changes
    )


def full(name: str, height: int = 480, width: int = 832, **changes: int) -> Workload:
    return Workload(PUBLISHED[name], 81, height, width, **changes)


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """Of texts; tokens have it from `softmax`."""
    monkeypatch.setattr(block, "replicated_keys", softmax)


def softmax(q, k, v, keys=None):
    """Attention that the compiler sees through, whatever kernel the program takes."""
    return kernels.plain(q, k, v, keys)[0]


@functools.cache
def sizes(config: WanConfig) -> dict[str, int]:
    """Numbers of each parameter of the abstract transformer."""
    model = nnx.eval_shape(lambda: wan_transformer(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): math.prod(leaf.get_value().shape) for path, leaf in flat}


def count(config: WanConfig, pattern: str) -> int:
    return sum(size for name, size in sizes(config).items() if re.match(pattern, name))


# --- sizes ------------------------------------------------------------------------------------


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
    made = count(config, text) + count(config, r"vace_(patch_embedding|proj_in)\.")
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
        length = sharding.padded(tokens, devices)
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
    assert found.latents == (1 + 1 + 1 + 3 + 10) * 2 * tokens * 4 * 4 * 4
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
    rows, at_a_time = 2 * 2 * 40 * 40, costs.FEED_FORWARD_TOKENS
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
    return sampler.sample.lower(model, cells, edits, table, knobs, program=program).compile()


# --- arithmetic -------------------------------------------------------------------------------


def dots(jaxpr) -> int:
    """Operations of all matrix products of a program, of a loop's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(dots, jax.extend.core.jaxprs_in_params(equation.params)))
    return total


def run_block(kind: type[Block], config: WanConfig, workload: Workload):
    """A block as a function of its arrays, and shapes of them."""
    shape, wide = jax.ShapeDtypeStruct, config.dim
    heads = (ROWS, workload.text_tokens, config.num_attention_heads, config.attention_head_dim)
    table = shape((workload.tokens, config.attention_head_dim // 2), jnp.float32)
    arrays = (
        shape((ROWS, workload.tokens, wide), jnp.float32),
        shape((ROWS, 6, wide), jnp.float32),
        KVCache.abstract(heads, jnp.dtype(jnp.float32)),
        (table, table),
    )
    graph, state = nnx.split(
        nnx.eval_shape(lambda: kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    )

    def run(state, x, modulation, text, rope):
        block, positions = nnx.merge(graph, state), Positions(rope, None, softmax)
        if kind is VACEBlock:
            return block.hint(x, modulation, text, positions)
        return block(x, modulation, text, positions, None)[0]

    return run, (state, *arrays)


def run_model(config: WanConfig, workload: Workload):
    """A pass without a loop as a function of its arrays, and shapes of them."""
    model = nnx.eval_shape(
        lambda: wan_transformer(config, unroll=config.num_layers, attend=softmax, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    grid = Grid.of(workload.latent_shape)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    context = shape((ROWS, workload.text_tokens, config.text_dim))
    if config.vace_layers:
        control = shape((ROWS, grid.length, 4, config.vace_in_channels))
        context = VACEContext(context, control, shape((ROWS,)))

    def condition(state, context):
        return nnx.merge(graph, state).condition(context, grid)

    def run(state, latents, timestep, conditioning):
        return nnx.merge(graph, state)(latents, timestep, conditioning)

    latents = shape((ROWS, grid.length, 4, config.in_channels))
    conditioning = jax.eval_shape(condition, state, context)
    return run, (state, latents, shape((ROWS,)), conditioning)


def compilers(run, arguments) -> float:
    return jax.jit(run).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("workload", [small(T2V), small(T2V, height=128, text_tokens=80)])
def test_a_blocks_flops_are_the_compilers(workload):
    one = dataclasses.replace(workload, config=dataclasses.replace(T2V, num_layers=1))
    flops = costs.pass_flops(one, ROWS)
    expected = flops.total - flops.embedding - flops.head
    run, arguments = run_block(Block, T2V, workload)
    assert dots(jax.make_jaxpr(run)(*arguments).jaxpr) == expected
    # What is not a matrix product comes on top.
    assert expected < compilers(run, arguments) < 1.03 * expected


def test_what_is_no_matrix_product_is_little(monkeypatch):
    """Of a block of 1.3B, 81 frames of 480x832, and as the compiler counts: no exponentials."""
    monkeypatch.setattr(block, "FEED_FORWARD_TOKENS", 10**6)  # it counts a loop's body once
    one = full("wan2.1-t2v-1.3b")
    flops = costs.pass_flops(
        dataclasses.replace(one, config=dataclasses.replace(SMALL, num_layers=1)), ROWS
    )
    run, arguments = run_block(Block, SMALL, one)
    found = compilers(run, arguments)
    assert 1 < found / (flops.total - flops.embedding - flops.head) < 1.02


def test_a_context_blocks_flops_are_the_compilers():
    one = small(dataclasses.replace(VACE, vace_layers=(0,)))
    expected = costs.pass_flops(one, ROWS).context
    run, arguments = run_block(VACEBlock, VACE, one)
    assert dots(jax.make_jaxpr(run)(*arguments).jaxpr) == expected
    assert expected < compilers(run, arguments) < 1.03 * expected


@pytest.mark.parametrize("config", [T2V, VACE], ids=["t2v", "vace"])
def test_a_pass_has_the_flops_of_the_compiler(config):
    expected = costs.pass_flops(small(config), ROWS).total
    run, arguments = run_model(config, small(config))
    assert expected < compilers(run, arguments) < 1.03 * expected
    if not config.vace_layers:  # a branch of a loop runs as often as its data say
        assert dots(jax.make_jaxpr(run)(*arguments).jaxpr) == expected


def test_parts_are_what_they_are_called():
    """Doubling what only one part depends on adds that part once more."""

    def block(workload: Workload) -> int:
        run, arguments = run_block(Block, workload.config, workload)
        return dots(jax.make_jaxpr(run)(*arguments).jaxpr)

    one_layer = dataclasses.replace(T2V, num_layers=1)
    once = small(one_layer)
    flops = costs.pass_flops(once, ROWS)
    wider = small(dataclasses.replace(one_layer, ffn_dim=2 * T2V.ffn_dim))
    assert block(wider) - block(once) == flops.feed_forward
    assert block(small(one_layer, text_tokens=96)) - block(once) == flops.cross_attention
    # Twice the tokens: four times the products of pairs of tokens, and twice all else.
    assert block(small(one_layer, width=512)) - 2 * block(once) == 2 * flops.self_attention


def test_padding_is_computed():
    whole = costs.pass_flops(full("wan2.1-vace-14b"), 1)
    padded = costs.pass_flops(full("wan2.1-vace-14b"), 1, Layout.of(8, False, 32_760))
    assert padded.projections * 32_760 == whole.projections * 32_768
    assert padded.self_attention * 32_760**2 == whole.self_attention * 32_768**2


def test_branches_of_a_step():
    workload = full("wan2.1-vace-1.3b", batch=3)
    one = costs.pass_flops(workload, 1)
    assert costs.edit_flops(workload) == 6 * one.total
    assert costs.source_flops(workload) == 3 * (one.total - one.head)


@pytest.mark.parametrize("name", lock.PRESETS)
def test_source_passes_are_the_loops(name):
    settings = lock.preset(name, 5.0)
    for steps in (4, 50):
        window = lock.in_window(steps, settings.kappa)
        needed = lock.source_needed(window, lock.knobs(settings, 5.0))
        assert costs.source_share(settings, steps) == pytest.approx(np.mean(needed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(T2V, frames=6), "Workload.frames must be 1 more than a multiple of 4"),
        (lambda: small(T2V, height=250), "Workload.height must be a multiple of 16, found 250"),
        (lambda: small(T2V, width=8), "Workload.width must be a multiple of 16"),
        (lambda: small(T2V, batch=0), "Workload.batch must be over 0, found 0"),
        (lambda: small(T2V, references=-1), "Workload.references must be 0 or more"),
        (lambda: Layout.of(0, False, 8), "Layout.devices must be over 0, found 0"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
