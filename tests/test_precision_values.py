"""Cases in which bfloat16 would lose the result, were it not for a float32 island.

Each is shown to be lost once the island is taken away (DESIGN.md section 3).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from islands import (
    FUNCTIONS,
    GRID,
    LOW,
    WIDE,
    context_of,
    low_attend,
    low_push,
    lower,
    patches,
    transformer,
)

from kvlock_jax import lock
from kvlock_jax.models import norms
from kvlock_jax.models.attention import dispatch
from kvlock_jax.models.attention.rope import rope_table, rotate
from kvlock_jax.models.attention.sharded import gathered, replicated_keys, ring
from kvlock_jax.sampling import solvers

RNG = np.random.default_rng(1)


def error(found, expected) -> float:
    """Relative L2."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def modulation(model, timestep):
    return np.asarray(model.times(jnp.array([timestep])).modulation)


@pytest.mark.parametrize("layer", ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"])
def test_modulation_is_that_of_float32(layer):
    """To the bit: 998 and 999, both 1000 in bfloat16, stay apart."""
    low, wide = transformer(), transformer(dtype=WIDE)
    for t in (998.0, 999.0):
        np.testing.assert_array_equal(modulation(low, t), modulation(wide, t))
    assert error(modulation(low, 998.0), modulation(low, 999.0)) > 1e-3
    lower(low, f"condition_embedder.{layer}")
    assert not np.array_equal(modulation(low, 999.0), modulation(wide, 999.0))


def velocity(model):
    """Of a model whose residual stream lies about 1000, where bfloat16 counts by fours."""
    rng = np.random.default_rng(2)
    z = patches(rng)
    model.patch_embedding.bias[...] = jnp.full((model.config.dim,), 1000.0)
    context = context_of(model.config, 1, rng)
    run = jax.jit(lambda m, z: m(z, jnp.full((1,), 500.0), m.condition(context, GRID)))
    return run(model, z)


def test_a_large_residual_stream_keeps_what_is_small(monkeypatch):
    expected, kept = velocity(transformer(dtype=WIDE)), velocity(transformer())
    norm = norms._centred
    with monkeypatch.context() as patch:
        patch.setattr(norms, "_centred", lambda x, eps: norm(x.astype(LOW).astype(WIDE), eps))
        rounded = velocity(transformer())
    monkeypatch.setattr(*FUNCTIONS["residual stream"])
    stream = velocity(transformer())
    errors = [error(found, expected) for found in (kept, rounded, stream)]
    assert errors[0] < 0.02 and min(errors[1:]) > 0.2, errors


@pytest.mark.parametrize("attend", [dispatch.attend, gathered, ring, replicated_keys])
def test_softmax_of_large_logits(attend):
    """About 480, where bfloat16 counts by twos: half a unit from key to key decides."""
    keys = np.full((1, 8, 1, 64), 7.5)
    keys[0, :, 0, :16] += np.arange(8)[:, None] / 32
    q, k = jnp.full((1, 1, 1, 64), 1.0, LOW), jnp.asarray(keys, LOW)
    v = jnp.asarray(RNG.standard_normal((1, 8, 1, 64)), LOW)
    weights = 2.0 ** (0.5 * np.arange(8))
    expected = weights / weights.sum() @ np.asarray(v, np.float64)[0, :, 0]
    assert error(attend(q, k, v)[0, 0, 0], expected) < 5e-3
    assert error(low_attend(q, k, v)[0, 0, 0], expected) > 0.05


def test_rotary_positions_far_out():
    """Of 1024 frames, against complex numbers in float64; with rounded tables 100 times off."""
    size = 12
    pairs = size - 2 * (2 * (size // 6))
    rope = rope_table((1024, 1, 1), size)
    x = jnp.asarray(RNG.standard_normal((1, 1024, 1, size)), WIDE)
    turned = np.asarray(rotate(x, rope), np.float64)[0, :, 0, :pairs]
    place = np.arange(1024)[:, None] * 10_000.0 ** (-np.arange(0, pairs, 2) / pairs)
    whole = np.asarray(x, np.float64)[0, :, 0, :pairs]
    expected = (whole[:, ::2] + 1j * whole[:, 1::2]) * np.exp(1j * place)
    assert error(turned[:, ::2], expected.real) < 1e-6
    low = rotate(x, tuple(t.astype(LOW).astype(WIDE) for t in rope))
    assert error(np.asarray(low)[0, :, 0, :pairs:2], expected.real) > 1e-4


def test_variance_of_estimates_that_hardly_waver():
    """Deviations of 0.01 about 8, where bfloat16 counts by 1/32."""
    estimates = (8 + 0.01 * RNG.standard_normal((5, 1, 2, 4, 6, 4))).astype(np.float32)
    expected = estimates.astype(np.float64).var(axis=0, ddof=1).mean()
    everywhere = jnp.ones((1, 2, 4, 6), bool)

    def statistic(push):
        window = lock.X0Window.zeros(5, (1, 2, 4, 6, 4))
        for x0 in estimates:
            window = push(window, jnp.asarray(x0))
        return float(lock.hallucination(window, everywhere)[0])

    assert statistic(lock.push) == pytest.approx(expected, rel=1e-4)
    assert statistic(low_push) != pytest.approx(expected, rel=0.2)


def test_small_steps_are_not_lost():
    """The first of 50 at shift 16 are 1e-3 long, a quarter of bfloat16's unit below 1."""
    table = solvers.euler(50, 16.0)
    noise, clean = RNG.standard_normal((2, 1, 2, 4, 6, 4)).astype(np.float32)

    def low(row, state, latents, x0):
        a, b = row.predictor[:2].astype(LOW)
        return (a * latents.astype(LOW) + b * x0.astype(LOW)).astype(WIDE), state

    def run(step):
        z = jnp.asarray(noise)
        state = solvers.init(z)
        for k in range(10):
            row = jax.tree.map(lambda column, k=k: jnp.asarray(column[k]), table)
            z, state = step(row, state, z, jnp.asarray(clean))
        return z - noise

    moved = (1 - np.float64(table.sigma_next[9])) * (clean - noise.astype(np.float64))
    assert error(run(solvers.step), moved) < 1e-4
    assert error(run(low), moved) > 0.1


def test_projection_over_many_elements():
    """`s*` sums a million products at full size; 24,576 here, where bfloat16 stops counting."""
    v = (1 + 0.1 * RNG.standard_normal((2, 1, 3, 32, 64, 4))).astype(np.float32)
    cond, uncond = v.astype(np.float64)
    region = jnp.ones((1, 3, 32, 64), bool)
    found = lock.projection_scale(jnp.asarray(v[0], LOW), jnp.asarray(v[1], LOW), region)
    assert found.dtype == WIDE
    assert float(found[0]) == pytest.approx((cond * uncond).sum() / (uncond**2).sum(), rel=1e-3)
