"""The baseline ProEdit in the loop, beside the same steps in NumPy (METHOD.md section 10)."""

import dataclasses

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from kvlock_jax import lock
from kvlock_jax.sampling import solvers

FIRST = 5


def settings_of(**changes):
    return dataclasses.replace(lock.preset("proedit", loops.OMEGA), injected_steps=FIRST, **changes)


def by_hand(model, edits, i, settings, table, omega):
    """One edit in float64: Euler's steps, the first ones with the source's keys and values."""
    weights = {n: np.asarray(getattr(model, n), np.float64) for n in ("keys", "values", "out")}
    source, noise = (loops.whole(x)[i].astype(np.float64) for x in (edits.source, edits.noise))
    cells = np.repeat(loops.whole(edits.foreground)[i], loops.C, axis=-1)
    inside = loops.np_tokens(cells).any(axis=1)[:, None]
    texts = (edits.prompts[2 * i], edits.prompts[2 * i + 1], edits.source_prompts[i])
    cond, uncond, original = (np.tanh(np.asarray(x, np.float64)) for x in texts)
    z = noise
    for k, (sigma, after) in enumerate(zip(table.sigma, table.sigma_next, strict=True)):
        sigma, after = float(sigma), float(after)
        share = np.zeros_like(inside, float)
        if k < settings.injected_steps:
            share = np.where(inside, settings.foreground_ratio, 1.0)
        seen = (1 - sigma) * source + sigma * noise
        cached = loops.np_keys_values(weights, seen, sigma, original)
        # Every token counts as background to the shared oracle, so the share is per token.
        args = (cached, np.zeros(len(inside), bool), share)
        v = [velocity(weights, z, sigma, text, *args) for text in (cond, uncond)]
        z = z + (after - sigma) * (v[1] + omega * (v[0] - v[1]))
    return z


def velocity(weights, z, level, text, cached, edited, share):
    own = loops.np_keys_values(weights, z, level, text)
    total = np.tanh(text)
    for layer in range(loops.LAYERS):
        k, v = ((1 - share) * n[layer] + share * o[layer] for n, o in zip(own, cached, strict=True))
        total = total + (k * v).mean(axis=0)
    rows = np.tanh(loops.np_tokens(z) @ weights["out"] + total)
    return loops.whole(loops.to_cells(jnp.asarray(rows, jnp.float32)))[0].astype(np.float64)


@pytest.mark.parametrize("cache", ["fused", "carried"])
def test_a_run_is_its_steps_in_numpy(cache):
    settings, model, edits = settings_of(cache=cache), loops.make_fake(), loops.make_edits()
    table = solvers.euler(loops.STEPS, loops.SHIFT)
    latents, trace = loops.run(model, edits, settings, table)
    for i in range(loops.EDITS):
        wanted = by_hand(model, edits, i, settings, table, loops.OMEGA)
        np.testing.assert_allclose(loops.whole(latents)[i], wanted, rtol=2e-5, atol=2e-5)
    alpha = np.asarray(trace.fusion_ratio)
    np.testing.assert_array_equal(alpha, np.arange(loops.STEPS)[:, None] < FIRST + 0 * alpha)


def test_the_source_runs_in_the_injected_steps_alone():
    passes = []
    model = loops.make_fake(on_source=passes.append)
    jax.block_until_ready(loops.run(model, loops.make_edits(), settings_of()))
    jax.effects_barrier()
    assert len(passes) == FIRST


def test_the_share_in_the_foreground_counts():
    model, edits = loops.make_fake(), loops.make_edits()
    mixed, kept = (
        loops.run(model, edits, settings_of(foreground_ratio=beta))[0] for beta in (0.1, 0.0)
    )
    assert np.abs(mixed - kept).max() > 1e-4


def test_a_mixed_foreground_needs_the_full_pass():
    firm = lock.preset("hard_lock", 5.0)
    first = dataclasses.replace(firm, injected_steps=3)
    assert lock.passes(firm) == lock.passes(first) == ("foreground",)
    mixed = dataclasses.replace(first, foreground_ratio=0.1)
    assert lock.passes(mixed) == ("full", "foreground")
    assert lock.passes(lock.preset("proedit", 5.0)) == ("plain", "full")
    without = dataclasses.replace(lock.preset("proedit", 5.0), injected_steps=0)
    assert lock.passes(without) == ("plain",)
    assert lock.passes(dataclasses.replace(mixed, enabled=False)) == ("plain",)
