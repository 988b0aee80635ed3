"""Arithmetic on paper against the compiler's count of operations."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from workloads import ROWS, SMALL, T2V, VACE, full, small, softmax

from kvlock_jax import lock
from kvlock_jax.errors import ConfigError
from kvlock_jax.estimate import costs
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.grid import Grid
from kvlock_jax.lock import KVCache
from kvlock_jax.models.wan import block as wan_block
from kvlock_jax.models.wan.block import Block, Modulation, Positions
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEBlock, VACEContext, wan_transformer


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """Of texts; tokens have it from `softmax`."""
    monkeypatch.setattr(wan_block, "replicated_keys", softmax)


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
    text = (ROWS, workload.text_tokens, wide)
    table = shape((workload.tokens, config.attention_head_dim // 2), jnp.float32)
    arrays = (
        shape((ROWS, workload.tokens, wide), jnp.float32),
        shape((ROWS, 6, wide), jnp.float32),
        KVCache.abstract(text, jnp.dtype(jnp.float32)),
        (table, table),
    )
    graph, state = nnx.split(
        nnx.eval_shape(lambda: kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    )

    def run(state, x, modulations, text, rope):
        modulation = Modulation(modulations)
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
    monkeypatch.setattr(wan_block, "FEED_FORWARD_TOKENS", 10**6)  # it counts a loop's body once
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


def test_a_foreground_pass_computes_less_in_the_main_blocks_alone():
    whole, fifth = (costs.pass_flops(full("wan2.1-vace-1.3b"), 1, None, c) for c in (1, 0.2))
    assert (fifth.context, fifth.embedding) == (whole.context, whole.embedding)
    for part in ("projections", "self_attention", "cross_attention", "feed_forward", "head"):
        assert 5 * getattr(fifth, part) == pytest.approx(getattr(whole, part))


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
